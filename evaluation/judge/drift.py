"""Drift of the fused answer's hits: ADWIN, by river (Bifet and Gavaldà 2007)."""

from __future__ import annotations

import logging
from collections import deque
from typing import Any

import msgspec

log = logging.getLogger(__name__)

# A false alarm in so many looks, at most, by ADWIN's bound.
DELTA = 0.002
# The hits that a restart feeds again, so that ADWIN goes on with what it had seen.
KEPT_HITS = 10_000


class Drift(msgspec.Struct, frozen=True, kw_only=True):
    """A change of the hit rate. at_ms: event time at which it was noticed

    before, after: HR@10 of the window that ADWIN had, and of what it kept
    """

    generation: str
    at_ms: int
    before: float
    after: float

    @property
    def what(self) -> str:
        """`fall` or `rise`."""
        return "fall" if self.after < self.before else "rise"


class DriftWatch:
    """Watches the hits of one generation's fused answer. Thread rule: one thread.

    found: drifts so far; last: the newest one
    """

    def __init__(
        self, generation: str, hits: bytes = b"", found: int = 0, last: Drift | None = None
    ) -> None:
        """hits: what `hits` was before a restart, oldest first; found, last: likewise"""
        self.generation = generation
        self.found, self.last = found, last
        self._adwin = make_adwin()
        self._hits: deque[int] = deque(maxlen=KEPT_HITS)
        for hit in hits:
            self._feed(hit)

    @property
    def hits(self) -> bytes:
        """The newest hits, 1 or 0, oldest first."""
        return bytes(self._hits)

    def add(self, at_ms: int, hit: bool) -> None:
        """One more target. hit: whether its rank is at most 10"""
        before = self._rate()
        if self._feed(int(hit)):
            self.found += 1
            self.last = Drift(
                generation=self.generation, at_ms=at_ms, before=before, after=self._rate()
            )
            log.warning(
                "the hit rate has changed",
                extra={
                    "generation": self.generation,
                    "what": self.last.what,
                    "before": round(before, 4),
                    "after": round(self.last.after, 4),
                },
            )

    def _feed(self, hit: int) -> bool:
        self._hits.append(hit)
        return self._adwin is not None and self._adwin.update(hit)

    def _rate(self) -> float:
        return 0.0 if self._adwin is None else self._adwin.rate()


class Adwin:
    """ADWIN without the rest of river, whose import takes seconds and 150 MB (scipy, pandas)."""

    def __init__(self, window: Any) -> None:
        self._window = window

    def update(self, hit: int) -> bool:
        """Whether the rate has changed, of which this hit is the last sign."""
        return bool(self._window.update(float(hit)))

    def rate(self) -> float:
        """The mean of the window; 0 without any."""
        width = self._window.get_width()
        return float(self._window.get_total() / width) if width else 0.0


def make_adwin() -> Adwin | None:
    """A detector; None without river, which the extra `judge` installs."""
    try:
        from river._river_rust.drift import AdaptiveWindowing
    except ImportError:
        return None
    # The defaults of river.drift.ADWIN.
    return Adwin(
        AdaptiveWindowing(
            delta=DELTA, clock=32, max_buckets=5, min_window_length=5, grace_period=10
        )
    )
