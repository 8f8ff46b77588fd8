"""Faiss as ANN backend: Flat, IVF-Flat, IVF-PQ and HNSW. Only this file imports faiss.

Everything runs on the calling thread: queries run in parallel already, and a rebuild must leave
cores to them. Search is by inner product on unit vectors. Each call carries its search parameters,
so the index is never modified.
"""

from __future__ import annotations

import math
import threading
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import faiss as library
import numpy as np
from typing_extensions import override

from index.arrays import Ints, Vector
from index.backends.base import AnnBackend, AnnIndex

# Its type hints do not describe the classes that it wraps in Python.
faiss: Any = library

# Vectors added between two checks of `stop`.
BATCH = 1_024
# k-means needs this many vectors per centroid; more than the maximum only add time.
TRAIN_MIN, TRAIN_MAX = 39, 64
# Further rounds of k-means change recall by less than 0.001 and take most of the training time.
TRAIN_ROUNDS = 10
PQ_BITS = 8
# A product quantizer trains 256 centroids per part.
PQ_VECTORS_MIN = TRAIN_MIN << PQ_BITS


@dataclass(frozen=True)
class FaissPlan:
    """How to build and search one index for given vectors.

    index:      empty, perhaps untrained; bytes_of: memory of the filled index
    parameters: search parameters for a breadth, None if the kind has none
    over_fetch: candidates named per candidate requested; rescoring picks the best of them
    complete:   whether a search that names too few has failed to reach every vector
    """

    index: Any
    bytes_of: Callable[[Any], int]
    parameters: Callable[[int], Any] = lambda _: None
    over_fetch: int = 1
    complete: bool = True


class FaissIndex(AnnIndex):
    """One finished index."""

    def __init__(self, name: str, plan: FaissPlan, labels: Ints) -> None:
        """plan: its index is filled; labels: int64 (n,), in the order the vectors were added."""
        self.name = name
        self.size = len(labels)
        self.memory_bytes = plan.bytes_of(plan.index) + labels.nbytes
        self._index = plan.index
        self._labels = labels
        self._over_fetch = plan.over_fetch
        self._complete = plan.complete
        # Queries use a handful of different breadths.
        self._parameters = lru_cache(maxsize=64)(plan.parameters)

    @override
    def search(self, query: Vector, fetch: int, breadth: int = 0) -> Ints | None:
        """As in the port; releases the interpreter lock while it searches."""
        faiss.omp_set_num_threads(1)  # applies to the calling thread only
        breadth = max(fetch, breadth)
        # With rounded scores the best may be anywhere among all that the search visits.
        named = fetch if self._over_fetch == 1 else self._over_fetch * breadth
        k = min(self.size, named)
        _, found = self._index.search(query[np.newaxis], k, params=self._parameters(breadth))
        positions = found[0][found[0] >= 0]  # -1 pads the answer if the visited lists hold fewer
        return None if self._complete and len(positions) < k else self._labels[positions]


class _Faiss(AnnBackend):
    """What the four kinds share; a kind overrides `_plan`."""

    name = "faiss"

    def __init__(self, **settings: int) -> None:
        """settings: all at least 1."""
        for key, value in settings.items():
            if value < 1:
                raise ValueError(f"{key} {value} must be at least 1")
        self.settings = settings

    @override
    def build(self, labels: Ints, vectors: Vector, stop: threading.Event) -> AnnIndex | None:
        """As in the port; `stop` interrupts the adding, not the training."""
        faiss.omp_set_num_threads(1)
        plan = self._plan(vectors)
        if stop.is_set():
            return None
        if not plan.index.is_trained:
            plan.index.train(vectors)
        for at in range(0, len(vectors), BATCH):
            if stop.is_set():
                return None
            plan.index.add(vectors[at : at + BATCH])
        return FaissIndex(self.name, plan, np.array(labels, np.int64))

    @abstractmethod
    def _plan(self, vectors: Vector) -> FaissPlan:
        """The empty Faiss index of this kind for these vectors, float32 (n, d)."""


class FaissFlat(_Faiss):
    """Faiss's exact scan: float32 products by its own kernels."""

    name = "faiss-flat"

    @override
    def _plan(self, vectors: Vector) -> FaissPlan:
        n, d = vectors.shape
        return FaissPlan(faiss.IndexFlatIP(d), lambda _: 4 * n * d)


class FaissIvf(_Faiss):
    """Inverted lists of whole vectors (IVF-Flat)."""

    name = "faiss-ivf"

    def __init__(
        self, *, breadth: int = 200, lists_per_root: int = 4, probe_percent: int = 8
    ) -> None:
        """Set the number of lists and the share of them that a search visits.

        lists_per_root: lists per square root of the number of vectors
        probe_percent:  lists visited for a search of `breadth`, at least 16; in proportion above
        """
        super().__init__(
            breadth=breadth, lists_per_root=lists_per_root, probe_percent=probe_percent
        )

    @override
    def _plan(self, vectors: Vector) -> FaissPlan:
        n, d = vectors.shape
        lists = self._lists(n)
        # The index refers to its quantizer; neither owns the other, Python keeps both.
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(d), d, lists, faiss.METRIC_INNER_PRODUCT)
        _set_training(index.cp)
        size = (4 * d + 8) * n + 4 * d * lists
        return FaissPlan(index, lambda _: size, self._probes(lists), complete=False)

    def _lists(self, n: int) -> int:
        """Number of lists, bounded by what n vectors can train."""
        return max(1, min(int(self.settings["lists_per_root"] * math.sqrt(n)), n // TRAIN_MIN))

    def _probes(self, lists: int) -> Callable[[int], Any]:
        share, least = self.settings["probe_percent"] / 100, self.settings["breadth"]

        def parameters(breadth: int) -> Any:
            probes = max(16.0, share * lists) * max(1.0, breadth / least)
            return faiss.SearchParametersIVF(nprobe=min(lists, math.ceil(probes)))

        return parameters


class FaissIvfPq(FaissIvf):
    """Inverted lists of product-quantized vectors, d/2 bytes each; over-fetches for rounding."""

    name = "faiss-ivfpq"

    @override
    def _plan(self, vectors: Vector) -> FaissPlan:
        n, d = vectors.shape
        if n < PQ_VECTORS_MIN:
            return super()._plan(vectors)
        lists, parts = self._lists(n), d // 2 if d % 2 == 0 else d
        quantizer = faiss.IndexFlatIP(d)
        index = faiss.IndexIVFPQ(quantizer, d, lists, parts, PQ_BITS, faiss.METRIC_INNER_PRODUCT)
        _set_training(index.cp)
        _set_training(index.pq.cp)
        size = (parts + 8) * n + 4 * d * lists + (4 * d << PQ_BITS)
        return FaissPlan(index, lambda _: size, self._probes(lists), over_fetch=2, complete=False)


class FaissHnsw(_Faiss):
    """Faiss's HNSW graph."""

    name = "faiss-hnsw"

    def __init__(self, *, m: int = 16, ef_construction: int = 200, ef: int = 200) -> None:
        """m, ef_construction, ef: as hnswlib's."""
        super().__init__(m=m, ef_construction=ef_construction, ef=ef)

    @override
    def _plan(self, vectors: Vector) -> FaissPlan:
        n, d = vectors.shape
        index = faiss.IndexHNSWFlat(d, self.settings["m"], faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = self.settings["ef_construction"]
        ef = self.settings["ef"]

        def bytes_of(filled: Any) -> int:
            return int(4 * n * d + 4 * filled.hnsw.neighbors.size() + 12 * n)

        return FaissPlan(
            index, bytes_of, lambda breadth: faiss.SearchParametersHNSW(efSearch=max(ef, breadth))
        )


def _set_training(clustering: Any) -> None:
    clustering.min_points_per_centroid = 1  # no warning on stderr: `_lists` bounds it
    clustering.max_points_per_centroid = TRAIN_MAX
    clustering.niter = TRAIN_ROUNDS
