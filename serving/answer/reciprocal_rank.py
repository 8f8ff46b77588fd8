"""Reciprocal rank fusion: an item's score is the sum of weight / (K + rank) over the paths.

After Cormack, Clarke and Büttcher, "Reciprocal Rank Fusion Outperforms Condorcet and Individual
Rank Learning Methods" (SIGIR 2009), whose constant is K, too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from heapq import nsmallest

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from index.arrays import Ints
from index.port import Hit, IndexReader, LiveItems
from serving.answer.fusion import (
    FusedOrder,
    PathCalls,
    PathResult,
    RanksAll,
    Recommendation,
    Source,
    counted,
    fill,
    tiers_of,
)
from serving.recall.base import FILLS, PathScores, RecallPath, RecallRequest

K = 60.0


class ReciprocalRank(RanksAll):
    """The first candidates of every path by reciprocal rank; equal scores by item id.

    What they leave open is filled by the paths of `FILLS`, whose items have no fused score.
    """

    name = "rrf"

    def __init__(
        self,
        fused: Collection[str],
        weights: Mapping[str, float],
        *,
        candidates: int,
        budget_ms: int = 0,
    ) -> None:
        """fused: names of the paths that have ranks; the others only fill.

        weights:    of paths, above 0; 1 for a path without one
        candidates: of each path, those with a rank
        budget_ms:  see the setting `path_budget_ms`; 0: no limit
        """
        self._fused = frozenset(fused)
        self._weights = dict(weights)
        self._candidates = candidates
        self._budget_ms = budget_ms

    @override
    def fuse(
        self, paths: Sequence[RecallPath], request: RecallRequest, index: IndexReader
    ) -> tuple[list[Recommendation], list[PathResult]]:
        if request.k <= 0:
            return [], []
        calls = PathCalls(index, request, self._budget_ms)
        results = recall_all(
            [path for path in paths if path.name in self._fused],
            request._replace(k=self._candidates),
            calls,
        )
        items = self._ranked(results, request.excluded, request.k)
        results = counted(items, results)
        fill([path for path in paths if path.name in FILLS], request, calls, items, results)
        return items, results

    def _ranked(
        self, results: Sequence[PathResult], excluded: Collection[str], k: int
    ) -> list[Recommendation]:
        """The first k candidates, best first."""
        # By path: item id -> rank and hit.
        ranked = {one.path: first_hits(one, self._candidates, excluded) for one in results}
        scores: dict[str, float] = {}
        for path, found in ranked.items():
            for item_id, (rank, _) in found.items():
                scores[item_id] = scores.get(item_id, 0.0) + self._share(path, rank)
        made = []
        for score, item_id in nsmallest(k, ((-score, item) for item, score in scores.items())):
            sources = []
            for path, found in ranked.items():
                if (one := found.get(item_id)) is not None:
                    rank, hit = one
                    sources.append(Source(path, rank, hit.score, self._share(path, rank)))
            best = max(sources, key=lambda source: source.share)
            hit = ranked[best.path][item_id][1]
            made.append(Recommendation(hit, best.path, best.rank, sources, -score))
        return made

    def _share(self, path: str, rank: float) -> float:
        return self._weights.get(path, 1.0) / (K + rank)

    @override
    def order_all(
        self, scores: Mapping[str, PathScores], items: LiveItems, excluded: npt.NDArray[np.int64]
    ) -> FusedOrder:
        fused = np.zeros(len(items.ids))
        # The same order of additions as in `fuse`, so the same bits.
        for path, scored in scores.items():
            if path in self._fused:
                for rank, place in enumerate(
                    first_places(scored, self._candidates, items.ids, excluded), 1
                ):
                    fused[place] += self._share(path, rank)
        first = PathScores(np.where(fused > 0, fused, -np.inf)[None, :])
        ordered = [first, *(scores[name] for name in FILLS if name in scores)]
        return FusedOrder(tiers_of(ordered), ordered)


def recall_all(
    paths: Sequence[RecallPath], request: RecallRequest, calls: PathCalls
) -> list[PathResult]:
    """What every path returns for the request; `taken` and `marginal` are 0.

    Those that the budget has no time for are not called. Raises EndsQuery.
    """
    results = []
    for path in paths:
        why = calls.spent()
        results.append(calls.left_out(path, why) if why else calls.call(path, request))
    return results


def first_hits(
    result: PathResult, candidates: int, excluded: Collection[str]
) -> dict[str, tuple[int, Hit]]:
    """Item id -> rank and hit, of a path's first candidates without excluded ones."""
    found: dict[str, tuple[int, Hit]] = {}
    for rank, hit in enumerate(result.candidates.hits[:candidates], 1):
        if hit.item_id not in excluded:
            found.setdefault(hit.item_id, (rank, hit))
    return found


def first_places(scored: PathScores, limit: int, ids: Sequence[str], excluded: Ints) -> list[int]:
    """Places of a path's first `limit` items of one request, best first, equal ones by id."""
    row = scored.scores[0]
    competes = row > -np.inf
    competes[excluded] = False
    places = np.flatnonzero(competes)
    values = row[places].astype(np.float64)
    if len(places) > limit:
        cut = np.partition(values, len(values) - limit)[len(values) - limit] - scored.error
        places, values = places[values >= cut], values[values >= cut]
    if scored.exact is not None:
        values = scored.exact(0, places)
    order = sorted(
        zip((-values).tolist(), places.tolist(), strict=True),
        key=lambda pair: (pair[0], ids[pair[1]]),
    )
    return [place for _, place in order[:limit]]
