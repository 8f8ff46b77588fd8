"""Small segments: when one is built, what it takes in, what a new main segment leaves to it."""

import threading
import time

import pytest

from eddyline.schema.item_record import ItemRecord
from index.exact import ExactIndex
from index.factory import HnswIndex
from index.writing import merge_policy
from tests.unit.index.item_records import each_live_item_has_one_entry, records, units, wait_until

D = 16


def wait_for_main(index: HnswIndex, items: int) -> None:
    """Wait for the first main segment, which the index builds by itself."""
    wait_until(lambda: index.stats().main == items)


class SlowRebuilds(HnswIndex):
    """From the second main segment on, its build waits for `go_on`; small segments do not."""

    def __init__(self, **options: int) -> None:
        super().__init__(D, m=8, ef_construction=60, ef=200, exact_below=50, **options)
        self.go_on, self.begun = threading.Event(), threading.Event()
        build = self._backend.build

        def slow(labels, vectors, stop):  # type: ignore[no-untyped-def]
            if len(labels) > 300 and self._version.segments:
                self.begun.set()
                assert self.go_on.wait(20)
            return build(labels, vectors, stop)

        self._backend.build = slow  # type: ignore[method-assign]


@pytest.mark.parametrize(("fresh", "segments"), [(29, 0), (30, 0), (31, 1), (90, 1)])
def test_fresh_rows_above_flush_above_become_a_small_segment_while_a_rebuild_runs_long(
    fresh: int, segments: int
) -> None:
    index, oracle = SlowRebuilds(fresh_max=10, flush_above=30), ExactIndex(D)
    try:
        vectors = units(400 + fresh, D, 3)
        for each in (index, oracle):
            each.upsert(records(vectors[:400]))
        wait_until(lambda: index.stats().main == 400)
        for each in (index, oracle):
            each.upsert(records(vectors[400:], 400))
        assert index.begun.wait(20)
        wait_until(lambda: index.stats().small_segments == segments)
        time.sleep(0.0 if segments else 0.05)
        stats = index.stats()
        assert stats.small_segments == segments
        assert stats.small_segment_items == segments * fresh
        assert stats.fresh == (0 if segments else fresh)
        for query in vectors[::40]:
            assert index.query(query, 60) == oracle.query(query, 60)
        each_live_item_has_one_entry(index._version)
        index.go_on.set()
        wait_until(lambda: index.stats().main == 400 + fresh)
        stats = index.stats()
        assert (stats.small_segments, stats.fresh, stats.stale) == (0, 0, 0)
        assert index.query(vectors[0], 60) == oracle.query(vectors[0], 60)
    finally:
        index.go_on.set()
        index.close()


def test_a_new_main_segment_leaves_other_items_in_the_small_segments() -> None:
    index, oracle = SlowRebuilds(fresh_max=10**6, flush_above=0), ExactIndex(D)

    def both(some: list[ItemRecord]) -> None:
        assert index.apply(some) == oracle.apply(some)

    def check() -> None:
        each_live_item_has_one_entry(index._version)
        for query in units(12, D, 50):
            assert index.query(query, 80) == oracle.query(query, 80)

    try:
        vectors = units(900, D, 4)
        both(records(vectors[:600]))
        wait_until(lambda: index.stats().main == 600)
        both(records(vectors[600:650], 0, 1_000))
        assert index.flush()  # input of the main segment that follows
        rebuild = threading.Thread(target=index.rebuild)
        rebuild.start()
        assert index.begun.wait(20)
        both(records(vectors[650:700], 100, 2_000))
        both(records(vectors[700:710], 10, 3_000))  # items of the first small segment turn again
        # The first one is no larger, so it is merged.
        assert index.flush() and index.stats().fresh == 0
        both(records(vectors[710:720], 200, 4_000))
        both([ItemRecord(f"i{n}", 0, 5_000, 0, 0, None) for n in (5, 15, 105, 205, 305)])
        check()
        assert index.stats().small_segments == 1
        index.go_on.set()
        rebuild.join(20)
        stats = index.stats()
        # Small segment: i100 … i149 and i10 … i19 but two retired; the main one has i0 … i49 again.
        assert (stats.main, stats.small_segments) == (600, 1)
        assert stats.small_segment_items == 50 + 10 - 2
        assert stats.fresh == 10 - 1
        check()
        assert index.rebuild()
        stats = index.stats()
        assert (stats.small_segments, stats.stale, stats.main) == (0, 0, 595)
        check()
    finally:
        index.go_on.set()
        index.close()


def test_a_small_segment_is_merged_unless_it_is_much_larger() -> None:
    index = HnswIndex(D, m=8, ef_construction=60, exact_below=10, fresh_max=10**6)
    vectors = units(3_000, D, 5)
    index.upsert(records(vectors[:1_000]))
    wait_for_main(index, 1_000)
    sizes = []
    at = 1_000
    for more in (100, 100, 401, 100, 100, 101):
        index.upsert(records(vectors[at : at + more], at))
        at += more
        assert index.flush()
        sizes.append([segment.index.size for segment in index._version.segments[1:]])
        each_live_item_has_one_entry(index._version)
    assert sizes == [[100], [200], [601], [601, 100], [601, 200], [902]]
    # A mostly dead one is merged at any size.
    index.retire([ItemRecord(f"i{n}", 0, 10**6, 0, 0, None) for n in range(1_000, 1_500)])
    index.upsert(records(vectors[at : at + 1], at))
    assert merge_policy.segments_to_merge(index._version, index._placement) == [
        index._version.segments[1].number
    ]
    assert index.flush()
    assert [segment.index.size for segment in index._version.segments[1:]] == [403]
    index.close()


def test_a_failed_flush_keeps_the_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    index = HnswIndex(D, m=8, exact_below=10, fresh_max=10**6)
    vectors = units(200, D, 6)
    index.upsert(records(vectors[:100]))
    wait_for_main(index, 100)
    index.upsert(records(vectors[100:], 100))

    def full(*_: object) -> None:
        raise MemoryError("no room for the graph")

    monkeypatch.setattr(index._backend, "build", full)
    assert not index.flush()
    assert (index.stats().fresh, index.stats().small_segments) == (100, 0)
    assert index.query(vectors[150], 1)[0].item_id == "i150"
    each_live_item_has_one_entry(index._version)
    monkeypatch.undo()
    assert index.flush() and index.stats().small_segment_items == 100
    index.close()


def test_dropping_the_main_segment_drops_the_small_ones() -> None:
    index = HnswIndex(D, m=8, exact_below=100, fresh_max=10**6)
    vectors = units(200, D, 7)
    index.upsert(records(vectors[:120]))
    wait_for_main(index, 120)
    index.upsert(records(vectors[120:], 120))
    assert index.flush() and index.stats().small_segments == 1
    index.retire([ItemRecord(f"i{n}", 0, 10**6, 0, 0, None) for n in range(121)])
    wait_until(lambda: index.stats().main == 0)
    stats = index.stats()
    assert (stats.small_segments, stats.small_segment_items, stats.fresh) == (0, 0, 0)
    assert index.flush() and index.stats().small_segments == 0
    assert len(index.query(vectors[150], 500)) == 79
    index.close()
