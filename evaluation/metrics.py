"""95 % intervals of means by bootstrap over users, and measures of lists.

The bootstrap draws users with repetition; a drawn user brings all their events. All rows are
resampled alike, so differences between rows are paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

RESAMPLES = 1_000
# Resamples that are in memory at one time, times the users.
_CELLS_MAX = 4_000_000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its 95 % interval; NaN where no event counts."""

    value: float
    low: float
    high: float


class Bootstrap:
    """Resampled means over the events of some users. Thread rule: one thread."""

    def __init__(self, users: Ints, *, seed: int, resamples: int = RESAMPLES) -> None:
        """users: int64 (n,), the user of each event, any numbers."""
        ids, self._rows = np.unique(users, return_inverse=True)
        self._users, self._seed, self._resamples = len(ids), seed, resamples

    def means(self, values: Floats, weights: Floats) -> tuple[Floats, Floats]:
        """Weighted means of columns: (k,) of all events, and (resamples, k).

        values: float64 (n, k); weights: float64 (n, k), at least 0; NaN where no weight was drawn
        """
        over = self._by_user(values * weights)
        under = self._by_user(weights)
        return (
            _ratio(over.sum(0), under.sum(0)),
            _ratio(*self._resample(np.concatenate((over, under), axis=1), over.shape[1])),
        )

    def _by_user(self, columns: Floats) -> Floats:
        found = np.empty((self._users, columns.shape[1]))
        for column in range(columns.shape[1]):
            found[:, column] = np.bincount(
                self._rows, weights=columns[:, column], minlength=self._users
            )
        return found

    def _resample(self, sums: Floats, k: int) -> tuple[Floats, Floats]:
        """Sums of `sums` over users that are drawn with repetition, cut after column k."""
        rng, found = np.random.default_rng(self._seed), np.empty((self._resamples, sums.shape[1]))
        step = max(1, _CELLS_MAX // max(1, self._users))
        for start in range(0, self._resamples, step):
            stop = min(start + step, self._resamples)
            drawn = np.zeros((stop - start, self._users))
            for n in range(stop - start):
                picks = rng.integers(0, self._users, self._users)
                drawn[n] = np.bincount(picks, minlength=self._users)
            found[start:stop] = drawn @ sums
        return found[:, :k], found[:, k:]


def estimates(means: Floats, resampled: Floats) -> list[Estimate]:
    """One estimate for each column of `Bootstrap.means`."""
    found = []
    for column, value in enumerate(means.tolist()):
        of_column = resampled[:, column]
        of_column = of_column[np.isfinite(of_column)]
        if not len(of_column):
            found.append(Estimate(value, float("nan"), float("nan")))
            continue
        low, high = np.percentile(of_column, (2.5, 97.5)).tolist()
        found.append(Estimate(value, low, high))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Lists:
    """Measures of the first items, over the events whose lists were kept.

    coverage:  share of the live items that are in any list
    gini:      of the items' numbers of appearances: 0 all alike, 1 all on one item
    novelty:   mean of −log₂ p(item), p = (events of the item before + 1) / (all events + items)
    diversity: mean of 1 − cosine of the item vectors over all pairs of a list
    """

    coverage: float
    gini: float
    novelty: float
    diversity: float


def of_lists(
    lists: Sequence[Sequence[str]],
    live: int,
    events_of: Mapping[str, int],
    vectors_of: Mapping[str, npt.NDArray[np.float32]],
) -> Lists:
    """The measures of some lists. live: live items

    events_of:  item id -> its events before the split
    vectors_of: item id -> float32 (d,), unit norm
    """
    shown: dict[str, int] = {}
    for one in lists:
        for item_id in one:
            shown[item_id] = shown.get(item_id, 0) + 1
    total = sum(events_of.values()) + live
    surprise = [
        -np.log2((events_of.get(item_id, 0) + 1) / total) * n for item_id, n in shown.items()
    ]
    apart = [_distance(one, vectors_of) for one in lists if len(one) > 1]
    return Lists(
        coverage=len(shown) / live if live else 0.0,
        gini=gini([*shown.values()], live),
        novelty=float(sum(surprise) / sum(shown.values())) if shown else 0.0,
        diversity=float(np.mean(apart)) if apart else 0.0,
    )


def gini(counts: Sequence[int], n: int) -> float:
    """The Gini coefficient of n numbers, those that are not in `counts` 0.

    >>> gini([1, 1, 1, 1], 4), gini([5], 5)
    (0.0, 0.8)
    """
    if not counts or not n:
        return 0.0
    ordered = np.sort(
        np.concatenate((np.zeros(max(0, n - len(counts))), np.asarray(counts, float)))
    )
    m = len(ordered)
    places = np.arange(1, m + 1)
    return float((2 * (places * ordered).sum() / ordered.sum() - (m + 1)) / m)


def _distance(one: Sequence[str], vectors_of: Mapping[str, npt.NDArray[np.float32]]) -> float:
    """Mean of 1 − cosine over the pairs of a list."""
    vectors = np.array([vectors_of[item_id] for item_id in one], np.float64)
    n, total = len(vectors), vectors.sum(axis=0)
    cosines = (float(total @ total) - float((vectors * vectors).sum())) / (n * (n - 1))
    return 1.0 - cosines


def _ratio(over: Floats, under: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Floats = np.where(under > 0, over / under, np.nan)
    return found
