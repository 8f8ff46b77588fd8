"""The worker's connection to the item vectors, and the tail over it, on a real Kafka that goes
away.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest

from eddyline.errors import KafkaUnavailable, Unavailable
from eddyline.kafka import producers, topics
from eddyline.schema.item_record import ItemRecord, encode_record
from eddyline.settings.loader import Settings
from index.exact import ExactIndex
from serving.worker import item_vectors
from serving.worker.item_vectors import ItemVectorLog
from serving.worker.replica import CLOSE_S, Replica
from tests.integration.conftest import OwnServers

pytestmark = pytest.mark.timeout(120)
VECTOR = np.array([1, 0], np.float32)


def wait_until(check: Callable[[], Any], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


@pytest.fixture
def settings(fresh_settings: Settings) -> Settings:
    topics.ensure_topics(fresh_settings, [topics.item_vectors("1")])
    return fresh_settings


class Writer:
    """Writes item records to partition 0, a transaction for each call."""

    def __init__(self, settings: Settings) -> None:
        self._topic = settings.prefixed(topics.item_vectors("1"))
        self._producer = producers.make_producer(
            settings, transactional_id=f"{settings.namespace}-writer"
        )
        self._producer.init_transactions()

    def put(self, *item_ids: str, aborted: bool = False) -> None:
        self._producer.begin_transaction()
        for item_id in item_ids:
            value = encode_record(ItemRecord(item_id, 0, 1, 0, 1, VECTOR))
            self._producer.send(self._topic, value, key=item_id.encode(), partition=0)
        if aborted:
            self._producer.flush(10)
            self._producer.abort_transaction()
        else:
            self._producer.commit_transaction()

    def close(self) -> None:
        self._producer.close(timeout=5)


@pytest.fixture
def writer(settings: Settings) -> Iterator[Writer]:
    made = Writer(settings)
    yield made
    made.close()


@pytest.fixture
def log(settings: Settings) -> Iterator[ItemVectorLog]:
    made = ItemVectorLog(settings, "1")
    yield made
    made.close()


def read(log: ItemVectorLog) -> list[str]:
    """All keys up to the end seen now."""
    found: list[str] = []
    ends, deadline = log.ends(), time.monotonic() + 20
    while log.positions() != ends:
        assert time.monotonic() < deadline, (log.positions(), ends)
        found += [record.key.decode() for records in log.poll(200).values() for record in records]
    return found


def test_what_is_committed_is_read_and_marks_are_passed(log: ItemVectorLog, writer: Writer) -> None:
    writer.put("a", "b")
    writer.put("never", aborted=True)
    writer.put("c")
    log.begin({})
    assert read(log) == ["a", "b", "c"]
    assert log.positions()[0] == log.ends()[0] == 7, "four records and three marks"
    assert log.poll(10) == {}
    writer.put("d")
    assert read(log) == ["d"]


@pytest.mark.parametrize(
    ("position", "found"), [(1, ["b"]), (2, []), (3, []), (4, ["a", "b"]), (9_999, ["a", "b"])]
)
def test_it_begins_where_told_and_anew_where_that_is_gone(
    position: int, found: list[str], log: ItemVectorLog, writer: Writer
) -> None:
    """The log ends at 3: two records and their transaction's mark."""
    writer.put("a", "b")
    # Kafka acknowledges a commit before the partition's last stable offset is there.
    wait_until(lambda: log.ends()[0] == 3)
    log.begin({0: position, 1: 0})
    assert log.positions()[0] == (position if position <= 3 else 0)
    assert read(log) == found


def test_more_than_a_poll_takes_comes_in_several(
    log: ItemVectorLog, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(item_vectors, "POLL_RECORDS", 3)
    names = [f"i{n}" for n in range(10)]
    writer.put(*names)
    log.begin({})
    found: list[str] = []
    while len(found) < len(names):
        polled = [record for records in log.poll(500).values() for record in records]
        assert len(polled) <= 3
        found += [record.key.decode() for record in polled]
        assert log.positions()[0] in (len(found), 11), "never ahead of what was handed out"
    assert found == names


def test_a_topic_that_is_missing_is_named(fresh_settings: Settings) -> None:
    with pytest.raises(Unavailable, match=r"there is no topic .*item-vectors\.other"):
        ItemVectorLog(fresh_settings, "other")


def test_fetches_that_ended_are_told(log: ItemVectorLog) -> None:
    """aiokafka only logs it; a poll would wait for ever."""
    log.begin({})
    log._consumer._fetcher.error_future.cancel()
    log.poll(10)
    with pytest.raises(KafkaUnavailable, match="the fetches ended"):
        log.poll(10)


def test_nobody_there_is_told_in_time() -> None:
    settings = Settings(kafka_bootstrap_servers="127.0.0.1:1", kafka_timeout_ms=500)
    begun = time.monotonic()
    with pytest.raises(KafkaUnavailable, match=r"127\.0\.0\.1:1"):
        ItemVectorLog(settings, "1")
    assert time.monotonic() - begun < 6


def test_the_tail_outlives_a_broker_that_hangs_and_one_that_dies(own_servers: OwnServers) -> None:
    settings = msgspec.structs.replace(
        own_servers.settings, backoff_ms_max=200, kafka_timeout_ms=2_000
    )
    topics.ensure_topics(settings, [topics.item_vectors("1")])
    index, threads = ExactIndex(2), set(threading.enumerate())
    writer = Writer(settings)
    replica = Replica(settings, "1", index)
    replica.start()
    try:
        assert replica.wait_caught_up(20)
        writer.put("a")
        wait_until(lambda: index.describe(["a"])[0] is not None)
        wait_until(lambda: replica.positions()[0] == 2 and not replica.state().lag_records)
        assert replica.missing() == ""

        own_servers.pause("kafka")
        wait_until(lambda: replica.missing() != "", 10)
        assert replica.missing().startswith("Kafka at ") and replica.state().away_since_ms
        own_servers.resume("kafka")
        wait_until(lambda: replica.missing() == "")
        writer.put("b")
        wait_until(lambda: index.describe(["b"])[0] is not None)

        own_servers.kill("kafka")
        wait_until(lambda: replica.missing() != "", 10)
        wait_until(lambda: replica.missing() == "", 60)
        assert replica.state().records == 2, "it went on where it was"
        own_servers.pause("kafka")
        begun = time.monotonic()
        replica.close()
        assert time.monotonic() - begun < CLOSE_S
    finally:
        own_servers.resume("kafka")
        replica.close()
        writer.close()
    assert not {t for t in set(threading.enumerate()) - threads if t.name == "replica"}
