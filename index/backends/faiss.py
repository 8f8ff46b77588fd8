"""Faiss as main index: Flat, IVF-Flat, IVF-PQ and HNSW. The only file that imports faiss.

Everything runs on the calling thread: queries are parallel already, and a rebuild must leave cores to them.
Inner product on unit vectors. How wide a search is, is passed with the call; the index is not touched.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import faiss as library
import numpy as np

from index.arrays import Ints, Vector
from index.port import AnnIndex

# What it says of its types does not hold for what it wraps in Python.
faiss: Any = library

# Vectors are added so many at a time; between two pieces a rebuild can be given up.
PIECE = 1_024
# k-means wants at least so many vectors for each centroid, more than so many add time only.
TRAIN_MIN, TRAIN_MAX = 39, 64
# More rounds of k-means change the recall of either index by less than 0.001, and take most of the training.
TRAIN_ROUNDS = 10
PQ_BITS = 8
# A product quantizer has 256 centroids for each part; with fewer vectors there is nothing to quantize.
PQ_VECTORS_MIN = TRAIN_MIN << PQ_BITS


@dataclass(frozen=True)
class FaissPlan:
    """How one index is made for vectors that are at hand.

    index:      still empty, perhaps untrained; bytes_of: its memory once it is filled
    widen:      search parameters for so many candidates, None where there are none
    over_fetch: so many times more candidates are named than asked for; rescoring picks the best of them
    whole:      whether a search that names fewer than asked for has failed: not every point was reached
    """

    index: Any
    bytes_of: Callable[[Any], int]
    widen: Callable[[int], Any] = lambda _: None
    over_fetch: int = 1
    whole: bool = True


class FaissGraph:
    """One finished index. Thread rule: any thread may search."""

    def __init__(self, name: str, plan: FaissPlan, labels: Ints) -> None:
        """plan: carried out; labels: int64 (n,), of the vectors in the order they were added."""
        self.name = name
        self.memory_bytes = plan.bytes_of(plan.index) + labels.nbytes
        self._index, self._labels = plan.index, labels
        self._over_fetch, self._whole = plan.over_fetch, plan.whole
        # Rarely more than a handful of different numbers are asked for.
        self._parameters = lru_cache(maxsize=64)(plan.widen)

    @property
    def size(self) -> int:
        """How many vectors it holds."""
        return len(self._labels)

    def search(self, query: Vector, fetch: int, breadth: int = 0) -> Ints | None:
        """See `graphs.AnnIndex.search`; releases the interpreter while it searches."""
        faiss.omp_set_num_threads(1)  # it holds for the calling thread only
        # Where scores are rounded the best may be anywhere among all that the search is wide enough for.
        named = fetch if self._over_fetch == 1 else self._over_fetch * max(fetch, breadth)
        k = min(len(self._labels), named)
        _, places = self._index.search(
            query[np.newaxis], k, params=self._parameters(max(fetch, breadth))
        )
        found = places[0][places[0] >= 0]  # -1 where the lists that were looked at hold fewer
        return None if self._whole and len(found) < k else self._labels[found]


class _Faiss:
    """What all four have in common; `name` and `settings` are those of `index.backends.base.AnnBackend`."""

    name = "faiss"

    def __init__(self, **settings: int) -> None:
        """settings: all at least 1."""
        for key, value in settings.items():
            if value < 1:
                raise ValueError(f"{key} {value} must be at least 1")
        self.settings: Mapping[str, int] = settings

    def build(self, labels: Ints, vectors: Vector, stop: threading.Event) -> AnnIndex | None:
        """See `AnnBackend.build`. Stops between two pieces, not within training."""
        faiss.omp_set_num_threads(1)
        plan = self._plan(vectors)
        index = plan.index
        if stop.is_set():
            return None
        if not index.is_trained:
            index.train(vectors)
        for at in range(0, len(vectors), PIECE):
            if stop.is_set():
                return None
            index.add(vectors[at : at + PIECE])
        return FaissGraph(self.name, plan, np.array(labels, np.int64))

    def _plan(self, vectors: Vector) -> FaissPlan:
        n, d = vectors.shape
        return FaissPlan(faiss.IndexFlatIP(d), lambda _: 4 * n * d)


class FaissFlat(_Faiss):
    """Faiss's exact scan: float32 products by its own kernels."""

    name = "faiss-flat"

    def __init__(self) -> None:
        """Nothing to set."""
        super().__init__()


class FaissIvf(_Faiss):
    """Inverted lists of whole vectors (IVF-Flat)."""

    name = "faiss-ivf"

    def __init__(
        self, *, breadth: int = 200, lists_per_root: int = 4, probe_percent: int = 8
    ) -> None:
        """How it is cut into lists and how many of them are looked at.

        lists_per_root: lists for each square root of the number of vectors
        probe_percent:  lists looked at where `breadth` candidates are asked for, at least 16; more where more
        """
        super().__init__(
            breadth=breadth, lists_per_root=lists_per_root, probe_percent=probe_percent
        )

    def _plan(self, vectors: Vector) -> FaissPlan:
        n, d = vectors.shape
        lists = self._lists(n)
        # The index refers to its quantizer: neither may own the other, Python keeps both.
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(d), d, lists, faiss.METRIC_INNER_PRODUCT)
        _train_with(index.cp)
        size = (4 * d + 8) * n + 4 * d * lists
        return FaissPlan(index, lambda _: size, self._probes(lists), whole=False)

    def _lists(self, n: int) -> int:
        """Fewer where they could not be trained."""
        return max(1, min(int(self.settings["lists_per_root"] * math.sqrt(n)), n // TRAIN_MIN))

    def _probes(self, lists: int) -> Callable[[int], Any]:
        share, breadth = self.settings["probe_percent"] / 100, self.settings["breadth"]

        def widen(fetch: int) -> Any:
            probes = max(16.0, share * lists) * max(1.0, fetch / breadth)
            return faiss.SearchParametersIVF(nprobe=min(lists, math.ceil(probes)))

        return widen


class FaissIvfPq(FaissIvf):
    """Inverted lists of product-quantized vectors, d/2 bytes each; scores are rounded, so it fetches more."""

    name = "faiss-ivfpq"

    def _plan(self, vectors: Vector) -> FaissPlan:
        n, d = vectors.shape
        if n < PQ_VECTORS_MIN:
            return super()._plan(vectors)
        lists, parts = self._lists(n), d // 2 if d % 2 == 0 else d
        quantizer = faiss.IndexFlatIP(d)
        index = faiss.IndexIVFPQ(quantizer, d, lists, parts, PQ_BITS, faiss.METRIC_INNER_PRODUCT)
        _train_with(index.cp)
        _train_with(index.pq.cp)
        size = (parts + 8) * n + 4 * d * lists + (4 * d << PQ_BITS)
        return FaissPlan(index, lambda _: size, self._probes(lists), over_fetch=2, whole=False)


class FaissHnsw(_Faiss):
    """Faiss's HNSW graph."""

    name = "faiss-hnsw"

    def __init__(self, *, m: int = 16, ef_construction: int = 200, ef: int = 200) -> None:
        """m, ef_construction, ef: as hnswlib's."""
        super().__init__(m=m, ef_construction=ef_construction, ef=ef)

    def _plan(self, vectors: Vector) -> FaissPlan:
        n, d = vectors.shape
        index = faiss.IndexHNSWFlat(d, self.settings["m"], faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = self.settings["ef_construction"]
        ef = self.settings["ef"]

        def bytes_of(filled: Any) -> int:
            return int(4 * n * d + 4 * filled.hnsw.neighbors.size() + 12 * n)

        return FaissPlan(
            index, bytes_of, lambda fetch: faiss.SearchParametersHNSW(efSearch=max(ef, fetch))
        )


def _train_with(clustering: Any) -> None:
    clustering.min_points_per_centroid = 1  # no warning on stderr: `_lists` sees to it
    clustering.max_points_per_centroid = TRAIN_MAX
    clustering.niter = TRAIN_ROUNDS
