"""The newest items: right after any writes, and cheap after each at a million items."""

import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eddyline.schema.item_record import ItemRecord
from index.exact import ExactIndex
from index.factory import HnswIndex
from index.filters import Filter
from index.search import newest
from index.snapshot.format import Contents
from index.storage import index_version, item_offsets, vector_table
from index.writing import batch
from tests.unit.index.item_records import units

VECTOR = np.array([1.0, 0.0], np.float32)
TAGS = ({}, {"tags": ["a"]}, {"tags": ["a", "b"]})
N = 1_000_000

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


def restored(times: np.ndarray) -> HnswIndex:
    """A million items; one in a hundred has the tag "rare"."""
    n = len(times)
    facts = np.zeros((n, 3), np.int64)
    facts[:, 0] = times
    rare = np.flatnonzero(np.arange(n) * 7_919 % 100 == 0)
    contents = Contents(
        ids=[f"item-{n * 7_919 % N:07}" for n in range(n)],
        vectors=np.tile(VECTOR, (n, 1)),
        facts=facts,
        deleted=np.empty((0, 3), np.int64),
        columns=[(("tags", "rare"), rare, None)],
        watermarks={},
    )
    index = HnswIndex(2, exact_below=2 * N)
    index.restore(contents)
    return index


def cpu_s(call: Callable[[], object]) -> float:
    """CPU time of this thread, the best of five."""
    found = []
    for _ in range(5):
        begun = time.thread_time()
        call()
        found.append(time.thread_time() - begun)
    return min(found)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("equal", [False, True])
def test_newest_after_each_write_is_cheap_at_a_million_items(equal: bool) -> None:
    """Each call after a write costs less than half of one selection in a plain array of times.

    A filter that passes one item in a hundred may cost that of its mask as well.
    """
    times = np.full(N, 5_000) if equal else np.random.default_rng(1).permutation(N) + 1_000
    index = restored(times)
    rare = Filter(tags=frozenset({"rare"}))
    reference = cpu_s(lambda: np.partition(times + np.arange(N) % 2, N - 100))
    version = index._version
    mask = cpu_s(
        lambda: version.columns.mask(rare, version.used) & (version.table.died_at[:-1] > 0)[:N]
    )
    index.newest(100)
    plain, filtered, offset = list[float](), list[float](), 10
    vectors = units(64, 2, 1)
    for step in range(30):
        at_ms = 5_000 if equal else 500_000 + 20_000 * step
        first = N - 2_000 if step % 2 else 0
        names = [f"item-{first + 7 * step + n:07}" for n in range(64)]
        records = [
            ItemRecord(name, 0, offset + n, at_ms, 0, None if (n + step) % 16 == 0 else vectors[n])
            for n, name in enumerate(names)
        ]
        offset += 64
        assert index.apply(records) == 64
        begun = time.thread_time()
        hits = index.newest(100)
        plain.append(time.thread_time() - begun)
        assert len(hits) == 100
        begun = time.thread_time()
        assert len(index.newest(100, (), rare)) == 100
        filtered.append(time.thread_time() - begun)
    keys = [(-hit.at_ms, hit.item_id) for hit in hits]
    assert keys == sorted(keys)
    index.close()
    assert np.median(plain) < reference / 2, (plain, reference)
    assert np.median(filtered) < reference / 2 + mask, (filtered, reference, mask)
