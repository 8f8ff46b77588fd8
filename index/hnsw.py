"""The live index over hnswlib graphs. The only file that imports hnswlib; its traps are handled here.

A graph is built once, by one thread, and never touched again but by searches: adding while searching is
                                                                               undefined
in hnswlib 0.8.0. Labels are ours, so its counts and its delete marks are not used. It searches by inner
product on unit vectors: raw inner product leaves nodes unreachable.
"""

from __future__ import annotations

import threading

import hnswlib
import numpy as np

from index.live import LiveIndex
from index.port import Vector
from index.rows import Ints
from index.state import Main

# About 100 ms of building at a time; between two pieces a rebuild can be given up.
PIECE = 512
# Levels are drawn from this seed: the same vectors in the same order make the same graph.
SEED = 100


class HnswMain:
    """One finished graph. Thread rule: any thread may search."""

    def __init__(self, graph: hnswlib.Index, size: int) -> None:
        """graph: finished, never changed from here on."""
        self._graph = graph
        self._size = size

    @property
    def size(self) -> int:
        """How many vectors it holds."""
        return self._size

    def search(self, query: Vector, fetch: int) -> Ints | None:
        """See `state.Main.search`; releases the interpreter while it searches."""
        try:
            labels, _ = self._graph.knn_query(query, k=fetch, num_threads=1)
        except RuntimeError:
            # "Cannot return the results in a contiguous 2D array": some nodes cannot be reached.
            return None
        found: Ints = labels[0].astype(np.int64)
        return found


class HnswIndex(LiveIndex):
    """The live index on hnswlib; see `index.live`."""

    def __init__(
        self,
        dimension: int,
        *,
        m: int = 16,
        ef_construction: int = 200,
        ef: int = 200,
        exact_below: int = 12_000,
        fresh_max: int = 4_096,
    ) -> None:
        """m, ef_construction, ef: hnswlib's; exact_below, fresh_max: see `LiveIndex`."""
        if m < 2 or ef_construction < 1 or ef < 1:
            raise ValueError(
                f"m {m} must be at least 2, ef_construction {ef_construction} and ef {ef} at least 1"
            )

        def build(labels: Ints, vectors: Vector, stop: threading.Event) -> Main | None:
            graph = hnswlib.Index(space="ip", dim=dimension)
            graph.init_index(
                max_elements=max(1, len(labels)), M=m, ef_construction=ef_construction, random_seed=SEED
            )
            # Not kept in a saved graph, so it is set here and nowhere else.
            graph.set_ef(ef)
            for at in range(0, len(labels), PIECE):
                if stop.is_set():
                    return None
                graph.add_items(vectors[at : at + PIECE], labels[at : at + PIECE], num_threads=1)
            return HnswMain(graph, len(labels))

        super().__init__(dimension, build, breadth=ef, exact_below=exact_below, fresh_max=fresh_max)
