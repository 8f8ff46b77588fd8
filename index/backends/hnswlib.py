"""The default ANN backend: an hnswlib graph. Only this file imports hnswlib and handles its traps.

One thread builds a graph; afterwards it is only searched, because adding during a search is
undefined in hnswlib 0.8.0. Labels are ours, so its counts and delete marks are not used. It
searches by inner product on unit vectors: with raw vectors some nodes become unreachable.
"""

from __future__ import annotations

import threading

import hnswlib
import numpy as np
from typing_extensions import override

from index.arrays import Ints, Vector
from index.backends.base import AnnBackend, AnnIndex

# Vectors added between two checks of `stop`, about 100 ms of building.
BATCH = 512
# hnswlib draws levels from it: the same vectors in the same order give the same graph.
SEED = 100


class HnswGraph(AnnIndex):
    """One finished graph."""

    name = "hnswlib"

    def __init__(self, graph: hnswlib.Index, size: int) -> None:
        """graph: finished, its ef set; never changed afterwards. size: number of vectors."""
        self._graph = graph
        self._ef = int(graph.ef)
        self.size = size
        self.memory_bytes = int(graph.index_file_size())

    @override
    def search(self, query: Vector, fetch: int, breadth: int = 0) -> Ints | None:
        """As in the port; releases the interpreter lock while it searches.

        hnswlib searches with the larger of ef and k, so a larger k widens the search. Up to ef,
        k is `fetch`.
        """
        try:
            k = fetch if breadth <= self._ef else max(fetch, breadth)
            labels, _ = self._graph.knn_query(query, k=k, num_threads=1)
        except RuntimeError:
            # "Cannot return the results in a contiguous 2D array": some nodes are unreachable.
            return None
        # hnswlib's labels are unsigned; a view costs nothing.
        found: Ints = labels[0, :fetch].view(np.int64)
        return found


class HnswBackend(AnnBackend):
    """Builds hnswlib graphs."""

    name = "hnswlib"

    def __init__(self, *, m: int = 16, ef_construction: int = 200, ef: int = 200) -> None:
        """m, ef_construction, ef: hnswlib's parameters."""
        if m < 2 or ef_construction < 1 or ef < 1:
            raise ValueError(
                f"m {m} must be at least 2, "
                f"ef_construction {ef_construction} and ef {ef} at least 1"
            )
        self.settings = {"m": m, "ef_construction": ef_construction, "ef": ef}

    @override
    def build(self, labels: Ints, vectors: Vector, stop: threading.Event) -> AnnIndex | None:
        graph = hnswlib.Index(space="ip", dim=vectors.shape[1])
        graph.init_index(
            max_elements=max(1, len(labels)),
            M=self.settings["m"],
            ef_construction=self.settings["ef_construction"],
            random_seed=SEED,
        )
        # A saved graph does not keep ef, so it is set here only.
        graph.set_ef(self.settings["ef"])
        for at in range(0, len(labels), BATCH):
            if stop.is_set():
                return None
            graph.add_items(vectors[at : at + BATCH], labels[at : at + BATCH], num_threads=1)
        return HnswGraph(graph, len(labels))
