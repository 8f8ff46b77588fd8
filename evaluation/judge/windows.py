"""Counts of series over windows of time, from buckets.

Bounded: windows have a fixed number of buckets, and there is a fixed number of generations and of
values of each group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import msgspec

MINUTE_MS = 60_000
# Window -> (width of its buckets, number of them). A window ends with the newest bucket.
WINDOWS = {"15m": (MINUTE_MS, 15), "1h": (MINUTE_MS, 60), "24h": (15 * MINUTE_MS, 96)}
# Since the judge began to score.
TOTAL = "total"
# Width of buckets -> number of them that the longest window needs.
_KEPT: dict[int, int] = {}
for _width_ms, _number in WINDOWS.values():
    _KEPT[_width_ms] = max(_number, _KEPT.get(_width_ms, 0))
# Groups of a series.
ALL, SCENE = "all", "scene"
# Values of a group; further ones are counted together.
VALUES_MAX = 20
OTHER = "other"
# The generation that is active, and the one before.
GENERATIONS_MAX = 2


class _Series(Protocol):
    @property
    def generation(self) -> str: ...

    def __lt__(self, other: Any, /) -> bool: ...


class _Counts(Protocol):
    def add(self, other: Self, /) -> None:
        """Add the counts of another bucket."""


S = TypeVar("S", bound=_Series)
C = TypeVar("C", bound=_Counts)
R = TypeVar("R")


class State(msgspec.Struct, Generic[S, C]):
    """newest_ms: largest time of a count; buckets: width -> number of the bucket -> counts"""

    newest_ms: int
    values: dict[str, list[str]]
    generations: list[str]
    buckets: dict[int, dict[int, list[tuple[S, C]]]]
    total: list[tuple[S, C]]


class WindowCounts(ABC, Generic[S, C, R]):
    """Counts of series S in structs C, read as rates R. Thread rule: one thread.

    newest_ms: largest time of a count
    """

    # The groups whose number of values is bounded.
    _groups: ClassVar[tuple[str, ...]]
    # `State[S, C]`.
    _state: ClassVar[Any]
    _new: type[C]

    def __init__(self) -> None:
        self.newest_ms = 0
        self._values: dict[str, list[str]] = {group: [] for group in self._groups}
        self._generations: list[str] = []
        self._buckets: dict[int, dict[int, dict[S, C]]] = {width_ms: {} for width_ms in _KEPT}
        self._total: dict[S, C] = {}

    def counts(self, window: str) -> dict[S, C]:
        """Series -> its counts in one of `WINDOWS` or in `TOTAL`."""
        if window == TOTAL:
            return dict(self._total)
        width_ms, number = WINDOWS[window]
        first = self.newest_ms // width_ms - number + 1
        found: dict[S, C] = {}
        for bucket, of_bucket in self._buckets[width_ms].items():
            if bucket >= first:
                for series, counts in of_bucket.items():
                    found.setdefault(series, self._new()).add(counts)
        return found

    def rates(self) -> list[R]:
        """Every series of every window."""
        return [
            self._rate(window, series, counts)
            for window in (*WINDOWS, TOTAL)
            for series, counts in sorted(self.counts(window).items())
        ]

    def export(self) -> bytes:
        """All counts, for `load`."""
        buckets = {
            width: {bucket: list(found.items()) for bucket, found in of_width.items()}
            for width, of_width in self._buckets.items()
        }
        total = list(self._total.items())
        state = State(self.newest_ms, self._values, self._generations, buckets, total)
        return msgspec.msgpack.encode(state)

    @classmethod
    def load(cls, exported: bytes) -> Self:
        """The counts that `export` returned. Raises msgspec.MsgspecError."""
        state, made = msgspec.msgpack.decode(exported, type=cls._state), cls()
        made.newest_ms = state.newest_ms
        made._values, made._generations = state.values, state.generations
        for width in made._buckets.keys() & state.buckets.keys():
            made._buckets[width] = {n: dict(found) for n, found in state.buckets[width].items()}
        made._total = dict(state.total)
        return made

    @abstractmethod
    def _rate(self, window: str, series: S, counts: C) -> R:
        """The rate of one series in one window."""

    def _places(self, at_ms: int) -> list[dict[S, C]]:
        """The total, and the bucket of this time in each width that still has it."""
        self.newest_ms = max(self.newest_ms, at_ms)
        places = [self._total]
        for width_ms, kept in _KEPT.items():
            bucket, of_width = at_ms // width_ms, self._buckets[width_ms]
            first = self.newest_ms // width_ms - kept + 1
            if bucket < first:
                continue  # too late for every window
            if bucket not in of_width:
                of_width[bucket] = {}
                for old in [one for one in of_width if one < first]:
                    del of_width[old]
            places.append(of_width[bucket])
        return places

    def _value(self, group: str, value: str) -> str:
        """The value that a count is of: itself, or `OTHER`."""
        known = self._values[group]
        if value not in known:
            if len(known) >= VALUES_MAX:
                return OTHER
            known.append(value)
        return value

    def _open(self, generation: str) -> None:
        """Drop the counts of the oldest generation where this one is new and too many are kept."""
        if generation in self._generations:
            return
        self._generations.append(generation)
        while len(self._generations) > GENERATIONS_MAX:
            gone = self._generations.pop(0)
            for place in (self._total, *(b for w in self._buckets.values() for b in w.values())):
                for series in [one for one in place if one.generation == gone]:
                    del place[series]
