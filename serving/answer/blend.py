"""The fusion `blend`: the blender orders the first candidates of every recall path."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
from typing_extensions import override

from eddyline.schema.user_history import Entry, positive_items
from index.port import IndexReader
from serving.answer.blend_features import (
    LAST_ITEMS,
    Known,
    Listed,
    Matrix,
    Table,
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
from serving.recall.base import (
    AFTER,
    BEFORE,
    FILLS,
    Candidates,
    QueryCoVisits,
    RecallPath,
    RecallRequest,
)
from serving.recall.co_visits import AFTER_PRIOR, CoVisitsBothPath, CoVisitsPath, NextPath, sum_up

# More candidates than a shard describes in one call have no vectors.
VECTORS_MAX = 1_024
# Feature -> the path whose scores it has.
_VISITS = {
    "co-visits": CoVisitsPath.name,
    "co-visits both": CoVisitsBothPath.name,
    "next": NextPath.name,
}
_NOTHING = Candidates(())
# One thread of the process blends at a time. It computes for some milliseconds in two hundred calls
# of numpy, most of which let go of the interpreter for a moment: a second thread would take it each
# time, and both would do little else.
_TURN = threading.Lock()


@dataclass(frozen=True, slots=True)
class Prepared:
    """A query's candidates as the blender sees them.

    results: of the paths that were called
    q:       float64 (contexts,); x: float64 (candidates, features)
    """

    results: list[PathResult]
    table: Table
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
        with _TURN if index.is_local else nullcontext():
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
        found = {result.path: result.candidates for result in results}
        lists = []
        for name in self._fused:
            of_path = found.get(name, _NOTHING)
            hits = of_path.hits[: self._candidates]
            lists.append(Listed(name, hits, cosines=of_path.vector is not None))
        table = Table.of(lists, request.excluded)
        rows = _rows(request, frozenset().union(*(path.reads for path in called)))
        known = _known(request._replace(co_visits=rows), index, table, found)
        return Prepared(results, table, context(known), features(table, known, self._candidates))

    def _ranked(self, prepared: Prepared, k: int) -> list[Recommendation]:
        """The k best candidates."""
        table, blender = prepared.table, self._blender()
        scores = blender.scores(prepared.q, prepared.x)
        best: Sequence[int] = range(len(scores))
        if len(scores) > k:
            cut = np.partition(scores, len(scores) - k)[len(scores) - k]
            best = np.flatnonzero(scores >= cut).tolist()
        order = sorted(best, key=lambda at: (-scores[at], table.ids[at]))[:k]
        shares = self._shares(blender, prepared, order)
        columns = table.ranks[:, order].T.tolist(), table.scores[:, order].T.tolist()
        found = []
        for at, of_item, ranks, of_paths in zip(order, shares, *columns, strict=True):
            sources = [
                Source(path, rank + 1, score, share)
                for path, rank, score, share in zip(
                    self._fused, ranks, of_paths, of_item, strict=True
                )
                if rank >= 0
            ]
            most = max(sources, key=lambda source: source.share)
            hit = table.hits[at]._replace(score=most.score)
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


def _rows(request: RecallRequest, reads: Collection[str]) -> QueryCoVisits | None:
    """The rows that the paths read: evaluation reads more than a worker."""
    rows = request.co_visits
    if rows is None:
        return None
    return QueryCoVisits(
        rows.items, rows.after if AFTER in reads else (), rows.before if BEFORE in reads else ()
    )


def _known(
    request: RecallRequest, index: IndexReader, table: Table, found: Mapping[str, Candidates]
) -> Known:
    """What is known of the candidates besides the lists. found: by path"""
    ids = table.ids
    entries = () if request.user is None else request.user.history.entries
    last = positive_items(entries, LAST_ITEMS)
    vectors = index.vectors_of_hits(table.hits) if 0 < len(ids) <= VECTORS_MAX else None
    own, recency = _own(entries, ids)
    rows = request.co_visits
    return Known(
        values={"own clicks": own, **_visits(rows, table, index, found)},
        now_ms=request.now_ms,
        events=len(entries),
        last_ms=max((entry.at_ms for entry in entries), default=0),
        visits_sum=rows.after[0].visits_sum if rows is not None and rows.after else 0.0,
        own_recency=recency,
        # An item that died meanwhile has none.
        vectors=vectors if vectors is not None and len(vectors) == len(ids) else None,
        user_vector=next((one.vector for one in found.values() if one.vector is not None), None),
        last_vectors=index.vectors_of(last) if last else None,
    )


def _own(entries: Sequence[Entry], ids: Sequence[str]) -> tuple[Matrix, Matrix]:
    """Of each candidate, the user's events on it, and their `Known.own_recency`."""
    own, recency = np.zeros(len(ids)), np.zeros(len(ids))
    place = dict(zip(ids, range(len(ids)), strict=True)) if entries else {}
    for number, entry in enumerate(entries):
        at = place.get(entry.item_id)
        if at is not None:
            if not own[at]:
                recency[at] = 1 / np.log(2 + number)
            own[at] += 1
    return own, recency


def _visits(
    rows: QueryCoVisits | None, table: Table, index: IndexReader, found: Mapping[str, Candidates]
) -> dict[str, Matrix]:
    """What co-visits say of the candidates, whether a path lists them or not."""
    scored = {
        name: by_key
        for name, path in _VISITS.items()
        if (by_key := found.get(path, _NOTHING).by_key) is not None
    }
    if rows is not None and rows.before:
        row = rows.before[0]
        scored["visited before"] = sum_up(
            [(row.keys, row.visits, 1 / (row.visits_sum + AFTER_PRIOR))]
        )
    if not scored:
        return {}
    keys = index.keys_of_hits(table.hits)
    return {name: of_name.of(keys) for name, of_name in scored.items()}
