"""Recall paths of what is clicked most, decayed by the clicks' age in event time or in events."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from typing_extensions import override

from index.port import IndexReader, LiveItems
from index.ranked import RankedItems
from serving.recall.base import Candidates, PathScores, RecallContext, RecallPath, RecallRequest
from serving.recall.trend import Pace


class PopularPath(RecallPath):
    """The live items with the most clicks, most first; the score is the decayed clicks.

    `popular` decays them by time, `popular_fast` and `popular_slow` by events.
    """

    name = "popular"

    def __init__(self, context: RecallContext, pace: Pace | None = None) -> None:
        """pace: of the path by events; None: the path by time"""
        self._popularity = context.popularity
        self._list = context.popularity if pace is None else context.popularity.follow(pace)
        # Dead items leave the lists by events as others are clicked.
        self._looks_for_live = pace is None
        if pace is not None:
            self.name = f"popular_{pace}"
        # The list that the items were last made of; replaced as one.
        self._made: tuple[Sequence[tuple[str, float]], RankedItems] = ((), RankedItems.of(()))

    @override
    def recall(self, request: RecallRequest, index: IndexReader) -> Candidates:
        request.deadline.check("the popular list was read")
        k, filters = request.k, request.filters
        ranked = self._ranked_items()
        hits = index.first_listed(ranked, k, request.excluded, filters)
        degradation = self.degradation()
        if self._looks_for_live and (len(hits) < k or self._popularity.replaces):
            self._popularity.look_for_live()
        if len(hits) >= k:
            return Candidates(hits, degradation=degradation)
        which = "live and unseen" if filters is None else "live, unseen and pass the filter"
        why = self._popularity.empty_because(len(ranked))
        why = why or f"of {len(ranked)} popular items {len(hits)} are {which}"
        return Candidates(hits, why, degradation=degradation)

    def _ranked_items(self) -> RankedItems:
        ranked, (of, made) = self._list.ranked, self._made
        if ranked is not of:
            made = RankedItems.of(ranked)
            self._made = ranked, made
        return made

    @override
    def score_all(
        self, requests: Sequence[RecallRequest], index: IndexReader, items: LiveItems
    ) -> PathScores:
        scores = self._list.scores(items.place_of)
        return PathScores(np.broadcast_to(scores, (len(requests), len(scores))))

    @override
    def degradation(self) -> str:
        missing = self._popularity.missing()
        return f"redis: {missing}" if missing else ""
