"""From several paths to one answer: a cascade, each path fills what those before it left open."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from index.port import Hit
from serving.recall.base import RecallPath


class Recommendation(NamedTuple):
    """One item of the answer and where it came from: its path and its rank there, 1 the best."""

    hit: Hit
    path: str
    path_rank: int


class PathSummary(NamedTuple):
    """What one path did: how many it named, how many are in the answer, and why not more."""

    path: str
    candidates: int
    taken: int
    why: str


def cascade(
    paths: Sequence[RecallPath], k: int, seen: Collection[str]
) -> tuple[list[Recommendation], list[PathSummary]]:
    """The first k items over all paths in their order, each once, seen ones left out.

    A path is asked only for what is still open, so one that is not needed costs nothing and is not listed.
    """
    chosen: list[Recommendation] = []
    summaries: list[PathSummary] = []
    excluded = set(seen)
    for path in paths:
        open_ = k - len(chosen)
        if open_ <= 0:
            break
        named = path.ask(open_, frozenset(excluded))
        before = len(chosen)
        for rank, hit in enumerate(named.hits, 1):
            if hit.item_id not in excluded and len(chosen) < k:
                excluded.add(hit.item_id)
                chosen.append(Recommendation(hit, path.name, rank))
        summaries.append(PathSummary(path.name, len(named.hits), len(chosen) - before, named.why))
    return chosen, summaries
