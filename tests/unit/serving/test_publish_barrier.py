"""A worker waits for what ingest has still to publish of a generation, but not for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from eddyline.errors import KafkaUnavailable
from eddyline.kafka import topics
from eddyline.settings.loader import Settings
from eddyline.stores.memory import MemoryStore
from eddyline.stores.state_store import Fence, LogId, Source
from index.exact import ExactIndex
from serving.proto import retrieval_pb2 as pb
from serving.rpc.backends import LocalIndex
from serving.worker import publish_barrier
from serving.worker.publish_barrier import PublishBarrier
from serving.worker.replica import Replica

LOG = LogId("cluster", "topic")


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    found = {0: 10, 1: 0}
    monkeypatch.setattr(topics, "end_offsets", lambda *_: found)
    return found


def wait_until_published(
    settings: Settings, store: MemoryStore, generation: str, stop: threading.Event, limit_s: float
) -> int:
    return PublishBarrier(settings, store, generation).wait(stop, limit_s)


def publish(store: MemoryStore, offset: int, expected: Fence | None = None) -> Fence:
    fence = Fence(offset, LOG)
    store.write_item_metadata("i0", Source("items@2", 0), expected, fence, {})
    return fence


@pytest.mark.parametrize(("offset", "behind"), [(8, 1), (9, 0), (10, 0)])
def test_it_waits_for_the_last_record_and_says_what_is_missing(
    ends: dict[int, int], offset: int, behind: int
) -> None:
    store = MemoryStore()
    publish(store, offset)
    assert wait_until_published(Settings(), store, "2", threading.Event(), limit_s=0.1) == behind


def test_fences_of_another_generation_do_not_count(ends: dict[int, int]) -> None:
    store = MemoryStore()
    publish(store, 9)
    assert wait_until_published(Settings(), store, "3", threading.Event(), limit_s=0.1) == 10


def test_it_goes_on_as_soon_as_ingest_is_there(ends: dict[int, int]) -> None:
    store, began = MemoryStore(), time.monotonic()
    threading.Timer(0.2, publish, (store, 9)).start()
    assert wait_until_published(Settings(), store, "2", threading.Event(), limit_s=10) == 0
    assert time.monotonic() - began < 5


def test_a_stop_ends_the_wait_and_an_absent_kafka_does_not_hold_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stop = threading.Event()
    stop.set()
    monkeypatch.setattr(topics, "end_offsets", lambda *_: {0: 10})
    began = time.monotonic()
    wait_until_published(Settings(), MemoryStore(), "2", stop, limit_s=10)

    def away(*_: object) -> dict[int, int]:
        raise KafkaUnavailable("away")

    monkeypatch.setattr(topics, "end_offsets", away)
    assert wait_until_published(Settings(), MemoryStore(), "2", threading.Event(), limit_s=10) == 0
    assert time.monotonic() - began < 2


def test_what_is_missing_is_reported_until_it_is_published_and_read(
    ends: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish_barrier, "AGAIN_S", 0.02)
    store, replica = MemoryStore(), SimpleNamespace(reached_s=0.0)
    fence = publish(store, 3)
    barrier = PublishBarrier(Settings(), store, "2")
    assert barrier.wait(threading.Event(), 0.05) == 6
    held = LocalIndex("2", ExactIndex(2), Replica(Settings(), "2", ExactIndex(2)), barrier)
    barrier.start(replica)  # type: ignore[arg-type]
    try:
        assert "ingest has not published 6 records" in held.missing()
        stats = pb.StatsResponse()
        held.fill_index_stats(stats)
        assert list(stats.missing) == [f"kafka: {held.missing()}"]
        fence = publish(store, 7, fence)
        wait_until(lambda: "2 records" in barrier.missing())
        publish(store, 9, fence)
        time.sleep(0.2)
        assert barrier.missing(), "published, but not read yet"
        replica.reached_s = time.monotonic()
        wait_until(lambda: not held.missing())
    finally:
        barrier.close()
    assert "publish-barrier" not in {thread.name for thread in threading.enumerate()}


def test_an_unknown_state_is_reported_until_kafka_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish_barrier, "AGAIN_S", 0.02)

    def away(*_: object) -> dict[int, int]:
        raise KafkaUnavailable("away")

    monkeypatch.setattr(topics, "end_offsets", away)
    barrier = PublishBarrier(Settings(), MemoryStore(), "2")
    assert barrier.wait(threading.Event(), 0.05) == 0
    assert "unknown" in barrier.missing() and "away" in barrier.missing()
    barrier.start(SimpleNamespace(reached_s=float("inf")))  # type: ignore[arg-type]
    try:
        monkeypatch.setattr(topics, "end_offsets", lambda *_: {0: 10})
        wait_until(lambda: "10 records" in barrier.missing())
    finally:
        barrier.close()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)
