"""Hit rates over windows of event time.

A target counts in three groups: all targets, its scene, and the stage of its user. Bounded: see
`windows`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import msgspec
from typing_extensions import override

from eddyline.statistics import wilson
from embeddings.evaluation.metrics import CUTS
from evaluation.judge.windows import ALL, SCENE, State, WindowCounts

STAGE = "stage"


class Series(NamedTuple):
    """What a count is of. row: a recall path, or the fused answer; group: `ALL`, `SCENE`, `STAGE`

    value: the scene or the stage; "" in `ALL`
    """

    generation: str
    row: str
    group: str
    value: str


class Counts(msgspec.Struct, array_like=True):
    """Counts of one series in one bucket or window.

    hits: targets with a rank of at most 10, 50, 100 (`CUTS`); reciprocal: sum of 1 / rank
    """

    targets: int = 0
    hits: list[int] = msgspec.field(default_factory=lambda: [0] * len(CUTS))
    reciprocal: float = 0.0

    def add(self, other: Counts) -> None:
        """Add the counts of another bucket."""
        self.targets += other.targets
        self.hits = [mine + theirs for mine, theirs in zip(self.hits, other.hits, strict=True)]
        self.reciprocal += other.reciprocal

    def note(self, rank: float) -> None:
        """Count one target. rank: from 1 on; infinity for a miss"""
        self.targets += 1
        for at, cut in enumerate(CUTS):
            self.hits[at] += rank <= cut
        self.reciprocal += 1 / rank


class Rate(msgspec.Struct, frozen=True, kw_only=True):
    """One series in one window, for metrics and `eddyline stats`.

    hr: HR@10, 50 and 100; low, high: their 95 % intervals by Wilson's score
    """

    window: str
    generation: str
    row: str
    group: str
    value: str
    targets: int
    hr: list[float]
    low: list[float]
    high: list[float]
    mrr: float


def stage(events: int) -> str:
    """The stage of a user with so many events in the list.

    >>> [stage(n) for n in (0, 1, 4, 5, 19, 20)]
    ['0', '1-4', '1-4', '5-19', '5-19', '20+']
    """
    if events == 0:
        return "0"
    return "1-4" if events < 5 else "5-19" if events < 20 else "20+"


class Rates(WindowCounts[Series, Counts, Rate]):
    """All counts of targets. Thread rule: one thread; `rates` of others reads a copy."""

    _groups = (SCENE,)
    _state = State[Series, Counts]
    _new = Counts

    def add(
        self, generation: str, at_ms: int, scene: str, user_stage: str, ranks: Mapping[str, float]
    ) -> None:
        """Count one target. at_ms: its event time; scene: "" for none; ranks: row -> rank"""
        self._open(generation)
        groups = [(ALL, ""), (STAGE, user_stage)]
        if scene:
            groups.append((SCENE, self._value(SCENE, scene)))
        places = self._places(at_ms)
        for row, rank in ranks.items():
            for group in groups:
                series = Series(generation, row, *group)
                for place in places:
                    counts = place.get(series)
                    if counts is None:
                        counts = place[series] = Counts()
                    counts.note(rank)

    @override
    def _rate(self, window: str, series: Series, counts: Counts) -> Rate:
        intervals = [wilson(hits, counts.targets) for hits in counts.hits]
        return Rate(
            window=window,
            **series._asdict(),
            targets=counts.targets,
            hr=[hits / counts.targets for hits in counts.hits],
            low=[low for low, _ in intervals],
            high=[high for _, high in intervals],
            mrr=counts.reciprocal / counts.targets,
        )
