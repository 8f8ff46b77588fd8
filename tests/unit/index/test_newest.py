"""The newest items: right after any writes, and cheap after each at a million items."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eddyline.schema.item_record import ItemRecord
from index.exact import ExactIndex
from index.factory import HnswIndex
from index.filters import Filter
from index.search import filtered, newest
from index.snapshot.format import Contents
from index.storage import index_version, item_offsets, vector_table
from index.storage.columns import ColumnData
from index.storage.index_version import IndexVersion
from index.writing import batch
from tests.unit.index.item_records import units

VECTOR = np.array([1.0, 0.0], np.float32)
TAGS = ({}, {"tags": ["a"]}, {"tags": ["a", "b"]})
# Six times the length of the list.
N = 100_000
WRITES = 64

write = st.tuples(
    st.integers(0, 30), st.integers(0, 3), st.sampled_from(["put", "put", "put", "delete"])
)


@given(
    batches=st.lists(st.lists(write, max_size=12), max_size=40),
    k=st.integers(0, 40),
    capacity=st.sampled_from([2, 64]),
    kept=st.sampled_from([2, 5, 10]),
    every=st.integers(1, 4),
)
@settings(max_examples=300, deadline=None)
def test_newest_is_that_of_brute_force_after_any_writes(
    batches: list[list[tuple[int, int, str]]], k: int, capacity: int, kept: int, every: int
) -> None:
    """Few times for many items; a list of few entries; tables that compact often."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (vector_table, item_offsets, index_version, batch):
            patch.setattr(module, "CAPACITY_MIN", capacity)
        patch.setattr(newest, "KEPT", kept)
        patch.setattr(newest, "KEPT_MAX", kept + 2)
        index, oracle, offset = HnswIndex(2), ExactIndex(2), 0
        for number, of_batch in enumerate(batches):
            records = []
            for item, at_ms, what in of_batch:
                offset += 1
                vector = None if what == "delete" else VECTOR
                tags = TAGS[item % 3]
                records.append(ItemRecord(f"i{item}", 0, offset, at_ms, 0, vector, tags))
            assert index.apply(records) == oracle.apply(records)
            if number % every:
                continue
            for filters in (
                None,
                Filter(tags=frozenset({"b"})),
                Filter(deny=frozenset({"i1", "i30"})),
                Filter(allow=frozenset({"i4", "i5", "i29"})),
            ):
                for exclude in ((), ("i2", "i3", "i9")):
                    expected = oracle.newest(k, exclude, filters)
                    assert index.newest(k, exclude, filters) == expected
        index.close()


def restored(n: int, times: np.ndarray) -> HnswIndex:
    """An index of n items; one in a hundred has the tag "rare"."""
    facts = np.zeros((n, 3), np.int64)
    facts[:, 0] = times
    rare = np.flatnonzero(np.arange(n) * 7_919 % 100 == 0)
    contents = Contents(
        ids=[f"item-{row * 7_919 % n:07}" for row in range(n)],
        vectors=np.tile(VECTOR, (n, 1)),
        facts=facts,
        deleted=np.empty((0, 3), np.int64),
        columns=(
            ColumnData([], np.zeros(1, np.int64), np.empty(0, np.int64), np.empty(0)),
            ColumnData([("tags", "rare")], np.array([0, len(rare)]), rare, None),
        ),
        watermarks={},
    )
    index = HnswIndex(2, exact_below=2 * n)
    index.restore(contents)
    return index


@pytest.mark.parametrize("equal", [False, True])
def test_newest_after_each_write_never_selects_from_all_items_again(
    equal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One selection from all rows at the first call; later calls cost the rows written since.

    `make bench-costs` has the time of a call at a million items.
    """
    times = np.full(N, 5_000) if equal else np.random.default_rng(1).permutation(N) + 1_000
    index = restored(N, times)
    rare = Filter(tags=frozenset({"rare"}))
    selections, inserted, filtered_rows = list[int](), list[int](), list[int]()
    first_rows, insert, passing = newest.first_rows, newest._insert, filtered.passing_rows

    def counted_selection(version: IndexVersion, need: int, mask: Any) -> Any:
        selections.append(version.used)
        return first_rows(version, need, mask)

    def counted_insert(found: Any, version: IndexVersion, keys: Any, rows: Any, new: Any) -> Any:
        inserted.append(len(new))
        return insert(found, version, keys, rows, new)

    def counted_filter(version: IndexVersion, rows: Any, filters: Filter) -> Any:
        filtered_rows.append(len(rows))
        return passing(version, rows, filters)

    monkeypatch.setattr(newest, "first_rows", counted_selection)
    monkeypatch.setattr(newest, "_insert", counted_insert)
    monkeypatch.setattr(filtered, "passing_rows", counted_filter)
    monkeypatch.setattr(filtered, "passing_mask", None)  # a mask costs as much as a selection
    index.newest(100)
    assert selections == [N]
    offset, vectors = 10, units(WRITES, 2, 1)
    for step in range(30):
        at_ms = 5_000 if equal else N // 2 + 20_000 * step
        first = N - 2_000 if step % 2 else 0
        names = [f"item-{first + 7 * step + n:07}" for n in range(WRITES)]
        records = [
            ItemRecord(name, 0, offset + n, at_ms, 0, None if (n + step) % 16 == 0 else vectors[n])
            for n, name in enumerate(names)
        ]
        offset += WRITES
        assert index.apply(records) == WRITES
        filtered_rows.clear()
        hits = index.newest(100)
        assert len(hits) == 100 and not filtered_rows
        assert len(index.newest(100, (), rare)) == 100
        assert sum(filtered_rows) <= newest.KEPT_MAX
    keys = [(-hit.at_ms, hit.item_id) for hit in hits]
    assert keys == sorted(keys)
    index.close()
    assert selections == [N]
    assert len(inserted) == 30 and max(inserted) <= WRITES
