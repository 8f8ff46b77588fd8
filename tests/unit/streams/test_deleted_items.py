"""Deleted items: after their end an older change finds no item; they are removed without effect."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from eddyline.schema.partitioning import item_slots
from eddyline.settings.loader import Settings
from eddyline.stores.memory import MemoryStore
from eddyline.stores.state_store import Fence, LogId, Mark, Source
from streams.deleted_items import DeletedItems
from streams.fences import PUBLISHED_SLOT, PartitionFences, published_source
from tests.applying import ingest
from tests.unit.streams.test_emptied_items import of
from tests.unit.streams.test_ingest_rules import FILM, HERE, MS, SETTINGS, Rig
from tests.unit.streams.test_refused_newer import applied, stored
from tests.unit.streams.test_strays import OTHER, change, title_of

KEPT_S = 100
# The bound itself still counts as deleted.
LAST = 6 + 1_000 * KEPT_S


def remove(rig: Rig, slack_ms: int = 0) -> int:
    slots = item_slots(SETTINGS.item_slots)
    return sum(rig.store.remove_deleted_items(slots, SETTINGS.items_partitions, slack_ms))


@pytest.mark.parametrize("removed", [False, True])
@pytest.mark.parametrize("size", [1, 2, 99])
@pytest.mark.parametrize(
    ("at", "shown", "restored"), [(LAST, None, [None]), (LAST + 1, "older", [])]
)
def test_an_older_change_finds_no_item_once_its_delete_has_ended(
    at: int, shown: str | None, restored: list[Any], size: int, removed: bool
) -> None:
    before = [change(0, "a", 1), change(1, None, 6), of(2, title="other")]
    before[2].key, before[2].timestamp = b"another", MS + at
    before[2].value = before[2].value.replace(FILM.encode(), b"another")
    rig = applied(before, size, deleted_items_kept_s=KEPT_S)
    if removed:
        assert remove(rig) == (at > LAST)
    ingest(rig.items, HERE, [change(3, "older", at, (OTHER, 5))])
    rig.items.flush()
    found = stored(rig)
    assert found is not None and title_of(found.body) == shown
    assert [title_of(value) for _, value, _ in rig.out.forwarded] == restored


def test_a_delete_that_is_appended_again_is_kept_from_then_on() -> None:
    """As Kafka does: after compaction the later delete record is the one that is left."""
    log = [change(0, None, 6), change(1, "a", 50, (OTHER, 5)), change(2, None, 60, (HERE, 6))]
    for kept in (log, log[1:], log[2:]):
        rig = applied(kept, deleted_items_kept_s=KEPT_S)
        found = stored(rig)
        assert found is not None and (found.first_ms, found.deleted) == (MS + 6, True)
        assert found.ends_ms == MS + 60 + 1_000 * KEPT_S


@pytest.mark.parametrize(
    ("kept_s", "ends_ms"), [(0, 0), (1, MS + 1_006), (SETTINGS.deleted_items_kept_s, None)]
)
def test_the_setting_holds_from_the_delete_on(kept_s: int, ends_ms: int | None) -> None:
    found = stored(applied([change(0, None, 6)], deleted_items_kept_s=kept_s))
    assert found is not None
    assert found.ends_ms == (MS + 6 + 2_592_000_000 if ends_ms is None else ends_ms)
    untimed = change(0, None, 6)
    untimed.timestamp = -1
    found = stored(applied([untimed], deleted_items_kept_s=kept_s))
    assert found is not None and found.ends_ms == 0


def test_a_new_generation_reads_patches_of_an_item_that_was_removed() -> None:
    """The metadata no longer says what they made; the delete that follows does."""
    log = [of(0, title="t"), of(1, attributes={"price": 2}), change(2, None, 6)]
    log.append(of(3, title="other"))
    log[3].key, log[3].timestamp = b"another", MS + LAST + 1
    log[3].value = log[3].value.replace(FILM.encode(), b"another")
    rig = applied(log, items_patches=True, deleted_items_kept_s=KEPT_S)
    assert remove(rig) == 1 and stored(rig) is None
    rig.store.drop_fences(PUBLISHED_SLOT, [published_source("g", HERE)])
    again = Rig(items_patches=True, deleted_items_kept_s=KEPT_S)
    again.store.restore(rig.store.snapshot())
    assert again.items.fences.open({HERE: (0, 99)}) == {HERE: 0}
    for one in log:
        ingest(again.items, HERE, [one])
    again.items.flush()
    assert again.out.letters == []
    last = {record.item_id: record for record in again.out.published}
    assert last[FILM].retired and not last["another"].retired and stored(again) is None


@pytest.mark.parametrize("opened", [0, 1])
@pytest.mark.parametrize(
    ("kept_s", "since_s", "removed"),
    [
        (86_400, 86_400 + 3_600, 0),
        (86_400, 86_400 + 3_601, 1),
        (100, 125, 0),
        (100, 126, 1),
        # The setting of now decides on the slack alone.
        (0, 3_600, 0),
        (0, 3_601, 1),
    ],
)
def test_removal_waits_until_a_brokers_clock_cannot_go_back(
    kept_s: int, since_s: int, removed: int, opened: int
) -> None:
    store, log = MemoryStore(), LogId("cluster", "topic")
    settings = Settings(items_partitions=2, deleted_items_kept_s=kept_s)
    item = replace(stored_delete(), ends_ms=MS + 1_000 * kept_s)
    fence = Fence(1, log, Mark(1, MS + 1_000 * since_s, 0))
    for name in ("i0", "i1"):
        store.write_item_metadata(name, Source("items", 1), None, fence, {f"x{name}": item})
    fences = PartitionFences(settings, store, "items", {"items": log})
    fences.open({opened: (0, 2)})
    deleted = DeletedItems(settings, store, fences)
    deleted.check()
    # Another process has partition 0.
    assert deleted.removed == (removed if opened == 0 else 0)


def stored_delete() -> Any:
    found = stored(applied([change(0, None, 6)]))
    assert found is not None
    return replace(found, partition=1)
