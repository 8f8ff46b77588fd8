"""Annoy's forest of random splits as ANN backend. Only this file imports annoy.

Annoy cannot add to a finished forest; the live index never does. Annoy allocates space up
to the largest item number, so its numbers are positions in our array of labels.
"""

from __future__ import annotations

import threading

import annoy
import numpy as np
from typing_extensions import override

from index.arrays import Ints, Vector
from index.backends.base import AnnBackend, AnnIndex

SEED = 100
# Vectors added between two checks of `stop`; adding holds the interpreter lock, microseconds each.
BATCH = 1_024
# A node has 12 bytes before its vector. Inner nodes have a vector too, and random splits fill the
# leaves to about two thirds. A test compares the estimate with the size of a saved forest.
NODE_BYTES = 12
LEAF_FILL = 0.66


class AnnoyForest(AnnIndex):
    """One finished forest."""

    name = "annoy"

    def __init__(
        self, forest: annoy.AnnoyIndex, labels: Ints, nodes_per_candidate: int, dimension: int
    ) -> None:
        """forest: built; labels: int64 (n,), by Annoy's item number."""
        self._forest = forest
        self._labels = labels
        self._nodes_per_candidate = nodes_per_candidate
        node_bytes = NODE_BYTES + 4 * dimension
        per_leaf = LEAF_FILL * (dimension + 2)
        inner = forest.get_n_trees() * 2.0 * len(labels) / per_leaf
        self.size = len(labels)
        self.memory_bytes = int(node_bytes * (len(labels) + inner)) + labels.nbytes

    @override
    def search(self, query: Vector, fetch: int, breadth: int = 0) -> Ints | None:
        """As in the port; releases the interpreter lock while it searches."""
        nodes = max(fetch, breadth) * self._nodes_per_candidate
        # Annoy reads a list several times faster than an array.
        found = self._forest.get_nns_by_vector(query.tolist(), fetch, nodes)
        return self._labels[found] if found else None


class AnnoyBackend(AnnBackend):
    """Builds Annoy forests."""

    name = "annoy"

    def __init__(self, *, trees: int = 32, width: int = 24) -> None:
        """trees: more trees find more and take more memory; width: nodes visited per candidate."""
        if trees < 1 or width < 1:
            raise ValueError(f"trees {trees} and width {width} must be at least 1")
        self.settings = {"trees": trees, "width": width}

    @override
    def build(self, labels: Ints, vectors: Vector, stop: threading.Event) -> AnnIndex | None:
        """As in the port; `stop` interrupts the adding, not the growing of the trees."""
        # On unit vectors the order by angle is the order by inner product.
        dimension = vectors.shape[1]
        forest = annoy.AnnoyIndex(dimension, "angular")
        forest.set_seed(SEED)
        for at in range(0, len(labels), BATCH):
            if stop.is_set():
                return None
            for number, vector in enumerate(vectors[at : at + BATCH].tolist(), at):
                forest.add_item(number, vector)
        forest.build(self.settings["trees"], n_jobs=1)
        return AnnoyForest(forest, np.array(labels, np.int64), self.settings["width"], dimension)
