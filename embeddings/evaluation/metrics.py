"""Ranking metrics: the rank of a target among scored items, and means over many ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embeddings.towers.numerics import Floats, Ints


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """Means over `events`, each 0 … 1. A seen user has an event in the training data."""

    events: int
    hit_rate_10: float
    hit_rate_50: float
    hit_rate_100: float
    mrr: float
    ndcg_10: float
    hit_rate_10_seen_users: float
    hit_rate_10_unseen_users: float


def rank(scores: Floats, excluded: Ints, target: int) -> float:
    """1 + the number of items with a higher score + half the number of ties.

    scores:   float32 (n,)
    excluded: rows that do not compete; the target competes even if it is among them

    >>> rank(np.array([3, 2, 1, 1], np.float32), np.array([0]), 2)
    2.5
    """
    others = np.unique(excluded)
    others = others[others != target]
    own = scores[target]
    higher = np.count_nonzero(scores > own) - np.count_nonzero(scores[others] > own)
    ties = np.count_nonzero(scores == own) - 1 - np.count_nonzero(scores[others] == own)
    return float(1 + higher + ties / 2)


def quality(ranks: npt.NDArray[np.float64], seen: npt.NDArray[np.bool_]) -> Quality:
    """The metrics of n >= 1 events. ranks: float64 (n,); seen: bool (n,), of a seen user."""
    hits = ranks <= 10
    gain = np.where(hits, 1 / np.log2(ranks + 1), 0.0)
    return Quality(
        events=len(ranks),
        hit_rate_10=float(hits.mean()),
        hit_rate_50=float((ranks <= 50).mean()),
        hit_rate_100=float((ranks <= 100).mean()),
        mrr=float((1 / ranks).mean()),
        ndcg_10=float(gain.mean()),
        hit_rate_10_seen_users=float(hits[seen].mean()) if seen.any() else 0.0,
        hit_rate_10_unseen_users=float(hits[~seen].mean()) if not seen.all() else 0.0,
    )
