"""The second tier: when it is made, what it takes in, and what a new main index leaves to it."""

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from eddyline.schema.item_record import ItemRecord
from index.exact import ExactIndex
from index.factory import HnswIndex
from index.storage.state import IndexVersion
from index.writing import merge_policy

D = 16


def units(n: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(n, D)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def records(vectors: np.ndarray, first: int = 0, offset: int = 0) -> list[ItemRecord]:
    return [ItemRecord(f"i{first + n}", 0, offset + n, 0, 0, v) for n, v in enumerate(vectors)]


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)


def built(index: HnswIndex, items: int) -> None:
    """Wait for the first graph, which the index builds by itself; one asked for beside it could come late."""
    wait_until(lambda: index.stats().main == items)


def everyone_stands_once(state: IndexVersion) -> None:
    entries = [graph.rows for graph in state.graphs] + [state.fresh.rows[: state.fresh_count]]
    counting = [rows[state.table.died_at[rows] > state.seq] for rows in entries]
    assert sorted(np.concatenate(counting)) == state.table.alive(state.used, state.seq).tolist()
    assert [len(rows) for rows in counting[:-1]] == list(state.standing)


class SlowMain(HnswIndex):
    """From its second one on, a main index is not finished before `go_on` is set; tiers are."""

    def __init__(self, **options: int) -> None:
        super().__init__(D, m=8, ef_construction=60, ef=200, exact_below=50, **options)
        self.go_on, self.begun = threading.Event(), threading.Event()
        build = self._build

        def slow(labels, vectors, stop):  # type: ignore[no-untyped-def]
            if len(labels) > 300 and self._state.graphs:
                self.begun.set()
                assert self.go_on.wait(20)
            return build(labels, vectors, stop)

        self._build = slow  # type: ignore[assignment]


@pytest.mark.parametrize(("fresh", "made"), [(29, 0), (30, 0), (31, 1), (90, 1)])
def test_more_fresh_rows_than_tier_above_become_a_tier_while_a_rebuild_is_long(
    fresh: int, made: int
) -> None:
    index, oracle = SlowMain(fresh_max=10, tier_above=30), ExactIndex(D)
    try:
        vectors = units(400 + fresh, 3)
        for each in (index, oracle):
            each.upsert(records(vectors[:400]))
        wait_until(lambda: index.stats().main == 400)
        for each in (index, oracle):
            each.upsert(records(vectors[400:], 400, 400))
        assert index.begun.wait(20)
        wait_until(lambda: index.stats().tiers == made)
        time.sleep(0.05 if not made else 0.0)
        stats = index.stats()
        assert (stats.tiers, stats.tiered, stats.fresh) == (
            made,
            made * fresh,
            0 if made else fresh,
        )
        for query in vectors[::40]:
            assert index.query(query, 60) == oracle.query(query, 60)
        everyone_stands_once(index._state)
        index.go_on.set()
        wait_until(lambda: index.stats().main == 400 + fresh)
        assert (index.stats().tiers, index.stats().fresh, index.stats().stale) == (0, 0, 0)
        assert index.query(vectors[0], 60) == oracle.query(vectors[0], 60)
    finally:
        index.go_on.set()
        index.close()


def test_a_new_main_index_leaves_to_the_tiers_what_they_alone_know() -> None:
    index, oracle = SlowMain(fresh_max=10**6, tier_above=0), ExactIndex(D)

    def both(some: list[ItemRecord]) -> None:
        assert index.apply(some) == oracle.apply(some)

    def asked() -> None:
        everyone_stands_once(index._state)
        for query in units(12, 50):
            assert index.query(query, 80) == oracle.query(query, 80)

    try:
        vectors = units(900, 4)
        both(records(vectors[:600]))
        wait_until(lambda: index.stats().main == 600)
        both(records(vectors[600:650], 0, 1_000))
        assert index.build_tier()  # known to the main index that follows
        rebuild = threading.Thread(target=index.rebuild)
        rebuild.start()
        assert index.begun.wait(20)
        both(records(vectors[650:700], 100, 2_000))
        both(records(vectors[700:710], 10, 3_000))  # those of the first tier move again
        # As large as the first one now: it is merged.
        assert index.build_tier() and index.stats().fresh == 0
        both(records(vectors[710:720], 200, 4_000))
        both([ItemRecord(f"i{n}", 0, 5_000, 0, 0, None) for n in (5, 15, 105, 205, 305)])
        asked()
        assert index.stats().tiers == 1
        index.go_on.set()
        rebuild.join(20)
        stats = index.stats()
        # Of the tier: i100 … i149 and i10 … i19 but two that are gone; i0 … i49 are the main index's again.
        assert (stats.main, stats.tiers, stats.tiered) == (600, 1, 50 + 10 - 2)
        assert stats.fresh == 10 - 1
        asked()
        assert index.rebuild()
        assert (index.stats().tiers, index.stats().stale, index.stats().main) == (0, 0, 595)
        asked()
    finally:
        index.go_on.set()
        index.close()


def test_a_tier_is_merged_while_it_is_not_much_larger() -> None:
    index = HnswIndex(D, m=8, ef_construction=60, exact_below=10, fresh_max=10**6)
    vectors = units(3_000, 5)
    index.upsert(records(vectors[:1_000]))
    built(index, 1_000)
    sizes = []
    at = 1_000
    for more in (100, 100, 401, 100, 100, 101):
        index.upsert(records(vectors[at : at + more], at, at))
        at += more
        assert index.build_tier()
        sizes.append([graph.main.size for graph in index._state.graphs[1:]])
        everyone_stands_once(index._state)
    assert sizes == [[100], [200], [601], [601, 100], [601, 200], [902]]
    # One that mostly does not count is merged whatever its size.
    index.retire([ItemRecord(f"i{n}", 0, 10**6, 0, 0, None) for n in range(1_000, 1_500)])
    index.upsert(records(vectors[at : at + 1], at, at))
    assert merge_policy.segments_to_merge(index._state, index._placement) == [
        index._state.graphs[1].number
    ]
    assert index.build_tier()
    assert [graph.main.size for graph in index._state.graphs[1:]] == [403]
    index.close()


def test_a_tier_that_cannot_be_built_leaves_the_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    index = HnswIndex(D, m=8, exact_below=10, fresh_max=10**6)
    vectors = units(200, 6)
    index.upsert(records(vectors[:100]))
    built(index, 100)
    index.upsert(records(vectors[100:], 100, 100))

    def full(*_: object) -> None:
        raise MemoryError("no room for the graph")

    monkeypatch.setattr(index, "_build", full)
    assert not index.build_tier()
    assert (index.stats().fresh, index.stats().tiers) == (100, 0)
    assert index.query(vectors[150], 1)[0].item_id == "i150"
    everyone_stands_once(index._state)
    monkeypatch.undo()
    assert index.build_tier() and index.stats().tiered == 100
    index.close()


def test_graphs_let_go_take_their_tiers_along() -> None:
    index = HnswIndex(D, m=8, exact_below=100, fresh_max=10**6)
    vectors = units(200, 7)
    index.upsert(records(vectors[:120]))
    built(index, 120)
    index.upsert(records(vectors[120:], 120, 120))
    assert index.build_tier() and index.stats().tiers == 1
    index.retire([ItemRecord(f"i{n}", 0, 10**6, 0, 0, None) for n in range(121)])
    wait_until(lambda: index.stats().main == 0)
    assert (index.stats().tiers, index.stats().tiered, index.stats().fresh) == (0, 0, 0)
    assert index.build_tier() and index.stats().tiers == 0
    assert len(index.query(vectors[150], 500)) == 79
    index.close()
