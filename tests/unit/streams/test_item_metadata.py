"""Cards and fences of items that wait for those of more chunks."""

from __future__ import annotations

import random

import pytest

from eddyline.errors import FenceMoved, StoreUnavailable
from eddyline.schema.events import Item
from eddyline.settings.loader import Settings
from eddyline.stores.memory import MemoryStore
from eddyline.stores.state_store import Fence, LogId, Source
from streams.fences import PartitionFences
from streams.items.metadata import (
    METADATA_BATCH_MAX,
    METADATA_WAIT_S,
    ItemChange,
    ItemMetadataWriter,
    sources,
)
from streams.write_behind import flush, flush_due
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
        self.positions = PartitionFences(
            self.store, "items", lambda p: sources(SETTINGS, "g", p), lambda: LOG
        )
        self.positions.open({0: (0, 10_000), 1: (0, 10_000)})
        self.cards = ItemMetadataWriter(
            SETTINGS, "g", self.store, self.positions, wait_s, self.clock
        )

    def add(self, *offsets: int, partition: int = 0) -> dict[int, Exception]:
        changes = {f"i{at}": change(at, partition) for at in offsets}
        return self.cards.add({partition: (offsets[-1], changes)})

    def another_owner(self, partition: int) -> None:
        """Another process moves the fences of a partition."""
        for source, slots in sources(SETTINGS, "g", partition).items():
            for slot in slots:
                self.store.write_item_metadata(slot, source, None, Fence(8, LOG), {})

    def kept(self, count: int) -> set[str]:
        return set(
            self.store.read_item_metadata([f"i{n}" for n in range(count)], SETTINGS.item_slots)
        )

    def fences(self, partition: int = 0) -> set[int]:
        found = {
            fence
            for source, slots in sources(SETTINGS, "g", partition).items()
            for fence in self.store.fences(source, slots).values()
        }
        return {-1 if fence is None else fence.offset for fence in found}


def change(offset: int, partition: int = 0) -> ItemChange:
    record = Rec("items", partition, offset, 1_000, b"k", b"v")
    return ItemChange(record, 1_000, Item(item_id=f"i{offset}"))


def test_they_wait_and_go_in_one_write_when_they_are_due() -> None:
    rig = Rig()
    assert rig.add(0) == {} and rig.add(1, 2) == {}
    assert rig.kept(9) == set() and rig.fences() == {-1} and rig.cards.due() == []
    rig.clock.now_s = METADATA_WAIT_S - 0.001
    assert rig.cards.due() == [] and rig.add(3) == {} and rig.fences() == {-1}
    rig.clock.now_s = METADATA_WAIT_S
    assert rig.cards.due() == [0]
    rig.cards.write(0)
    assert rig.kept(9) == {"i0", "i1", "i2", "i3"} and rig.fences() == {3} and rig.cards.due() == []
    assert rig.positions.lowest(0) == 3
    rig.cards.write(0)  # nothing waits
    # The next one waits anew; the one that comes when it has waited takes it along.
    assert rig.add(4) == {} and rig.fences() == {3}
    rig.clock.now_s = 2 * METADATA_WAIT_S
    assert rig.add(7) == {} and rig.fences() == {7} and rig.kept(9) >= {"i4", "i7"}


def test_a_partition_waits_for_itself() -> None:
    rig = Rig()
    rig.add(5)
    rig.clock.now_s = 0.06
    rig.add(6, partition=1)
    rig.clock.now_s = METADATA_WAIT_S
    assert rig.cards.due() == [0]
    rig.cards.write(0)
    assert rig.fences(0) == {5} and rig.fences(1) == {-1}


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
        assert all(len(tally.changes) < METADATA_BATCH_MAX for tally in rig.cards._tallies.values())
    assert (rig.fences() == {-1}) is waits


def test_without_a_wait_each_chunk_is_written() -> None:
    rig = Rig(wait_s=0.0)
    rig.add(0, 1)
    assert rig.fences() == {1} and rig.kept(3) == {"i0", "i1"}


def test_the_last_change_of_an_item_stands() -> None:
    rig = Rig()
    rig.add(0)
    rig.cards.add({0: (4, {"i0": ItemChange(Rec("items", 0, 4, 1_000, b"i0", None), 1_000, None)})})
    rig.cards.write(0)
    card = rig.store.read_item_metadata(["i0"], SETTINGS.item_slots)["i0"]
    assert (card.offset, card.body) == (4, b"")


def test_what_was_not_written_is_forgotten_when_the_partition_is_read_again() -> None:
    rig = Rig()
    rig.add(0)
    rig.cards.opened(0)
    rig.clock.now_s = 1.0
    assert rig.cards.due() == []
    rig.cards.write(0)
    assert rig.fences() == {-1} and rig.kept(3) == set()


def test_before_partitions_are_given_up_all_that_waits_is_written() -> None:
    rig = Rig()
    rig.add(3)
    rig.add(5, partition=1)
    rig.another_owner(1)
    assert sorted(rig.cards.waiting()) == [0, 1]
    flush(rig.cards)
    # What another one wrote meanwhile stays, and nothing of it comes later.
    assert rig.fences(0) == {3} and rig.fences(1) == {8} and rig.cards.waiting() == []


def test_what_waits_is_written_for_partitions_that_are_ours_alone() -> None:
    rig = Rig()
    rig.add(3)
    assert flush_due(rig.cards, rig.positions, {0, 1}) is None and rig.fences() == {
        -1
    }  # not due yet
    rig.clock.now_s = 1.0
    assert flush_due(rig.cards, rig.positions, {1}) is None and rig.cards.waiting() == [0]
    assert flush_due(rig.cards, rig.positions, {0, 1}) is None and rig.fences() == {3}


@pytest.mark.parametrize("away", [False, True])
def test_a_refused_partition_is_to_be_read_again(away: bool) -> None:
    """Where another one moved the fence, all of ours are refused; where Redis is away, later ones are not."""

    class Away(MemoryStore):
        def write_item_metadata_many(self, writes: object) -> list[None]:
            raise StoreUnavailable("away")

    rig = Rig(Away() if away else None)
    rig.add(3)
    if not away:
        rig.another_owner(0)
    rig.clock.now_s = 1.0
    assert flush_due(rig.cards, rig.positions, {0}) == 0 and rig.cards.waiting() == []
    if away:
        with pytest.raises(FenceMoved):
            rig.positions.begin(0, 4, 4)
    else:
        rig.positions.begin(0, 4, 4)
        rig.add(4)
        with pytest.raises(FenceMoved):
            rig.cards.write(0)


def test_a_fence_is_of_the_log_that_was_read() -> None:
    rig = Rig()
    rig.add(3)
    rig.positions._log = LogId(
        "another", "log"
    )  # the topic was made anew, and another partition opened
    rig.cards.write(0)
    found = rig.store.fences(PUBLISHED, ["i0"])["i0"]
    assert found == Fence(3, LOG)


def test_another_owner_is_told_of_and_of_his_partition_alone() -> None:
    rig = Rig()
    rig.add(0)
    rig.add(0, partition=1)
    rig.another_owner(0)
    rig.clock.now_s = 1.0
    failed = rig.cards.add({0: (1, {}), 1: (1, {"i1": change(1, 1)})})
    assert list(failed) == [0] and isinstance(failed[0], FenceMoved)
    assert rig.fences(1) == {1}
    rig.add(2)
    with pytest.raises(FenceMoved):
        rig.cards.write(0)


def test_a_store_that_is_away_is_told_of_for_each() -> None:
    class Away(MemoryStore):
        def write_item_metadata_many(self, writes: object) -> list[None]:
            raise StoreUnavailable("away")

    rig = Rig(Away(), wait_s=0.0)
    failed = rig.cards.add({0: (1, {}), 1: (1, {})})
    assert set(failed) == {0, 1} and all(
        isinstance(error, StoreUnavailable) for error in failed.values()
    )
