"""The default main index: an hnswlib graph. The only file that imports hnswlib; its traps are handled here.

A graph is built once, by one thread, and never touched again but by searches: adding while searching is
undefined in hnswlib 0.8.0. Labels are ours, so its counts and its delete marks are not used. It searches by
inner product on unit vectors: raw inner product leaves nodes unreachable.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import hnswlib
import numpy as np

from index.arrays import Ints, Vector
from index.port import AnnIndex

# About 100 ms of building at a time; between two pieces a rebuild can be given up.
PIECE = 512
# Levels are drawn from this seed: the same vectors in the same order make the same graph.
SEED = 100


class HnswGraph:
    """One finished graph. Thread rule: any thread may search."""

    name = "hnswlib"

    def __init__(self, graph: hnswlib.Index, size: int) -> None:
        """graph: finished, its ef set, never changed from here on."""
        self._graph = graph
        self._size = size
        self._ef = int(graph.ef)
        self.memory_bytes = int(graph.index_file_size())

    @property
    def size(self) -> int:
        """How many vectors it holds."""
        return self._size

    def search(self, query: Vector, fetch: int, breadth: int = 0) -> Ints | None:
        """See `graphs.AnnIndex.search`; releases the interpreter while it searches.

        hnswlib searches with the larger of ef and what is asked for, so asking for more is searching wider;
        up to ef no more than `fetch` is asked for.
        """
        try:
            k = fetch if breadth <= self._ef else max(fetch, breadth)
            labels, _ = self._graph.knn_query(query, k=k, num_threads=1)
        except RuntimeError:
            # "Cannot return the results in a contiguous 2D array": some nodes cannot be reached.
            return None
        # hnswlib's numbers are unsigned; a view of them costs nothing.
        found: Ints = labels[0, :fetch].view(np.int64)
        return found


class HnswBackend:
    """Builds hnswlib graphs; see `index.backends.base.AnnBackend`."""

    name = "hnswlib"

    def __init__(self, *, m: int = 16, ef_construction: int = 200, ef: int = 200) -> None:
        """m, ef_construction, ef: hnswlib's."""
        if m < 2 or ef_construction < 1 or ef < 1:
            raise ValueError(
                f"m {m} must be at least 2, ef_construction {ef_construction} and ef {ef} at least 1"
            )
        self._m, self._ef_construction, self._ef = m, ef_construction, ef

    @property
    def settings(self) -> Mapping[str, int]:
        """See `AnnBackend.settings`."""
        return {"m": self._m, "ef_construction": self._ef_construction, "ef": self._ef}

    def build(self, labels: Ints, vectors: Vector, stop: threading.Event) -> AnnIndex | None:
        """See `AnnBackend.build`. Stops between two pieces."""
        graph = hnswlib.Index(space="ip", dim=vectors.shape[1])
        graph.init_index(
            max_elements=max(1, len(labels)),
            M=self._m,
            ef_construction=self._ef_construction,
            random_seed=SEED,
        )
        # Not kept in a saved graph, so it is set here and nowhere else.
        graph.set_ef(self._ef)
        for at in range(0, len(labels), PIECE):
            if stop.is_set():
                return None
            graph.add_items(vectors[at : at + PIECE], labels[at : at + PIECE], num_threads=1)
        return HnswGraph(graph, len(labels))
