"""The rows of an evaluation: each ranks the target of every query in its own way.

Rows of the product call the recall paths and the fusion that serve. Queries of the towers are
scored in tiles of fixed size, so that the product of a tile has the same bits in every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from eddyline.stores.state_store import UserState
from evaluation.engine import Engine
from evaluation.ranks import Ints, fused_rank, ranks
from index.arrays import Vector
from index.port import LiveItems
from serving.answer.fusion import Cascade, FusedOrder, RanksAll
from serving.recall.base import PathScores
from serving.recall.towers import TowersPath

# Queries of the towers that are scored together: 64 × 10,000 scores are 2.5 MB.
TILE = 64
LIST_LENGTH = 10
NO_ROWS: Ints = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class Query:
    """One event to score.

    number:   of the scored event
    target:   place of its item among the live items
    user:     the user's state from strictly before the event
    excluded: places that do not compete, each once
    wants_list: whether the first items are kept, too
    """

    number: int
    user_id: str
    at_ms: int
    target: int
    user: UserState
    excluded: Ints
    wants_list: bool


class Results:
    """What a row found. Thread rule: one thread.

    ranks: float64 (n,), by number of the scored event; `NEVER` where the item is never returned
    lists: number -> ids of the first items
    """

    def __init__(self, scored: int) -> None:
        """scored: number of events."""
        self.ranks: npt.NDArray[np.float64] = np.full(scored, np.inf)
        self.lists: dict[int, list[str]] = {}


class Row(Protocol):
    """One or more ways to rank. Thread rule: one thread.

    results: name -> what was found
    """

    results: dict[str, Results]

    def score(self, query: Query) -> None:
        """Rank the target, now or at the next `flush`."""

    def flush(self) -> None:
        """Rank what waits; called before an item changes, and at the end. Default: nothing."""
        return

    def learn(self, begin: int, end: int) -> None:
        """The events from `begin` to `end` have happened; all before had. Default: nothing."""
        return


class ProductRow(Row):
    """A row that learns nothing by itself: ingest does."""

    def __init__(self, product: Engine, names: Sequence[str], scored: int) -> None:
        """names: of its results; scored: number of events."""
        self.product = product
        self.results = {name: Results(scored) for name in names}


class PathRow(ProductRow):
    """A recall path alone whose scores do not depend on the user."""

    def __init__(self, product: Engine, path: str, scored: int) -> None:
        """path: its name."""
        super().__init__(product, [path], scored)
        self._path = product.path(path)
        self._results = self.results[path]

    @override
    def score(self, query: Query) -> None:
        product = self.product
        product.read_popularity()
        request = product.request(query.user, LIST_LENGTH)
        scored = self._path.score_all([request], product.index, product.items)
        note(self._results, [query], scored, product.items)


class TowersRow(ProductRow):
    """The towers, with the history as it was at the last full period, and at the split.

    With and without the micro-steps of the user-ID embedding, which is as old as the history.
    """

    def __init__(
        self, product: Engine, scored: int, name: str, period_ms: int, *, steps: Sequence[bool]
    ) -> None:
        """period_ms: 1 for a live history; 0 for that of the split.

        steps: of the results, first `name` with micro-steps, then `name`-nostep without
        """
        names = [name if with_steps else f"{name}-nostep" for with_steps in steps]
        super().__init__(product, names, scored)
        self._steps = list(zip(steps, self.results.values(), strict=True))
        self._period_ms = period_ms
        # User -> (period, state at its begin, its vectors, the items that they were made of).
        self._kept: dict[str, tuple[int, UserState, list[Vector | None], LiveItems]] = {}
        self._waiting: list[tuple[Query, list[Vector | None]]] = []

    @override
    def score(self, query: Query) -> None:
        self._waiting.append((query, self._vectors(query)))
        if len(self._waiting) == TILE:
            self.flush()

    @override
    def flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        queries = [query for query, _ in waiting]
        for number, (_, results) in enumerate(self._steps):
            score_tile(self.product, results, queries, [vectors[number] for _, vectors in waiting])

    def _vectors(self, query: Query) -> list[Vector | None]:
        """The query vectors with and without micro-steps."""
        if self._period_ms == 1:
            return self._encode(query.user)
        # The first query of a period sees events from before the period only.
        period = query.at_ms // self._period_ms if self._period_ms else 0
        kept, items = self._kept.get(query.user_id), self.product.items
        if kept is None or kept[0] != period:
            kept = (period, query.user, self._encode(query.user), items)
        elif kept[3] is not items:
            kept = (period, kept[1], self._encode(kept[1]), items)
        self._kept[query.user_id] = kept
        return kept[2]

    def _encode(self, user: UserState) -> list[Vector | None]:
        towers, index = self.product.towers, self.product.index
        forward, _ = towers.forward(user, index)
        if forward is None:
            return [None] * len(self._steps)
        return [
            towers.combine(forward, user if with_steps else _without_steps(user), index)
            for with_steps, _ in self._steps
        ]


class FusedRow(ProductRow):
    """The answer that a fusion makes of some paths."""

    def __init__(
        self, product: Engine, name: str, scored: int, fusion: RanksAll, paths: Sequence[str]
    ) -> None:
        """paths: names, in the order of the calls."""
        super().__init__(product, [name], scored)
        self._fusion = fusion
        self._paths = {path: product.path(path) for path in paths}
        # The first path of the cascade returns all live items then, and no other is called.
        self._towers_first = isinstance(fusion, Cascade) and paths[0] == TowersPath.name
        self._results = self.results[name]
        self._waiting: list[tuple[Query, Vector]] = []

    @override
    def score(self, query: Query) -> None:
        product = self.product
        if self._towers_first:
            vector, _ = product.towers.vector(query.user, product.index)
            if vector is not None:
                self._waiting.append((query, vector))
                if len(self._waiting) == TILE:
                    self.flush()
                return
        product.read_popularity()
        request = product.request(query.user, LIST_LENGTH)
        scores = {
            name: path.score_all([request], product.index, product.items)
            for name, path in self._paths.items()
        }
        order = self._fusion.order_all(scores, product.items, query.excluded)
        self._results.ranks[query.number] = fused_rank(order, query.target, query.excluded)
        if query.wants_list:
            first = first_places(order, query.excluded)
            self._results.lists[query.number] = [product.items.ids[place] for place in first]

    @override
    def flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        queries = [query for query, _ in waiting]
        score_tile(self.product, self._results, queries, [vector for _, vector in waiting])


def score_tile(
    product: Engine, results: Results, queries: Sequence[Query], vectors: Sequence[Vector | None]
) -> None:
    """Rank the targets of at most `TILE` queries by the towers' scores."""
    if queries:
        padded = [*vectors, *[None] * (TILE - len(vectors))]
        scored = product.towers.scores_of(padded, product.items)
        scored = scored._replace(scores=scored.scores[: len(queries)])
        note(results, queries, scored, product.items)


def note(results: Results, queries: Sequence[Query], scored: PathScores, items: LiveItems) -> None:
    """Keep the ranks, and the first items where they are wanted."""
    targets = np.array([query.target for query in queries], np.int64)
    numbers = [query.number for query in queries]
    results.ranks[numbers] = ranks(scored, targets, [query.excluded for query in queries])
    for at, query in enumerate(queries):
        if query.wants_list:
            alone = PathScores(scored.scores[at : at + 1])
            tiers = np.where(alone.scores[0] > -np.inf, 0, 1)
            first = first_places(FusedOrder(tiers, [alone]), query.excluded)
            results.lists[query.number] = [items.ids[place] for place in first]


def first_places(order: FusedOrder, excluded: Ints) -> list[int]:
    """Places of the first `LIST_LENGTH` items of an order; equal ones in the order of places."""
    tiers = order.tiers.copy()
    tiers[excluded] = len(order.scores)
    found: list[int] = []
    for tier, scored in enumerate(order.scores):
        wanted = LIST_LENGTH - len(found)
        places = np.flatnonzero(tiers == tier)
        if wanted <= 0 or not len(places):
            continue
        scores = scored.scores[0][places]
        if len(places) > wanted:
            cut = np.partition(scores, len(scores) - wanted)[len(scores) - wanted]
            places, scores = places[scores >= cut], scores[scores >= cut]
        found += places[np.argsort(-scores, kind="stable")][:wanted].tolist()
    return found


def _without_steps(user: UserState) -> UserState:
    return replace(user, embedding=None)
