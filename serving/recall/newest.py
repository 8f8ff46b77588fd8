"""Fallback recall path: the newest items, if the other paths return too few."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from typing_extensions import override

from index.port import IndexReader, LiveItems
from serving.recall.base import Candidates, PathScores, RecallContext, RecallPath, RecallRequest


class NewestPath(RecallPath):
    """The live items of the largest `at_ms`, newest first."""

    name = "newest"

    def __init__(self, context: RecallContext) -> None:
        """Needs nothing but the index."""

    @override
    def recall(self, request: RecallRequest, index: IndexReader) -> Candidates:
        hits = index.newest(request.k, request.excluded, request.filters)
        if len(hits) == request.k:
            return Candidates(hits)
        which = "live items" if request.filters is None else "live items that pass the filter"
        return Candidates(hits, f"only {len(hits)} {which} are left")

    @override
    def score_all(
        self, requests: Sequence[RecallRequest], index: IndexReader, items: LiveItems
    ) -> PathScores:
        scores = items.at_ms.astype(np.float64)
        return PathScores(np.broadcast_to(scores, (len(requests), len(scores))))
