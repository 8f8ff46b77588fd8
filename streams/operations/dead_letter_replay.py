"""List dead letters, and send refused records again once the reason is gone.

A replay is exactly-once: the record and its replay mark (a record of `dead-letters` under the same
key, header `replayed`) go into Kafka in one transaction. The transactional id belongs to the
namespace, so a second command fences the first, and a killed command leaves nothing behind. The
reasons are in docs/adr/0005-lists-merges-and-dead-letters.md.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import msgspec
from kafka import KafkaProducer
from kafka.errors import KafkaError

from eddyline.errors import EddylineError, Rejected, SettingsError
from eddyline.kafka import clients, producers, reading, topics
from eddyline.schema import events, validation
from eddyline.schema.erasure import erased_after
from eddyline.schema.events import Click, Merge, UserProfile
from eddyline.schema.id_form import key_in_form
from eddyline.schema.mapping.mapper import REPLAYED_FROM
from eddyline.schema.partitioning import user_slot
from eddyline.schema.records import BuiltRecord, mark_of
from eddyline.settings.loader import Settings
from eddyline.stores.redis import RedisStore
from eddyline.stores.state_store import Source, StateStore, UserQuery
from streams.dead_letters import FORWARD_BYTES_MAX, HEADER_PREFIX, record_bytes
from streams.operations import batch_skips
from streams.records import appended_after, coordinates

# A scan keeps one digest of each letter, to recognise repeats and marks: about 200 MB at most.
SCAN_RECORDS_MAX = 2_000_000
# `topic/partition/offset`. Any producer may write to the topic; other keys are no letters.
_COORDINATES = re.compile(r"[^/]+/[0-9]{1,9}/[0-9]{1,18}")
_MILLISECONDS = re.compile(r"[0-9]{1,15}")
# Letters in one transaction.
BATCH_LETTERS = 100
# Kafka aborts the transaction of a killed command after this time; readers wait until then.
_TRANSACTION_TIMEOUT_MS = 15_000


@dataclass(frozen=True, slots=True)
class Letter:
    """One dead letter.

    at:           `topic/partition/offset` of the refused record
    key, value:   as they were sent, None for null
    headers:      of the refused record, where its topic has a map
    timestamp_ms: append time of the refused record
    first_ms:     append time of the record that it was forwarded or replayed from
    offset:       of the letter itself, in `dead-letters`
    """

    at: str
    reason: str
    field: str
    detail: str
    key: bytes | None
    value: bytes | None
    timestamp_ms: int
    first_ms: int
    offset: int
    headers: tuple[tuple[str, bytes], ...] = ()

    @property
    def partition(self) -> int:
        """The refused record's partition."""
        return self.source[1]

    @property
    def source(self) -> tuple[str, int, int]:
        """(real topic name, partition, offset) of the refused record."""
        topic, partition, offset = self.at.rsplit("/", 2)
        return topic, int(partition), int(offset)


@dataclass(slots=True)
class Summary:
    """What `dead-letters` holds. Counts are of distinct refused records.

    letters:        the newest ones that match, oldest first
    reasons:        count by reason
    replayed:       `at` of the replayed ones among `letters`
    replayed_count: of all letters
    skipped:        records of the topic that are too old to be scanned (`SCAN_RECORDS_MAX`)
    """

    letters: list[Letter] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    replayed: set[str] = field(default_factory=set)
    replayed_count: int = 0
    skipped: int = 0


@dataclass(slots=True)
class ReplayReport:
    """The result of a replay. sent: `at` of sent letters; not_sent: `at` → reason."""

    sent: list[str] = field(default_factory=list)
    not_sent: dict[str, str] = field(default_factory=dict)


class _Scan:
    """One pass over `dead-letters`: the distinct letters, and which of them were replayed."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._seen: set[bytes] = set()
        self._replayed: set[bytes] = set()
        self.skipped = 0

    def read(self) -> Iterator[Letter]:
        """The first letter of every refused record.

        The marks are complete at the end of the pass.
        """
        name = topics.DEAD_LETTERS
        begins = topics.beginning_offsets(self._settings, name)
        ends = topics.end_offsets(self._settings, name)
        starts = {p: max(begin, ends[p] - SCAN_RECORDS_MAX) for p, begin in begins.items()}
        self.skipped = sum(starts.values()) - sum(begins.values())
        for record in reading.read(self._settings, name, starts):
            headers, key = dict(record.headers), (record.key or b"").decode("utf-8", "replace")
            if "replayed" in headers:
                self._replayed.add(_digest(key))
            elif _COORDINATES.fullmatch(key) and _digest(key) not in self._seen:
                self._seen.add(_digest(key))
                yield _letter(key, headers, record)

    def replayed(self, at: str) -> bool:
        """Whether a mark says that this record was replayed."""
        return _digest(at) in self._replayed

    def refused(self, at: str) -> bool:
        """Whether this record has a letter and no mark."""
        return _digest(at) in self._seen and not self.replayed(at)

    @property
    def replayed_count(self) -> int:
        """How many of the letters were replayed."""
        return len(self._seen & self._replayed)


def summary(settings: Settings, *, reason: str = "", limit: int = 20) -> Summary:
    """The newest `limit` letters (of one reason), and counts of all. Raises KafkaUnavailable."""
    scan, found = _Scan(settings), Summary()
    for letter in scan.read():
        found.reasons[letter.reason] += 1
        if not reason or letter.reason == reason:
            found.letters.append(letter)
            del found.letters[:-limit]
    found.replayed = {letter.at for letter in found.letters if scan.replayed(letter.at)}
    found.replayed_count, found.skipped = scan.replayed_count, scan.skipped
    return found


def find(settings: Settings, at: str) -> tuple[Letter, bool]:
    """(the letter of a refused record, whether it was replayed). Raises SettingsError if none."""
    scan, found = _Scan(settings), None
    for letter in scan.read():
        if letter.at == at:
            found = letter
    if found is None:
        raise SettingsError(
            f"dead-letters has no record {at!r}: `eddyline dead-letters list` shows them"
        )
    return found, scan.replayed(at)


def replay(
    settings: Settings, *, at: str = "", reason: str = "", limit: int = 1_000
) -> ReplayReport:
    """Send refused records again, under their own keys, each at most once.

    at: one record, `topic/partition/offset`; else the oldest `limit` of a reason without a mark
    Does not send a record that the codec would refuse again, nor an item or profile of which a
    newer one exists, nor a record of a user who was forgotten after its first append. Raises
    KafkaUnavailable, StoreUnavailable, and EddylineError if another replay took over.
    """
    store = RedisStore(settings)
    try:
        return _replay_all(settings, store, at, reason, limit)
    finally:
        store.close()


def _replay_all(
    settings: Settings, store: StateStore, at: str, reason: str, limit: int
) -> ReplayReport:
    producer = producers.make_producer(
        settings,
        transactional_id=settings.prefixed("eddyline-dead-letters"),
        transaction_timeout_ms=_TRANSACTION_TIMEOUT_MS,
        max_request_size=topics.DEAD_LETTER_BYTES_MAX,
    )
    report = ReplayReport()
    try:
        # First, so that the transaction of a killed command is aborted or readable.
        producers.in_time(settings, producer.init_transactions)
        marks = _marks(settings)
        due = _due(settings, marks, at, reason, limit)
        while batch := list(islice(due, BATCH_LETTERS)):
            _replay(settings, store, producer, marks, batch, report)
    except KafkaError as error:
        # kafka-python wraps the error of a send that follows the one that was fenced.
        text = f"{type(error).__name__} {error}"
        if "Fenced" in text or "InvalidProducerEpoch" in text:
            raise EddylineError(
                "another replay has begun; this one stopped, nothing is sent twice"
            ) from None
        raise clients.translate_error(settings, error) from None
    finally:
        producer.close(timeout=1)
    if at and not (report.sent or report.not_sent):
        report.not_sent[at] = (
            "replayed before" if marks.replayed(at) else "dead-letters has no such record"
        )
    return report


def _marks(settings: Settings) -> _Scan:
    """A complete scan. Raises EddylineError if the topic is too long for one."""
    marks = _Scan(settings)
    for _ in marks.read():
        pass
    if marks.skipped:
        raise EddylineError(
            f"dead-letters has {marks.skipped:,} records more than a replay can scan, so it is "
            "unknown whether they were replayed; let retention remove them "
            "(dead_letters_retention_h)"
        )
    return marks


def _due(settings: Settings, marks: _Scan, at: str, reason: str, limit: int) -> Iterator[Letter]:
    """The letters to replay, oldest first."""
    due = (
        letter
        for letter in _Scan(settings).read()
        if marks.refused(letter.at) and (letter.at == at if at else letter.reason == reason)
    )
    return islice(due, limit)


def _replay(
    settings: Settings,
    store: StateStore,
    producer: KafkaProducer,
    marks: _Scan,
    batch: Sequence[Letter],
    report: ReplayReport,
) -> None:
    """Send the letters of a batch that are still valid and the newest of their key."""
    valid = []
    for letter in batch:
        try:
            value, _ = checked(settings, letter)
            headers = [*letter.headers, *_headers(letter)]
            size = record_bytes(letter.key, value or b"", headers)
            if size > FORWARD_BYTES_MAX:
                raise Rejected("too_large", "", f"has {size:,} bytes as a record")
            valid.append(letter)
        except Rejected as rejected:
            report.not_sent[letter.at] = str(rejected)
    forgotten = forgotten_since(settings, store, valid)
    report.not_sent |= dict.fromkeys(forgotten, "its user was forgotten since")
    valid = [letter for letter in valid if letter.at not in forgotten]
    newer = newer_than(settings, valid, marks)
    report.not_sent |= dict.fromkeys(newer, "there is a newer one under this key by now")
    valid = [letter for letter in valid if letter.at not in newer]
    if valid:
        report.sent += _send_fitting(settings, producer, valid, report)


def checked(settings: Settings, letter: Letter) -> tuple[bytes | None, int]:
    """(the value to send, its partition). Raises Rejected as ingest would today.

    A record that a map makes events of is sent as it was, to its own partition.
    """
    topic = letter.source[0]
    if letter.reason == batch_skips.REASON:
        raise Rejected(letter.reason, "", "the letter holds a batch that cannot be read")
    names = {settings.prefixed(name): name for name in topics.SOURCES}
    if topic not in names:
        raise Rejected("other_topic", "", f"{events.quote(topic)} is no topic of this namespace")
    found = validation.unsent_record(settings, names[topic], _sent_anew(letter))
    if not found:
        raise Rejected("ignored", "", "the map makes no event of it")
    if _is_mapped(settings, names[topic], letter):
        return letter.value, letter.partition
    [(event, partition)] = found
    if isinstance(event, Click) and event.event_id is None:
        # The coordinates are the id, as for a click that is forwarded.
        return events.encode(msgspec.structs.replace(event, event_id=letter.at)), partition
    return letter.value, partition


def _sent_anew(letter: Letter) -> BuiltRecord:
    """The record that a replay sends."""
    headers = [*letter.headers, *_headers(letter)]
    topic, partition, offset = letter.source
    return BuiltRecord(
        topic, partition, offset, letter.timestamp_ms, letter.key, letter.value, headers
    )


def _is_mapped(settings: Settings, name: str, letter: Letter) -> bool:
    return validation.map_of(settings, name) is not None and mark_of(letter.headers) is None


def forgotten_since(settings: Settings, store: StateStore, letters: Sequence[Letter]) -> set[str]:
    """The letters (`at`) that an erasure of their user covers: ingest would drop them.

    Of a letter with several events: if it covers all of them. Raises StoreUnavailable.
    """
    names = {settings.prefixed(name): name for name in (topics.CLICKS, topics.USERS)}
    of_users: list[tuple[Letter, Click | Merge | UserProfile]] = []
    queries: list[UserQuery] = []
    others: set[str] = set()
    for letter in letters:
        if (name := names.get(letter.source[0])) is None:
            continue
        for event, partition in validation.unsent_record(settings, name, _sent_anew(letter)):
            if isinstance(event, Click | Merge | UserProfile):
                slot, source = user_slot(partition), Source(topics.CLICKS, partition)
                of_users.append((letter, event))
                queries.append(UserQuery(slot, source, [event.user_id], []))
            else:
                others.add(letter.at)  # it deletes: it may be replayed
    if not queries:
        return set()
    now_ms, found = producers.now_ms(), set[str]()
    for (letter, event), read in zip(of_users, store.read_many(queries), strict=True):
        erasure = read.erasures.get(event.user_id)
        if erasure is None:
            covered = False
        elif isinstance(event, UserProfile):
            # Of one millisecond the order is unknown; an erased profile must not come back.
            covered = letter.first_ms <= erasure.until_ms
        else:
            covered = erased_after(erasure, event.at_ms, now_ms, letter.first_ms)
        (found if covered else others).add(letter.at)
    return found - others


def newer_than(settings: Settings, letters: Sequence[Letter], marks: _Scan) -> set[str]:
    """The letters (`at`) whose key has a newer item or profile, which must not be overwritten."""
    newer: set[str] = set()
    for name in (topics.ITEMS, topics.USERS):
        topic = settings.prefixed(name)
        by_key: dict[bytes, list[Letter]] = {}
        for letter in letters:
            if letter.source[0] == topic and letter.key is not None:
                key = key_in_form(letter.key, settings.id_form)
                by_key.setdefault(key, []).append(letter)
        if not by_key:
            continue
        since_ms = min(letter.first_ms for group in by_key.values() for letter in group)
        partitions = {checked(settings, group[0])[1] for group in by_key.values()}
        starts = reading.offsets_at(settings, name, partitions, since_ms)
        for record in reading.read(settings, name, starts):
            at = coordinates(record)
            for letter in by_key.get(key_in_form(record.key, settings.id_form), ()):
                if _after(letter, record) and not marks.refused(at):
                    newer.add(letter.at)
    return newer


def _after(letter: Letter, record: Any) -> bool:
    """Whether the record came after the refused one: by offset, or by time across partitions.

    By time also where the refused one was itself a replay: its offset says nothing then.
    """
    _, partition, offset = letter.source
    first_ms = events.first_append_ms(record)
    again = record.partition == partition and appended_after(record) == offset
    if first_ms < letter.first_ms or (again and first_ms == letter.first_ms):
        return False  # an older state, appended again after the refused record
    if record.partition == partition and letter.first_ms == letter.timestamp_ms:
        return bool(record.offset > offset)
    return bool(record.timestamp >= letter.first_ms) and coordinates(record) != letter.at


def _send_fitting(
    settings: Settings, producer: KafkaProducer, batch: Sequence[Letter], report: ReplayReport
) -> list[str]:
    """Send the letters, without those whose topic takes less; returns what was sent."""
    try:
        producers.in_time(settings, lambda: _send(settings, producer, batch))
    except KafkaError as error:
        if not clients.is_too_large(error):
            raise
        producers.in_time(settings, producer.abort_transaction)
        if len(batch) > 1:  # one by one: the error does not name the record
            found = (_send_fitting(settings, producer, [letter], report) for letter in batch)
            return [at for sent in found for at in sent]
        size = record_bytes(batch[0].key, batch[0].value or b"", _headers(batch[0]))
        report.not_sent[batch[0].at] = (
            f"has {size:,} bytes as a record, which its topic does not take: raise "
            "max.message.bytes"
        )
        return []
    return [letter.at for letter in batch]


def _send(settings: Settings, producer: KafkaProducer, batch: Sequence[Letter]) -> None:
    """Send the records, each with its mark, in one transaction."""
    producer.begin_transaction()
    letters = settings.prefixed(topics.DEAD_LETTERS)
    for letter in batch:
        value, partition = checked(settings, letter)
        name, headers = letter.source[0], [*letter.headers, *_headers(letter)]
        producer.send(name, value, key=letter.key, partition=partition, headers=headers)
        producer.send(letters, b"", key=letter.at.encode(), headers=[("replayed", b"1")])
    producer.commit_transaction()


def _headers(letter: Letter) -> list[tuple[str, bytes]]:
    """Of the record that is sent."""
    first_ms = str(letter.first_ms).encode()
    return [(REPLAYED_FROM, letter.at.encode()), (events.ORIGIN_MS, first_ms)]


def _digest(at: str) -> bytes:
    return hashlib.blake2b(at.encode(), digest_size=16).digest()


def _letter(at: str, headers: Mapping[str, bytes], record: Any) -> Letter:
    def text(name: str) -> str:
        return (headers.get(name) or b"").decode("utf-8", "replace")

    stamp, origin_ms = text("timestamp_ms"), events.origin_ms(record.headers)
    timestamp_ms = int(stamp) if _MILLISECONDS.fullmatch(stamp) else int(record.timestamp)
    return Letter(
        at=at,
        reason=text("reason"),
        field=text("field"),
        detail=text("detail"),
        key=headers.get("key"),
        value=None if "no_value" in headers else bytes(record.value or b""),
        timestamp_ms=timestamp_ms,
        first_ms=timestamp_ms if origin_ms is None else min(origin_ms, timestamp_ms),
        offset=record.offset,
        headers=tuple(
            (name.removeprefix(HEADER_PREFIX), value)
            for name, value in record.headers
            if name.startswith(HEADER_PREFIX) and value is not None
        ),
    )
