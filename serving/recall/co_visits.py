"""Recall paths of co-visits: what users visited after, or around, the items of this user.

A row says which items were visited after an item, or before it, and how often; `request.co_visits`
has the rows of the user's newest items. The rows name items by key; keys are summed up first, and
only the best are looked up in the index.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from eddyline.schema.item_key import cached_keys_of, keys_of
from index.arrays import Floats, Ints, Keys
from index.port import IndexReader, LiveItems
from serving.recall.base import (
    AFTER,
    BEFORE,
    Candidates,
    PathScores,
    QueryCoVisits,
    RecallContext,
    RecallPath,
    RecallRequest,
    Scored,
    locate,
)

# An item counts less by this factor for each newer one of the user.
DECAY, NEXT_DECAY = 0.9, 0.7
# Items that `next` looks at.
NEXT_ITEMS = 5
# Visits that a row is taken to have beyond its own, so that a row of few does not count too much.
AFTER_PRIOR, BOTH_PRIOR, NEXT_PRIOR = 10.0, 5.0, 5.0
# `co_visits_both` divides by (clicks + CLICKS_PRIOR) to this power, clicks decayed by events.
CLICKS_PRIOR, CLICKS_POWER = 10.0, 0.3


def sum_up(parts: Sequence[tuple[Keys, npt.NDArray[np.float32], float]]) -> Scored:
    """The sum of value · weight by key, over some rows.

    parts: (keys, which may repeat, values, weight) of each row; the order of additions is theirs
    """
    if not parts:
        return Scored(np.empty(0, np.uint64), np.empty(0))
    keys = np.concatenate([row for row, _, _ in parts])
    weights = np.array([weight for _, _, weight in parts])
    rows = [row for _, row, _ in parts]
    values = np.concatenate(rows) * np.repeat(weights, [len(row) for row in rows])
    above = values > 0
    found, place = np.unique(keys[above], return_inverse=True)
    sums = np.bincount(place, values[above], len(found))
    return Scored(found, np.asarray(sums, np.float64))


class KeyPlaces:
    """Places of item keys among the live items. Thread rule: one thread."""

    def __init__(self) -> None:
        self._items: LiveItems | None = None
        self._keys: Keys = np.empty(0, np.uint64)
        self._places: Ints = np.empty(0, np.int64)

    def find(self, keys: Keys, items: LiveItems) -> Ints:
        """int64 (n,): the place of each key, -1 for none."""
        if items is not self._items:
            every = keys_of(items.ids)
            self._places = np.argsort(every)
            self._keys = every[self._places]
            self._items = items
        at, known = locate(self._keys, keys)
        places = np.full(len(keys), -1)
        places[known] = self._places[at[known]]
        return places


class CoVisitsPath(RecallPath):
    """The live items that users visited soon after this user's newest items (directed).

    score = Σ over those items: DECAY^n · visits / √(all visits after it + AFTER_PRIOR), n = 0 for
    the newest
    """

    name = "co_visits"
    reads = frozenset({AFTER})

    def __init__(self, context: RecallContext) -> None:
        """Needs nothing but the request's rows."""
        self._live = KeyPlaces()

    def score(self, found: QueryCoVisits) -> Scored:
        """The score of each item that was visited after one of the user's."""
        weights = []
        for n, row in enumerate(found.after):
            weights += [DECAY**n / (row.visits_sum + AFTER_PRIOR) ** 0.5, 0.0]
        return found.entries.summed(found.entries.visits, weights)

    def popularity_of(self, keys: Keys) -> Floats | None:
        """What the scores of these items are multiplied by, as queries see it; None: nothing."""
        return None

    def popularity_of_all(self, items: LiveItems) -> Floats | None:
        """The same for all live items, by place."""
        return None

    @override
    def recall(self, request: RecallRequest, index: IndexReader) -> Candidates:
        request.deadline.check("the co-visits were summed up")
        if request.user is None:
            return Candidates((), "the user could not be read")
        found = request.co_visits
        if found is None:
            return Candidates((), "the co-visits could not be read")
        if not found.items:
            return Candidates((), "no positive event of this user is known")
        every = self.score(found)
        if (factor := self.popularity_of(every.keys)) is not None:
            every = Scored(every.keys, every.scores * factor)
        some = without(every, _excluded_keys(request))
        hits = index.first_by_key(some.keys, some.scores, request.k, request.filters)
        if len(hits) == request.k:
            return Candidates(hits, by_key=every)
        which = "live and unseen" if request.filters is None else "live, unseen and pass the filter"
        of = f"of {len(some.keys)} co-visited items"
        return Candidates(hits, f"{of} {len(hits)} are {which}", by_key=every)

    @override
    def score_all(
        self, requests: Sequence[RecallRequest], index: IndexReader, items: LiveItems
    ) -> PathScores:
        scores = np.full((len(requests), len(items.ids)), -np.inf)
        factor = self.popularity_of_all(items)
        for row, request in zip(scores, requests, strict=True):
            if request.user is None or request.co_visits is None:
                continue
            keys, values = self.score(request.co_visits)
            places = self._live.find(keys, items)
            live = places >= 0
            places = places[live]
            row[places] = values[live] if factor is None else values[live] * factor[places]
        return PathScores(scores)


class CoVisitsBothPath(CoVisitsPath):
    """The live items that users visited soon after or before this user's newest items (symmetric).

    score = Σ over those items: DECAY^n · visits / √(all its visits + BOTH_PRIOR), over
    (clicks + CLICKS_PRIOR)^CLICKS_POWER
    """

    name = "co_visits_both"
    reads = frozenset({AFTER, BEFORE})

    def __init__(self, context: RecallContext) -> None:
        super().__init__(context)
        self._clicks = context.popularity.follow("slow")
        # The list that keys were last made of, and its clicks by key; replaced as one.
        self._by_key: tuple[Sequence[tuple[str, float]], Scored] = ((), sum_up(()))

    @override
    def score(self, found: QueryCoVisits) -> Scored:
        weights = []
        for n, (after, before) in enumerate(zip(found.after, found.before, strict=True)):
            visits = after.visits_sum + before.visits_sum
            weights += [DECAY**n / (visits + BOTH_PRIOR) ** 0.5] * 2
        return found.entries.summed(found.entries.visits, weights)

    @override
    def popularity_of(self, keys: Keys) -> Floats:
        ranked, (of, known) = self._clicks.ranked, self._by_key
        if ranked is not of:
            every = cached_keys_of(item_id for item_id, _ in ranked)
            order = np.argsort(every)
            clicks = np.array([clicks for _, clicks in ranked], np.float64)
            known = Scored(every[order], clicks[order])
            self._by_key = ranked, known
        return _factor(known.of(keys))

    @override
    def popularity_of_all(self, items: LiveItems) -> Floats:
        return _factor(np.maximum(self._clicks.scores(items.place_of), 0.0))


class NextPath(CoVisitsPath):
    """The live items that users visited right after this user's newest items (Markov).

    score = Σ over those items: NEXT_DECAY^n · visits / (all visits right after it + NEXT_PRIOR)
    """

    name = "next"

    @override
    def score(self, found: QueryCoVisits) -> Scored:
        weights = []
        for n, row in enumerate(found.after):
            weight = NEXT_DECAY**n / (row.next_sum + NEXT_PRIOR) if n < NEXT_ITEMS else 0.0
            weights += [weight, 0.0]
        return found.entries.summed(found.entries.next, weights)


def _excluded_keys(request: RecallRequest) -> Keys:
    """Those of a user with a thousand seen items are known: it takes 0.1 ms to make them."""
    hidden = request.hidden
    if hidden is not None and hidden.ids is request.excluded and hidden.keys is not None:
        return hidden.keys
    return cached_keys_of(request.excluded)


def without(found: Scored, keys: Keys) -> Scored:
    """The scores without those of these items. keys: uint64 (n,), in any order"""
    at, known = locate(found.keys, keys)
    stays = np.ones(len(found.keys), bool)
    stays[at[known]] = False
    return Scored(found.keys[stays], found.scores[stays])


def _factor(clicks: Floats) -> Floats:
    factor: Floats = (clicks + CLICKS_PRIOR) ** -CLICKS_POWER
    return factor
