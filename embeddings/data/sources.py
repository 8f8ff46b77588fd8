"""The trainer's data: Kafka topics up to their current ends, the archive and Kafka, or a file.

All sources use the kernel's validation. Rejected records are counted by reason and skipped; ingest
has already sent them to the dead letters.

The file holds JSON lines, `{"topic": "clicks" | "items" | "users", "value": {…}}`, with the value
as a producer sends it.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from types import MappingProxyType

import msgspec

from eddyline.archive import FORGETS, Archive, ArchiveUnavailable
from eddyline.errors import LogMismatch, Rejected
from eddyline.kafka import reading
from eddyline.kafka import topics as kafka_topics
from eddyline.schema import events, item_changes, validation
from eddyline.schema.answers import RecordedAnswer
from eddyline.schema.deduplication import DedupeWindow
from eddyline.schema.erasure import Erasure, digest, erased_after, erased_before
from eddyline.schema.events import AT_MS_MAX, Click, Forget, Item
from eddyline.schema.id_form import in_form
from eddyline.schema.partitioning import partition_of
from eddyline.schema.records import MAPPED, BuiltRecord, Record
from eddyline.schema.validation import UserEvent
from eddyline.settings.loader import Settings
from embeddings.data.examples import TrainingData

log = logging.getLogger(__name__)

# 5 million clicks take about 2 GB. Of a longer log, the newest of each partition are used.
CLICKS_MAX = 5_000_000
# A topic without a new record for so long, before its end, is not being served.
_STALL_S = 30.0

OnRead = Callable[[str, int, int], None]


def from_kafka(settings: Settings, *, on_read: OnRead | None = None) -> TrainingData:
    """The clicks, items and users up to the topics' ends at the time of the call.

    on_read: called after each fetch with (topic, offsets read, offsets in total)
    Blocks until everything is read. Raises KafkaUnavailable, also if a topic stalls for 30 s.
    """
    ends = {name: kafka_topics.end_offsets(settings, name) for name in kafka_topics.SOURCES}
    return assemble(
        settings,
        {name: _read(settings, name, ends[name], on_read) for name in kafka_topics.SOURCES},
        cut={str(p): end - 1 for p, end in ends[kafka_topics.ITEMS].items()},
    )


def from_archive(settings: Settings, *, on_read: OnRead | None = None) -> TrainingData:
    """The archive's files, and Kafka's records from their ends up to the time of the call.

    The history is as long as the archive and includes the last hour, which is in no file yet.
    Items that are patches are in no file: they come from Kafka.
    on_read: called after each fetch with (topic, offsets read from Kafka, offsets in total)
    Raises ArchiveUnavailable, KafkaUnavailable, SettingsError for a bad `archive_url`, and
    LogMismatch if the archive belongs to another log.
    """
    archive = Archive(settings)
    try:
        archived = {name: archive.ends(name) for name in kafka_topics.SOURCES}
        if validation.carries_patches(settings):
            archived[kafka_topics.ITEMS] = {}
        _check_join(settings, archive, archived)
    except OSError as error:
        raise ArchiveUnavailable(f"archive at {archive.url}: {error}") from None
    ends = {name: kafka_topics.end_offsets(settings, name) for name in kafka_topics.SOURCES}
    topics = {
        name: chain(
            _archived(archive, name, archived[name]),
            _read(settings, name, ends[name], on_read, archived[name]),
        )
        for name in kafka_topics.SOURCES
    }
    cut = {str(p): end - 1 for p, end in ends[kafka_topics.ITEMS].items()}
    erasures = _archived_erasures(archive, archived[kafka_topics.CLICKS])
    return assemble(settings, topics, cut=cut, erasures=erasures)


def _check_join(
    settings: Settings, archive: Archive, archived: Mapping[str, Mapping[int, int]]
) -> None:
    """Check that files and topics belong to one log; log the clicks that are in neither."""
    ids = kafka_topics.log_ids(settings, kafka_topics.SOURCES)
    for name in kafka_topics.SOURCES:
        # Files are ordered by offset, so the last file of each partition remains.
        newest = {file.partition: file for file in archive.files(name)}
        for partition, file in newest.items():
            if (found := archive.log_id(file)) != ids[name]:
                raise LogMismatch(
                    f"topic {settings.prefixed(name)}, partition {partition}: the archive "
                    f"{archive.url} is of {found or 'no known log'}, this is {ids[name]}; set "
                    "EDDYLINE_ARCHIVE_URL to the archive of this log, or train from the topics "
                    "alone (--no-archive)"
                )
    for partition, begin in kafka_topics.beginning_offsets(settings, kafka_topics.CLICKS).items():
        end = archived[kafka_topics.CLICKS].get(partition, -1) + 1
        if begin > end:
            log.warning(
                "clicks are neither in the archive nor in Kafka",
                extra={"partition": partition, "first": end, "last": begin - 1},
            )


def assemble(
    settings: Settings,
    topics: Mapping[str, Iterable[Record]],
    *,
    cut: Mapping[str, int],
    clicks_max: int = CLICKS_MAX,
    erasures: Mapping[str, Erasure] = MappingProxyType({}),
) -> TrainingData:
    """Training data from records; each partition's records are in the order of its log.

    cut:      partition of items, as text -> last offset that the records of items reach
    erasures: SHA-256 of a user id -> what is kept of a user whose Forget lies before the records,
              or whose earlier events are not among them
    """
    rejected: Counter[str] = Counter()
    items: dict[str, tuple[Item, int, int]] = {}
    # Item without a time -> first append of its first record.
    born: dict[str, int] = {}
    for r in topics[kafka_topics.ITEMS]:
        try:
            changes = validation.item_changes(settings, r)
        except Rejected as error:
            rejected[error.reason] += 1
            continue
        for item_id, item, own in changes:
            if not own:
                rejected["stray"] += 1  # ingest forwards it
            elif item is None:
                items.pop(item_id, None)
                born.pop(item_id, None)
            else:
                before = items[item_id][0] if item_id in items else None
                try:
                    item = item_changes.resulting(before, item, settings.refuse_emptied_items)
                    items[item_id] = (item, r.partition, r.offset)
                    if item.at_ms:
                        born.pop(item_id, None)
                    else:
                        born.setdefault(item_id, max(0, events.first_append_ms(r)))
                except Rejected as error:
                    rejected[error.reason] += 1
    profiles: dict[str, Mapping[str, object]] = {}
    for r in topics[kafka_topics.USERS]:
        try:
            found = validation.profiles(settings, r)
        except Rejected as error:
            rejected[error.reason] += 1
            continue
        for user, profile, own in found:
            if not own:
                rejected["stray"] += 1
            elif profile is None:
                profiles.pop(user, None)
            else:
                profiles[user] = profile.attributes
    clicks = _clicks(settings, topics[kafka_topics.CLICKS], clicks_max, rejected, dict(erasures))
    return TrainingData(
        items=[
            msgspec.structs.replace(item, at_ms=born[item_id]) if item_id in born else item
            for item_id, (item, _, _) in items.items()
        ],
        profiles=profiles,
        clicks=clicks,
        versions={
            item_id: (partition, offset) for item_id, (_, partition, offset) in items.items()
        },
        cut=dict(cut),
        rejected=rejected,
    )


def from_file(settings: Settings, path: Path) -> TrainingData:
    """The data of an export file. Raises Rejected for a malformed line, OSError for the file."""
    found: dict[str, list[Record]] = {name: [] for name in kafka_topics.SOURCES}
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = msgspec.json.decode(raw, type=_Line)
                value = msgspec.json.decode(line.value, type=dict[str, object])
            except msgspec.DecodeError as error:
                raise Rejected("malformed_line", f"{path}:{number}", str(error)) from None
            if line.topic not in found:
                raise Rejected("malformed_line", f"{path}:{number}", f"topic {line.topic!r}")
            items = line.topic == kafka_topics.ITEMS
            sent_id = str(value.get("item_id" if items else "user_id", ""))
            key = in_form(sent_id, settings.id_form)
            partitions = settings.items_partitions if items else settings.clicks_partitions
            found[line.topic].append(
                BuiltRecord(
                    line.topic,
                    partition_of(key, partitions),
                    number,
                    AT_MS_MAX,
                    key.encode(),
                    bytes(line.value),
                    [MAPPED],
                )
            )
    # Line numbers are not offsets of a log.
    return dataclasses.replace(assemble(settings, found, cut={}), versions={})


class _Line(msgspec.Struct):
    topic: str
    value: msgspec.Raw


def _clicks(
    settings: Settings,
    records: Iterable[Record],
    clicks_max: int,
    rejected: Counter[str],
    erasures: dict[str, Erasure],
) -> list[Click]:
    """The clicks that ingest accepts, without those that the erasure of their user covers.

    erasures: see `assemble`; gains those of the Forgets among the records
    """
    # By user: (clicks of the partition before the Forget, its bound), in the order of the log.
    boundaries: dict[str, list[tuple[int, int]]] = {}
    numbers: Counter[int] = Counter()
    newest: dict[int, deque[Click]] = {}
    windows: dict[int, DedupeWindow] = {}
    per_partition = max(1, clicks_max // settings.clicks_partitions)
    for r, event, own in _user_events(settings, records, rejected):
        if not own:
            rejected["misplaced"] += 1  # ingest forwards it to its own partition
            continue
        if r.partition not in windows:
            windows[r.partition] = DedupeWindow(settings.dedupe_window_events)
        if not windows[r.partition].accept(event.event_id, r.offset):
            rejected["re-sent"] += 1
            continue
        known = erasures.get(digest(event.user_id)) if erasures else None
        if isinstance(event, Forget):
            erasure = Erasure.of(event)
            if not erasure.repeats(known, r.timestamp):
                erasures[digest(event.user_id)] = erasure.after(known)
                boundary = (numbers[r.partition], event.bound_ms)
                boundaries.setdefault(event.user_id, []).append(boundary)
        elif erased_after(known, event.at_ms, r.timestamp, events.origin_ms(r.headers)):
            rejected["forgotten"] += 1
        elif isinstance(event, Click):
            numbers[r.partition] += 1
            event_id = event.event_id or f"{r.partition}/{r.offset}"
            click = msgspec.structs.replace(event, event_id=event_id)
            newest.setdefault(r.partition, deque(maxlen=per_partition)).append(click)
    return [
        click
        for partition in sorted(newest)
        for number, click in enumerate(
            newest[partition], numbers[partition] - len(newest[partition])
        )
        if not any(
            number < first and erased_before(bound_ms, click.at_ms)
            for first, bound_ms in boundaries.get(click.user_id, ())
        )
    ]


def _user_events(
    settings: Settings, records: Iterable[Record], rejected: Counter[str]
) -> Iterator[tuple[Record, UserEvent, bool]]:
    """(record, event, whether it lies in its user's partition) of the accepted records."""
    for record in records:
        try:
            found = validation.user_events(settings, record)
        except Rejected as error:
            rejected[error.reason] += 1
            continue
        for _, event, own in found:
            yield record, event, own


def _archived(archive: Archive, name: str, ends: Mapping[int, int]) -> Iterator[Record]:
    """The archive's events up to the offsets `ends`, as records, without forgotten users."""
    try:
        for found in archive.read(name):
            if found.key is not None and found.offset <= ends.get(found.partition, -1):
                assert not isinstance(found.event, RecordedAnswer)  # those of `answers` alone
                value = None if found.event is None else events.encode(found.event)
                place = name, found.partition, found.offset, found.appended_ms
                yield BuiltRecord(*place, found.key.encode(), value, [MAPPED])
    except (OSError, ValueError) as error:
        raise ArchiveUnavailable(f"archive at {archive.url}: {error}") from None


def _archived_erasures(archive: Archive, ends: Mapping[int, int]) -> dict[str, Erasure]:
    """What the archive keeps of forgotten users, by SHA-256 of the id.

    ends: partition -> the last offset of `clicks` that is read from the archive
    """
    kept: dict[str, Erasure] = {}
    try:
        for found in archive.read(FORGETS):
            forget, hashed = found.event, found.digest
            if found.offset > ends.get(found.partition, -1) or not isinstance(forget, Forget):
                continue
            erasure, known = Erasure.of(forget), kept.get(hashed or "")
            if not erasure.repeats(known, found.appended_ms):
                kept[hashed or ""] = erasure.after(known)
    except (OSError, ValueError) as error:
        raise ArchiveUnavailable(f"archive at {archive.url}: {error}") from None
    return kept


def _read(
    settings: Settings,
    name: str,
    ends: Mapping[int, int],
    on_read: OnRead | None,
    archived: Mapping[int, int] = MappingProxyType({}),
) -> Iterator[Record]:
    """The committed records of a topic below `ends`, without those up to the offsets `archived`."""
    starts = {partition: archived.get(partition, -1) + 1 for partition in ends}
    on_progress = (lambda done, total: None) if on_read is None else partial(on_read, name)
    return reading.read(settings, name, starts, ends, stall_s=_STALL_S, on_progress=on_progress)
