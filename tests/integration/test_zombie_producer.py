"""A process that lost its partition unnoticed publishes no old record behind a newer one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
import pytest

from eddyline.kafka import reading, topics
from eddyline.schema.item_record import ItemRecord, decode_record
from eddyline.settings.loader import Settings
from streams.items import publisher
from streams.items.publisher import TransactionalPublisher
from streams.ports import PartitionLost

pytestmark = pytest.mark.timeout(90)
VECTOR = np.array([1, 0], np.float32)


@pytest.fixture
def settings(fresh_settings: Settings) -> Settings:
    topics.ensure_topics(fresh_settings, [topics.item_vectors("1")])
    return fresh_settings


def change(offset: int, item_id: str = "film", *, deleted: bool = False) -> ItemRecord:
    return ItemRecord(item_id, 0, offset, offset, 0, None if deleted else VECTOR, {})


def published(settings: Settings) -> list[tuple[str, int, bool]]:
    """What a worker reads, committed records only: (item, version, whether it is retired), in this
    order.
    """
    records = reading.read(settings, topics.item_vectors("1"), {0: 0})
    found = [decode_record(record.key, record.value) for record in records]
    return [(record.item_id, record.offset, record.retired) for record in found]


def publish(who: TransactionalPublisher, *changes: ItemRecord) -> None:
    for error in who.publish({0: changes}).values():
        raise error


@pytest.fixture(params=[0, 3_600], ids=["each in a transaction", "by epoch"])
def pair(
    settings: Settings, request: pytest.FixtureRequest
) -> Iterator[list[TransactionalPublisher]]:
    """The zombie to be, and the owner after it."""
    yield from two(settings, request.param)


def two(settings: Settings, fence_s: int) -> Iterator[list[TransactionalPublisher]]:
    settings = msgspec.structs.replace(settings, items_fence_s=fence_s)
    both = [TransactionalPublisher(settings, "1") for _ in range(2)]
    yield both
    for one in both:
        one.close()


def test_a_zombie_that_wakes_up_later_is_refused(
    settings: Settings, pair: list[TransactionalPublisher]
) -> None:
    zombie, owner = pair
    publish(zombie, change(5))
    owner.open(0)  # the partition was assigned to another process
    publish(owner, change(6), change(7, deleted=True))
    with pytest.raises(PartitionLost):
        publish(zombie, change(6))
    publish(owner, change(8, "other"))
    assert published(settings) == [
        ("film", 5, False),
        ("film", 6, False),
        ("film", 7, True),
        ("other", 8, False),
    ]


def test_what_a_zombie_wrote_before_its_successor_lies_in_front(settings: Settings) -> None:
    for zombie, owner in two(settings, 3_600):
        publish(zombie, change(5))
        owner.open(0)
        publish(zombie, change(6))  # it was under way while the other opened
        publish(owner, change(6), change(7, deleted=True))
        with pytest.raises(PartitionLost):
            publish(zombie, change(6, "other"))
        assert published(settings) == [
            ("film", 5, False),
            ("film", 6, False),
            ("film", 6, False),
            ("film", 7, True),
        ]


def test_a_producer_that_has_not_proved_itself_for_long_does_it_again(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if its successor has written nothing yet: the partition knows no other epoch."""
    now_s = 1_000.0
    monkeypatch.setattr(publisher, "_since_boot_s", lambda: now_s)
    for zombie, owner in two(settings, 60):
        for offset in range(4):
            publish(zombie, change(offset))
            now_s += 40
        for offset in range(4, 8):  # right after a transaction, too
            publish(zombie, change(offset))
        assert published(settings) == [("film", offset, False) for offset in range(8)]
        owner.open(0)
        now_s += 61
        with pytest.raises(PartitionLost):
            publish(zombie, change(8))
        publish(owner, change(8, deleted=True))
        assert published(settings)[8:] == [("film", 8, True)]


def test_a_zombie_in_the_middle_of_a_transaction_is_undone(settings: Settings) -> None:
    """It has sent its records and stands still before the commit, while another takes over and
    deletes.
    """
    sent, taken_over = threading.Event(), threading.Event()

    def be_the_zombie(zombie: TransactionalPublisher) -> None:
        producer = zombie._producers[0]
        commit = producer.commit_transaction

        async def held_up() -> None:
            sent.set()  # its records lie in the log, not committed
            assert taken_over.wait(30)
            await commit()

        producer.commit_transaction = held_up
        publish(zombie, change(6), change(6, "other"))

    with ThreadPoolExecutor(1) as thread:
        for zombie, owner in two(settings, 0):
            publish(zombie, change(5))
            waking = thread.submit(be_the_zombie, zombie)
            try:
                assert sent.wait(30)
                owner.open(0)
                publish(owner, change(6), change(7, deleted=True))
            finally:
                taken_over.set()
            with pytest.raises(PartitionLost):
                waking.result(timeout=40)
            assert published(settings) == [
                ("film", 5, False),
                ("film", 6, False),
                ("film", 7, True),
            ]
            assert topics.end_offsets(settings, topics.item_vectors("1"))[0] > 6, (
                "its records were in the log"
            )
