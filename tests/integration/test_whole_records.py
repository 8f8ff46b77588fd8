"""Whole records of any kind through real broker and clients: no process ends, nothing is lost.

After each round the second model says what each record must have done: it was applied, forwarded or
is a dead letter. FUZZ_RECORDS makes a round longer, FUZZ_SEED draws another one.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from confluent_kafka import Producer

from eddyline.kafka import producers, topics
from eddyline.kafka.producers import now_ms
from eddyline.schema.events import Item
from embeddings.bundle import bundle as bundles
from embeddings.data import sources
from serving.rpc.client import is_ready
from streams.operations import dead_letter_replay
from tests.archiving import archive_all
from tests.integration.conftest import Live, living
from tests.model import comparison
from tests.model.eras import Era
from tests.topics import Topics
from tests.whole_records import BATCH_BYTES_MAX, Maker, Whole

RECORDS = int(os.environ.get("FUZZ_RECORDS", "300"))
SEED = int(os.environ.get("FUZZ_SEED", "1"))
pytestmark = pytest.mark.timeout(120 + RECORDS // 10)

USERS = [f"w{n}" for n in range(40)]
ITEMS = [f"f{n}" for n in range(30)]


@pytest.fixture(scope="module")
def system(servers, dataset, bundle, tmp_path_factory) -> Iterator[Live]:
    settings = msgspec.structs.replace(
        servers,
        namespace=f"t-{uuid.uuid4().hex[:12]}",
        data_dir=str(tmp_path_factory.mktemp("whole")),
    )
    with living(settings, dataset, bundle) as made:
        yield made


@pytest.fixture
def maker(system: Live) -> Maker:
    settings = system.settings
    return Maker(
        SEED,
        USERS,
        ITEMS,
        {
            "clicks": settings.clicks_partitions,
            "users": settings.clicks_partitions,
            "items": settings.items_partitions,
        },
    )


class Senders:
    """kafka-python sends header names that are not UTF-8, librdkafka headers without a value."""

    def __init__(self, system: Live) -> None:
        self._settings = system.settings
        self.plain = producers.make_producer(
            system.settings, linger_ms=5, max_request_size=2 * BATCH_BYTES_MAX
        )
        self.transactional = producers.make_producer(
            system.settings, transactional_id=system.settings.prefixed("fuzz")
        )
        self.transactional.init_transactions()
        self.failed: list[BaseException] = []
        self._other = Producer(
            {
                "bootstrap.servers": system.settings.kafka_bootstrap_servers,
                "linger.ms": 5,
                "partitioner": "murmur2_random",
                "message.max.bytes": 2 * BATCH_BYTES_MAX,
            },
            logger=logging.getLogger("rdkafka"),
        )

    def send(self, topic: str, record: Whole, producer: Any = None) -> Any:
        name = self._settings.prefixed(topic)
        if producer is None and any(value is None for _, value in record.headers):
            more = {"partition": record.partition, "timestamp": record.timestamp_ms}
            self._other.produce(
                name,
                record.value,
                record.key,
                headers=record.headers,
                **{k: v for k, v in more.items() if v is not None},
            )
            return None
        future = (producer or self.plain).send(
            name,
            record.value,
            key=record.key,
            headers=[(n, v or b"") for n, v in record.headers],
            partition=record.partition,
            timestamp_ms=record.timestamp_ms,
        )
        future.add_errback(self.failed.append)
        return future

    def close(self) -> None:
        self.plain.flush(timeout=30)
        assert self._other.flush(30) == 0 and self.failed == []
        self.plain.close(timeout=5)
        self.transactional.close(timeout=5)


def differences(system: Live) -> list[str]:
    """The differences that the second model finds, and the processes that ended."""
    system.applied(timeout_s=60)
    towers = bundles.load(system.settings.bundles / "1")
    read = Topics.read(system.settings)
    found = comparison.compare(read, [towers], [Era(system.settings)], any_reason=True).differences
    restarts = {name: n for name, (_, n) in system.supervisor.states().items() if n}
    return found + [f"{name} ended {n} times" for name, n in restarts.items()]


def test_whole_records_are_applied_forwarded_or_dead_letters(system: Live, maker: Maker) -> None:
    senders = Senders(system)
    aborts = senders.transactional
    for number in range(RECORDS):
        topic = topics.SOURCES[number % 3]
        if number % 20 != 19:
            senders.send(topic, maker.record(topic, now_ms()))
            continue
        aborts.begin_transaction()
        for _ in range(3):
            senders.send(topic, maker.record(topic, now_ms()), aborts)
        aborts.flush(timeout=10)
        aborts.abort_transaction() if number % 40 == 39 else aborts.commit_transaction()
    senders.close()
    assert not (found := differences(system)), "\n".join(found)


def test_every_reader_passes_whole_records(system: Live) -> None:
    """The trainer and the archive read the records that the test before left in the topics."""
    settings = system.settings
    live = sources.from_kafka(settings)
    archive_all(settings)
    archived = sources.from_archive(settings)
    assert {click.user_id for click in live.clicks} == {c.user_id for c in archived.clicks}
    assert len(live.clicks) == len(archived.clicks) > 0
    assert {item.item_id for item in live.items} == {item.item_id for item in archived.items}


@pytest.mark.long
def test_the_dead_letters_of_whole_records_are_listed_and_replayed(system: Live) -> None:
    listed = dead_letter_replay.summary(system.settings, limit=10_000)
    assert len(listed.letters) == sum(listed.reasons.values()) > 0
    for reason in listed.reasons:
        report = dead_letter_replay.replay(system.settings, reason=reason, limit=10_000)
        assert len(report.sent) + len(report.not_sent) == listed.reasons[reason]
    assert not (found := differences(system)), "\n".join(found)


@pytest.mark.long
def test_records_of_any_kind_in_topics_that_eddyline_writes(system: Live, maker: Maker) -> None:
    senders, settings = Senders(system), system.settings
    for _ in range(RECORDS // 2):
        senders.send(topics.DEAD_LETTERS, maker.any_bytes())
        vectors = maker.any_bytes()
        vectors.key = vectors.key or b"key"  # the broker refuses a record without one here
        senders.send(topics.item_vectors("1"), vectors)
    senders.close()
    listed = dead_letter_replay.summary(settings, limit=10_000)
    for reason in listed.reasons:
        dead_letter_replay.replay(settings, reason=reason, limit=10_000)
    system.item(Item(item_id="after-all-that", title="a", at_ms=now_ms()))
    system.applied()

    def seen() -> bool:
        answer = system.client().retrieve("nobody", settings.k_max, timeout_s=5)
        return any(item.item_id == "after-all-that" for item in answer.items)

    system.wait_for("the item behind the records", seen)
    assert is_ready(system.address)
    assert {name: n for name, (_, n) in system.supervisor.states().items() if n} == {}


# Bytes that a broker would still take: a forwarded record grows by its origin and its key.
SPARE = (0, 60, 120, 20_000)


@pytest.mark.long
def test_records_of_nearly_a_megabyte_are_applied_or_dead_letters(
    system: Live, maker: Maker
) -> None:
    senders, stored = Senders(system), []
    partitions = system.settings.clicks_partitions
    for spare in SPARE:
        for topic in topics.SOURCES:
            large = maker.large(topic, now_ms(), spare)
            stored.append(senders.send(topic, large))
            if topic == topics.CLICKS:
                assert large.partition is not None
                astray = Whole(large.key, large.value, partition=(large.partition + 1) % partitions)
                stored.append(senders.send(topic, astray))
                without_key = Whole(None, large.value, partition=astray.partition)
                stored.append(senders.send(topic, without_key))
    senders.close()
    assert all(future.succeeded() for future in stored), "the broker takes them all"
    assert not (found := differences(system)), "\n".join(found)
