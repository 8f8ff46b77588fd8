"""A worker waits for what ingest has still to publish of a generation, but not for ever."""

from __future__ import annotations

import threading
import time

import pytest

from eddyline.errors import KafkaUnavailable
from eddyline.kafka import topics
from eddyline.settings.loader import Settings
from eddyline.stores.memory import MemoryStore
from eddyline.stores.state_store import Fence, LogId, Source
from serving.worker.publish_barrier import wait_until_published

LOG = LogId("cluster", "topic")


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    found = {0: 10, 1: 0}
    monkeypatch.setattr(topics, "end_offsets", lambda *_: found)
    return found


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
