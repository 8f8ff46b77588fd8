"""The two-tower path: a user's last items and embedding become a vector; the index has its neighbours."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from eddyline.schema.user_history import positive_items
from eddyline.stores.state_store import UserState
from index.arrays import Vector
from index.filters import Filter
from index.port import Hit
from serving.recall.base import Candidates
from serving.recall.index_reader import IndexReader

NAME = "towers"
# Rescoring by popularity moves an item by some places: so many times the candidates are fetched first.
OVER_FETCH = 3

Correct = Callable[[Sequence[Hit], int], Sequence[Hit]]


class Tower(Protocol):
    """What is needed of `embeddings.towers.user_tower.UserTower`."""

    history_max: int

    def encode_one(self, history: Vector, profile: Mapping[str, object]) -> Vector:
        """float32 (h, d) newest first, and attributes -> float32 (d,), unit norm."""


@dataclass(slots=True)
class StageTimings:
    """When the steps of one query were done, microseconds since 1970; 0 is not taken."""

    embedded_us: int = 0
    searched_us: int = 0


class TowersPath:
    """Users to neighbours, within one generation. Thread rule: any thread."""

    def __init__(self, tower: Tower, combine: Callable[[Vector, Vector | None], Vector]) -> None:
        """combine: (tower's output, the user-ID embedding or None) -> the query vector."""
        self._tower = tower
        self._combine = combine

    def ask(
        self,
        items: IndexReader,
        user: UserState,
        k: int,
        exclude: Collection[str],
        marks: StageTimings,
        *,
        filters: Filter | None = None,
        correct: Correct | None = None,
    ) -> Candidates:
        """The k nearest items that pass and are not excluded; none, with the reason, where he has no history.

        correct: rescores (hits, k); it gets OVER_FETCH times as many as are wanted
        """
        vector, why = self._vector(items, user)
        marks.embedded_us = time.time_ns() // 1000
        if vector is None:
            return Candidates((), why)
        hits: Sequence[Hit] = items.query(
            vector, k * OVER_FETCH if correct else k, exclude, filters
        )
        hits = correct(hits, k) if correct else hits
        marks.searched_us = time.time_ns() // 1000
        which = "are unseen" if filters is None else "are unseen and pass the filter"
        return Candidates(hits, "" if len(hits) == k else f"only {len(hits)} live items {which}")

    def _vector(self, items: IndexReader, user: UserState) -> tuple[Vector | None, str]:
        entries = user.history.entries
        if not entries:
            return None, "nothing is known of this user"
        liked = positive_items(entries, len(entries))
        if not liked:
            return None, "the user's list holds dislikes only"
        # Most are live, so the rest of a long list is seldom looked at.
        wanted = self._tower.history_max
        history = items.vectors_of(liked[: 2 * wanted])
        if len(history) < wanted < len(liked) / 2:
            history = np.concatenate((history, items.vectors_of(liked[2 * wanted :])))
        if not len(history):
            return None, f"none of the {len(liked)} items of the user's list is in the index"
        forward = self._tower.encode_one(history[:wanted], user.profile)
        return self._combine(forward, _embedding(user, items.dimension)), ""


def _embedding(user: UserState, dimension: int) -> Vector | None:
    """The user-ID embedding; None where there is none, or one that does not fit."""
    if user.embedding is None or len(user.embedding[1]) != 4 * dimension:
        return None
    embedding: Vector = np.frombuffer(user.embedding[1], "<f4")
    return embedding if np.isfinite(embedding).all() else None
