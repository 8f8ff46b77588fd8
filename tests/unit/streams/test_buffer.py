"""Fetched records and the batches that are made of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition

from streams.consumer.buffer import FULL_BATCHES, Fetched, RecordBuffer, place_of
from streams.ports import RecordBatch


def records(first: int, count: int) -> list[Any]:
    return [SimpleNamespace(offset=first + n) for n in range(count)]


def filled(
    fetches: list[tuple[int, int]], records_max: int, partition_max: int | None = None
) -> RecordBuffer:
    """A buffer with one fetch for each (partition, records), whose offsets follow each other."""
    buffer, nexts = RecordBuffer("clicks", records_max, partition_max), dict[int, int]()
    for partition, count in fetches:
        first = nexts.get(partition, 0)
        nexts[partition] = first + count
        buffer.add(partition, Fetched(records(first, count), 9, 5))
    return buffer


def current(at: TopicPartition, epoch: int) -> bool:
    return epoch == 5


def seen(batches: list[RecordBatch]) -> list[tuple[int, int, int]]:
    """(partition, first offset, records) of each batch."""
    return [(batch.partition, batch.first, len(batch.records)) for batch in batches]


def all_of(buffer: RecordBuffer) -> list[list[tuple[int, int, int]]]:
    """What each `take` returns, until the buffer is empty."""
    taken = []
    while batches := buffer.take(current):
        for batch in batches:
            offsets = [record.offset for record in batch.records]
            assert offsets == list(range(offsets[0], offsets[0] + len(offsets)))
            assert (batch.topic, batch.epoch, batch.read_us) == ("clicks", 5, 9)
        taken.append(seen(batches))
    assert buffer.batches() == 0
    return taken


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([1, 1], [[(0, 0, 1), (1, 0, 1)]]),
        ([2, 1], [[(0, 0, 2), (1, 0, 1)]]),
        ([2, 2], [[(0, 0, 2)], [(1, 0, 2)]]),
        ([2, 2, 1], [[(0, 0, 2), (2, 0, 1)], [(1, 0, 2)]]),
        ([3, 1], [[(0, 0, 3)], [(1, 0, 1)]]),
        ([4, 1], [[(0, 0, 3)], [(1, 0, 1), (0, 3, 1)]]),
        ([7, 7], [[(0, 0, 3)], [(1, 0, 3)], [(0, 3, 3)], [(1, 3, 3)], [(0, 6, 1), (1, 6, 1)]]),
    ],
)
def test_partitions_go_together_up_to_the_most_records_and_take_turns(
    sizes: list[int], expected: list[list[tuple[int, int, int]]]
) -> None:
    assert all_of(filled(list(enumerate(sizes)), 3)) == expected


@pytest.mark.parametrize(
    ("count", "most", "cut"),
    [
        (3, 4, [3]),
        (4, 4, [4]),
        (5, 4, [4, 1]),
        (17, 4, [4, 4, 4, 4, 1]),
        (9, None, [9]),
        (99, 200, [60, 39]),
    ],
)
def test_a_topic_may_have_smaller_batches_that_follow_each_other(
    count: int, most: int | None, cut: list[int]
) -> None:
    """Of at most 60 records without its own limit, and never of more."""
    assert [[n for _, _, n in batches] for batches in all_of(filled([(0, count)], 60, most))] == [
        [n] for n in cut
    ]


def test_small_batches_of_all_partitions_go_together() -> None:
    """As many of each partition as may be applied at once, so that one call applies all."""
    assert [
        [(partition, n) for partition, _, n in batches]
        for batches in all_of(filled([(p, 9) for p in range(3)], 12, 4))
    ] == [[(0, 4), (1, 4), (2, 4)], [(0, 4), (1, 4), (2, 4)], [(0, 1), (1, 1), (2, 1)]]


def test_fetches_of_one_partition_become_one_batch() -> None:
    buffer = filled([(0, 2), (1, 1), (0, 3), (2, 1), (0, 4)], 100)
    assert seen(buffer.take(current)) == [(0, 0, 9), (1, 0, 1), (2, 0, 1)]
    assert buffer.take(current) == []


def test_what_was_read_before_a_seek_is_dropped() -> None:
    buffer = RecordBuffer("clicks", 10)
    for epoch, first in ((4, 0), (4, 3), (5, 1)):
        buffer.add(0, Fetched(records(first, 3), 9, epoch))
    buffer.add(1, Fetched(records(7, 2), 9, 4))
    assert seen(buffer.take(current)) == [(0, 1, 3)]
    assert buffer.take(current) == [] and buffer.batches() == 0


def test_a_partition_without_current_records_gives_no_batch() -> None:
    buffer = filled([(0, 2)], 10)
    assert buffer.take(lambda at, epoch: False) == [] and buffer.batches() == 0


@pytest.mark.parametrize("more", [-1, 0, 1, 1_000])
def test_a_buffer_is_full_from_so_many_records_on(more: int) -> None:
    buffer = filled([(0, FULL_BATCHES * 10 + more)], 10)
    assert buffer.full() is (more >= 0)
    assert buffer.batches() == FULL_BATCHES + (more > 0) + (more == 1_000) * 99
    buffer.clear()
    assert not buffer.full() and buffer.take(current) == []


def test_a_batch_names_its_partition() -> None:
    assert place_of(RecordBatch("clicks", 3, records(0, 1), 0)) == TopicPartition("clicks", 3)
