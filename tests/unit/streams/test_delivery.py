"""Outputs to Kafka: what confirms a fence's records, and records that are too large to be sent."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace
from typing import Any

import pytest
from kafka.errors import KafkaTimeoutError, MessageSizeTooLargeError

from eddyline.errors import KafkaUnavailable, Rejected
from eddyline.schema import events
from eddyline.schema.events import Click
from eddyline.schema.partitioning import partition_of
from eddyline.settings.loader import Settings
from eddyline.stores.memory import MemoryStore
from eddyline.stores.state_store import LogId, Source
from streams import dead_letters
from streams.clicks.handler import ClickHandler
from streams.dead_letters import KafkaDeadLetters, KafkaForwarder
from streams.fences import PartitionFences
from streams.ports import RecordBatch

LOG = LogId("cluster-a", "topic-1")
MS = 1_700_000_000_000
SETTINGS = Settings(clicks_partitions=2, items_partitions=2, dedupe_window_events=10)
MIB = 1024 * 1024


def rec(offset: int, value: bytes | None, key: bytes | None = b"k", **more: Any) -> Any:
    fields = {"topic": "clicks", "partition": 0, "timestamp": MS, "headers": ()} | more
    return SimpleNamespace(offset=offset, key=key, value=value, **fields)


def origin_of(record: Any, place: bytes) -> list[tuple[str, bytes]]:
    """The headers that a forwarded record gets."""
    return [("origin", place), (events.ORIGIN_MS, str(record.timestamp).encode())]


def click_of(partition: int, offset: int, lies_in: int, **more: Any) -> Any:
    user = next(f"u{n}" for n in range(50) if partition_of(f"u{n}", 2) == partition)
    value = events.encode(Click(user_id=user, item_id="i", at_ms=MS, **more))
    return rec(offset, value, partition=lies_in)


class Future:
    def __init__(self, error: Exception | None) -> None:
        self.error = error

    def get(self, timeout: float) -> None:
        if self.error:
            raise self.error


class Producer:
    """Takes records; `errors` has the error of the n-th send, `futures` that of its future.

    bytes_max: the most bytes of a record of `limited`
    """

    def __init__(self, bytes_max: int = 2**31, limited: str = "clicks") -> None:
        self.limited = limited
        self.sent: list[tuple[str, bytes, dict[str, Any]]] = []
        self.errors: dict[int, Exception] = {}
        self.futures: dict[int, Exception] = {}
        self.bytes_max = bytes_max
        self.count = 0

    def send(self, topic: str, value: bytes, **more: Any) -> Future:
        self.count += 1
        if self.count in self.errors:
            raise self.errors[self.count]
        self.sent.append((topic, value, more))
        headers = sum(len(name) + len(v) for name, v in more["headers"])
        error = self.futures.get(self.count)
        if (
            topic == self.limited
            and len(value) + len(more["key"] or b"") + headers + 90 > self.bytes_max
        ):
            error = MessageSizeTooLargeError("the broker's limit")
        return Future(error)

    def flush(self, timeout: float) -> None:
        pass


class Rig:
    def __init__(self, producer: Any) -> None:
        self.store = MemoryStore()
        self.fences = PartitionFences(SETTINGS, self.store, "clicks", {"clicks": LOG})
        self.handler = ClickHandler(
            SETTINGS,
            self.store,
            self.fences,
            KafkaDeadLetters(SETTINGS, producer),
            KafkaForwarder(SETTINGS, producer),
            [],
        )
        self.fences.open({0: (0, 1_000), 1: (0, 1_000)})

    def apply(self, *records: Any) -> list[Any]:
        batches = [RecordBatch("clicks", r.partition, [r], 0) for r in records]
        return self.handler.apply(batches)

    def fence(self, partition: int) -> int:
        return self.fences.done(Source("clicks", partition), f"u{partition}")


@pytest.mark.parametrize("rejected", [False, True])
def test_a_failed_send_of_one_batch_leaves_those_of_others_to_be_confirmed(rejected: bool) -> None:
    """The first batch's record is never stored: its fence must not move."""
    producer = Producer()
    producer.errors[2] = KafkaTimeoutError("the buffer is full")
    producer.futures[1] = KafkaTimeoutError("never stored")
    rig = Rig(producer)
    strays = (
        [rec(0, b"{", partition=0), rec(0, b"{", partition=1)]
        if rejected
        else [click_of(1, 0, 0), click_of(0, 0, 1)]
    )
    results = rig.apply(*strays)
    assert [type(result) for result in results] == [KafkaUnavailable, KafkaUnavailable]
    assert (rig.fence(0), rig.fence(1)) == (-1, -1)


def test_a_confirmed_batch_goes_on_although_another_one_could_not_be_sent() -> None:
    producer = Producer()
    producer.errors[2] = KafkaTimeoutError("the buffer is full")
    rig = Rig(producer)
    first, second = rig.apply(click_of(1, 0, 0), click_of(0, 0, 1))
    assert isinstance(second, KafkaUnavailable) and first.forwarded == 1
    assert (rig.fence(0), rig.fence(1)) == (0, -1)


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_a_stray_is_measured_with_key_headers_and_origin(more: int) -> None:
    """At the limit it is forwarded with all headers; above it, without them."""
    producer = Producer(bytes_max=MIB + 12)
    forwarder = KafkaForwarder(SETTINGS, producer)
    headers = [("trace", b"h" * 16_480), ("produced_us", b"17")]
    record = rec(4, b"", headers=headers)
    origin = origin_of(record, b"clicks/0/4")
    room = MIB - dead_letters.record_bytes(b"user", b"", [*headers, *origin]) + more
    forwarder.forward(record, b"user", b"v" * room, 1)
    forwarder.flush()
    ((topic, value, sent),) = producer.sent
    assert (topic, len(value)) == ("clicks", room)
    assert sent["headers"] == [*headers, *origin] if more <= 0 else [headers[1], *origin]


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_a_stray_that_is_too_large_without_headers_is_a_dead_letter(more: int) -> None:
    producer = Producer(bytes_max=MIB + 12)
    rig = Rig(producer)
    small = click_of(1, 7, 0, event_id="e").value
    user = events.decode_user_event(
        small, appended_ms=MS, far_future_ms_max=0, id_form="nfc"
    ).user_id.encode()
    origin = origin_of(rec(7, small), b"clicks/0/7")
    room = MIB - dead_letters.record_bytes(user, small, origin) + more
    value_sent = small + b" " * room
    padded = rec(7, value_sent, headers=(("trace", b"h"), ("no value", None)))
    (outcome,) = rig.apply(padded)
    ((topic, value, sent),) = producer.sent
    assert value == value_sent and rig.fence(0) == 7
    if more <= 0:
        assert (topic, outcome.forwarded, outcome.rejected) == ("clicks", 1, 0)
    else:
        assert (topic, outcome.forwarded, outcome.rejected) == ("dead-letters", 0, 1)
        assert dict(sent["headers"])["reason"] == b"too_large"


def test_a_forwarded_record_that_the_broker_refuses_by_size_is_a_dead_letter() -> None:
    """`max.message.bytes` of the topic is below the default."""
    producer = Producer(bytes_max=400)
    rig = Rig(producer)
    stray = rec(7, click_of(1, 7, 0, event_id="e").value + b" " * 500)
    (outcome,) = rig.apply(stray)
    assert outcome.records == 1 and rig.fence(0) == 7
    assert [topic for topic, _, _ in producer.sent] == ["clicks", "dead-letters"]
    headers = dict(producer.sent[1][2]["headers"])
    assert (headers["reason"], producer.sent[1][1]) == (b"too_large", stray.value)


def test_a_dead_letter_that_the_broker_refuses_by_size_is_sent_short() -> None:
    producer = Producer(bytes_max=4_096, limited="dead-letters")
    sink = KafkaDeadLetters(SETTINGS, producer)
    value = b"v" * 5_000
    sink.put(rec(9, value, b"k" * 2_000), Rejected("malformed_json", "", "no"))
    sink.flush()
    (_, short, sent) = producer.sent[-1]
    headers = dict(sent["headers"])
    assert (len(short), sent["key"]) == (dead_letters.SHORT_BYTES, b"clicks/0/9")
    assert headers["key"] == b"k" * dead_letters.SHORT_BYTES
    assert headers["key_truncated_from_bytes"] == b"2000"
    assert headers["truncated_from_bytes"] == b"5000"
    assert headers["sha256"] == hashlib.sha256(value).hexdigest().encode()


@pytest.mark.parametrize("key", [0, dead_letters.KEY_BYTES_MAX, MIB])
def test_the_largest_dead_letter_is_within_the_limit_of_its_topic(key: int) -> None:
    producer = Producer()
    sink = KafkaDeadLetters(SETTINGS, producer)
    record = rec(2**62, b"v" * (3 * MIB), b"k" * key, topic="t" * 249)
    sink.put(record, Rejected("r" * 100, "f" * 1_000, "d" * 4_000))
    ((_, value, sent),) = producer.sent
    size = dead_letters.record_bytes(sent["key"], value, sent["headers"])
    assert len(value) == dead_letters.VALUE_BYTES_MAX and size <= 2 * MIB
