"""Confidence intervals of estimates."""

from __future__ import annotations

import math
from collections.abc import Collection

# 95 % of a normal distribution lie within this many standard deviations.
Z = 1.96


def interval(found: Collection[tuple[float, int]]) -> tuple[float, float, float]:
    """(mean recall, low, high): Wilson's score interval at 95 %, over (recall of a query, its k).

    The k items of one query hit or miss together, so they are not k independent trials. The spread
    between queries gives the number of trials, between the number of queries and that of all items.

    >>> [round(x, 3) for x in interval([(1.0, 10)] * 100)]
    [1.0, 0.996, 1.0]
    >>> [round(x, 3) for x in interval([(1.0, 10), (0.8, 10)] * 50)]
    [0.9, 0.879, 0.918]
    """
    queries = len(found)
    if not queries:
        return 0.0, 0.0, 1.0
    mean = sum(recall for recall, _ in found) / queries
    trials = float(sum(k for _, k in found))
    spread = sum((recall - mean) ** 2 for recall, _ in found) / max(1, queries - 1)
    if spread:
        trials = min(trials, max(float(queries), mean * (1 - mean) * queries / spread))
    mid = mean + Z * Z / (2 * trials)
    half = Z * math.sqrt(mean * (1 - mean) / trials + Z * Z / (4 * trials * trials))
    scale = 1 + Z * Z / trials
    return mean, max(0.0, (mid - half) / scale), min(1.0, (mid + half) / scale)
