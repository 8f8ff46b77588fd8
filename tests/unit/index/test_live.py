"""The live index: when it builds and drops segments, recall under churn, failed rebuilds."""

import os
import sys
import threading
import time
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from eddyline.schema.item_record import ItemRecord
from index.exact import ExactIndex
from index.factory import HnswIndex
from index.live import LiveIndex
from index.storage.vector_table import VectorTable
from index.writing import batch, placement
from index.writing.rebuilder import Rebuilder, run_niced
from tests.unit.index.item_records import records, units, wait_until

D = 6


POOL = units(64, D, 1)


@pytest.mark.parametrize(("n", "main"), [(49, 0), (50, 0), (51, 51), (500, 500)])
def test_segments_begin_above_exact_below(n: int, main: int) -> None:
    index = HnswIndex(D, exact_below=50)
    try:
        index.upsert(records(units(n, D, 2)))
        wait_until(lambda: not index._due())
        assert index.stats().main == main
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


def test_segments_far_larger_than_the_live_items_are_dropped() -> None:
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


def test_recall_under_churn_stays_that_of_a_fresh_build() -> None:
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
            found = 0
            for query in units(10, 32, 200 + step):
                truth = {hit.item_id for hit in oracle.query(query, 50)}
                found += len(truth & {hit.item_id for hit in index.query(query, 50)})
            assert found / 500 >= 0.95, f"recall {found / 500} in step {step}"
    finally:
        index.close()


def test_a_failed_rebuild_is_reported_and_the_old_segment_serves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    index = HnswIndex(D, exact_below=10, fresh_max=5)
    try:
        vectors = units(60, D, 8)
        index.upsert(records(vectors)[:40])
        wait_until(lambda: index.stats().main == 40)

        def full(*_: object) -> None:
            raise MemoryError("no room for the graph")

        monkeypatch.setattr(index._backend, "build", full)
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


def test_items_that_change_during_a_build_are_fresh() -> None:
    begun, go_on = threading.Event(), threading.Event()
    index = HnswIndex(D, exact_below=0, fresh_max=100_000)
    build = index._backend.build

    def slow(labels, vectors, stop):  # type: ignore[no-untyped-def]
        begun.set()
        assert go_on.wait(10)
        return build(labels, vectors, stop)

    index._backend.build = slow  # type: ignore[method-assign]
    oracle = ExactIndex(D)
    try:
        vectors = units(2_000, D, 9)
        for each in (index, oracle):
            each.upsert(records(vectors[:900]))
        assert begun.wait(10)
        changes = [
            *records(vectors[1_000:1_100], 0, 5_000),
            *(ItemRecord(f"i{n}", 0, 6_000, 0, 0, None) for n in range(80, 200)),
            *(ItemRecord(f"i{n}", 0, 7_000, 0, 0, vectors[n]) for n in range(80, 90)),
            *(ItemRecord(f"new{n}", 0, 8_000, 0, 0, vectors[n]) for n in range(1_100, 2_000)),
        ]
        for each in (index, oracle):
            each.apply(changes)
        go_on.set()
        wait_until(lambda: index.stats().main == 900)
        # i0 … i99 turned; then i80 … i199 were retired, and i80 … i89 came back as they had been.
        assert index.stats().fresh == 80 + 900
        assert index.stats().stale == 80 + 110
        for query in vectors[::50]:
            assert index.query(query, 25) == oracle.query(query, 25)
    finally:
        go_on.set()
        index.close()


def test_a_scan_replaces_a_search_that_finds_too_few() -> None:
    class Blind:
        size, name, memory_bytes = 30, "blind", 0

        def search(self, query, fetch, breadth=0):  # type: ignore[no-untyped-def]
            return None

    class BlindBackend:
        name, settings = "blind", MappingProxyType({})

        def build(self, labels, vectors, stop):  # type: ignore[no-untyped-def]
            return Blind()

    index = LiveIndex(D, BlindBackend(), breadth=10, exact_below=5, fresh_max=50)
    try:
        vectors = units(30, D, 10)
        index.upsert(records(vectors))
        assert index.rebuild()
        assert [hit.item_id for hit in index.query(vectors[7], 1)] == ["i7"]
        assert index.stats().refused == 1
    finally:
        index.close()


def test_newest_beyond_the_cached_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("index.search.newest.KEPT", 3)
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


def test_unchanged_vectors_leave_the_segment_alone() -> None:
    index = HnswIndex(D, exact_below=0, fresh_max=10)
    try:
        vectors = units(50, D, 11)
        index.upsert(records(vectors))
        assert index.rebuild()
        for again in range(5):
            index.upsert(records(vectors, 0, 1_000 * (again + 1)))
        assert (index.stats().fresh, index.stats().stale) == (0, 0)
        assert index.query(vectors[3], 1)[0].offset == 5_003
    finally:
        index.close()


@pytest.mark.parametrize(
    "bad",
    [
        {"exact_below": -1},
        {"fresh_max": 0},
        {"flush_above": -1},
        {"m": 1},
        {"ef": 0},
        {"ef_construction": 0},
    ],
)
def test_bad_parameters_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least"):
        HnswIndex(D, **bad)
    with pytest.raises(ValueError, match="dimension 0"):
        HnswIndex(0)


def test_a_table_scan_keeps_everything_near_the_cut() -> None:
    table = VectorTable(4, 2)
    table.own[:] = [[1, 0], [1, 1e-7], [0, 1], [1, 0]]
    table.died_at[3] = 5
    query = np.array([1, 0], np.float32)
    assert set(table.scan(query, 4, 4, 1)) == {0, 1, 3}
    assert set(table.scan(query, 4, 5, 1)) == {0, 1}
    assert set(table.scan(query, 4, 5, 4)) == {0, 1, 2}
    assert set(table.scan(query, 2, 4, 9)) == {0, 1}
    assert len(table.scan(query, 0, 4, 1)) == 0


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


def test_a_search_widens_if_all_near_entries_are_stale() -> None:
    index = HnswIndex(16, exact_below=0, fresh_max=100_000)
    fetches: list[int] = []
    try:
        vectors = units(2_000, 16, 13)
        index.upsert(records(vectors))
        assert index.rebuild()
        query = units(1, 16, 14)[0]
        main = index._version.segments[0].index
        search = main.search
        main.search = lambda q, fetch, breadth=0: (  # type: ignore[method-assign]
            fetches.append(fetch) or search(q, fetch, breadth)  # type: ignore[func-returns-value]
        )
        near = np.argsort(-(vectors @ query))
        assert [hit.item_id for hit in index.query(query, 20)] == [f"i{n}" for n in near[:20]]
        assert fetches == [50]
        index.upsert([ItemRecord(f"i{n}", 0, 5_000, 0, 0, -vectors[n]) for n in near[:70]])
        assert [hit.item_id for hit in index.query(query, 20)] == [f"i{n}" for n in near[70:90]]
        assert fetches == [50, 50 * 2_000 // 1_930, 200]
    finally:
        index.close()


@pytest.mark.parametrize("more", [-1, 0, 1, 1_000])
def test_a_large_batch_yields_to_readers(monkeypatch: pytest.MonkeyPatch, more: int) -> None:
    index = HnswIndex(D)
    pauses: list[float] = []
    monkeypatch.setattr("index.writing.batch.time.sleep", pauses.append)
    n = batch.YIELD_ABOVE + more
    assert index.apply(records(units(n, D, 15))) == n
    assert len(pauses) == (3 if more > 0 else 0)
    assert len(index.query(POOL[0], n)) == n


def share_with_turns(size: int, batches: int) -> float:
    """The share of batches in whose middle a reader that waits for the interpreter runs 5 times."""
    index, vectors = HnswIndex(D, exact_below=10**7), units(size, D, 15)
    some = [
        [
            ItemRecord(f"i{n}", 0, at * size + n, 0, 1, v, {"tags": ["a"]})
            for n, v in enumerate(vectors)
        ]
        for at in range(batches)
    ]
    turns, done = 0, threading.Event()

    def read() -> None:
        nonlocal turns
        while not done.is_set():
            time.sleep(5e-5)  # as for a socket; then it needs the interpreter
            turns += 1

    reader, found = threading.Thread(target=read), list[int]()
    reader.start()
    try:
        for records_ in some:
            time.sleep(1e-3)
            before = turns
            index.apply(records_)
            found.append(turns - before)
    finally:
        done.set()
        reader.join(20)
    return float(np.mean(np.array(found) >= 5))


def test_a_reader_runs_in_the_middle_of_a_large_batch() -> None:
    """The interpreter takes its lock from nobody here, so only what the writer gives counts.

    On idle cores a reader ran five times in 92 to 100 % of the batches, and in 20 to 24 % where the
    writer gave nothing: numpy lets readers in at times. On busy cores a reader may not get a core
    in time, so the best of some tries counts.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(100.0)
    try:
        shares = list[float]()
        while len(shares) < 10 and max(shares, default=0.0) < 0.6:
            shares.append(share_with_turns(256, 100))
    finally:
        sys.setswitchinterval(before)
    assert max(shares) >= 0.6, shares


def test_the_highest_offset_of_an_item_in_a_batch_counts() -> None:
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


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere niceness belongs to the process")
@pytest.mark.parametrize("what", ["rebuild", "flush"])
def test_only_the_construction_of_a_graph_has_a_low_priority(
    monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """A thread of low priority that held the write lock would stop writers on busy cores."""

    def priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    own, found = priority(), dict[str, int]()
    index = HnswIndex(D, exact_below=0, fresh_max=30, flush_above=10)
    index.apply(records(units(20, D, 3)))
    assert index.rebuild()
    for owner, name in ((type(index._backend), "build"), (placement.Placement, "adopt")):
        original = getattr(owner, name)

        def noting(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            found[name] = priority()
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, noting)
    (index._flusher if what == "rebuild" else index._rebuilder).close()
    index.apply(records(units(40, D, 4), offset=9_000))
    wait_until(lambda: "adopt" in found)
    index.close()
    assert found == {"build": min(19, own + 10), "adopt": own}
    assert priority() == own


def test_an_error_of_a_build_reaches_the_thread_that_waits_for_it() -> None:
    def broken() -> None:
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        run_niced(broken)
    assert run_niced(lambda: 7) == 7


@pytest.mark.parametrize("exact_below", [10**6, 50], ids=["scan", "segments"])
@pytest.mark.parametrize("k", [1, 10, 40])
def test_many_excluded_items_leave_the_same_answer(k: int, exact_below: int) -> None:
    """Whether few or many of them are among the best, or more than a narrow search looks at."""
    vectors = units(3_000, D, 9)
    index, oracle = HnswIndex(D, exact_below=exact_below, ef=400), ExactIndex(D)
    try:
        for one in (index, oracle):
            one.apply(records(vectors))
        wait_until(lambda: not index._due())
        assert (index.stats().main > 0) == (exact_below == 50)
        every = [hit.item_id for hit in oracle.query(POOL[0], 3_000)]
        for best, others in ((0, 300), (60, 300), (70, 0), (150, 150), (400, 0), (2_999, 0)):
            excluded = set(every[:best]) | set(every[best + 100 :][:others])
            found, wanted = (one.query(POOL[0], k, excluded) for one in (index, oracle))
            assert [hit.item_id for hit in found] == [hit.item_id for hit in wanted]
        assert index.stats().refused == 0
    finally:
        index.close()
