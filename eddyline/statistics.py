"""Intervals of estimates: for a number of samples, and for looks after every sample."""

from __future__ import annotations

import math

# No bet is larger: beyond it the logarithm of a bound grows without a limit.
_BET_MAX = 0.75
# Of the standard normal distribution: between -Z_95 and Z_95 lie 95 %.
_Z_95 = 1.959963984540054


def wilson(hits: int, samples: int) -> tuple[float, float]:
    """The 95 % interval of a rate, by Wilson's score; 0 … 1 without samples.

    For independent samples. Unlike the normal interval it has width where nothing or all is a hit.

    >>> [round(bound, 4) for bound in wilson(8, 10)]
    [0.4902, 0.9433]
    >>> wilson(0, 0)
    (0.0, 1.0)
    """
    if not samples:
        return 0.0, 1.0
    rate, z2 = hits / samples, _Z_95**2 / samples
    middle = (rate + z2 / 2) / (1 + z2)
    half = _Z_95 * math.sqrt(rate * (1 - rate) / samples + z2 / (4 * samples)) / (1 + z2)
    return max(0.0, middle - half), min(1.0, middle + half)


class ConfidenceSequence:
    """The mean of samples within 0 … 1, with an interval that holds at every moment.

    With probability 1 − `alpha` the true mean is in all intervals of the sequence, however often
    they are looked at. An interval for a fixed number of samples would not: who looks after every
    sample finds a rare one that is wrong. Method: the predictable plug-in empirical Bernstein
    confidence sequence, theorem 2 of Waudby-Smith and Ramdas, "Estimating means of bounded random
    variables by betting", Journal of the Royal Statistical Society B 86 (2024). Its width falls
    with the variance of the samples. Thread rule: one writer.

    >>> sequence = ConfidenceSequence(0.05)
    >>> sequence.low, sequence.high
    (0.0, 1.0)
    >>> for _ in range(200):
    ...     sequence.add(1.0)
    >>> round(sequence.low, 3), sequence.high
    (0.974, 1.0)
    """

    __slots__ = ("_alpha_log", "_bets", "_cost", "_squares", "_sum", "_weighted", "samples")

    def __init__(self, alpha: float) -> None:
        """alpha: above 0, below 1."""
        self._alpha_log = math.log(2 / alpha)
        self.samples = 0
        self._sum = self._bets = self._weighted = self._cost = 0.0
        # Sum of squared deviations, with one of a half to begin with.
        self._squares = 0.25

    @property
    def mean(self) -> float:
        """The mean of the samples; 0 without any."""
        return self._sum / max(1, self.samples)

    @property
    def low(self) -> float:
        """The lower end of the interval."""
        return max(0.0, self._middle() - self._half())

    @property
    def high(self) -> float:
        """The upper end of the interval."""
        return min(1.0, self._middle() + self._half())

    def add(self, sample: float) -> None:
        """Take one more sample. The bet on it depends on earlier samples only."""
        n = self.samples + 1
        expected = (0.5 + self._sum) / n
        variance = self._squares / n
        bet = min(_BET_MAX, math.sqrt(2 * self._alpha_log / (variance * n * math.log(n + 1))))
        self._bets += bet
        self._weighted += bet * sample
        self._cost += (sample - expected) ** 2 * (-math.log1p(-bet) - bet)
        self.samples, self._sum = n, self._sum + sample
        self._squares += (sample - (0.5 + self._sum) / (n + 1)) ** 2

    def _middle(self) -> float:
        return self._weighted / self._bets if self.samples else 0.5

    def _half(self) -> float:
        return (self._alpha_log + self._cost) / self._bets if self.samples else 0.5
