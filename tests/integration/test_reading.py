"""Topics are read from offsets to offsets: committed records only, and gaps at the end end it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from kafka import TopicPartition

from eddyline.errors import KafkaUnavailable
from eddyline.kafka import producers, reading, topics
from eddyline.settings.loader import Settings

NAME = topics.CLICKS
PARTITIONS = 3


@pytest.fixture
def logs(fresh_settings: Settings) -> Iterator[Settings]:
    """Three partitions: 0 has 40 records, 1 ends with an aborted transaction, 2 is empty."""
    settings = msgspec.structs.replace(fresh_settings, clicks_partitions=PARTITIONS)
    topics.ensure_topics(settings, [NAME])
    topic = settings.prefixed(NAME)
    producer = producers.make_producer(settings, transactional_id=f"{topic}-writer")
    try:
        producers.in_time(settings, producer.init_transactions)
        for number in range(4):
            producer.begin_transaction()
            for record in range(10):
                producer.send(topic, b"%d" % (10 * number + record), partition=0)
            if number < 2:
                producer.send(topic, b"kept", partition=1)
            producers.in_time(settings, producer.commit_transaction)
        producer.begin_transaction()
        for _ in range(5):
            producer.send(topic, b"aborted", partition=1)
        producer.flush(timeout=20)
        producers.in_time(settings, producer.abort_transaction)
        yield settings
    finally:
        producer.close(timeout=5)


def values(records: Iterator[Any]) -> dict[int, list[bytes]]:
    found: dict[int, list[bytes]] = {}
    for record in records:
        found.setdefault(record.partition, []).append(record.value)
    return found


def test_everything_is_read_once_and_aborted_records_are_not(logs: Settings) -> None:
    seen: list[tuple[int, int]] = []
    found = values(reading.read(logs, NAME, on_progress=lambda done, n: seen.append((done, n))))
    assert found == {0: [b"%d" % n for n in range(40)], 1: 2 * [b"kept"]}
    # Offsets, not records: 44 with the markers of four transactions; 2 + 2, 5 aborted and a marker.
    assert seen[-1] == (54, 54) and seen == sorted(seen)


def test_a_gap_at_the_end_is_not_waited_for(logs: Settings) -> None:
    end = topics.end_offsets(logs, NAME)[1]
    begun = time.monotonic()
    assert values(reading.read(logs, NAME, {1: end - 3}, stall_s=60)) == {}
    assert values(reading.read(logs, NAME, {1: 1}, {1: end}, stall_s=60)) == {1: [b"kept"]}
    assert time.monotonic() - begun < 30


@pytest.mark.parametrize(("start", "end"), [(0, 0), (0, 1), (3, 10), (9, 12), (12, 9), (43, 44)])
def test_bounds(start: int, end: int, logs: Settings) -> None:
    found = [r.offset for r in reading.read(logs, NAME, {0: start}, {0: end})]
    # Every eleventh offset is the marker of a transaction.
    assert found == [offset for offset in range(start, end) if offset % 11 != 10]


def test_a_start_below_the_oldest_record_and_an_end_that_is_not_named(logs: Settings) -> None:
    assert values(reading.read(logs, NAME, {0: -1}, {0: 1, 1: 5})) == {0: [b"0"]}
    assert values(reading.read(logs, NAME, {0: 0, 1: 0}, {0: 1})) == {0: [b"0"]}


def test_a_topic_that_is_not_there_has_no_records(logs: Settings) -> None:
    assert list(reading.read(logs, topics.GENERATIONS)) == []


def test_an_end_that_never_comes_is_an_error_in_time(logs: Settings) -> None:
    begun, found = time.monotonic(), []
    with pytest.raises(KafkaUnavailable, match="clicks/0: no records for 1 s, before the end"):
        found.extend(r.value for r in reading.read(logs, NAME, {0: 40}, {0: 1_000}, stall_s=1))
    assert found == [b"37", b"38", b"39"] and 1 <= time.monotonic() - begun < 20


def test_one_consumer_reads_slice_after_slice(logs: Settings) -> None:
    places = [TopicPartition(logs.prefixed(NAME), p) for p in range(PARTITIONS)]
    with reading.open_consumer(logs) as consumer:
        for _ in range(3):
            found = values(
                reading.read_slices(consumer, {places[0]: (0, 5), places[2]: (0, 0)}, stall_s=20)
            )
            assert found == {0: [b"0", b"1", b"2", b"3", b"4"]}


def test_a_reader_may_stop_early(logs: Settings) -> None:
    records = reading.read(logs, NAME)
    next(records)
    records.close()  # type: ignore[attr-defined]
