"""From several paths to one answer: a cascade, each path fills what those before it left open."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from index.port import Hit


class Candidates(NamedTuple):
    """What a path names, best first. why: one clause on why it is fewer than it was asked for, else ""."""

    hits: Sequence[Hit]
    why: str = ""


class Path(NamedTuple):
    """A way to name candidates for the user in question.

    ask: (k, exclude) -> at most k live items, none of them excluded
    """

    name: str
    ask: Callable[[int, Collection[str]], Candidates]


class Fused(NamedTuple):
    """One item of the answer and where it came from: its path and its rank there, 1 the best."""

    hit: Hit
    path: str
    path_rank: int


class Summary(NamedTuple):
    """What one path did: how many it named, how many are in the answer, and why not more."""

    path: str
    candidates: int
    taken: int
    why: str


def cascade(paths: Sequence[Path], k: int, seen: Collection[str]) -> tuple[list[Fused], list[Summary]]:
    """The first k items over all paths in their order, each once, seen ones left out.

    A path is asked only for what is still open, so one that is not needed costs nothing and is not listed.
    """
    chosen: list[Fused] = []
    summaries: list[Summary] = []
    left_out = set(seen)
    for path in paths:
        open_ = k - len(chosen)
        if open_ <= 0:
            break
        named = path.ask(open_, frozenset(left_out))
        before = len(chosen)
        for rank, hit in enumerate(named.hits, 1):
            if hit.item_id not in left_out and len(chosen) < k:
                left_out.add(hit.item_id)
                chosen.append(Fused(hit, path.name, rank))
        summaries.append(Summary(path.name, len(named.hits), len(chosen) - before, named.why))
    return chosen, summaries
