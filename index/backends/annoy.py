"""AnnoyBackend's forest of random splits as main index. The only file that imports annoy.

AnnoyBackend cannot add to a finished forest; here it does not have to. It makes room for the largest item number, so
its numbers are places in our array of labels, not the labels themselves.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import annoy
import numpy as np

from index.arrays import Ints, Vector
from index.port import AnnIndex

SEED = 100
# Adding holds the interpreter, a few microseconds an item; between two pieces a rebuild can be given up.
PIECE = 1_024
# Before its vector a node has 12 bytes; an inner node has a vector, too, and random splits fill the leaves to
# about two thirds. A test compares it with the size of a saved forest.
NODE_BYTES = 12
LEAF_FILL = 0.66


class AnnoyGraph:
    """One finished forest. Thread rule: any thread may search."""

    name = "annoy"

    def __init__(self, forest: annoy.AnnoyIndex, labels: Ints, width: int, dimension: int) -> None:
        """forest: built; labels: int64 (n,); width: nodes to look at for each candidate asked for."""
        self._forest = forest
        self._labels = labels
        self._width = width
        node = NODE_BYTES + 4 * dimension
        per_leaf = LEAF_FILL * (dimension + 2)
        inner = forest.get_n_trees() * 2.0 * len(labels) / per_leaf
        self.memory_bytes = int(node * (len(labels) + inner)) + labels.nbytes

    @property
    def size(self) -> int:
        """How many vectors it holds."""
        return len(self._labels)

    def search(self, query: Vector, fetch: int, breadth: int = 0) -> Ints | None:
        """See `graphs.AnnIndex.search`; releases the interpreter while it searches."""
        # Reading the numbers of a list is several times faster than those of an array.
        places = self._forest.get_nns_by_vector(
            query.tolist(), fetch, max(fetch, breadth) * self._width
        )
        return self._labels[places] if places else None


class AnnoyBackend:
    """Builds AnnoyBackend forests; see `index.backends.base.AnnBackend`."""

    name = "annoy"

    def __init__(self, *, trees: int = 32, width: int = 24) -> None:
        """trees: more find more and take more memory; width: nodes looked at for each candidate asked for."""
        if trees < 1 or width < 1:
            raise ValueError(f"trees {trees} and width {width} must be at least 1")
        self._trees, self._width = trees, width

    @property
    def settings(self) -> Mapping[str, int]:
        """See `AnnBackend.settings`."""
        return {"trees": self._trees, "width": self._width}

    def build(self, labels: Ints, vectors: Vector, stop: threading.Event) -> AnnIndex | None:
        """See `AnnBackend.build`. Stops while adding; growing the trees cannot be interrupted."""
        # On unit vectors the order by angle is the order by inner product.
        forest = annoy.AnnoyIndex(vectors.shape[1], "angular")
        forest.set_seed(SEED)
        for at in range(0, len(labels), PIECE):
            if stop.is_set():
                return None
            for place, vector in enumerate(vectors[at : at + PIECE].tolist(), at):
                forest.add_item(place, vector)
        forest.build(self._trees, n_jobs=1)
        return AnnoyGraph(forest, np.array(labels, np.int64), self._width, vectors.shape[1])
