"""95 % intervals of means by bootstrap over users, and measures of lists.

The bootstrap draws users with repetition; a drawn user brings all their events. All rows are
resampled alike, so differences between rows are paired.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
# Values and weights of the events: float64 (n,), and float64 of at least 0 or bool (n,).
Column = tuple[Floats, Floats | Mask]

RESAMPLES = 1_000
# Resamples that are multiplied at one time, times the users.
_CELLS_MAX = 4_000_000
# Up to so many cells, of two bytes, all resamples are kept; of more users they are drawn again.
_KEPT_MAX = 200_000_000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its 95 % interval; NaN where no event counts."""

    value: float
    low: float
    high: float

    @property
    def number(self) -> str:
        """The mean, or a dash."""
        return f"{self.value:.4f}" if math.isfinite(self.value) else "–"

    @property
    def interval(self) -> str:
        """Both ends of the interval, or a dash."""
        if not math.isfinite(self.low):
            return "–"
        return f"{self.low:.4f}{' to ' if self.low < 0 else '–'}{self.high:.4f}"

    def __str__(self) -> str:
        """The mean and its interval, or a dash."""
        return f"{self.number} ({self.interval})" if math.isfinite(self.value) else "–"


class Bootstrap:
    """Resampled means over the events of some users. Thread rule: one thread."""

    def __init__(self, users: Ints, *, seed: int, resamples: int = RESAMPLES) -> None:
        """users: int64 (n,), the user of each event, any numbers."""
        ids, self._rows = np.unique(users, return_inverse=True)
        self._users, self._seed, self._resamples = len(ids), seed, resamples
        self._kept: list[npt.NDArray[np.uint16]] = []

    def estimates(self, columns: Sequence[Column]) -> list[Estimate]:
        """The weighted mean of each column."""
        means, resampled = self.means(columns)
        return [
            _estimate(value, resampled[:, column]) for column, value in enumerate(means.tolist())
        ]

    def means(self, columns: Sequence[Column]) -> tuple[Floats, Floats]:
        """Weighted means of k columns: (k,) of all events, and (resamples, k).

        NaN where no weight was drawn. Columns of the same weights share them as one object.
        """
        weights = {id(of_events): of_events for _, of_events in columns}
        under_of = dict(zip(weights, range(len(columns), len(columns) + len(weights)), strict=True))
        sums = np.empty((self._users, len(columns) + len(weights)))
        for column, (values, of_events) in enumerate(columns):
            sums[:, column] = self._of_users(values * of_events)
        for key, of_events in weights.items():
            sums[:, under_of[key]] = self._of_users(of_events)
        unders = [under_of[id(of_events)] for _, of_events in columns]
        total, resampled = sums.sum(0), self._resample(sums)
        k = len(columns)
        return _ratio(total[:k], total[unders]), _ratio(resampled[:, :k], resampled[:, unders])

    def _of_users(self, values: Floats | Mask) -> Floats:
        """The sum of each user's values."""
        return np.bincount(self._rows, weights=values, minlength=self._users).astype(np.float64)

    def _resample(self, sums: Floats) -> Floats:
        """Sums of `sums` over users that are drawn with repetition, (resamples, columns)."""
        found, at = np.empty((self._resamples, sums.shape[1])), 0
        for drawn in self._kept or self._draw():
            found[at : at + len(drawn)] = drawn.astype(np.float64) @ sums
            at += len(drawn)
        return found

    def _draw(self) -> Iterator[npt.NDArray[np.uint16]]:
        """How often each user is drawn, (some resamples, users): all resamples in some parts."""
        rng, users = np.random.default_rng(self._seed), self._users
        step = max(1, _CELLS_MAX // max(1, users))
        for start in range(0, self._resamples, step):
            drawn = np.empty((min(step, self._resamples - start), users), np.uint16)
            for n in range(len(drawn)):
                drawn[n] = np.bincount(rng.integers(0, users, users), minlength=users)
            if self._resamples * users <= _KEPT_MAX:
                self._kept.append(drawn)
            yield drawn


def _estimate(value: float, resampled: Floats) -> Estimate:
    """The estimate of one column of `Bootstrap.means`."""
    drawn = resampled[np.isfinite(resampled)]
    if not len(drawn):
        return Estimate(value, math.nan, math.nan)
    low, high = np.percentile(drawn, (2.5, 97.5)).tolist()
    return Estimate(value, low, high)


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
