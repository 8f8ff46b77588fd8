"""Where a trainer takes its data from: the Kafka topics up to their current ends, the archive and then Kafka,
or a file of JSON lines.

All decode with the kernel's codec. Records that it rejects are counted by reason and left out; ingest has
sent them to the dead letters already.

A line of the file is `{"topic": "clicks" | "items" | "users", "value": {…}}`, with the value as a producer
sends it.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import msgspec
from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError

from eddyline.archive import Archive, ArchiveUnavailable
from eddyline.errors import KafkaUnavailable, LogMismatch, Rejected
from eddyline.kafka import clients
from eddyline.kafka import topics as kafka_topics
from eddyline.schema import events, validation
from eddyline.schema.deduplication import DedupeWindow
from eddyline.schema.events import AT_MS_MAX, Click, Forget, Item
from eddyline.schema.partitioning import partition_of
from eddyline.settings.loader import Settings
from embeddings.data.examples import TrainingData

log = logging.getLogger(__name__)

# 5 million clicks take about 2 GB here; of a longer log the newest of each partition are kept.
CLICKS_MAX = 5_000_000
# A topic that gives no record for so long, before its end, is not being served.
_STALLED_S = 30.0

OnRead = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """One record of a topic; appended_ms is the broker's time stamp."""

    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    appended_ms: int


def from_kafka(
    settings: Settings, *, clicks_max: int = CLICKS_MAX, on_read: OnRead | None = None
) -> TrainingData:
    """Everything in clicks, items and users up to their ends at the time of the call.

    on_read: called with (topic, records read, records there are), now and then
    Raises KafkaUnavailable. Blocks until all is read; a topic that stalls for 30 s raises.
    """
    ends = {name: kafka_topics.end_offsets(settings, name) for name in kafka_topics.SOURCES}
    return assemble(
        settings,
        {name: _read(settings, name, ends[name], on_read) for name in kafka_topics.SOURCES},
        cut={str(p): end - 1 for p, end in ends[kafka_topics.ITEMS].items()},
        clicks_max=clicks_max,
    )


def from_archive(
    settings: Settings, *, clicks_max: int = CLICKS_MAX, on_read: OnRead | None = None
) -> TrainingData:
    """Everything in the archive's files, and from their ends on what Kafka has up to now.

    So history is as long as the archive, and the last hour, which is in no file yet, is there as well.
    on_read: called with (topic, records read from Kafka, records there are), now and then
    Raises ArchiveUnavailable, KafkaUnavailable, SettingsError for a bad `archive_url`, and LogMismatch for an
    archive of another log: the two do not join, and versions of items would be of the wrong one.
    """
    archive = Archive(settings)
    try:
        archived = {name: archive.ends(name) for name in kafka_topics.SOURCES}
        _join(settings, archive, archived)
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
    return assemble(settings, topics, cut=cut, clicks_max=clicks_max)


def _join(settings: Settings, archive: Archive, archived: Mapping[str, Mapping[int, int]]) -> None:
    """Check that the topics go on where the files end; say which clicks are in neither."""
    ids = kafka_topics.log_ids(settings, kafka_topics.SOURCES)
    for name in kafka_topics.SOURCES:
        last = {
            file.partition: file for file in archive.files(name)
        }  # by offset, so the last one stays
        for partition, file in last.items():
            if (found := archive.log_id(file)) != ids[name]:
                raise LogMismatch(
                    f"topic {settings.prefixed(name)}, partition {partition}: the archive {archive.url} is "
                    f"of {found or 'no known log'}, this is {ids[name]}; set EDDYLINE_ARCHIVE_URL to the "
                    "archive of this log, or train from the topics alone (--no-archive)"
                )
    for partition, begin in kafka_topics.beginning_offsets(settings, kafka_topics.CLICKS).items():
        end = archived[kafka_topics.CLICKS].get(partition, -1) + 1
        if begin > end:
            log.warning(
                "clicks are neither in the archive nor in Kafka any more",
                extra={"partition": partition, "first": end, "last": begin - 1},
            )


def assemble(
    settings: Settings,
    topics: Mapping[str, Iterable[SourceRecord]],
    *,
    cut: Mapping[str, int],
    clicks_max: int = CLICKS_MAX,
) -> TrainingData:
    """Training data from records, each topic's in the order of its partitions.

    cut: partition of items, as text -> the last offset that the records of items reach
    """
    rejected: Counter[str] = Counter()
    items: dict[str, tuple[Item, int, int]] = {}
    for r in topics[kafka_topics.ITEMS]:
        try:
            item_id, item = validation.item(settings, r.partition, r.key, r.value, r.appended_ms)
        except Rejected as error:
            rejected[error.reason] += 1
            continue
        if item is None:
            items.pop(item_id, None)
        else:
            items[item_id] = (item, r.partition, r.offset)
    profiles: dict[str, Mapping[str, object]] = {}
    for r in topics[kafka_topics.USERS]:
        try:
            user, profile = validation.profile(settings, r.partition, r.key, r.value, r.appended_ms)
        except Rejected as error:
            rejected[error.reason] += 1
            continue
        if profile is None:
            profiles.pop(user, None)
        else:
            profiles[user] = profile.attributes
    clicks = _clicks(settings, topics[kafka_topics.CLICKS], clicks_max, rejected)
    return TrainingData(
        items=[item for item, _, _ in items.values()],
        profiles=profiles,
        clicks=clicks,
        versions={
            item_id: (partition, offset) for item_id, (_, partition, offset) in items.items()
        },
        cut=dict(cut),
        rejected=rejected,
    )


def from_file(settings: Settings, path: Path) -> TrainingData:
    """The data of an export file. Raises Rejected for a line that is none, OSError for the file."""
    found: dict[str, list[SourceRecord]] = {name: [] for name in kafka_topics.SOURCES}
    ids = {
        kafka_topics.CLICKS: "user_id",
        kafka_topics.ITEMS: "item_id",
        kafka_topics.USERS: "user_id",
    }
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = msgspec.json.decode(raw, type=_Line)
                key = msgspec.json.decode(line.value, type=dict[str, object]).get(
                    ids.get(line.topic, ""), ""
                )
            except msgspec.DecodeError as error:
                raise Rejected("malformed_line", f"{path}:{number}", str(error)) from None
            if line.topic not in found:
                raise Rejected("malformed_line", f"{path}:{number}", f"topic {line.topic!r}")
            items = line.topic == kafka_topics.ITEMS
            partitions = settings.items_partitions if items else settings.clicks_partitions
            partition = partition_of(str(key), partitions)
            record = SourceRecord(
                partition, number, str(key).encode(), bytes(line.value), AT_MS_MAX
            )
            found[line.topic].append(record)
    data = assemble(settings, found, cut={})
    return TrainingData(data.items, data.profiles, data.clicks, rejected=data.rejected)


class _Line(msgspec.Struct):
    topic: str
    value: msgspec.Raw


def _clicks(
    settings: Settings, records: Iterable[SourceRecord], clicks_max: int, rejected: Counter[str]
) -> list[Click]:
    """Clicks that ingest counts, less those that a later `Forget` of their user covers."""
    forgotten: dict[str, int] = {}
    kept: dict[int, OrderedDict[int, Click]] = {}
    windows: dict[int, DedupeWindow] = {}
    per_partition = max(1, clicks_max // settings.clicks_partitions)
    for r in records:
        try:
            event, own = validation.user_event(settings, r.partition, r.value, r.appended_ms)
        except Rejected as error:
            rejected[error.reason] += 1
            continue
        if not own:
            rejected["misplaced"] += 1  # ingest forwards it to its own partition
            continue
        if r.partition not in windows:
            windows[r.partition] = DedupeWindow(settings.dedupe_window_events)
        if not windows[r.partition].accept(event.event_id, r.offset):
            rejected["re-sent"] += 1
        elif isinstance(event, Forget):
            forgotten[event.user_id] = max(forgotten.get(event.user_id, -1), event.forget_until_ms)
        elif isinstance(event, Click):
            mine = kept.setdefault(r.partition, OrderedDict())
            event_id = event.event_id or f"{r.partition}/{r.offset}"
            mine[r.offset] = msgspec.structs.replace(event, event_id=event_id)
            if len(mine) > per_partition:
                mine.popitem(last=False)
    clicks = (click for partition in sorted(kept) for click in kept[partition].values())
    return [click for click in clicks if click.at_ms > forgotten.get(click.user_id, -1)]


def _archived(archive: Archive, name: str, ends: Mapping[int, int]) -> Iterator[SourceRecord]:
    """The archive's events up to `ends`, as the records that they were, without forgotten users."""
    try:
        for found in archive.read(name):
            if found.key is not None and found.offset <= ends.get(found.partition, -1):
                value = None if found.event is None else events.encode(found.event)
                yield SourceRecord(
                    found.partition, found.offset, found.key.encode(), value, found.appended_ms
                )
    except (OSError, ValueError) as error:
        raise ArchiveUnavailable(f"archive at {archive.url}: {error}") from None


def _read(
    settings: Settings,
    name: str,
    ends: Mapping[int, int],
    on_read: OnRead | None,
    after: Mapping[int, int] | None = None,
) -> Iterator[SourceRecord]:
    """The records of a topic below `ends`, read committed; of a partition in `after` only those after it."""
    topic = settings.prefixed(name)
    places = [TopicPartition(topic, p) for p in sorted(ends)]
    try:
        consumer = clients.connect(
            settings,
            KafkaConsumer,
            group_id=None,
            enable_auto_commit=False,
            isolation_level="read_committed",
        )
        try:
            consumer.assign(places)
            consumer.seek_to_beginning(*places)
            for place in places:
                if after is not None and after.get(place.partition, -1) >= consumer.position(place):
                    consumer.seek(place, after[place.partition] + 1)
            waiting = {
                place for place in places if consumer.position(place) < ends[place.partition]
            }
            there = sum(ends[place.partition] - consumer.position(place) for place in waiting)
            read, last_s = 0, time.monotonic()
            while waiting:
                batches = consumer.poll(timeout_ms=500, max_records=5_000)
                for place, batch in batches.items():
                    for r in batch:
                        if r.offset < ends[place.partition]:
                            read += 1
                            yield SourceRecord(
                                place.partition, r.offset, r.key, r.value, r.timestamp
                            )
                done = {
                    place for place in waiting if consumer.position(place) >= ends[place.partition]
                }
                waiting -= done
                if batches or done:
                    last_s = time.monotonic()
                elif time.monotonic() - last_s > _STALLED_S:
                    raise KafkaUnavailable(f"topic {topic} gave nothing for {_STALLED_S:.0f} s")
                if on_read is not None:
                    on_read(name, read, max(there, read))
        finally:
            consumer.close()
    except (KafkaError, OSError) as error:
        raise clients.translate_error(settings, error, f"topic {topic}") from None
