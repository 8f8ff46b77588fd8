"""Several query vectors, for a user with several interests, merged into one list."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

import numpy as np

from eddyline.errors import VectorRejected
from index.arrays import Vector
from index.filters import Filter
from index.port import Hit, IndexReader
from index.records import check_query

Merge = Literal["max", "sum"]
# Bounds the work of one call; models in the literature give a user 4 to 8 interests.
VECTORS_MAX = 32


def query_multi(
    index: IndexReader,
    vectors: Vector,
    k: int,
    exclude: Collection[str] = (),
    filters: Filter | None = None,
    *,
    merge: Merge = "max",
) -> Sequence[Hit]:
    """The k live items of the highest merged score, best first, equal scores by item id.

    vectors: float32 (q, d), 1 … VECTORS_MAX of them, finite
    merge:   "max": an item's score for its nearest vector. As exact as single queries, because
             each of the k best is among the k best of its vector.
             "sum": the sum of an item's inner products, from one query of the summed vectors
    Raises VectorRejected if the vectors do not fit, ValueError for an unknown merge.
    """
    if vectors.ndim != 2 or not 1 <= len(vectors) <= VECTORS_MAX:
        raise VectorRejected(
            f"query vectors: shape {vectors.shape}, must be 1 … {VECTORS_MAX} rows"
        )
    for vector in vectors:
        check_query(vector, index.dimension)
    if merge == "sum":
        total = vectors.astype(np.float64).sum(axis=0).astype(np.float32)
        return index.query(total, k, exclude, filters)
    if merge != "max":
        raise ValueError(f"merge {merge!r} is neither 'max' nor 'sum'")
    best: dict[str, Hit] = {}
    for vector in vectors:
        for hit in index.query(vector, k, exclude, filters):
            before = best.get(hit.item_id)
            if before is None or hit.score > before.score:
                best[hit.item_id] = hit
    return sorted(best.values(), key=lambda hit: (-hit.score, hit.item_id))[: max(k, 0)]
