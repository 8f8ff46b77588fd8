"""Recall path of the two towers: the items nearest to the vector of the user's last items."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from typing_extensions import override

from eddyline.schema.user_history import positive_items
from eddyline.stores.state_store import UserState
from index.arrays import Floats, Ints, Vector
from index.port import Hit, IndexReader, LiveItems
from index.search.nearest import exact_scores
from index.storage.vector_table import score_error
from serving.recall.base import (
    Candidates,
    PathScores,
    RecallContext,
    RecallPath,
    RecallRequest,
    StageTimings,
)

# The popularity correction moves an item by some places: this many times k candidates are fetched.
OVER_FETCH = 3


class TowersPath(RecallPath):
    """The live items nearest to the user's vector, within one generation."""

    name = "towers"

    def __init__(self, context: RecallContext) -> None:
        self._tower = context.tower
        self._popularity = context.popularity

    @override
    def recall(self, request: RecallRequest, index: IndexReader) -> Candidates:
        request.deadline.check("the index was searched")
        if request.user is None:
            return Candidates((), "the user could not be read")
        vector, why = self.vector(request.user, index)
        embedded_us = time.time_ns() // 1000
        if vector is None:
            return Candidates((), why, StageTimings(embedded_us))
        k, beta, filters = request.k, request.popularity_beta, request.filters
        hits: Sequence[Hit] = index.query(
            vector, k * OVER_FETCH if beta else k, request.excluded, filters
        )
        if beta:
            hits = self._popularity.debias(hits, k, beta)
        timings = StageTimings(embedded_us, time.time_ns() // 1000)
        which = "are unseen" if filters is None else "are unseen and pass the filter"
        why = "" if len(hits) == k else f"only {len(hits)} live items {which}"
        return Candidates(hits, why, timings, vector=None if beta else vector)

    @override
    def score_all(
        self, requests: Sequence[RecallRequest], index: IndexReader, items: LiveItems
    ) -> PathScores:
        vectors = [None if r.user is None else self.vector(r.user, index)[0] for r in requests]
        return self.scores_of(vectors, items)

    def scores_of(self, vectors: Sequence[Vector | None], items: LiveItems) -> PathScores:
        """The scores for these query vectors, as in `score_all`; None: nothing is returned."""
        queries = np.zeros((len(vectors), items.vectors.shape[1]), np.float32)
        known = np.array([vector is not None for vector in vectors], bool)
        for number, vector in enumerate(vectors):
            if vector is not None:
                queries[number] = vector
        scores = queries @ items.vectors.T
        scores[~known] = -np.inf
        # Twice: both scores of a comparison may be off.
        error = max((2 * score_error(query) for query in queries), default=0.0)

        def exact(number: int, places: Ints) -> Floats:
            return exact_scores(items.vectors[places], queries[number].astype(np.float64))

        return PathScores(scores, error, exact)

    def vector(self, user: UserState, index: IndexReader) -> tuple[Vector | None, str]:
        """(the query vector, ""), or (None, why there is none)."""
        forward, why = self.forward(user, index)
        return (None if forward is None else self.combine(forward, user, index)), why

    def combine(self, forward: Vector, user: UserState, index: IndexReader) -> Vector:
        """The query vector: the result of `forward`, and the user's ID embedding."""
        return self._tower.combine(forward, _embedding(user, index.dimension))

    def forward(self, user: UserState, index: IndexReader) -> tuple[Vector | None, str]:
        """(the user tower's vector of history and profile, ""), or (None, why there is none)."""
        entries = user.history.entries
        if not entries:
            return None, "nothing is known of this user"
        positive = positive_items(entries, len(entries))
        if not positive:
            return None, "the user's list holds dislikes only"
        # Most are live, so the rest of a long list is seldom looked up.
        needed = self._tower.history_max
        history = index.vectors_of(positive[: 2 * needed])
        if len(history) < needed < len(positive) / 2:
            history = np.concatenate((history, index.vectors_of(positive[2 * needed :])))
        if not len(history):
            return None, f"none of the {len(positive)} items of the user's list is in the index"
        return self._tower.encode_one(history[:needed], user.profile), ""


def _embedding(user: UserState, dimension: int) -> Vector | None:
    """The user-ID embedding; None if there is none, or it does not fit."""
    if user.embedding is None or len(user.embedding[1]) != 4 * dimension:
        return None
    embedding: Vector = np.frombuffer(user.embedding[1], "<f4")
    return embedding if np.isfinite(embedding).all() else None
