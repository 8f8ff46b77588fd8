"""Click-through of recorded answers by recall path and position, over windows of log time.

A click counts where its answer counts, so a rate never exceeds 1, and the rates of the last minutes
grow while clicks come in. Bounded: see `rates`, and `VALUES_MAX`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from eddyline.statistics import wilson
from evaluation.judge.rates import GENERATIONS_MAX, OTHER, TOTAL, WINDOWS

# Items further down are not counted: callers rarely show them.
POSITIONS = 10
# Groups of a series.
ALL, PATH, SCENE, ARM = "all", "path", "scene", "arm"
# Of each group; further ones are counted together.
VALUES_MAX = 20


class ClickSeries(NamedTuple):
    """What a count is of.

    group: `ALL`, `PATH`, `SCENE` or `ARM`; value: the path, the scene or the arm; "" in `ALL`
    position: 1 … `POSITIONS`, in `ALL` and `PATH`; 0: all of them
    """

    generation: str
    group: str
    value: str
    position: int


class ClickCounts(msgspec.Struct, array_like=True):
    """impressions: items of answers; clicks: those that were clicked; reciprocal: sum of 1 /
    position over the clicks
    """

    impressions: int = 0
    clicks: int = 0
    reciprocal: float = 0.0

    def add(self, other: ClickCounts) -> None:
        """Add the counts of another bucket."""
        self.impressions += other.impressions
        self.clicks += other.clicks
        self.reciprocal += other.reciprocal


class ClickRate(msgspec.Struct, frozen=True, kw_only=True):
    """One series in one window, for metrics and `eddyline stats`.

    rate: clicks / impressions; low, high: its 95 % interval by Wilson's score
    reciprocal: mean of 1 / position over the clicks; 0 without clicks
    """

    window: str
    generation: str
    group: str
    value: str
    position: int
    impressions: int
    clicks: int
    rate: float
    low: float
    high: float
    reciprocal: float


class Origin(NamedTuple):
    """What an item of an answer counts for. scene, arm: "" for none"""

    generation: str
    scene: str
    arm: str


class _State(msgspec.Struct):
    newest_ms: int
    values: dict[str, list[str]]
    generations: list[str]
    buckets: dict[int, dict[int, list[tuple[ClickSeries, ClickCounts]]]]
    total: list[tuple[ClickSeries, ClickCounts]]


class ClickRates:
    """All counts. Thread rule: one thread."""

    def __init__(self) -> None:
        self._newest_ms = 0
        self._values: dict[str, list[str]] = {PATH: [], SCENE: [], ARM: []}
        self._generations: list[str] = []
        kept: dict[int, int] = {}
        for width_ms, buckets in WINDOWS.values():
            kept[width_ms] = max(buckets, kept.get(width_ms, 0))
        self._kept = kept
        self._buckets: dict[int, dict[int, dict[ClickSeries, ClickCounts]]] = {w: {} for w in kept}
        self._total: dict[ClickSeries, ClickCounts] = {}

    def add_answer(self, at_ms: int, origin: Origin, paths: Sequence[str]) -> None:
        """Count an answer. at_ms: log time; paths: of its first `POSITIONS` items, in order"""
        self._open(origin.generation)
        self._newest_ms = max(self._newest_ms, at_ms)
        places = list(self._places(at_ms))
        for position, path in enumerate(paths, 1):
            for series in self._series(origin, path, position):
                for place in places:
                    place.setdefault(series, ClickCounts()).impressions += 1

    def add_click(self, at_ms: int, origin: Origin, path: str, position: int) -> None:
        """Count a click on an item of an answer that was counted. at_ms: of the answer"""
        if origin.generation not in self._generations:
            return  # dropped since
        places = list(self._places(at_ms))
        for series in self._series(origin, path, position):
            for place in places:
                counts = place.setdefault(series, ClickCounts())
                counts.clicks += 1
                counts.reciprocal += 1 / position

    def rates(self) -> list[ClickRate]:
        """Every series of every window."""
        return [one for window in (*WINDOWS, TOTAL) for one in self._rates(window)]

    def counts(self, window: str) -> dict[ClickSeries, ClickCounts]:
        """Series -> its counts in one of `WINDOWS` or in `TOTAL`."""
        if window == TOTAL:
            return dict(self._total)
        width_ms, number = WINDOWS[window]
        first = self._newest_ms // width_ms - number + 1
        found: dict[ClickSeries, ClickCounts] = {}
        for bucket, of_bucket in self._buckets[width_ms].items():
            if bucket >= first:
                for series, counts in of_bucket.items():
                    found.setdefault(series, ClickCounts()).add(counts)
        return found

    def export(self) -> bytes:
        """All counts, for `load`."""
        buckets = {
            width: {bucket: list(found.items()) for bucket, found in of_width.items()}
            for width, of_width in self._buckets.items()
        }
        state = _State(
            self._newest_ms, self._values, self._generations, buckets, list(self._total.items())
        )
        return msgspec.msgpack.encode(state)

    @classmethod
    def load(cls, exported: bytes) -> ClickRates:
        """The counts that `export` returned. Raises msgspec.MsgspecError."""
        state, rates = msgspec.msgpack.decode(exported, type=_State), cls()
        rates._newest_ms = state.newest_ms
        rates._values, rates._generations = state.values, state.generations
        for width in rates._buckets.keys() & state.buckets.keys():
            rates._buckets[width] = {n: dict(found) for n, found in state.buckets[width].items()}
        rates._total = dict(state.total)
        return rates

    def _rates(self, window: str) -> Iterator[ClickRate]:
        for series, counts in sorted(self.counts(window).items()):
            low, high = wilson(counts.clicks, counts.impressions)
            yield ClickRate(
                window=window,
                **series._asdict(),
                impressions=counts.impressions,
                clicks=counts.clicks,
                rate=counts.clicks / counts.impressions,
                low=low,
                high=high,
                reciprocal=counts.reciprocal / counts.clicks if counts.clicks else 0.0,
            )

    def _places(self, at_ms: int) -> Iterator[dict[ClickSeries, ClickCounts]]:
        """The total, and the bucket of this time in each width that still has it."""
        yield self._total
        for width_ms, kept in self._kept.items():
            bucket, of_width = at_ms // width_ms, self._buckets[width_ms]
            first = self._newest_ms // width_ms - kept + 1
            if bucket < first:
                continue
            if bucket not in of_width:
                of_width[bucket] = {}
                for old in [one for one in of_width if one < first]:
                    del of_width[old]
            yield of_width[bucket]

    def _series(self, origin: Origin, path: str, position: int) -> Iterator[ClickSeries]:
        generation, path = origin.generation, self._value(PATH, path)
        for at in (0, position):
            yield ClickSeries(generation, ALL, "", at)
            yield ClickSeries(generation, PATH, path, at)
        for group, value in ((SCENE, origin.scene), (ARM, origin.arm)):
            if value:
                yield ClickSeries(generation, group, self._value(group, value), 0)

    def _value(self, group: str, value: str) -> str:
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
