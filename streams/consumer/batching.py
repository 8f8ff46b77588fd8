"""Batches of what one fetch returned, and which of the queued batches are applied together.

Pure functions: nothing here knows a consumer. See `streams/consumer/consumer.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from faust.types import TP

from streams.ports import Record, RecordBatch

# By partition: the epoch of the records, and the records.
Fetched = Mapping[Any, tuple[int, Sequence[Record]]]


def place_of(batch: RecordBatch) -> TP:
    """The batch's partition."""
    return TP(batch.topic, batch.partition)


def split_fetched(
    fetched: Fetched, size: int, partition_max: Mapping[str, int], read_us: int
) -> Iterator[list[RecordBatch]]:
    """Make the batches of one fetch, in groups of one topic with at most `size` records.

    The first batches of all partitions come first, so that no partition waits for all of another.
    partition_max: topic -> the most records of a batch of it, where that is less than `size`
    """
    batches = []
    for at, (epoch, records) in fetched.items():
        topic, partition = at
        most = min(size, partition_max.get(topic, size))
        batches += [
            (start, RecordBatch(topic, partition, records[start : start + most], read_us, epoch))
            for start in range(0, len(records), most)
        ]
    batches.sort(key=lambda one: (one[0], one[1].topic))
    group: list[RecordBatch] = []
    room = size
    for _, batch in batches:
        if group and (len(batch.records) > room or group[0].topic != batch.topic):
            yield group
            group, room = [], size
        group.append(batch)
        room -= len(batch.records)
    if group:
        yield group


def choose(
    queued: Sequence[RecordBatch], size: int, partition_max: int | None
) -> tuple[list[RecordBatch], list[RecordBatch]]:
    """Return (the batches to apply now, one of each partition; those that stay queued).

    Queued batches of one partition that follow each other become one: under load many small fetches
    are applied together. queued: of one topic, in the order of their fetches
    size: the most records in all, partition_max: the same of one partition; a larger batch goes
          alone
    """
    chosen: dict[int, list[RecordBatch]] = {}
    rest: list[RecordBatch] = []
    full: set[int] = set()
    room, rooms = size, defaultdict[int, int](lambda: partition_max or size)
    for batch in queued:
        count, partition = len(batch.records), batch.partition
        too_large = count > room or (partition in chosen and count > rooms[partition])
        if partition in full or (chosen and too_large):
            rest.append(batch)
            full.add(partition)
        else:
            chosen.setdefault(partition, []).append(batch)
            room -= count
            rooms[partition] -= count
    return [_merged(batches) for batches in chosen.values()], rest


def _merged(batches: Sequence[RecordBatch]) -> RecordBatch:
    """Batches of one partition that follow each other, as one; `read_us` is that of the last."""
    if len(batches) == 1:
        return batches[0]
    records = [record for batch in batches for record in batch.records]
    last = batches[-1]
    return RecordBatch(last.topic, last.partition, records, last.read_us, last.epoch)
