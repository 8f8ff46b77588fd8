"""From several recall paths to one answer, filled up to k items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from index.port import Hit, IndexReader
from serving.recall.base import Candidates, PathScores, RecallPath, RecallRequest


class Recommendation(NamedTuple):
    """One item of the answer, its recall path, and its rank there (1 is the best)."""

    hit: Hit
    path: str
    path_rank: int


class PathResult(NamedTuple):
    """What one recall path returned, and how many of its candidates are in the answer."""

    path: str
    candidates: Candidates
    taken: int


class FusedOrder(NamedTuple):
    """How a fusion orders all live items for one request.

    tiers:  int64 (items,): a lower tier comes first
    scores: one for each tier, of one request: the order within the tier
    """

    tiers: npt.NDArray[np.int64]
    scores: Sequence[PathScores]


class Fusion(Protocol):
    """Chooses the answer's items from the candidates of the recall paths.

    It calls the paths itself: a request may depend on what earlier paths returned.
    """

    def fuse(
        self, paths: Sequence[RecallPath], request: RecallRequest, index: IndexReader
    ) -> tuple[list[Recommendation], list[PathResult]]:
        """(at most `request.k` items, best first; the results of the paths that were called)."""

    def order_all(self, scores: Sequence[PathScores]) -> FusedOrder:
        """The order of `fuse` over all live items. scores: of one request by each path, in order.

        An item that no path returns has the tier `len(scores)`.
        """


class Cascade(Fusion):
    """The first k items over all paths in their order, each once, without excluded ones.

    A path is called only for what the paths before it left open; one that is not needed is neither
    called nor listed.
    """

    @override
    def fuse(
        self, paths: Sequence[RecallPath], request: RecallRequest, index: IndexReader
    ) -> tuple[list[Recommendation], list[PathResult]]:
        items: list[Recommendation] = []
        results: list[PathResult] = []
        excluded = set(request.excluded)
        for path in paths:
            before = len(items)
            if before >= request.k:
                break
            if before:
                rest = request._replace(k=request.k - before, excluded=frozenset(excluded))
            else:
                rest = request
            candidates = path.recall(rest, index)
            for rank, hit in enumerate(candidates.hits, 1):
                if hit.item_id not in excluded and len(items) < request.k:
                    excluded.add(hit.item_id)
                    items.append(Recommendation(hit, path.name, rank))
            results.append(PathResult(path.name, candidates, len(items) - before))
        return items, results

    @override
    def order_all(self, scores: Sequence[PathScores]) -> FusedOrder:
        tiers = np.full(scores[0].scores.shape[1], len(scores))
        for tier in reversed(range(len(scores))):
            tiers[scores[tier].scores[0] > -np.inf] = tier
        return FusedOrder(tiers, scores)
