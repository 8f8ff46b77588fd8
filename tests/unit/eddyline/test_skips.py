"""Offsets that readers leave out, and partitions that stand in front of a batch."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from kafka import KafkaConsumer, TopicPartition

from eddyline.errors import BundleError
from eddyline.kafka import skips
from eddyline.kafka.skips import Skip, Skips, Stops
from eddyline.kafka.unreadable import UnreadableBatch

PLACE = ("shop.clicks", 3)


def batch(first: int, last: int | None = None) -> UnreadableBatch:
    return UnreadableBatch(*PLACE, first, first, last, "codec", "unknown codec 7", b"bytes")


@pytest.mark.parametrize(
    ("offset", "following"), [(9, None), (10, 15), (12, 15), (14, 15), (15, None), (20, 21)]
)
def test_the_offset_after_those_that_are_left_out(offset: int, following: int | None) -> None:
    left_out = Skips([(*PLACE, 10, 14), (*PLACE, 20, 20)])
    assert left_out.next_offset(PLACE, offset) == following
    assert left_out.next_offset(("shop.clicks", 4), offset) is None


def test_records_are_left_out_also_where_they_can_be_read() -> None:
    records: list[Any] = [SimpleNamespace(offset=offset) for offset in (9, 10, 14, 15)]
    kept = Skips([(*PLACE, 10, 14)]).kept(PLACE, records)
    assert [record.offset for record in kept] == [9, 15]
    assert Skips().kept(PLACE, records) is records


def test_a_decision_is_read_as_it_was_written() -> None:
    value = msgspec.json.encode(Skip("cluster|topic", 14, "codec"))
    records = {skips.key_of(*PLACE, 10): value, b"active": b"{}", b"begin/1/0": b"{}"}
    assert skips.decode(records) == [(*PLACE, 10, Skip("cluster|topic", 14, "codec"))]


@pytest.mark.parametrize(
    ("key", "value"),
    [(b"skip/clicks/0", b"{}"), (b"skip/clicks/0/x", b"{}"), (b"skip/c/0/1", b"{")],
)
def test_a_record_that_is_no_decision_is_named(key: bytes, value: bytes) -> None:
    with pytest.raises(BundleError, match=key.decode()):
        skips.decode({key: value})


def test_what_the_broker_could_not_read_is_tried_again() -> None:
    stops = Stops()
    stops.pass_over(UnreadableBatch(*PLACE, 7, 7, None, "broker", "CORRUPT_MESSAGE", b""))
    assert stops.resume(Skips()) == {PLACE: 7}
    assert stops.resume(Skips([(*PLACE, 7, 9)])) == {PLACE: 10}


def test_a_stop_is_logged_once_and_ends_with_a_decision(caplog: pytest.LogCaptureFixture) -> None:
    stops = Stops()
    for _ in range(2):
        assert stops.pass_over(batch(10, 14)) is None
        assert stops.stopped == {PLACE: batch(10, 14)}
        stops.clear([PLACE])
    [line] = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert line == (
        "topic shop.clicks, partition 3: the batch of offsets 10 to 14 cannot be read (codec: "
        "unknown codec 7). This partition stops there; to go on without these offsets: eddyline "
        "dead-letters skip shop.clicks/3/10"
    )
    stops.pass_over(batch(10, 14))
    assert stops.resume(Skips([(*PLACE, 9, 9)])) == {}
    assert stops.resume(Skips([(*PLACE, 10, 14)])) == {PLACE: 15}
    stops.clear([PLACE])
    assert stops.pass_over(batch(10, 14)) == 15 and stops.stopped == {}
    assert stops.pass_over(batch(20)) is None and "the batch at offset 20" in str(batch(20))


def test_a_consumer_pauses_before_a_batch_and_goes_on_behind_it() -> None:
    consumer = KafkaConsumer(bootstrap_servers="localhost:1", api_version=(3, 9))
    try:
        at, other = TopicPartition(*PLACE), TopicPartition("shop.clicks", 4)
        consumer.assign([at, other])
        for place in (at, other):
            consumer.seek(place, 10)
        stops, left_out = Stops(), Skips([(*PLACE, 10, 14)])
        assert stops.readable(consumer, at, [batch(10, 14)]) == ()
        assert consumer.paused() == {at} and stops.stopped == {PLACE: batch(10, 14)}
        records: list[Any] = [SimpleNamespace(offset=10)]
        assert stops.readable(consumer, other, records) is records
        stops.resume_skipped(consumer, Skips)
        assert consumer.paused() == {at}
        stops.resume_skipped(consumer, lambda: left_out)
        assert consumer.paused() == {at}, "decisions are read every few seconds"
        stops._look_s = 0.0
        stops.resume_skipped(consumer, lambda: left_out)
        assert not consumer.paused() and not stops.stopped and consumer.position(at) == 15
        consumer.seek(at, 10)
        assert stops.readable(consumer, at, [batch(10, 14)]) == ()
        assert not consumer.paused() and consumer.position(at) == 15
    finally:
        consumer.close()
