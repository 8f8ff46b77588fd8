"""Ranking metrics: the rank of a target among scored items, values by rank, means over many ranks.

One event has one target, so HR@k is Recall@k, and Precision@k is HR@k / k. A rank of infinity is a
miss in every metric.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embeddings.towers.numerics import Floats, Ints

Ranks = npt.NDArray[np.float64]

CUTS = (10, 50, 100)


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


def of_ranks(ranks: Ranks) -> dict[str, Ranks]:
    """Metric -> its value for each event, float64 (n,). ranks: float64 (n,), 1 and above

    >>> {name: float(value[0]) for name, value in of_ranks(np.array([2.0])).items()}["mrr"]
    0.5
    """
    found = {f"hr_{k}": (ranks <= k).astype(np.float64) for k in CUTS}
    found["precision_10"] = found["hr_10"] / 10
    found["mrr"] = 1 / ranks
    found["ndcg_10"] = np.where(ranks <= 10, 1 / np.log2(ranks + 1), 0.0)
    return found


def quality(ranks: Ranks, seen: npt.NDArray[np.bool_]) -> Quality:
    """The metrics of n >= 1 events. ranks: float64 (n,); seen: bool (n,), of a seen user."""
    found = of_ranks(ranks)
    hits = found["hr_10"]
    return Quality(
        events=len(ranks),
        hit_rate_10=float(hits.mean()),
        hit_rate_50=float(found["hr_50"].mean()),
        hit_rate_100=float(found["hr_100"].mean()),
        mrr=float(found["mrr"].mean()),
        ndcg_10=float(found["ndcg_10"].mean()),
        hit_rate_10_seen_users=float(hits[seen].mean()) if seen.any() else 0.0,
        hit_rate_10_unseen_users=float(hits[~seen].mean()) if not seen.all() else 0.0,
    )
