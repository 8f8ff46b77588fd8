"""Maximal marginal relevance: items near the top that differ from those chosen before.

After Carbonell and Goldstein, "The Use of MMR, Diversity-Based Reranking for Reordering Documents
and Producing Summaries" (SIGIR 1998). The relevance is that of a rank, 1 / log2(1 + rank), because
scores of two fusions cannot be compared; the similarity is the cosine of the item vectors.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from index.arrays import Floats, Vector


class InOrder:
    """Candidates in their order. Thread rule: one thread."""

    def __init__(self, count: int, first: int = 0) -> None:
        """count: of the candidates; first: those before it are left out"""
        self._next, self._count = first, count

    def take(self, passes: Callable[[int], bool]) -> int | None:
        """The place of the next candidate; None if there is none.

        passes: whether a candidate may be chosen; one that may not now may never be
        """
        while self._next < self._count:
            place = self._next
            self._next += 1
            if passes(place):
                return place
        return None


class ByMarginalRelevance:
    """Candidates by (1 − diversity) · relevance − diversity · (cosine to the nearest chosen one).

    Equal values: the higher rank first. Each choice costs O(candidates · d). Thread rule: one.
    """

    def __init__(
        self, vectors: Vector, diversity: float, chosen: Vector | None = None, *, count: int = 0
    ) -> None:
        """vectors: float32 (n, d), unit norm, of the candidates in their order, 0 for one without

        diversity: 0 … 1
        chosen:    float32 (m, d), of items that have their places already
        count:     of the candidates; those beyond the vectors follow in their order
        """
        self._rest = InOrder(count, len(vectors))
        self._vectors: Floats = vectors.astype(np.float64)
        ranks = np.arange(1, len(vectors) + 1)
        self._relevance: Floats = (1.0 - diversity) / np.log2(1.0 + ranks)
        self._diversity = diversity
        self._nearest: Floats | None = None
        self._open = np.ones(len(vectors), bool)
        for vector in () if chosen is None else chosen.astype(np.float64):
            self._see(vector)

    def take(self, passes: Callable[[int], bool]) -> int | None:
        """As `InOrder.take`."""
        values = self._relevance
        if self._nearest is not None:
            values = values - self._diversity * self._nearest
        values = np.where(self._open, values, -np.inf)
        while len(values):
            place = int(np.argmax(values))
            if values[place] == -np.inf:
                break
            self._open[place] = False
            values[place] = -np.inf
            if passes(place):
                self._see(self._vectors[place])
                return place
        return self._rest.take(passes)

    def _see(self, vector: Floats) -> None:
        near = self._vectors @ vector
        self._nearest = near if self._nearest is None else np.maximum(self._nearest, near)
