"""A process that lost its partition without noticing publishes nothing older behind what is newer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from eddyline import kafka
from eddyline.cli import topics
from eddyline.records import ItemRecord, decode_record
from eddyline.settings import Settings
from streams import publisher
from streams.chunk import PartitionLost
from streams.publisher import TransactionalPublisher

pytestmark = pytest.mark.timeout(90)
VECTOR = np.array([1, 0], np.float32)


@pytest.fixture
def settings(fresh_settings: Settings) -> Settings:
    kafka.ensure_topics(fresh_settings, [kafka.item_vectors("1")])
    return fresh_settings


def change(offset: int, item_id: str = "film", *, deleted: bool = False) -> ItemRecord:
    return ItemRecord(item_id, 0, offset, offset, 0, None if deleted else VECTOR, {})


def published(settings: Settings) -> list[tuple[str, int, bool]]:
    """What a worker reads, committed records only: (item, version, whether it is retired), in this order."""
    records = topics.read(settings, kafka.item_vectors("1"), {0: 0})
    found = [decode_record(record.key, record.value) for record in records]
    return [(record.item_id, record.offset, record.retired) for record in found]


def test_a_zombie_that_wakes_up_later_is_refused(settings: Settings) -> None:
    zombie, owner = TransactionalPublisher(settings, "1"), TransactionalPublisher(settings, "1")
    try:
        zombie.publish(0, [change(5)])
        owner.open(0)  # the partition was assigned to another process
        owner.publish(0, [change(6), change(7, deleted=True)])
        with pytest.raises(PartitionLost):
            zombie.publish(0, [change(6)])
        owner.publish(0, [change(8, "other")])
        assert published(settings) == [
            ("film", 5, False), ("film", 6, False), ("film", 7, True), ("other", 8, False),
        ]  # fmt: skip
    finally:
        zombie.close()
        owner.close()


def test_a_zombie_in_the_middle_of_a_transaction_is_undone(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has sent its records and stands still before the commit, while another takes over and deletes."""
    sent, taken_over, stand_still = threading.Event(), threading.Event(), threading.local()
    commit = publisher.in_time

    def held_up(call: Callable[[], object], timeout_s: float) -> None:
        if getattr(stand_still, "here", False):
            zombie._producers[0].flush(timeout=10)  # they lie in the log, not committed
            sent.set()
            assert taken_over.wait(30)
        commit(call, timeout_s)

    monkeypatch.setattr(publisher, "in_time", held_up)
    zombie, owner = TransactionalPublisher(settings, "1"), TransactionalPublisher(settings, "1")

    def be_the_zombie() -> Any:
        stand_still.here = True
        zombie.publish(0, [change(6), change(6, "other")])

    with ThreadPoolExecutor(1) as thread:
        try:
            zombie.publish(0, [change(5)])
            waking = thread.submit(be_the_zombie)
            assert sent.wait(30)
            owner.open(0)
            owner.publish(0, [change(6), change(7, deleted=True)])
            taken_over.set()
            with pytest.raises(PartitionLost):
                waking.result(timeout=40)
            assert published(settings) == [("film", 5, False), ("film", 6, False), ("film", 7, True)]
            assert kafka.end_offsets(settings, kafka.item_vectors("1"))[0] > 6, "its records were in the log"
        finally:
            taken_over.set()
            zombie.close()
            owner.close()
