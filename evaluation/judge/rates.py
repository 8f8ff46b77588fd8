"""Hit rates over windows of event time, from buckets of counts.

A target counts in three groups: all targets, its scene, and the stage of its user. Bounded: windows
have a fixed number of buckets, and there is a fixed number of scenes and of generations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import msgspec

from eddyline.statistics import wilson
from embeddings.evaluation.metrics import CUTS

MINUTE_MS = 60_000
# Window -> (width of its buckets, number of them). A window ends with the newest bucket.
WINDOWS = {"15m": (MINUTE_MS, 15), "1h": (MINUTE_MS, 60), "24h": (15 * MINUTE_MS, 96)}
# Since the judge began to score.
TOTAL = "total"
ALL, SCENE, STAGE = "all", "scene", "stage"
# Further scenes are counted together.
SCENES_MAX = 20
OTHER = "other"
# The generation that is active, and the one before.
GENERATIONS_MAX = 2


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


class _State(msgspec.Struct):
    """newest_ms: largest time of a target; buckets: width -> number of the bucket -> counts"""

    newest_ms: int = 0
    scenes: list[str] = []
    generations: list[str] = []
    buckets: dict[int, dict[int, list[tuple[Series, Counts]]]] = {}
    total: list[tuple[Series, Counts]] = []


class Rates:
    """All counts. Thread rule: one thread; `rates` of others reads a copy."""

    def __init__(self) -> None:
        self.newest_ms = 0
        self._scenes: list[str] = []
        self._generations: list[str] = []
        kept: dict[int, int] = {}
        for width_ms, buckets in WINDOWS.values():
            kept[width_ms] = max(buckets, kept.get(width_ms, 0))
        self._kept = kept
        self._buckets: dict[int, dict[int, dict[Series, Counts]]] = {w: {} for w in kept}
        self._total: dict[Series, Counts] = {}

    def add(
        self, generation: str, at_ms: int, scene: str, user_stage: str, ranks: Mapping[str, float]
    ) -> None:
        """Count one target. at_ms: its event time; scene: "" for none; ranks: row -> rank"""
        self._open(generation)
        groups = [(ALL, ""), (STAGE, user_stage)]
        if scene:
            groups.append((SCENE, self._scene(scene)))
        places = [self._total]
        self.newest_ms = max(self.newest_ms, at_ms)
        for width_ms, kept in self._kept.items():
            bucket, of_width = at_ms // width_ms, self._buckets[width_ms]
            first = self.newest_ms // width_ms - kept + 1
            if bucket < first:
                continue  # too late for every window
            if bucket not in of_width:
                of_width[bucket] = {}
                for old in [one for one in of_width if one < first]:
                    del of_width[old]
            places.append(of_width[bucket])
        for row, rank in ranks.items():
            for group in groups:
                series = Series(generation, row, *group)
                for place in places:
                    counts = place.get(series)
                    if counts is None:
                        counts = place[series] = Counts()
                    counts.note(rank)

    def counts(self, window: str) -> dict[Series, Counts]:
        """Series -> its counts in one of `WINDOWS` or in `TOTAL`."""
        if window == TOTAL:
            return dict(self._total)
        width_ms, number = WINDOWS[window]
        first = self.newest_ms // width_ms - number + 1
        found: dict[Series, Counts] = {}
        for bucket, of_bucket in self._buckets[width_ms].items():
            if bucket >= first:
                for series, counts in of_bucket.items():
                    found.setdefault(series, Counts()).add(counts)
        return found

    def rates(self) -> list[Rate]:
        """Every series of every window."""
        return [one for window in (*WINDOWS, TOTAL) for one in self._rates(window)]

    def export(self) -> bytes:
        """All counts, for `load`."""
        buckets = {
            width: {bucket: list(found.items()) for bucket, found in of_width.items()}
            for width, of_width in self._buckets.items()
        }
        total = list(self._total.items())
        state = _State(self.newest_ms, self._scenes, self._generations, buckets, total)
        return msgspec.msgpack.encode(state)

    @classmethod
    def load(cls, exported: bytes) -> Rates:
        """The counts that `export` returned. Raises msgspec.MsgspecError."""
        state, rates = msgspec.msgpack.decode(exported, type=_State), cls()
        rates.newest_ms = state.newest_ms
        rates._scenes, rates._generations = state.scenes, state.generations
        for width in rates._buckets.keys() & state.buckets.keys():
            rates._buckets[width] = {n: dict(found) for n, found in state.buckets[width].items()}
        rates._total = dict(state.total)
        return rates

    def _rates(self, window: str) -> Iterator[Rate]:
        for series, counts in sorted(self.counts(window).items()):
            intervals = [wilson(hits, counts.targets) for hits in counts.hits]
            yield Rate(
                window=window,
                generation=series.generation,
                row=series.row,
                group=series.group,
                value=series.value,
                targets=counts.targets,
                hr=[hits / counts.targets for hits in counts.hits],
                low=[low for low, _ in intervals],
                high=[high for _, high in intervals],
                mrr=counts.reciprocal / counts.targets,
            )

    def _scene(self, scene: str) -> str:
        if scene not in self._scenes:
            if len(self._scenes) >= SCENES_MAX:
                return OTHER
            self._scenes.append(scene)
        return scene

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
