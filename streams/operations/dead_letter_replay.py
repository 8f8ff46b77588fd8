"""`eddyline dead-letters`: what was refused and why, and sending it again once the reason is gone.

A replay is exactly-once: the record and the mark "this letter was replayed" (a record of `dead-letters`
itself, under the same key, header `replayed`) go into Kafka in one transaction. Its transactional id belongs
to the namespace, so a second command fences the first, and one that was killed half-way leaves nothing
behind. The reasons are in docs/adr/0005-lists-merges-and-dead-letters.md.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from kafka import KafkaProducer
from kafka.errors import KafkaError

from eddyline.errors import EddylineError, Rejected, SettingsError
from eddyline.kafka import clients, producers, reading, topics
from eddyline.schema import events, validation
from eddyline.schema.events import Click
from eddyline.settings.loader import Settings

# One digest is kept of each letter, to tell repeats and marks: at most some 200 MB.
SCAN_RECORDS_MAX = 2_000_000
# So many letters go in one transaction: all of them or none.
BATCH_LETTERS = 100
# Kafka aborts the transaction of a killed command after this time; readers wait for it that long.
_TRANSACTION_TIMEOUT_MS = 15_000


@dataclass(frozen=True, slots=True)
class Letter:
    """One dead letter. key, value: as they were sent, None for null.

    at:           `topic/partition/offset` of the refused record
    timestamp_ms: when the broker got that record
    offset:       the letter's own, in `dead-letters`
    """

    at: str
    reason: str
    field: str
    detail: str
    key: bytes | None
    value: bytes | None
    timestamp_ms: int
    offset: int

    @property
    def source(self) -> tuple[str, int, int]:
        """(real topic name, partition, offset) of the refused record."""
        topic, partition, offset = self.at.rsplit("/", 2)
        return topic, int(partition), int(offset)


@dataclass(slots=True)
class Summary:
    """What `dead-letters` holds. Counts are of distinct refused records.

    letters:  the newest ones that were asked for, oldest first
    reasons:  how many there are of each reason; replayed: how many of all were sent again
    skipped:  records of the topic that were too old to be looked at (`SCAN_RECORDS_MAX`)
    """

    letters: list[Letter] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    replayed: set[str] = field(default_factory=set)
    replayed_count: int = 0
    skipped: int = 0


@dataclass(slots=True)
class Replayed:
    """What became of a replay: letters that were sent, and `at` → why the others were not."""

    sent: list[str] = field(default_factory=list)
    kept_back: dict[str, str] = field(default_factory=dict)


class _Ledger:
    """Reads `dead-letters` from its beginning to its end: distinct letters, and which were replayed."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._seen: set[bytes] = set()
        self._replayed: set[bytes] = set()
        self.skipped = 0

    def read(self) -> Iterator[Letter]:
        """Every letter that is the first one of its record. Marks are known once this is at its end."""
        name = topics.DEAD_LETTERS
        begins = topics.beginning_offsets(self._settings, name)
        ends = topics.end_offsets(self._settings, name)
        starts = {p: max(begin, ends[p] - SCAN_RECORDS_MAX) for p, begin in begins.items()}
        self.skipped = sum(starts.values()) - sum(begins.values())
        for record in reading.read(self._settings, name, starts):
            headers, key = dict(record.headers), (record.key or b"").decode("utf-8", "replace")
            if "replayed" in headers:
                self._replayed.add(_digest(key))
            elif key.count("/") >= 2 and _digest(key) not in self._seen:
                self._seen.add(_digest(key))
                yield _letter(key, headers, record)

    def replayed(self, at: str) -> bool:
        """Whether a mark says that this record was sent again."""
        return _digest(at) in self._replayed

    def refused(self, at: str) -> bool:
        """Whether this record lies in `dead-letters`, and there alone."""
        return _digest(at) in self._seen and not self.replayed(at)

    @property
    def replayed_count(self) -> int:
        """How many of the letters were replayed."""
        return len(self._seen & self._replayed)


def summary(settings: Settings, *, reason: str = "", limit: int = 20) -> Summary:
    """The newest `limit` letters (of one reason), and counts of all. Raises KafkaUnavailable."""
    ledger, found = _Ledger(settings), Summary()
    for letter in ledger.read():
        found.reasons[letter.reason] += 1
        if not reason or letter.reason == reason:
            found.letters.append(letter)
            del found.letters[:-limit]
    found.replayed = {letter.at for letter in found.letters if ledger.replayed(letter.at)}
    found.replayed_count, found.skipped = ledger.replayed_count, ledger.skipped
    return found


def find(settings: Settings, at: str) -> tuple[Letter, bool]:
    """(the letter of one refused record, whether it was replayed). Raises SettingsError for none."""
    ledger, found = _Ledger(settings), None
    for letter in ledger.read():
        if letter.at == at:
            found = letter
    if found is None:
        raise SettingsError(
            f"dead-letters has no record {at!r}: `eddyline dead-letters list` shows them"
        )
    return found, ledger.replayed(at)


def replay(settings: Settings, *, at: str = "", reason: str = "", limit: int = 1_000) -> Replayed:
    """Send refused records again, under their own key, each at most once whatever happens.

    at: one record, `topic/partition/offset`; else the oldest `limit` of a reason that were not replayed yet
    A record that the codec would refuse again stays, and so does an item or a profile of which there is a
    newer one by now. Raises KafkaUnavailable, and EddylineError where another replay took over.
    """
    producer = producers.make_producer(
        settings,
        transactional_id=settings.prefixed("eddyline-dead-letters"),
        transaction_timeout_ms=_TRANSACTION_TIMEOUT_MS,
        max_request_size=topics.DEAD_LETTER_BYTES_MAX,
    )
    done = Replayed()
    try:
        # First: what a killed command left open is aborted, and what it committed can be read.
        producers.in_time(settings, producer.init_transactions)
        marks = _marks(settings)
        due: list[Letter] = []
        for letter in _due(settings, marks, at, reason, limit):
            due.append(letter)
            if len(due) == BATCH_LETTERS:
                _replay(settings, producer, marks, due, done)
                due = []
        _replay(settings, producer, marks, due, done)
    except KafkaError as error:
        # kafka-python wraps it where the send comes after the answer that told of it.
        if any(
            sign in f"{type(error).__name__} {error}" for sign in ("Fenced", "InvalidProducerEpoch")
        ):
            raise EddylineError(
                "another replay has begun; this one stopped, nothing is sent twice"
            ) from None
        raise clients.translate_error(settings, error) from None
    finally:
        producer.close(timeout=1)
    if at and not (done.sent or done.kept_back):
        done.kept_back[at] = (
            "replayed before" if marks.replayed(at) else "dead-letters has no such record"
        )
    return done


def _marks(settings: Settings) -> _Ledger:
    """Everything that is known of what was replayed. Raises EddylineError where that is not all."""
    marks = _Ledger(settings)
    for _ in marks.read():
        pass
    if marks.skipped:
        raise EddylineError(
            f"dead-letters has {marks.skipped:,} records more than a replay can look through, so whether "
            "they were replayed cannot be told; let retention take them (dead_letters_retention_h)"
        )
    return marks


def _due(settings: Settings, marks: _Ledger, at: str, reason: str, limit: int) -> Iterator[Letter]:
    """The letters to replay, oldest first."""
    found = 0
    for letter in _Ledger(settings).read():
        if marks.refused(letter.at) and (letter.at == at if at else letter.reason == reason):
            yield letter
            found += 1
            if found == limit:
                return


def _replay(
    settings: Settings,
    producer: KafkaProducer,
    marks: _Ledger,
    due: Sequence[Letter],
    done: Replayed,
) -> None:
    """Send a batch but for what has to stay."""
    fit = [letter for letter in due if not _keep_back(settings, letter, done)]
    newer = newer_than(settings, fit, marks)
    done.kept_back |= dict.fromkeys(newer, "there is a newer one under this key by now")
    fit = [letter for letter in fit if letter.at not in newer]
    if fit:
        producers.in_time(settings, lambda: _send(settings, producer, fit))
        done.sent += [letter.at for letter in fit]


def _keep_back(settings: Settings, letter: Letter, done: Replayed) -> bool:
    """Whether the codec would refuse it again; then its reason is noted."""
    try:
        checked(settings, letter)
    except Rejected as refused:
        done.kept_back[letter.at] = str(refused)
        return True
    return False


def checked(settings: Settings, letter: Letter) -> tuple[bytes | None, int]:
    """(the value to send, the partition it belongs in). Raises Rejected as ingest would today."""
    topic = letter.source[0]
    names = {settings.prefixed(name): name for name in topics.SOURCES}
    if topic not in names:
        raise Rejected("other_topic", "", f"{events.quote(topic)} is no topic of this namespace")
    event, partition = validation.unsent(settings, names[topic], letter.key, letter.value)
    if isinstance(event, Click) and event.event_id is None:
        # The coordinates are the id, as for a click that is forwarded.
        return events.encode(msgspec.structs.replace(event, event_id=letter.at)), partition
    return letter.value, partition


def newer_than(settings: Settings, letters: Sequence[Letter], ledger: _Ledger) -> set[str]:
    """Those of the letters (`at`) whose key has got a newer item or profile, which must stand."""
    newer: set[str] = set()
    for name in (topics.ITEMS, topics.USERS):
        topic = settings.prefixed(name)
        by_key: dict[bytes, list[Letter]] = {}
        for letter in letters:
            if letter.source[0] == topic and letter.key is not None:
                by_key.setdefault(letter.key, []).append(letter)
        if not by_key:
            continue
        since_ms = min(letter.timestamp_ms for group in by_key.values() for letter in group)
        wanted = {checked(settings, group[0])[1] for group in by_key.values()}
        for record in reading.read(
            settings, name, reading.offsets_at(settings, name, wanted, since_ms)
        ):
            for letter in by_key.get(record.key or b"", ()):
                if _after(letter, record) and not ledger.refused(_at(record)):
                    newer.add(letter.at)
    return newer


def _after(letter: Letter, record: Any) -> bool:
    """Whether the record was appended after the refused one: by offset, or by time in another partition."""
    _, partition, offset = letter.source
    if record.partition == partition:
        return bool(record.offset > offset)
    return bool(record.timestamp >= letter.timestamp_ms)


def _send(settings: Settings, producer: KafkaProducer, batch: Sequence[Letter]) -> None:
    """One transaction: the records, each with its mark."""
    producer.begin_transaction()
    letters = settings.prefixed(topics.DEAD_LETTERS)
    for letter in batch:
        value, partition = checked(settings, letter)
        at = letter.at.encode()
        headers = [("replayed_from", at)]
        producer.send(letter.source[0], value, key=letter.key, partition=partition, headers=headers)
        producer.send(letters, b"", key=at, headers=[("replayed", b"1")])
    producer.commit_transaction()


def _at(record: Any) -> str:
    return f"{record.topic}/{record.partition}/{record.offset}"


def _digest(at: str) -> bytes:
    return hashlib.blake2b(at.encode(), digest_size=16).digest()


def _letter(at: str, headers: Mapping[str, bytes], record: Any) -> Letter:
    def text(name: str) -> str:
        return headers.get(name, b"").decode("utf-8", "replace")

    stamp = text("timestamp_ms")
    return Letter(
        at=at,
        reason=text("reason"),
        field=text("field"),
        detail=text("detail"),
        key=headers.get("key"),
        value=None if "no_value" in headers else bytes(record.value or b""),
        timestamp_ms=int(stamp) if stamp.isdigit() else int(record.timestamp),
        offset=record.offset,
    )
