"""The mapped vectors of a snapshot stay in place, shared between processes, under all writes."""

from pathlib import Path

import numpy as np
import pytest

from eddyline.schema.item_key import keys_of
from eddyline.schema.item_record import ItemRecord
from index.exact import ExactIndex
from index.factory import HnswIndex
from index.snapshot import format
from index.snapshot.format import Origin
from index.storage.vector_table import CAPACITY_MIN, VectorTable
from tests.unit.index.item_records import units

D, N = 8, 1_200
ORIGIN = Origin(generation="g1", dimension=D, bundle_ms=1, log="cluster/topic")


def changes(step: int, items: range, *, retire: int = 0) -> list[ItemRecord]:
    vectors = units(len(items), D, step)
    return [
        ItemRecord(
            f"i{n}",
            0,
            10_000 * step + at,
            n,
            0,
            None if at < retire else v,
            {"tags": [f"t{n % 3}"]},
        )
        for at, (n, v) in enumerate(zip(items, vectors, strict=True))
    ]


def both(tmp_path: Path) -> tuple[HnswIndex, ExactIndex]:
    """An index restored from a file, and the oracle."""
    first, oracle = HnswIndex(D, exact_below=10**6), ExactIndex(D)
    for each in (first, oracle):
        each.apply(changes(1, range(N)))
        each.apply(changes(2, range(0, 100), retire=50))
    format.write(tmp_path / "x", first.contents(), ORIGIN, {}, 1)
    contents, _ = format.load(tmp_path / "x", ORIGIN, 0)
    index = HnswIndex(D, m=8, ef_construction=40, exact_below=200, fresh_max=10**6)
    index._due = lambda: False  # type: ignore[method-assign]
    index.restore(contents)
    assert index._version.table.base is contents.vectors
    return index, oracle


def same(index: HnswIndex, oracle: ExactIndex) -> None:
    assert index.stats().live == oracle.stats().live
    for query in units(3, D, 99):
        assert index.query(query, 60) == oracle.query(query, 60)
    names = [f"i{n}" for n in range(0, N, 37)]
    assert index.describe(names) == oracle.describe(names)
    assert index.find_keys(keys_of(names)) == oracle.describe(names)
    np.testing.assert_array_equal(index.vectors_of(names), oracle.vectors_of(names))


@pytest.mark.parametrize("graph", [False, True])
def test_writes_leave_the_mapped_vectors_in_place(tmp_path: Path, graph: bool) -> None:
    index, oracle = both(tmp_path)
    base = index._version.table.base
    same(index, oracle)
    if graph:
        assert index.rebuild()
    # The same 500 items repeatedly: the own rows fill up several times.
    for step in range(3, 11):
        for each in (index, oracle):
            each.apply(changes(step, range(100, 600), retire=step))
        same(index, oracle)
        if graph and step % 5 == 4:
            assert index.flush() if step == 4 else index.rebuild()
            same(index, oracle)
    table = index._version.table
    assert table.base is base and not base.flags.writeable
    assert len(table.own) <= 2 * (500 + 500) + CAPACITY_MIN
    # The next snapshot is complete.
    format.write(tmp_path / "y", index.contents(), ORIGIN, {}, 1)
    contents, _ = format.load(tmp_path / "y", ORIGIN, 0)
    again = HnswIndex(D, exact_below=10**6)
    again.restore(contents)
    same(again, oracle)


def test_a_base_is_dropped_once_less_than_half_of_it_lives(tmp_path: Path) -> None:
    index, oracle = both(tmp_path)
    for each in (index, oracle):
        for step in range(3, 9):
            each.apply(changes(step, range(N // 2 + 100)))
    assert len(index._version.table.base) == 0
    same(index, oracle)


@pytest.mark.parametrize(("dead", "kept"), [(4, True), (5, True), (6, False), (10, False)])
def test_the_limit_of_half(dead: int, kept: bool) -> None:
    base = units(10, D, 1)
    table = VectorTable(4, D, base)
    table.write(10, units(2, D, 2), np.ones(2, np.int64), np.ones((2, 4), np.int64), np.full(2, -1))
    table.died_at[:dead] = 1
    after, old = table.compact(12, 1, 3)
    assert (after.base is base) == kept
    assert old.tolist() == [*(range(10) if kept else range(dead, 10)), 10, 11]
    live = after.live_rows(len(old), 1)
    np.testing.assert_array_equal(after.gather(live), table.gather(old[live]))
    assert after.has_room(len(old), 3)


def test_a_scan_treats_base_and_own_rows_as_one_table() -> None:
    vectors, query = units(50, D, 3), units(1, D, 4)[0]
    whole, split = VectorTable(50, D), VectorTable(20, D, vectors[:30])
    whole.own[:], split.own[:] = vectors, vectors[30:]
    for table in (whole, split):
        table.died_at[[3, 35]] = 2
    for count in (30, 31, 50):
        for need in (1, 5, 60):
            assert (
                whole.scan(query, count, 2, need).tolist()
                == split.scan(query, count, 2, need).tolist()
            )
    at = np.array([40, 2, 29, 30, 2])
    np.testing.assert_array_equal(split.gather(at), vectors[at])
    assert (split.died_at[np.array([-1])] <= 0).all()
