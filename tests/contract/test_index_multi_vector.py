"""Several query vectors in one query: merged scores against sums and maxima over all items."""

import numpy as np
import pytest

from eddyline.errors import VectorRejected
from eddyline.schema.item_record import ItemRecord
from index.exact import ExactIndex
from index.factory import HnswIndex
from index.filters import Filter
from index.port import Index
from index.search.multi_vector import VECTORS_MAX, query_multi

D, N = 16, 400


def units(n: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(n, D)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


VECTORS = units(N, 1)
EVEN = {"tags": ["even"]}
RECORDS = [ItemRecord(f"i{n}", 0, n, 0, 0, VECTORS[n], {} if n % 2 else EVEN) for n in range(N)]


@pytest.fixture(params=["exact", "scan", "segments"])
def index(request: pytest.FixtureRequest) -> Index:
    made: Index = ExactIndex(D)
    if request.param != "exact":
        made = HnswIndex(D, exact_below=0 if request.param == "segments" else N)
    made.apply(RECORDS)
    if isinstance(made, HnswIndex):
        assert made.rebuild()
    request.addfinalizer(made.close)
    return made


@pytest.mark.parametrize("merge", ["max", "sum"])
@pytest.mark.parametrize("q", [1, 2, 5, VECTORS_MAX])
def test_merged_scores(index: Index, merge: str, q: int) -> None:
    queries = units(q, 2)
    scores = VECTORS.astype(np.float64) @ queries.T.astype(np.float64)
    merged = scores.max(axis=1) if merge == "max" else scores.sum(axis=1)
    hits = query_multi(index, queries, 20, ["i3"], merge=merge)  # type: ignore[arg-type]
    expected = [n for n in np.argsort(-merged, kind="stable") if n != 3][:20]
    assert [hit.item_id for hit in hits] == [f"i{n}" for n in expected]
    np.testing.assert_allclose([hit.score for hit in hits], merged[expected], atol=1e-5)


@pytest.mark.parametrize("merge", ["max", "sum"])
def test_a_filter_holds_for_every_vector(index: Index, merge: str) -> None:
    hits = query_multi(index, units(3, 4), N, (), Filter(tags=frozenset({"even"})), merge=merge)  # type: ignore[arg-type]
    assert len(hits) == len({hit.item_id for hit in hits}) == N // 2


@pytest.mark.parametrize("k", [-1, 0, 1, N, N + 1])
def test_k_is_clamped(index: Index, k: int) -> None:
    assert len(query_multi(index, units(3, 5), k)) == min(max(k, 0), N)


@pytest.mark.parametrize("shape", [(D,), (0, D), (VECTORS_MAX + 1, D), (2, D - 1), (1, 1, D)])
def test_vectors_that_do_not_fit(index: Index, shape: tuple[int, ...]) -> None:
    with pytest.raises(VectorRejected, match="query vector"):
        query_multi(index, np.ones(shape, np.float32), 1)


def test_nan_and_an_unknown_merge(index: Index) -> None:
    with pytest.raises(VectorRejected, match="NaN"):
        query_multi(index, np.full((2, D), np.nan, np.float32), 1, merge="sum")
    with pytest.raises(ValueError, match="'mean' is neither"):
        query_multi(index, units(2, 1), 1, merge="mean")  # type: ignore[arg-type]
