"""Recall path of several interests: the items nearest to any group of the user's last items.

The towers answer with one vector, the middle of what the user likes; between two different tastes
lies what suits neither. Here similar items form groups, and each group asks for itself, as in
PinnerSage (Pal et al., 2020); an item's score is that of its nearest group, as in ComiRec (Cen et
al., 2020).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from typing_extensions import override

from eddyline.schema.user_history import positive_items
from eddyline.stores.state_store import UserState
from index.arrays import Floats, Ints, Vector
from index.port import IndexReader, LiveItems
from index.search.multi_vector import query_multi
from index.search.nearest import exact_scores
from index.storage.vector_table import score_error
from serving.recall.base import Candidates, PathScores, RecallContext, RecallPath, RecallRequest

# The user's newest items that are grouped.
ITEMS_MAX = 50
# Each group costs a search of its own.
GROUPS_MAX = 4
# An item joins the nearest group from this cosine on, and begins one below it.
JOINS_FROM = 0.5
# An item counts less in its group by this factor for each newer item of the user.
DECAY = 0.95
# A shorter sum of unit vectors is rounding.
NORM_MIN = 1e-6


class InterestsPath(RecallPath):
    """The live items nearest to the middle of any group of the user's last items.

    score = the highest inner product with the middle of a group; up to `GROUPS_MAX` groups
    """

    name = "interests"

    def __init__(self, context: RecallContext) -> None:
        """Needs nothing but the index."""

    @override
    def recall(self, request: RecallRequest, index: IndexReader) -> Candidates:
        request.deadline.check("the interests were searched")
        if request.user is None:
            return Candidates((), "the user could not be read")
        middles = middles_of(request.user, index)
        if not len(middles):
            return Candidates((), "no positive event of this user is on a live item")
        hits = query_multi(index, middles, request.k, request.excluded, request.filters)
        if len(hits) == request.k:
            return Candidates(hits)
        which = "are unseen" if request.filters is None else "are unseen and pass the filter"
        return Candidates(hits, f"only {len(hits)} live items {which}")

    @override
    def score_all(
        self, requests: Sequence[RecallRequest], index: IndexReader, items: LiveItems
    ) -> PathScores:
        groups = [
            np.empty((0, index.dimension), np.float32)
            if request.user is None
            else middles_of(request.user, index)
            for request in requests
        ]
        scores = np.full((len(requests), len(items.ids)), -np.inf, np.float32)
        error = 0.0
        for row, middles in zip(scores, groups, strict=True):
            if len(middles):
                (middles @ items.vectors.T).max(axis=0, out=row)
                error = max(error, *(2 * score_error(middle) for middle in middles))

        def exact(number: int, places: Ints) -> Floats:
            vectors = items.vectors[places]
            highest = np.full(len(places), -np.inf)
            for middle in groups[number].astype(np.float64):
                np.maximum(highest, exact_scores(vectors, middle), out=highest)
            return highest

        return PathScores(scores, error, exact)


def middles_of(user: UserState, index: IndexReader) -> Vector:
    """float32 (groups, d) of unit norm: the middles of the user's groups; that of the newest first.

    groups: 0 where none of the user's items is live
    """
    return group(index.vectors_of(positive_items(user.history.entries, ITEMS_MAX)))


def group(vectors: Vector) -> Vector:
    """The middles of similar vectors, by leader clustering (Hartigan, 1975).

    vectors: float32 (n, d) of unit norm, the most recent first
    Returns float32 (up to GROUPS_MAX, d) of unit norm. A middle that a further vector would leave
    without a direction stays as it was.
    """
    sums: list[Floats] = []
    middles: list[Floats] = []
    for age, vector in enumerate(vectors.astype(np.float64)):
        nearest, cosine = 0, -np.inf
        for number, middle in enumerate(middles):
            if (with_it := float(middle @ vector)) > cosine:
                nearest, cosine = number, with_it
        if cosine < JOINS_FROM and len(middles) < GROUPS_MAX:
            sums.append(DECAY**age * vector)
            middles.append(vector)
            continue
        sums[nearest] = sums[nearest] + DECAY**age * vector
        norm = float(np.linalg.norm(sums[nearest]))
        if norm > NORM_MIN:
            middles[nearest] = sums[nearest] / norm
    return np.array(middles, np.float32).reshape(len(middles), vectors.shape[1])
