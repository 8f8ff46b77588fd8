"""Records that would empty the title or all categories of an item: most likely parts of it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from eddyline.schema.partitioning import partition_of
from embeddings.data.sources import assemble
from streams.fences import PUBLISHED_SLOT, published_source
from streams.ports import Outcome
from tests.applying import batch_of, ingest
from tests.unit.streams.test_ingest_rules import HERE, SETTINGS, Rig
from tests.unit.streams.test_refused_newer import applied, refused_of, stored
from tests.unit.streams.test_strays import FILM, change, record

WHOLE: dict[str, Any] = {
    "title": "t",
    "categories": ["c", "d"],
    "attributes": {"price": 3},
    "at_ms": 5,
}


def of(offset: int, **fields: Any) -> Any:
    value = msgspec.json.encode({"item_id": FILM, **fields})
    return record(offset, value, offset, None, FILM, "items")


def body(rig: Rig) -> dict[str, Any]:
    found = stored(rig)
    assert found is not None
    return msgspec.json.decode(found.body)


@pytest.mark.parametrize("size", [1, 99])
@pytest.mark.parametrize(
    "part",
    [
        {"attributes": {"price": 2}},
        {"title": "", "categories": ["c"]},
        {"title": "u"},
        {"title": "u", "categories": []},
        {"title": "u", "categories": [""]},
        {"title": None, "categories": ["c"]},
    ],
)
def test_it_is_refused_and_marks_the_item(part: dict[str, Any], size: int) -> None:
    rig = applied([of(0, **WHOLE), of(1, **part)], size)
    assert rig.out.letters == [(1, "would_empty")] and refused_of(rig) == (1, "would_empty")
    assert body(rig)["title"] == "t" and body(rig)["categories"] == ["c", "d"]
    assert [one.offset for one in rig.out.published] == [0]
    [(key, value, partition)] = rig.out.forwarded  # for compaction and for the trainer
    assert (key, partition) == (FILM.encode(), HERE) and b'"title":"t"' in (value or b"")


@pytest.mark.parametrize(
    "log",
    [
        [of(0, **WHOLE), of(1, title="u", categories=["c"])],
        [of(0, title="t"), of(1, title="u")],
        [of(0, categories=["c"]), of(1, categories=["d"])],
        [of(0), of(1)],
        [of(0, **WHOLE), change(1, None, 1), of(2)],
        [of(0, tags=["x"], attributes={"price": 3}), of(1)],
    ],
)
def test_other_records_are_whole_items(log: list[Any]) -> None:
    rig = applied(log)
    assert rig.out.letters == [] and rig.out.forwarded == [] and refused_of(rig) is None
    found = stored(rig)
    assert found is not None and found.offset == log[-1].offset


def test_an_unavailable_item_keeps_both_so_no_later_record_shows_it_without() -> None:
    rig = applied([of(0, **WHOLE), of(1, available=False)])
    assert rig.out.letters == [] and rig.out.published[-1].retired
    assert (body(rig)["title"], body(rig)["available"]) == ("t", False)
    assert b'"available":false' in (rig.out.forwarded[0][1] or b"")
    ingest(rig.items, HERE, [of(2, available=True)])
    rig.items.flush()
    assert rig.out.letters == [(2, "would_empty")] and rig.out.published[-1].retired


def test_the_setting_accepts_it() -> None:
    rig = applied([of(0, **WHOLE), of(1)], refuse_emptied_items=False)
    assert rig.out.letters == [] and body(rig)["title"] == ""


def test_a_record_that_was_accepted_is_accepted_again_where_the_metadata_is_ahead() -> None:
    rig = applied([of(0), of(1, **WHOLE)])
    again = Rig()
    again.store.restore(rig.store.snapshot())
    again.store.drop_fences(PUBLISHED_SLOT, [published_source("g", HERE)])
    assert again.items.fences.open({HERE: (0, 99)}) == {HERE: 0}
    ingest(again.items, HERE, [of(0)])
    assert again.out.letters == [] and [one.offset for one in again.out.published] == [0]


def test_only_items_without_title_category_or_time_are_looked_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig, read = Rig(), list[Any]()
    one = rig.store.read_item_metadata
    monkeypatch.setattr(
        rig.store, "read_item_metadata", lambda ids, slots: read.append(ids) or one(ids, slots)
    )
    ingest(rig.items, HERE, [of(0, **WHOLE), of(1, **WHOLE)])
    assert read == []
    ingest(rig.items, HERE, [of(2), of(3)])
    assert read == [[FILM]]


def test_all_partitions_are_looked_up_in_one_round_trip(monkeypatch: pytest.MonkeyPatch) -> None:
    rig, read = Rig(), list[Any]()
    rig.items.fences.open({1 - HERE: (0, 99)})
    one = rig.store.read_item_metadata
    monkeypatch.setattr(
        rig.store, "read_item_metadata", lambda ids, slots: read.append(ids) or one(ids, slots)
    )
    there = next(f"t{n}" for n in range(50) if partition_of(f"t{n}", 2) != HERE)
    batches = []
    for partition, item_id in ((HERE, FILM), (1 - HERE, there)):
        value = msgspec.json.encode({"item_id": item_id, "title": "t", "categories": ["c"]})
        made = record(0, value, 0, None, item_id, "items")
        made.partition = partition
        batches.append(batch_of([made]))
    outcomes = rig.items.apply(batches)
    assert [one.applied for one in outcomes if isinstance(one, Outcome)] == [1, 1]
    assert read == [[FILM, there]]


def test_the_trainer_has_the_same_rule() -> None:
    data = assemble(SETTINGS, {"items": [of(0, **WHOLE), of(1)], "users": [], "clicks": []}, cut={})
    assert [item.title for item in data.items] == ["t"]
    assert data.versions == {FILM: (HERE, 0)} and data.rejected == {"would_empty": 1}
