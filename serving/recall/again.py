"""Recall path of what the user had before, for sites where repeats are normal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from typing_extensions import override

from eddyline.schema import seen_items
from eddyline.schema.user_history import DISLIKE, positive_events
from eddyline.stores.state_store import UserState
from index.arrays import Floats, Keys
from index.port import IndexReader, LiveItems
from index.ranked import RankedItems
from serving.recall.base import Candidates, PathScores, RecallContext, RecallPath, RecallRequest
from serving.recall.co_visits import KeyPlaces

# An event counts (its age + AGE_PRIOR)^-AGE_POWER; the age is the number of newer ones.
AGE_PRIOR, AGE_POWER = 20.0, 0.25
# Items beyond the list that it looks at; a thousand give no more hits.
BEYOND_MAX = 300


class AgainPath(RecallPath):
    """The live items that the user had, the most frequent and recent first.

    Returns nothing where seen items are hidden.

    score = Σ over the item's positive events: (age + AGE_PRIOR)^-AGE_POWER. Of the newest items
    beyond the list one event each is known; their ages follow those of the list.
    """

    name = "again"

    def __init__(self, context: RecallContext) -> None:
        self._hidden = context.settings.seen_items == "hide"
        self._items_max = context.settings.seen_items_max
        self._live = KeyPlaces()

    @override
    def recall(self, request: RecallRequest, index: IndexReader) -> Candidates:
        if request.user is None:
            return Candidates((), "the user could not be read")
        scores = _scores_of(request.user)
        if request.user.seen:
            keys, more = beyond(request.user, self._items_max)
            for hit, score in zip(index.find_keys(keys), more.tolist(), strict=True):
                if hit is not None:
                    scores[hit.item_id] = scores.get(hit.item_id, 0.0) + score
        wanted = [pair for pair in scores.items() if pair[0] not in request.excluded]
        ranked = RankedItems.of(sorted(wanted, key=lambda pair: (-pair[1], pair[0])))
        hits = index.first_listed(ranked, request.k, (), request.filters)
        if len(hits) == request.k:
            return Candidates(hits)
        if self._hidden:
            return Candidates(hits, "seen items are hidden, see the setting seen_items")
        return Candidates(hits, f"of {len(scores)} items of the user {len(hits)} can be returned")

    @override
    def score_all(
        self, requests: Sequence[RecallRequest], index: IndexReader, items: LiveItems
    ) -> PathScores:
        scores = np.full((len(requests), len(items.ids)), -np.inf)
        for row, request in zip(scores, requests, strict=True):
            if request.user is not None:
                for item_id, score in _scores_of(request.user).items():
                    if (place := items.place_of.get(item_id)) is not None:
                        row[place] = score
                keys, more = beyond(request.user, self._items_max)
                places = self._live.find(keys, items)
                live = places >= 0
                row[places[live]] = np.maximum(row[places[live]], 0.0) + more[live]
        return PathScores(scores)


def beyond(user: UserState, items_max: int) -> tuple[Keys, Floats]:
    """(uint64 (n,): keys of the newest items beyond the list, float64 (n,): their scores).

    At most `BEYOND_MAX`, each once, newest first, equal times by key; without dislikes.
    """
    found = seen_items.decode(user.seen, items_max)
    order = np.lexsort((found.keys, -found.at_ms))
    order = order[found.kinds[order] != DISLIKE]
    keys, first = np.unique(found.keys[order], return_index=True)
    newest = np.argsort(first)[:BEYOND_MAX]
    ages = len(user.history.entries) + np.arange(len(newest), dtype=np.float64)
    return keys[newest], np.power(ages + AGE_PRIOR, -AGE_POWER)


def _scores_of(user: UserState) -> dict[str, float]:
    """Item -> score, of the user's positive events."""
    found: dict[str, float] = {}
    for age, event in enumerate(positive_events(user.history.entries)):
        found[event.item_id] = found.get(event.item_id, 0.0) + (age + AGE_PRIOR) ** -AGE_POWER
    return found
