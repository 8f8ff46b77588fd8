"""Offsets without a record at a partition's end: the fences of an idle partition pass them."""

from __future__ import annotations

from typing import Any

import pytest

from eddyline.errors import FenceMoved, LogMismatch, StoreUnavailable
from eddyline.kafka.topics import CLICKS, ITEMS, USERS
from eddyline.stores.state_store import Fence, Source
from streams.fences import PartitionFences
from tests.applying import ingest
from tests.unit.streams.test_ingest_rules import HERE, LOG, SETTINGS, Rig, click, item, profile


def rig_with(name: str) -> tuple[Rig, Any, Any]:
    """(the rig, the handler of a topic, one record of it at the offset 3)."""
    rig = Rig()
    record = {CLICKS: click(3), USERS: profile(3, {}), ITEMS: item(3)}[name]
    return rig, {CLICKS: rig.clicks, USERS: rig.users, ITEMS: rig.items}[name], record


def stored(rig: Rig, name: str) -> set[int]:
    """The offsets of all stored fences of a topic, of every slot and generation."""
    fences = PartitionFences(SETTINGS, rig.store, name, {name: LOG}, ["g"] if name == ITEMS else [])
    fences.open({HERE: (0, 1_000)})
    return {-1 if f is None else f.offset for f in fences._fences_of(HERE).values()}


@pytest.mark.parametrize("name", [CLICKS, USERS, ITEMS])
def test_every_fence_of_an_idle_partition_passes_a_marker(name: str) -> None:
    rig, handler, record = rig_with(name)
    ingest(handler, HERE, [record], 0)
    handler.flush()
    assert handler.skip_empty(HERE, 3, 4)
    assert stored(rig, name) == {4} and handler.fences.lowest(HERE) == 4
    assert not handler.skip_empty(HERE, 3, 4)  # nothing is left to do
    assert handler.skip_empty(HERE, 3, 6)  # a second marker
    assert stored(rig, name) == {6} and handler.fences.find_diverged([HERE]) == []


@pytest.mark.parametrize("name", [CLICKS, USERS, ITEMS])
def test_a_partition_that_begins_with_a_marker_gets_fences(name: str) -> None:
    rig, handler, _ = rig_with(name)
    assert handler.skip_empty(HERE, -1, 0) and stored(rig, name) == {0}


def test_records_after_the_marker_are_applied() -> None:
    rig = Rig()
    ingest(rig.clicks, HERE, [click(3, "a")], 0)
    rig.clicks.flush()
    assert rig.clicks.skip_empty(HERE, 3, 4)
    ingest(rig.clicks, HERE, [click(5, "b")], 0)
    rig.clicks.write_behind.write(HERE)
    assert rig.entries() == ["b", "a"]
    assert list(rig.store.popular("i0", 9).values()) == [{"a": 1_000, "b": 1_000}]


@pytest.mark.parametrize(("taken", "last"), [(4, 5), (2, 3), (0, 2)])
def test_no_fence_moves_over_records_that_are_not_applied_or_back(taken: int, last: int) -> None:
    """A record at 4 was fetched and is not applied; or the look is older than the last batch."""
    rig = Rig()
    ingest(rig.clicks, HERE, [click(3)], 0)
    rig.clicks.flush()
    assert not rig.clicks.skip_empty(HERE, taken, last)
    assert stored(rig, CLICKS) == {3}


def test_no_fence_moves_over_counts_that_are_not_written() -> None:
    rig = Rig()
    ingest(rig.clicks, HERE, [click(3)], 0)
    assert not rig.clicks.skip_empty(HERE, 3, 4)
    rig.clicks.flush()
    assert rig.clicks.skip_empty(HERE, 3, 4)


def test_a_refused_partition_keeps_its_fences_until_it_is_opened() -> None:
    rig = Rig()
    ingest(rig.clicks, HERE, [click(3)], 0)
    rig.clicks.flush()
    rig.clicks.fences.invalidate(HERE)
    assert not rig.clicks.skip_empty(HERE, 3, 4)


def test_the_fence_of_another_owner_is_not_overwritten() -> None:
    rig = Rig()
    ingest(rig.clicks, HERE, [click(3)], 0)
    rig.clicks.flush()
    source = Source(CLICKS, HERE)
    slot = f"u{HERE}"
    rig.store.write_item_metadata(slot, source, Fence(3, LOG), Fence(9, LOG), {})
    with pytest.raises((FenceMoved, StoreUnavailable)):
        rig.clicks.skip_empty(HERE, 3, 4)
    assert rig.store.fences(source, [slot])[slot] == Fence(9, LOG)


def test_a_marker_whose_segment_expired_is_no_loss_and_a_click_is_one() -> None:
    rig = Rig()
    ingest(rig.clicks, HERE, [click(3)], 0)
    rig.clicks.flush()
    rig.clicks.skip_empty(HERE, 3, 4)
    fences = PartitionFences(SETTINGS, rig.store, CLICKS, {CLICKS: LOG})
    assert fences.open({HERE: (5, 5)}) == {HERE: 5}
    with pytest.raises(LogMismatch, match="offsets 5 to 5"):
        fences.open({HERE: (6, 6)})
