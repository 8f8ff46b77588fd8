"""Strata of queries, for the recall guard: clusters of the items, and filtered queries.

A graph loses items by region, so recall differs between regions more than between queries of one.
"""

from __future__ import annotations

import numpy as np

from index.arrays import Vector
from index.search.filtered import FilteredSearch
from index.search.nearest import NearestSearch
from index.storage.index_version import IndexVersion

# Clusters; the stratum of filtered queries comes in addition.
STRATA = 16
FILTERED = -1
# Items that the clusters are found from, and rounds of k-means: about 20 ms.
_ITEMS_MAX, _ROUNDS = 4_096, 8


def clusters_of(version: IndexVersion) -> Vector:
    """float32 (c, d): unit centres of clusters of the live items, at most STRATA; by k-means.

    The same version gives the same clusters.
    """
    rows = version.table.live_rows(version.used, version.seq)
    step = max(1, len(rows) // _ITEMS_MAX)
    items = version.table.gather(rows[::step])
    centres = items[:: max(1, len(items) // STRATA)][:STRATA].copy()
    for _ in range(_ROUNDS):
        nearest = (items @ centres.T).argmax(axis=1)
        for number in range(len(centres)):
            total = items[nearest == number].sum(axis=0)
            norm = float(np.linalg.norm(total))
            if norm > 0:
                centres[number] = total / norm
    return centres


def stratum_of(search: NearestSearch, clusters: Vector | None) -> int:
    """The number of the query's cluster, or FILTERED; 0 while there are no clusters."""
    if isinstance(search, FilteredSearch):
        return FILTERED
    if clusters is None or not len(clusters):
        return 0
    return int((clusters @ search.query).argmax())
