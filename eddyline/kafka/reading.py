"""Read topics between offsets: one reader for commands, trainer and operations.

Ends are offsets, and an offset need not hold a record: compaction and transactions leave gaps. So a
read ends when the consumer's *position* reaches the end, not when the last record arrives.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError

from eddyline.errors import KafkaUnavailable
from eddyline.kafka import clients, topics
from eddyline.kafka import skips as decisions
from eddyline.kafka.skips import Skips
from eddyline.kafka.unreadable import BatchUnreadable, UnreadableBatch
from eddyline.settings.loader import Settings

# Records fetched at a time, and how long one fetch waits for the first of them.
_POLL_RECORDS = 5_000
_POLL_MS = 200


def read(
    settings: Settings,
    name: str,
    starts: Mapping[int, int] | None = None,
    ends: Mapping[int, int] | None = None,
    *,
    stall_s: float | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Generator[Any, None, None]:
    """The committed records of a topic, by offset within each partition.

    name:        without the namespace
    starts:      partition → first offset, at least the oldest kept one; default: the oldest kept
                 offsets of all partitions
    ends:        partition → the offset after the last, 0 if absent; default: the present ends
    stall_s:     the longest time without progress; default: `kafka_timeout_ms`
    on_progress: called after each fetch with the offsets passed so far and their total

    Holds one fetch in memory. A topic that does not exist has no records. Close the iterator to
    stop early. Raises KafkaUnavailable if nothing arrives for `stall_s`, KafkaRefused if we lack
    the right, BatchUnreadable for a batch that cannot be decoded and was not skipped.
    """
    left_out = skips(settings) if can_skip(name) else Skips()
    with open_consumer(settings) as consumer:
        topic = settings.prefixed(name)
        if starts is None and not (partitions := consumer.partitions_for_topic(topic)):
            topics.check_seen(settings, name)
            return
        places = [
            TopicPartition(topic, p) for p in sorted(partitions if starts is None else starts)
        ]
        oldest = consumer.beginning_offsets(places) if places else {}
        present = consumer.end_offsets(places) if places else {}
        slices = {}
        for place in places:
            first = max((starts or {}).get(place.partition, 0), oldest[place])
            end = present[place] if ends is None else ends.get(place.partition, 0)
            slices[place] = (first, end)
        stall_s = settings.kafka_timeout_ms / 1000 if stall_s is None else stall_s
        yield from read_slices(
            consumer, slices, stall_s=stall_s, on_progress=on_progress, skips=left_out
        )


def can_skip(name: str) -> bool:
    """Whether offsets of this topic may be skipped: it holds events, answers or item vectors."""
    return name in topics.ARCHIVED or name.startswith(topics.item_vectors(""))


def skips(settings: Settings, records: Mapping[bytes, bytes] | None = None) -> Skips:
    """The offsets that every reader leaves out, of logs that exist now.

    records: key → value of `generations`; default: as it is now
    Raises KafkaUnavailable, KafkaRefused, BundleError.
    """
    found = decisions.decode(latest(settings, topics.GENERATIONS) if records is None else records)
    names = {topic.removeprefix(settings.prefixed("")) for topic, *_ in found}
    ids = topics.log_ids(settings, sorted(names), missing_ok=True) if names else {}
    logs = {settings.prefixed(name): str(found) for name, found in ids.items()}
    return Skips(
        (topic, partition, first, skip.last)
        for topic, partition, first, skip in found
        if logs.get(topic) == skip.log
    )


def latest(settings: Settings, name: str) -> dict[bytes, bytes]:
    """Key → value of a compacted topic, by the offset of the key's last record.

    Arguments and errors as for `read`.
    """
    records: dict[bytes, bytes] = {}
    for record in read(settings, name):
        records.pop(record.key, None)
        if record.value is not None:
            records[record.key] = record.value
    return records


def read_slices(
    consumer: KafkaConsumer,
    slices: Mapping[TopicPartition, tuple[int, int]],
    *,
    stall_s: float,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    skips: Skips | None = None,
) -> Iterator[Any]:
    """The records of an open consumer between offsets. See `read`.

    slices: partition → (first offset, offset after the last)
    skips:  offsets that are left out

    Replaces the consumer's assignment; pauses a partition at its end. So read several partitions
    of a topic with a consumer of its own: a second read may wait for one of them until `stall_s`
    (see `clients.ALL_FETCHED`). kafka-python's own errors pass through: `open_consumer` translates
    them.
    """
    positions = {place: first for place, (first, end) in slices.items() if first < end}
    total = sum(slices[place][1] - first for place, first in positions.items())
    consumer.assign(list(positions))
    consumer.resume(*positions)  # an earlier read of this consumer may have paused it
    for place, first in positions.items():
        consumer.seek(place, first)
    waiting, progress_s = set(positions), time.monotonic()
    while waiting:
        fetched = consumer.poll(timeout_ms=_POLL_MS, max_records=_POLL_RECORDS)
        for place, records in fetched.items():
            end = slices[place][1]
            yield from _readable(consumer, place, records, end, skips or Skips())
        moved = False
        for place in list(waiting):
            position = min(consumer.position(place), slices[place][1])
            moved |= position > positions[place]
            positions[place] = position
            if position >= slices[place][1]:
                waiting.remove(place)
                consumer.pause(place)
        if moved or fetched:
            progress_s = time.monotonic()
        elif time.monotonic() - progress_s > stall_s:
            names = ", ".join(sorted(f"{place.topic}/{place.partition}" for place in waiting))
            raise KafkaUnavailable(f"{names}: no records for {stall_s:g} s, before the end")
        on_progress(total - sum(slices[p][1] - positions[p] for p in waiting), total)


def _readable(
    consumer: KafkaConsumer, place: TopicPartition, records: list[Any], end: int, skips: Skips
) -> Iterator[Any]:
    """The records in front of `end`; seeks past offsets that are left out and cannot be read.

    Raises BatchUnreadable.
    """
    first = records[0]
    if not isinstance(first, UnreadableBatch):
        yield from (r for r in skips.kept(place, records) if r.offset < end)
    elif first.first >= end:
        consumer.seek(place, end)
    elif (offset := skips.next_offset(place, first.first)) is not None:
        consumer.seek(place, offset)
    else:
        raise BatchUnreadable(first)


@contextmanager
def open_consumer(settings: Settings) -> Iterator[KafkaConsumer]:
    """A read-committed consumer outside of any group, closed at the end.

    Translates kafka-python's errors into KafkaUnavailable and KafkaRefused.
    """
    consumer = clients.connect(
        settings,
        KafkaConsumer,
        group_id=None,
        enable_auto_commit=False,
        auto_offset_reset="earliest",  # where retention removes the next record during a read
        isolation_level="read_committed",
    )
    try:
        yield consumer
    except (KafkaError, OSError) as error:
        raise clients.translate_error(settings, error) from None
    finally:
        consumer.close()


def offsets_at(
    settings: Settings, name: str, partitions: Collection[int], since_ms: int
) -> dict[int, int]:
    """Partition → the first offset appended at or after a time, else its end.

    since_ms: the broker's clock, in milliseconds since 1970
    """
    with open_consumer(settings) as consumer:
        times = {TopicPartition(settings.prefixed(name), p): since_ms for p in partitions}
        ends, found = consumer.end_offsets(list(times)), consumer.offsets_for_times(times)
        return {p.partition: found[p].offset if found.get(p) else ends[p] for p in times}
