"""From several recall paths to one answer, filled up to k items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from typing_extensions import override

from index.port import Hit, IndexReader
from serving.recall.base import Candidates, RecallPath, RecallRequest


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


class Fusion(Protocol):
    """Chooses the answer's items from the candidates of the recall paths.

    It calls the paths itself: a request may depend on what earlier paths returned.
    """

    def fuse(
        self, paths: Sequence[RecallPath], request: RecallRequest, index: IndexReader
    ) -> tuple[list[Recommendation], list[PathResult]]:
        """(at most `request.k` items, best first; the results of the paths that were called)."""


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
