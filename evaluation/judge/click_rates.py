"""Click-through of recorded answers by recall path and position, over windows of log time.

A click counts where its answer counts, so a rate never exceeds 1, and the rates of the last minutes
grow while clicks come in. Bounded: see `windows`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec
from typing_extensions import override

from eddyline.statistics import wilson
from evaluation.judge.windows import ALL, SCENE, State, WindowCounts

# Items further down are not counted: callers rarely show them.
POSITIONS = 10
PATH, ARM = "path", "arm"


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


class ClickRates(WindowCounts[ClickSeries, ClickCounts, ClickRate]):
    """All counts of recorded answers. Thread rule: one thread."""

    _groups = (PATH, SCENE, ARM)
    _state = State[ClickSeries, ClickCounts]
    _new = ClickCounts

    def add_answer(self, at_ms: int, origin: Origin, paths: Sequence[str]) -> None:
        """Count an answer. at_ms: log time; paths: of its first `POSITIONS` items, in order"""
        self._open(origin.generation)
        places = self._places(at_ms)
        for position, path in enumerate(paths, 1):
            for series in self._series(origin, path, position):
                for place in places:
                    place.setdefault(series, ClickCounts()).impressions += 1

    def add_click(self, at_ms: int, origin: Origin, path: str, position: int) -> None:
        """Count a click on an item of an answer that was counted. at_ms: of the answer"""
        if origin.generation not in self._generations:
            return  # dropped since
        places = self._places(at_ms)
        for series in self._series(origin, path, position):
            for place in places:
                counts = place.setdefault(series, ClickCounts())
                counts.clicks += 1
                counts.reciprocal += 1 / position

    @override
    def _rate(self, window: str, series: ClickSeries, counts: ClickCounts) -> ClickRate:
        low, high = wilson(counts.clicks, counts.impressions)
        return ClickRate(
            window=window,
            **series._asdict(),
            impressions=counts.impressions,
            clicks=counts.clicks,
            rate=counts.clicks / counts.impressions,
            low=low,
            high=high,
            reciprocal=counts.reciprocal / counts.clicks if counts.clicks else 0.0,
        )

    def _series(self, origin: Origin, path: str, position: int) -> Iterator[ClickSeries]:
        generation, path = origin.generation, self._value(PATH, path)
        for at in (0, position):
            yield ClickSeries(generation, ALL, "", at)
            yield ClickSeries(generation, PATH, path, at)
        for group, value in ((SCENE, origin.scene), (ARM, origin.arm)):
            if value:
                yield ClickSeries(generation, group, self._value(group, value), 0)
