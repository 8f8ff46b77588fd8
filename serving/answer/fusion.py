"""From several recall paths to one answer, filled up to k items."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from index.port import Hit, IndexReader, LiveItems
from serving.answer.deadline import EndsQuery
from serving.recall.base import FILLS, Candidates, PathScores, RecallPath, RecallRequest

log = logging.getLogger(__name__)

# Share of a query's remaining time that its recall paths may take.
BUDGET_SHARE = 0.5
# A path that always fails is logged so often.
LOG_EVERY_S = 60.0
# Path -> when its last error was logged, monotonic.
_logged: dict[str, float] = {}


class Source(NamedTuple):
    """A recall path that returned an item of the answer.

    rank:  there, 1 is the best; score: there
    share: of the item's fused score
    """

    path: str
    rank: int
    score: float
    share: float


class ItemRule(NamedTuple):
    """A rule that placed or moved an item, or keeps it out; see retrieval.proto."""

    kind: str
    name: str


class Recommendation(NamedTuple):
    """One item of the answer, the recall path that brought it, and its rank there (1 is the best).

    hit:         with its score by that path
    sources:     every path that returned it, in the order of the calls; empty where the fusion has
                 no scores, or the item was filled in
    fused_score: of the fusion; 0 where it has no scores
    rules:       what placed or moved it after the fusion
    """

    hit: Hit
    path: str
    path_rank: int
    sources: Sequence[Source] = ()
    fused_score: float = 0.0
    rules: Sequence[ItemRule] = ()


class PathResult(NamedTuple):
    """What one recall path returned.

    taken:    how many of its candidates are in the answer
    marginal: of those, how many no other called path returned
    took_us:  microseconds in the path
    """

    path: str
    candidates: Candidates
    taken: int
    marginal: int = 0
    took_us: int = 0


class FusedOrder(NamedTuple):
    """How a fusion orders all live items for one request.

    tiers:  int64 (items,): a lower tier comes first
    scores: one for each tier, of one request: the order within the tier
    """

    tiers: npt.NDArray[np.int64]
    scores: Sequence[PathScores]


class Fusion(Protocol):
    """Chooses the answer's items from the candidates of the recall paths.

    It calls the paths itself: a request may depend on what earlier paths returned. Thread rule:
    `fuse` from any thread.

    name: of the setting `fusion`
    """

    name: str

    def fuse(
        self, paths: Sequence[RecallPath], request: RecallRequest, index: IndexReader
    ) -> tuple[list[Recommendation], list[PathResult]]:
        """(at most `request.k` items, best first; the results of the paths that were called).

        A smaller k gives the first items of a larger one. Raises EndsQuery.
        """

    def degradation(self) -> str:
        """`worker: reason` if the fusion works with old or missing data now, else ""."""
        return ""


@runtime_checkable
class RanksAll(Fusion, Protocol):
    """A fusion that orders all live items by what the paths say of each."""

    def order_all(
        self, scores: Mapping[str, PathScores], items: LiveItems, excluded: npt.NDArray[np.int64]
    ) -> FusedOrder:
        """The order of `fuse` over all live items. Thread rule: one thread.

        scores:   of one request by each path, in order
        items:    those that the scores are of
        excluded: int64, places of the items that must not be returned, each once
        An item that no path returns has the tier `len(FusedOrder.scores)`.
        """


class PathCalls:
    """The calls of one query's recall paths. Thread rule: one thread."""

    def __init__(self, index: IndexReader, request: RecallRequest, budget_ms: int = 0) -> None:
        """budget_ms: see the setting `path_budget_ms`; 0: no limit."""
        self._index = index
        left_s = BUDGET_SHARE * request.deadline.left_s()
        # Once the deadline has passed, the next path says so.
        limited = budget_ms and left_s > 0
        self._budget_s = min(budget_ms / 1000, left_s) if limited else float("inf")
        self._begun = time.monotonic()

    def spent(self) -> str:
        """Why no further path is called; "" if one may be."""
        if time.monotonic() - self._begun < self._budget_s:
            return ""
        return f"recall had taken {self._budget_s * 1000:.0f} ms"

    def call(self, path: RecallPath, request: RecallRequest) -> PathResult:
        """What the path returns; nothing, with the reason, where it fails. Raises EndsQuery."""
        begun = time.perf_counter()
        try:
            candidates = path.recall(request, self._index)
        except EndsQuery:
            raise
        except Exception as error:
            _note(path)
            why = f"failed: {type(error).__name__}; the worker's log has more"
            candidates = Candidates((), why, degradation=_missing(path, why))
        return PathResult(path.name, candidates, 0, 0, int((time.perf_counter() - begun) * 1e6))

    def left_out(self, path: RecallPath, why: str) -> PathResult:
        """The result of a path that is not called."""
        why = f"was not called: {why}"
        return PathResult(path.name, Candidates((), why, degradation=_missing(path, why)), 0)


def _missing(path: RecallPath, why: str) -> str:
    return f"worker: recall path {path.name} {why}"


def _note(path: RecallPath) -> None:
    """Log the error that is handled now."""
    now = time.monotonic()
    if now - _logged.get(path.name, -LOG_EVERY_S) >= LOG_EVERY_S:
        _logged[path.name] = now
        log.exception("a recall path failed", extra={"path": path.name})


def fill(
    paths: Sequence[RecallPath],
    request: RecallRequest,
    calls: PathCalls,
    items: list[Recommendation],
    results: list[PathResult],
) -> None:
    """Append items of these paths, path after path, each for what is still open.

    Beyond the budget only the paths of `FILLS` are called.
    items:   best first; each of them is left out by the paths
    results: of the paths that were called; a path that was called before continues its entry
    """
    excluded = {*request.excluded, *(one.hit.item_id for one in items)}
    for path in paths:
        before = len(items)
        if before >= request.k:
            return
        if path.name not in FILLS and (why := calls.spent()):
            results.append(calls.left_out(path, why))
            continue
        rest = request
        if before:
            rest = request._replace(k=request.k - before, excluded=frozenset(excluded))
        result = calls.call(path, rest)
        at = next((n for n, one in enumerate(results) if one.path == path.name), len(results))
        earlier = results[at] if at < len(results) else None
        first = 1 if earlier is None else 1 + len(earlier.candidates.hits)
        for rank, hit in enumerate(result.candidates.hits, first):
            if hit.item_id not in excluded and len(items) < request.k:
                excluded.add(hit.item_id)
                items.append(Recommendation(hit, path.name, rank))
        added = len(items) - before
        results[at:] = [_joined(earlier, result, added), *results[at + 1 :]]


def _joined(earlier: PathResult | None, result: PathResult, added: int) -> PathResult:
    """The result of a path, after that of an earlier call. added: items of the later one"""
    if earlier is None:
        return result._replace(taken=added, marginal=added)
    found = result.candidates
    hits = [*earlier.candidates.hits, *found.hits]
    return earlier._replace(
        candidates=earlier.candidates._replace(hits=hits, why=found.why),
        taken=earlier.taken + added,
        marginal=earlier.marginal + added,
        took_us=earlier.took_us + result.took_us,
    )


def counted(items: Sequence[Recommendation], results: Sequence[PathResult]) -> list[PathResult]:
    """The results with `taken` and `marginal` as the paths of the answer's items have them."""
    paths = [[source.path for source in one.sources] or [one.path] for one in items]
    taken = Counter(chain.from_iterable(paths))
    alone = Counter(of_item[0] for of_item in paths if len(of_item) == 1)
    return [one._replace(taken=taken[one.path], marginal=alone[one.path]) for one in results]


def merged(earlier: Sequence[PathResult], later: Sequence[PathResult]) -> list[PathResult]:
    """The results of two fusions for one answer; their `taken` and `marginal` are not added up."""
    found = {one.path: one for one in earlier}
    for one in later:
        if (before := found.get(one.path)) is None:
            found[one.path] = one
            continue
        known = {hit.item_id for hit in before.candidates.hits}
        new = [hit for hit in one.candidates.hits if hit.item_id not in known]
        hits = [*before.candidates.hits, *new]
        found[one.path] = before._replace(
            candidates=before.candidates._replace(hits=hits, why=one.candidates.why),
            took_us=before.took_us + one.took_us,
        )
    return [*found.values()]


class Cascade(RanksAll):
    """The first k items over all paths in their order, each once, without excluded ones.

    A path is called only for what the paths before it left open; one that is not needed is neither
    called nor listed.
    """

    name = "cascade"

    def __init__(self, budget_ms: int = 0) -> None:
        """budget_ms: see the setting `path_budget_ms`; 0: no limit."""
        self._budget_ms = budget_ms

    @override
    def fuse(
        self, paths: Sequence[RecallPath], request: RecallRequest, index: IndexReader
    ) -> tuple[list[Recommendation], list[PathResult]]:
        items: list[Recommendation] = []
        results: list[PathResult] = []
        calls = PathCalls(index, request, self._budget_ms)
        fill(paths, request, calls, items, results)
        return items, results

    @override
    def order_all(
        self, scores: Mapping[str, PathScores], items: LiveItems, excluded: npt.NDArray[np.int64]
    ) -> FusedOrder:
        return FusedOrder(tiers_of([*scores.values()]), [*scores.values()])


def tiers_of(scores: Sequence[PathScores]) -> npt.NDArray[np.int64]:
    """int64 (items,): the first path that returns each item; `len(scores)` for none."""
    tiers = np.full(scores[0].scores.shape[1], len(scores))
    for tier in reversed(range(len(scores))):
        tiers[scores[tier].scores[0] > -np.inf] = tier
    return tiers
