"""The fusion `blend`: the blender orders the first candidates of every recall path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from typing_extensions import override

from eddyline.schema.item_key import keys_of
from eddyline.schema.user_history import positive_items
from index.arrays import Vector
from index.port import IndexReader
from serving.answer.blend_features import (
    LAST_ITEMS,
    Known,
    Listed,
    Matrix,
    Union,
    context,
    features,
)
from serving.answer.blend_weights import CurrentBlender
from serving.answer.blender import Blender
from serving.answer.fusion import (
    Fusion,
    PathCalls,
    PathResult,
    Recommendation,
    Source,
    counted,
    fill,
)
from serving.answer.reciprocal_rank import recall_all
from serving.recall.base import FILLS, Candidates, RecallPath, RecallRequest
from serving.recall.co_visits import AFTER_PRIOR, CoVisitsBothPath, CoVisitsPath, NextPath, sum_up

# More candidates than a shard describes in one call have no vectors.
VECTORS_MAX = 1_024


@dataclass(frozen=True, slots=True)
class Prepared:
    """A query's candidates as the blender sees them.

    results: of the paths that were called
    q:       float64 (contexts,); x: float64 (candidates, features)
    """

    results: list[PathResult]
    union: Union
    q: Matrix
    x: Matrix


class Blend(Fusion):
    """The first candidates of every path by the blender's score; equal scores by item id.

    What they leave open is filled by the paths of `FILLS`, whose items have no fused score.
    """

    name = "blend"

    def __init__(
        self, fused: Sequence[str], blender: CurrentBlender, *, candidates: int, budget_ms: int = 0
    ) -> None:
        """fused: names of the paths that have features, in their order; the others only fill.

        blender:    of these paths
        candidates: of each path
        budget_ms:  see the setting `path_budget_ms`; 0: no limit
        """
        self._fused = tuple(fused)
        self._blender = blender
        self._candidates = candidates
        self._budget_ms = budget_ms

    @override
    def degradation(self) -> str:
        return f"worker: {why}" if (why := self._blender.why) else ""

    @override
    def fuse(
        self, paths: Sequence[RecallPath], request: RecallRequest, index: IndexReader
    ) -> tuple[list[Recommendation], list[PathResult]]:
        if request.k <= 0:
            return [], []
        calls = PathCalls(index, request, self._budget_ms)
        prepared = self._prepare(paths, request, index, calls)
        items = self._ranked(prepared, request.k)
        results = counted(items, prepared.results)
        fill([path for path in paths if path.name in FILLS], request, calls, items, results)
        return items, results

    def prepare(
        self, paths: Sequence[RecallPath], request: RecallRequest, index: IndexReader
    ) -> Prepared:
        """What `fuse` scores. Raises EndsQuery."""
        return self._prepare(paths, request, index, PathCalls(index, request, self._budget_ms))

    def _prepare(
        self,
        paths: Sequence[RecallPath],
        request: RecallRequest,
        index: IndexReader,
        calls: PathCalls,
    ) -> Prepared:
        by_name = {path.name: path for path in paths}
        called = [by_name[name] for name in self._fused if name in by_name]
        results = recall_all(called, request._replace(k=self._candidates), calls)
        found = {result.path: result for result in results}
        lists, user_vector = [], None
        for name in self._fused:
            result = found.get(name)
            candidates = Candidates(()) if result is None else result.candidates
            user_vector = user_vector if candidates.vector is None else candidates.vector
            hits = candidates.hits[: self._candidates]
            lists.append(Listed(name, hits, cosines=candidates.vector is not None))
        union = Union.of(lists, request.excluded)
        known = known_of(request, index, union, user_vector)
        known.values = {**known.values, **_visits(request, union, found)}
        if request.co_visits is not None and request.co_visits.after:
            known.visits_sum = request.co_visits.after[0].visits_sum
        return Prepared(results, union, context(known), features(union, known, self._candidates))

    def _ranked(self, prepared: Prepared, k: int) -> list[Recommendation]:
        """The k best candidates."""
        union, blender = prepared.union, self._blender()
        scores = blender.scores(prepared.q, prepared.x)
        best: Sequence[int] = range(len(scores))
        if len(scores) > k:
            cut = np.partition(scores, len(scores) - k)[len(scores) - k]
            best = np.flatnonzero(scores >= cut).tolist()
        order = sorted(best, key=lambda at: (-scores[at], union.hits[at].item_id))[:k]
        shares = self._shares(blender, prepared, order)
        found = []
        for at, of_item in zip(order, shares, strict=True):
            sources = [
                Source(self._fused[row], int(rank) + 1, float(union.scores[row, at]), of_item[row])
                for row, rank in enumerate(union.ranks[:, at])
                if rank >= 0
            ]
            most = max(sources, key=lambda source: source.share)
            hit = union.hits[at]._replace(score=float(most.score))
            found.append(Recommendation(hit, most.path, most.rank, sources, float(scores[at])))
        return found

    def _shares(
        self, blender: Blender, prepared: Prepared, places: Sequence[int]
    ) -> list[list[float]]:
        """What the features of each path add to the score of these candidates."""
        paths = len(self._fused)
        parts = blender.parts(prepared.q, prepared.x[places])[:, : 3 * paths]
        found: list[list[float]] = parts.reshape(len(places), paths, 3).sum(axis=2).tolist()
        return found


def known_of(
    request: RecallRequest, index: IndexReader, union: Union, user_vector: Vector | None
) -> Known:
    """What is known of the candidates besides the lists. user_vector: of the towers, if known."""
    ids = union.ids
    entries = () if request.user is None else request.user.history.entries
    last = positive_items(entries, LAST_ITEMS)
    vectors = index.vectors_of(ids) if 0 < len(ids) <= VECTORS_MAX else None
    own, recency = np.zeros(len(ids)), np.zeros(len(ids))
    if entries and ids:
        place = {item_id: at for at, item_id in enumerate(ids)}
        for number, entry in enumerate(entries):
            at = place.get(entry.item_id)
            if at is not None:
                if not own[at]:
                    recency[at] = 1 / np.log(2 + number)
                own[at] += 1
    return Known(
        values={"own clicks": own},
        now_ms=request.now_ms,
        events=len(entries),
        last_ms=max((entry.at_ms for entry in entries), default=0),
        visits_sum=0.0,
        own_recency=recency,
        # An item that died meanwhile has none.
        vectors=vectors if vectors is not None and len(vectors) == len(ids) else None,
        user_vector=user_vector,
        last_vectors=index.vectors_of(last) if last else None,
    )


def _visits(
    request: RecallRequest, union: Union, results: Mapping[str, PathResult]
) -> dict[str, Matrix]:
    """What co-visits say of the candidates, whether a path lists them or not."""
    scored = {
        name: by_key
        for name, path in (
            ("co-visits", CoVisitsPath.name),
            ("co-visits both", CoVisitsBothPath.name),
            ("next", NextPath.name),
        )
        if path in results and (by_key := results[path].candidates.by_key) is not None
    }
    rows = request.co_visits
    if rows is not None and rows.before:
        row = rows.before[0]
        scored["visited before"] = sum_up(
            [(row.keys, row.visits, 1 / (row.visits_sum + AFTER_PRIOR))]
        )
    if not scored:
        return {}
    keys = keys_of(union.ids)
    return {name: of_name.of(keys) for name, of_name in scored.items()}
