"""Metadata and fences of items, written together with those of later batches."""

from __future__ import annotations

import random

import pytest

from eddyline.errors import FenceMoved, StoreUnavailable
from eddyline.kafka.topics import ITEMS
from eddyline.schema.events import Item
from eddyline.settings.loader import Settings
from eddyline.stores.memory import MemoryStore
from eddyline.stores.state_store import Fence, LogId, Source
from streams.fences import PartitionFences, sources
from streams.items.metadata import (
    METADATA_BATCH_MAX,
    METADATA_WAIT_S,
    ItemChange,
    ItemMetadataWriter,
)
from tests.simulation.test_ingest_faults import LOG, Rec

SETTINGS = Settings(items_partitions=2, item_slots=2)
PUBLISHED = Source("items@g", 0)


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Rig:
    def __init__(self, store: MemoryStore | None = None, wait_s: float = METADATA_WAIT_S) -> None:
        self.store, self.clock = store or MemoryStore(), Clock()
        self.fences = PartitionFences(SETTINGS, self.store, ITEMS, {ITEMS: LOG}, ["g"])
        self.fences.open({0: (0, 10_000), 1: (0, 10_000)})
        self.metadata = ItemMetadataWriter(
            SETTINGS, ["g"], self.store, self.fences, wait_s, self.clock
        )

    def add(self, *offsets: int, partition: int = 0) -> dict[int, Exception]:
        changes = {f"i{at}": change(at, partition) for at in offsets}
        return self.metadata.add({partition: (offsets[-1], changes)})

    def another_owner(self, partition: int) -> None:
        """Another process moves the fences of a partition."""
        for source, slots in sources(SETTINGS, ITEMS, partition, ["g"]).items():
            for slot in slots:
                self.store.write_item_metadata(slot, source, None, Fence(8, LOG), {})

    def kept(self, count: int) -> set[str]:
        return set(
            self.store.read_item_metadata([f"i{n}" for n in range(count)], SETTINGS.item_slots)
        )

    def offsets(self, partition: int = 0) -> set[int]:
        found = {
            fence
            for source, slots in sources(SETTINGS, ITEMS, partition, ["g"]).items()
            for fence in self.store.fences(source, slots).values()
        }
        return {-1 if fence is None else fence.offset for fence in found}


def change(offset: int, partition: int = 0) -> ItemChange:
    record = Rec("items", partition, offset, 1_000, b"k", b"v")
    return ItemChange(record, 1_000, Item(item_id=f"i{offset}"))


def test_they_wait_and_go_in_one_write_when_they_are_due() -> None:
    rig = Rig()
    assert rig.add(0) == {} and rig.add(1, 2) == {}
    assert rig.kept(9) == set() and rig.offsets() == {-1} and rig.metadata.due() == []
    rig.clock.now_s = METADATA_WAIT_S - 0.001
    assert rig.metadata.due() == [] and rig.add(3) == {} and rig.offsets() == {-1}
    rig.clock.now_s = METADATA_WAIT_S
    assert rig.metadata.due() == [0]
    rig.metadata.write(0)
    assert (
        rig.kept(9) == {"i0", "i1", "i2", "i3"}
        and rig.offsets() == {3}
        and rig.metadata.due() == []
    )
    assert rig.fences.lowest(0) == 3
    rig.metadata.write(0)  # nothing waits
    # The next change waits again; a change that comes after the wait is written with it.
    assert rig.add(4) == {} and rig.offsets() == {3}
    rig.clock.now_s = 2 * METADATA_WAIT_S
    assert rig.add(7) == {} and rig.offsets() == {7} and rig.kept(9) >= {"i4", "i7"}


def test_a_partition_waits_for_itself() -> None:
    rig = Rig()
    rig.add(5)
    rig.clock.now_s = 0.06
    rig.add(6, partition=1)
    rig.clock.now_s = METADATA_WAIT_S
    assert rig.metadata.due() == [0]
    rig.metadata.write(0)
    assert rig.offsets(0) == {5} and rig.offsets(1) == {-1}


@pytest.mark.parametrize(
    ("count", "waits"),
    [
        (1, True),
        (METADATA_BATCH_MAX - 1, True),
        (METADATA_BATCH_MAX, False),
        (METADATA_BATCH_MAX + 1, False),
        (3_000, False),
    ],
)
def test_enough_of_them_do_not_wait(count: int, waits: bool) -> None:
    rig = Rig()
    sizes, at, rng = [], 0, random.Random(count)
    while at < count:
        sizes.append(range(at, min(count, at + rng.randint(1, 40))))
        at = sizes[-1].stop
    for offsets in sizes:
        rig.add(*offsets)
        assert all(len(one.changes) < METADATA_BATCH_MAX for one in rig.metadata._pending.values())
    assert (rig.offsets() == {-1}) is waits


def test_without_a_wait_each_batch_is_written() -> None:
    rig = Rig(wait_s=0.0)
    rig.add(0, 1)
    assert rig.offsets() == {1} and rig.kept(3) == {"i0", "i1"}


def test_the_last_change_of_an_item_stands() -> None:
    rig = Rig()
    rig.add(0)
    rig.metadata.add(
        {0: (4, {"i0": ItemChange(Rec("items", 0, 4, 1_000, b"i0", None), 1_000, None)})}
    )
    rig.metadata.write(0)
    card = rig.store.read_item_metadata(["i0"], SETTINGS.item_slots)["i0"]
    assert (card.offset, card.body) == (4, b"")


def test_what_was_not_written_is_forgotten_when_the_partition_is_read_again() -> None:
    rig = Rig()
    rig.add(0)
    rig.metadata.reset(0)
    rig.clock.now_s = 1.0
    assert rig.metadata.due() == []
    rig.metadata.write(0)
    assert rig.offsets() == {-1} and rig.kept(3) == set()


def test_before_partitions_are_given_up_all_that_waits_is_written() -> None:
    rig = Rig()
    rig.add(3)
    rig.add(5, partition=1)
    rig.another_owner(1)
    assert sorted(rig.metadata.pending()) == [0, 1]
    rig.metadata.flush()
    # What another one wrote meanwhile stays, and nothing of it comes later.
    assert rig.offsets(0) == {3} and rig.offsets(1) == {8} and rig.metadata.pending() == []


def test_what_waits_is_written_for_partitions_that_are_ours_alone() -> None:
    rig = Rig()
    rig.add(3)
    assert rig.metadata.flush_due({0, 1}) is None and rig.offsets() == {-1}  # not due yet
    rig.clock.now_s = 1.0
    assert rig.metadata.flush_due({1}) is None and rig.metadata.pending() == [0]
    assert rig.metadata.flush_due({0, 1}) is None and rig.offsets() == {3}


@pytest.mark.parametrize("away", [False, True])
def test_a_refused_partition_is_to_be_read_again(away: bool) -> None:
    """Another process moved the fence: all writes are refused. Redis is away: later ones pass."""

    class Away(MemoryStore):
        def write_item_metadata_many(self, writes: object) -> list[None]:
            raise StoreUnavailable("away")

    rig = Rig(Away() if away else None)
    rig.add(3)
    if not away:
        rig.another_owner(0)
    rig.clock.now_s = 1.0
    assert rig.metadata.flush_due({0}) == 0 and rig.metadata.pending() == []
    if away:
        with pytest.raises(FenceMoved):
            rig.fences.begin(0, [change(4).record])
    else:
        rig.fences.begin(0, [change(4).record])
        rig.add(4)
        with pytest.raises(FenceMoved):
            rig.metadata.write(0)


def test_a_fence_is_of_the_log_that_was_read() -> None:
    rig = Rig()
    rig.add(3)
    rig.fences._log = LogId(
        "another", "log"
    )  # the topic was created again, and another partition opened
    rig.metadata.write(0)
    found = rig.store.fences(PUBLISHED, ["i0"])["i0"]
    assert found == Fence(3, LOG)


def test_another_owner_is_reported_for_its_partition_alone() -> None:
    rig = Rig()
    rig.add(0)
    rig.add(0, partition=1)
    rig.another_owner(0)
    rig.clock.now_s = 1.0
    failed = rig.metadata.add({0: (1, {}), 1: (1, {"i1": change(1, 1)})})
    assert list(failed) == [0] and isinstance(failed[0], FenceMoved)
    assert rig.offsets(1) == {1}
    rig.add(2)
    with pytest.raises(FenceMoved):
        rig.metadata.write(0)


def test_a_store_that_is_away_is_reported_for_each() -> None:
    class Away(MemoryStore):
        def write_item_metadata_many(self, writes: object) -> list[None]:
            raise StoreUnavailable("away")

    rig = Rig(Away(), wait_s=0.0)
    failed = rig.metadata.add({0: (1, {}), 1: (1, {})})
    assert set(failed) == {0, 1} and all(
        isinstance(error, StoreUnavailable) for error in failed.values()
    )
