"""Items without a time are as new as their first record."""

from __future__ import annotations

from typing import Any

import pytest

from embeddings.data.sources import assemble
from streams.fences import PUBLISHED_SLOT, published_source
from tests.applying import ingest
from tests.unit.streams.test_emptied_items import of
from tests.unit.streams.test_ingest_rules import HERE, MS, SETTINGS, Rig
from tests.unit.streams.test_refused_newer import applied, bad, stored
from tests.unit.streams.test_strays import FILM, OTHER, change, record

PARTS: dict[str, Any] = {"title": "t", "categories": ["c"]}
LOGS = {
    "first record": ([of(1, **PARTS), of(2, **PARTS), of(3, **PARTS)], MS + 1, MS + 1),
    "its own time": ([of(1, **PARTS), of(2, at_ms=7, **PARTS)], 7, 0),
    "no time any more": ([of(1, at_ms=7, **PARTS), of(2, **PARTS)], MS + 2, MS + 2),
    "deleted before": ([of(1, **PARTS), change(2, None, 2), of(3, **PARTS)], MS + 3, MS + 3),
    "forwarded": (
        [record(4, of(1, **PARTS).value, 9, (OTHER, 2), FILM, "items"), of(5, **PARTS)],
        MS + 2,
        MS + 2,
    ),
    "a refused record before": ([of(1, **PARTS), bad(2, 2), of(3, **PARTS)], MS + 1, MS + 1),
}


@pytest.mark.parametrize("size", [1, 2, 99])
@pytest.mark.parametrize(("log", "shown", "born"), LOGS.values(), ids=LOGS)
def test_an_item_is_as_new_as_its_time_or_its_first_record(
    log: list[Any], shown: int, born: int, size: int
) -> None:
    rig = applied(log, size)
    found = stored(rig)
    assert found is not None and found.born_ms == born
    assert rig.out.published[-1].at_ms == shown
    assert f'"at_ms":{0 if born else 7}'.encode() in found.body  # what the record says


@pytest.mark.parametrize("patches", [False, True])
def test_so_are_patches(patches: bool) -> None:
    rig = applied([of(1, **PARTS), of(2, **PARTS)], items_patches=patches)
    assert [one.at_ms for one in rig.out.published] == [MS + 1]


@pytest.mark.parametrize("size", [1, 2, 99])
def test_where_the_metadata_is_ahead_the_birth_of_the_stored_item_is_published(size: int) -> None:
    """A generation that reads the topic again: deletes of before, and patches that say nothing."""
    log = [of(1, **PARTS), change(2, None, 2), of(3, title="u"), of(4, categories=["d"])]
    rig = applied(log, items_patches=True)
    assert rig.out.published[-1].at_ms == MS + 3
    again = Rig(items_patches=True)
    again.store.restore(rig.store.snapshot())
    again.store.drop_fences(PUBLISHED_SLOT, [published_source("g", HERE)])
    again.items.fences.open({HERE: (0, 99)})
    for first in range(0, len(log), size):
        ingest(again.items, HERE, log[first : first + size])
    last = again.out.published[-1]
    assert (last.offset, last.at_ms) == (4, MS + 3)
    found = stored(again)
    assert found is not None and found.born_ms == MS + 3


@pytest.mark.parametrize("name", ["first record", "its own time", "deleted before"])
def test_the_trainer_has_the_same_times(name: str) -> None:
    log, shown, _ = LOGS[name]
    data = assemble(SETTINGS, {"items": log, "users": [], "clicks": []}, cut={})
    assert [item.at_ms for item in data.items] == [shown]
