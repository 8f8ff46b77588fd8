"""The live index: when a graph is built and let go, recall under churn, and when a rebuild fails."""

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from eddyline.schema.item_record import ItemRecord
from index.exact import ExactIndex
from index.factory import HnswIndex
from index.live import LiveIndex
from index.storage.vector_table import VectorTable
from index.writing import batch
from index.writing.rebuilder import Rebuilder

D = 6


def units(n: int, dimension: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(n, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


POOL = units(64, D, 1)


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)


def records(vectors: np.ndarray, first_offset: int = 0) -> list[ItemRecord]:
    return [ItemRecord(f"i{n}", 0, first_offset + n, 0, 0, v) for n, v in enumerate(vectors)]


@pytest.mark.parametrize(("n", "graph"), [(49, 0), (50, 0), (51, 51), (500, 500)])
def test_the_graph_begins_above_exact_below(n: int, graph: int) -> None:
    index = HnswIndex(D, exact_below=50)
    try:
        index.upsert(records(units(n, D, 2)))
        wait_until(lambda: not index._due())
        assert index.stats().main == graph
    finally:
        index.close()


@pytest.mark.parametrize(("fresh", "rebuilds"), [(9, 1), (10, 1), (11, 2), (200, 2)])
def test_more_fresh_rows_than_fresh_max_start_a_rebuild(fresh: int, rebuilds: int) -> None:
    index = HnswIndex(D, exact_below=20, fresh_max=10)
    try:
        vectors = units(300 + fresh, D, 3)
        index.upsert(records(vectors)[:300])
        wait_until(lambda: index.stats().rebuilds == 1)
        index.upsert(records(vectors)[300:])
        wait_until(lambda: not index._due() and not index.stats().rebuilding)
        assert index.stats().rebuilds == rebuilds
        assert index.stats().fresh == (fresh if rebuilds == 1 else 0)
    finally:
        index.close()


def test_a_graph_that_is_far_too_large_for_what_lives_is_let_go() -> None:
    index = HnswIndex(D, exact_below=100)
    try:
        index.upsert(records(units(101, D, 4)))
        wait_until(lambda: index.stats().main == 101)
        index.retire([ItemRecord(f"i{n}", 0, 1_000, 0, 0, None) for n in range(21)])
        assert index.stats().main == 101
        assert len(index.query(POOL[0], 500)) == 80
        index.retire([ItemRecord("i50", 0, 1_000, 0, 0, None)])
        wait_until(lambda: index.stats().main == 0)
        assert len(index.query(POOL[0], 500)) == 79
    finally:
        index.close()


def test_recall_stays_that_of_a_fresh_graph_under_churn() -> None:
    rng = np.random.default_rng(5)
    vectors = units(3_000, 32, 6)
    index = HnswIndex(32, exact_below=0, fresh_max=400)
    oracle = ExactIndex(32)
    try:
        index.upsert(records(vectors))
        oracle.upsert(records(vectors))
        assert index.rebuild()
        for step in range(12):
            chosen = rng.choice(3_000, 250, replace=False)
            new = units(250, 32, 100 + step)
            batch = [
                ItemRecord(f"i{n}", 0, 10_000 + step, 0, 0, v)
                for n, v in zip(chosen, new, strict=True)
            ]
            index.upsert(batch)
            oracle.upsert(batch)
            found = wanted = 0
            for query in units(10, 32, 200 + step):
                truth = {hit.item_id for hit in oracle.query(query, 50)}
                found += len(truth & {hit.item_id for hit in index.query(query, 50)})
                wanted += 50
            assert found / wanted >= 0.95, f"recall {found / wanted} in step {step}"
    finally:
        index.close()


def test_a_failed_rebuild_leaves_the_old_graph_serving_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    index = HnswIndex(D, exact_below=10, fresh_max=5)
    try:
        vectors = units(60, D, 8)
        index.upsert(records(vectors)[:40])
        wait_until(lambda: index.stats().main == 40)

        def full(*_: object) -> None:
            raise MemoryError("no room for the graph")

        monkeypatch.setattr(index, "_build", full)
        index.upsert(records(vectors)[40:])
        wait_until(lambda: index.stats().rebuilds_failed == 1)
        stats = index.stats()
        assert stats.rebuild_error == "MemoryError: no room for the graph"
        assert (stats.main, stats.fresh, stats.live) == (40, 20, 60)
        assert index.query(vectors[55], 1)[0].item_id == "i55"
        monkeypatch.undo()
        assert index.rebuild()
        assert (index.stats().main, index.stats().rebuild_error) == (60, "")
    finally:
        index.close()


def test_what_changes_while_a_graph_is_built_becomes_fresh() -> None:
    begun, go_on = threading.Event(), threading.Event()
    index = HnswIndex(D, exact_below=0, fresh_max=100_000)
    build = index._build

    def slow(labels, vectors, stop):  # type: ignore[no-untyped-def]
        begun.set()
        assert go_on.wait(10)
        return build(labels, vectors, stop)

    index._build = slow
    oracle = ExactIndex(D)
    try:
        vectors = units(2_000, D, 9)
        for each in (index, oracle):
            each.upsert(records(vectors[:900]))
        assert begun.wait(10)
        changes = [
            *records(vectors[1_000:1_100], 5_000),
            *(ItemRecord(f"i{n}", 0, 6_000, 0, 0, None) for n in range(80, 200)),
            *(ItemRecord(f"i{n}", 0, 7_000, 0, 0, vectors[n]) for n in range(80, 90)),
            *(ItemRecord(f"new{n}", 0, 8_000, 0, 0, vectors[n]) for n in range(1_100, 2_000)),
        ]
        for each in (index, oracle):
            each.apply(changes)
        go_on.set()
        wait_until(lambda: index.stats().main == 900)
        # i0 … i99 have new vectors, of which i80 … i99 were retired and i80 … i89 came back as they had been.
        assert index.stats().fresh == 80 + 900
        assert index.stats().stale == 80 + 110
        for query in vectors[::50]:
            assert index.query(query, 25) == oracle.query(query, 25)
    finally:
        go_on.set()
        index.close()


def test_a_graph_that_cannot_find_enough_is_replaced_by_the_scan() -> None:
    class Blind:
        size, name, memory_bytes = 30, "blind", 0

        def search(self, query, fetch, breadth=0):  # type: ignore[no-untyped-def]
            return None

    index = LiveIndex(D, lambda *_: Blind(), breadth=10, exact_below=5, fresh_max=50)
    try:
        vectors = units(30, D, 10)
        index.upsert(records(vectors))
        assert index.rebuild()
        assert [hit.item_id for hit in index.query(vectors[7], 1)] == ["i7"]
        assert index.stats().refused == 1
    finally:
        index.close()


def test_newest_beyond_what_is_kept_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("index.live.NEWEST_KEPT", 3)
    index, oracle = HnswIndex(D), ExactIndex(D)
    for step in range(3):
        batch = [
            ItemRecord(f"i{n}", 0, step, (n * 7 + step) % 5, 0, POOL[n]) for n in range(10 - step)
        ]
        for each in (index, oracle):
            each.upsert(batch)
        for k in (1, 3, 4, 20):
            assert index.newest(k) == oracle.newest(k)
            assert index.newest(k, ["i4", "i2"]) == oracle.newest(k, ["i4", "i2"])


def test_identical_vectors_do_not_touch_the_graph() -> None:
    index = HnswIndex(D, exact_below=0, fresh_max=10)
    try:
        vectors = units(50, D, 11)
        index.upsert(records(vectors))
        assert index.rebuild()
        for again in range(5):
            index.upsert(records(vectors, 1_000 * (again + 1)))
        assert (index.stats().fresh, index.stats().stale) == (0, 0)
        assert index.query(vectors[3], 1)[0].offset == 5_003
    finally:
        index.close()


@pytest.mark.parametrize(
    "bad",
    [
        {"exact_below": -1},
        {"fresh_max": 0},
        {"tier_above": -1},
        {"m": 1},
        {"ef": 0},
        {"ef_construction": 0},
    ],
)
def test_senseless_numbers_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least"):
        HnswIndex(D, **bad)
    with pytest.raises(ValueError, match="dimension 0"):
        HnswIndex(0)


def test_rows_scan_keeps_everything_near_the_cut() -> None:
    rows = VectorTable(4, 2)
    rows.own[:] = [[1, 0], [1, 1e-7], [0, 1], [1, 0]]
    rows.died_at[3] = 5
    query = np.array([1, 0], np.float32)
    assert set(rows.scan(query, 4, 4, 1)) == {0, 1, 3}
    assert set(rows.scan(query, 4, 5, 1)) == {0, 1}
    assert set(rows.scan(query, 4, 5, 4)) == {0, 1, 2}
    assert set(rows.scan(query, 2, 4, 9)) == {0, 1}
    assert len(rows.scan(query, 0, 4, 1)) == 0


def test_a_rebuilder_backs_off_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("index.writing.rebuilder.BACKOFF_S", 0.05)
    tries: list[float] = []

    def fail(stop: threading.Event) -> None:
        tries.append(time.monotonic())
        raise RuntimeError("no")

    rebuilder = Rebuilder(lambda: True, fail)
    rebuilder.wake()
    wait_until(lambda: len(tries) >= 4)
    rebuilder.close()
    gaps = np.diff(tries[:4])
    assert (gaps >= [0.05, 0.1, 0.2]).all()


def test_where_all_that_is_near_was_replaced_the_search_looks_wider() -> None:
    index = HnswIndex(16, exact_below=0, fresh_max=100_000)
    filters: list[int] = []
    try:
        vectors = units(2_000, 16, 13)
        index.upsert(records(vectors))
        assert index.rebuild()
        query = units(1, 16, 14)[0]
        graph = index._state.graphs[0].main
        search = graph.search
        graph.search = lambda q, fetch, breadth=0: (
            filters.append(fetch) or search(q, fetch, breadth)
        )  # type: ignore[attr-defined, method-assign]
        near = np.argsort(-(vectors @ query))
        assert [hit.item_id for hit in index.query(query, 20)] == [f"i{n}" for n in near[:20]]
        assert filters == [50]
        index.upsert([ItemRecord(f"i{n}", 0, 5_000, 0, 0, -vectors[n]) for n in near[:70]])
        assert [hit.item_id for hit in index.query(query, 20)] == [f"i{n}" for n in near[70:90]]
        assert filters == [50, 50 * 2_000 // 1_930, 200]
    finally:
        index.close()


@pytest.mark.parametrize("more", [-1, 0, 1, 1_000])
def test_a_large_batch_gives_way_to_readers(monkeypatch: pytest.MonkeyPatch, more: int) -> None:
    index = HnswIndex(D)
    pauses: list[float] = []
    monkeypatch.setattr("index.writing.batch.time.sleep", pauses.append)
    n = batch.AT_ONCE + more
    assert index.apply(records(units(n, D, 15))) == n
    assert len(pauses) == (3 if more > 0 else 0)
    assert len(index.query(POOL[0], n)) == n


def test_of_an_item_that_is_in_a_batch_several_times_the_highest_offset_counts() -> None:
    index, oracle = HnswIndex(D), ExactIndex(D)
    rng = np.random.default_rng(16)
    for _ in range(20):
        some = [
            ItemRecord(f"i{n}", 0, int(offset), 0, at, POOL[at] if offset % 5 else None)
            for at, (n, offset) in enumerate(
                zip(rng.integers(12, size=40), rng.integers(60, size=40))
            )
        ]
        assert index.apply(some) == oracle.apply(some)
        assert index.query(POOL[0], 20) == oracle.query(POOL[0], 20)
