"""One generation under the judge: its engine, its rows, and targets that wait for their ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from eddyline.kafka.topics import CLICKS, ITEMS
from eddyline.schema import events
from eddyline.schema.events import Click
from eddyline.schema.records import Record
from evaluation.blend_learner import BlendLearner
from evaluation.blend_row import BlendRow
from evaluation.engine import BATCH_RECORDS, Engine
from evaluation.judge.merging import Group
from evaluation.judge.rates import stage
from evaluation.prequential import Prequential
from evaluation.rows import FusedRow, PathRow, Row, TowersRow
from serving.answer.blend import Blend
from serving.answer.fusion import RanksAll
from serving.recall.towers import TowersPath

# Targets that wait for their ranks, at most.
WAITING_MAX = 256


class Ranked(NamedTuple):
    """A target and its ranks.

    at_ms: event time, at most that of the append: a wrong clock moves no window ahead
    scene: what the event says of where it happened; "" for nothing
    stage: of its user, see `rates.stage`
    ranks: row -> rank; infinity for a miss
    """

    click: Click
    at_ms: int
    stage: str
    scene: str
    ranks: Mapping[str, float]


class Track:
    """Scores targets and applies groups. Thread rule: one thread.

    on_ranked: called with each target that counts, in their order
    """

    def __init__(
        self,
        engine: Engine,
        on_ranked: Callable[[str, Ranked], None],
        *,
        keeps_repeats: bool,
        scene_field: str,
        learned: bytes = b"",
    ) -> None:
        """scene_field: key of the events' context; "" for no scenes.

        learned: what the fusion `blend` goes on with, see `BlendLearner`
        """
        self.engine = engine
        self.generation = engine.bundle.generation
        self._on_ranked = on_ranked
        self._keeps_repeats = keeps_repeats
        self._scene_field = scene_field
        self._rows: list[Row] = [
            TowersRow(engine, WAITING_MAX, name, 1, steps=(True,))
            if name == TowersPath.name
            else PathRow(engine, name, WAITING_MAX)
            for name in engine.paths
        ]
        # As `evaluate` calls it.
        name, fusion = engine.fusion.name, engine.fusion
        self._blend: BlendRow | None = None
        if isinstance(fusion, Blend):
            self._blend = BlendRow(engine, name, WAITING_MAX, learned=learned)
            self._rows.append(self._blend)
        elif isinstance(fusion, RanksAll):
            self._rows.append(FusedRow(engine, name, WAITING_MAX, fusion, [*engine.paths]))
        self._prequential = Prequential(engine, self._rows, keeps_repeats=keeps_repeats)
        self._waiting: list[tuple[Click, int, str]] = []
        self._items: list[Record] = []
        self._profiles: list[Record] = []

    def score(self, record: Record, click: Click) -> None:
        """Rank the event's item by what was applied, unless ingest drops the event."""
        if self.engine.is_dropped(record, click):
            return
        self._apply_waiting()
        number = len(self._waiting)
        target = self._prequential.score(number, click.user_id, click.item_id, click.at_ms)
        if target.repeat and not self._keeps_repeats:
            return
        at_ms = min(click.at_ms, record.timestamp)
        self._waiting.append((click, at_ms, stage(target.listed)))
        if len(self._waiting) == WAITING_MAX:
            self.settle()

    def apply(self, group: Group) -> None:
        """Apply the records of one time: the events first, as items and profiles count after it."""
        for one in group.records:
            if one.topic == CLICKS and not one.ignored:
                self._apply_profiles()
                self.engine.queue(one.record, one.events)
        for one in group.records:
            if one.ignored or one.topic == CLICKS:
                continue
            waiting = self._items if one.topic == ITEMS else self._profiles
            waiting.append(one.record)
            if len(waiting) >= BATCH_RECORDS:
                self._apply_waiting()

        if self._blend is not None:
            self._blend.step()

    @property
    def learner(self) -> BlendLearner | None:
        """What learns the fusion; None where it is another than `blend`."""
        return None if self._blend is None else self._blend.learner

    def settle(self) -> None:
        """Report the targets that wait for their ranks."""
        self._prequential.flush()
        waiting, self._waiting = self._waiting, []
        results = [(name, found) for row in self._rows for name, found in row.results.items()]
        for number, (click, at_ms, of_user) in enumerate(waiting):
            ranks = {name: float(found.ranks[number]) for name, found in results}
            ranked = Ranked(click, at_ms, of_user, self._scene(click), ranks)
            self._on_ranked(self.generation, ranked)
        for _, found in results:
            found.ranks[: len(waiting)] = np.inf

    def write(self) -> None:
        """Have the store hold everything that was applied, and report every target."""
        self.settle()
        self._apply_waiting()
        self.engine.write()
        self.engine.write_counts()

    def close(self) -> None:
        """Stop what runs."""
        self.engine.close()

    def _apply_waiting(self) -> None:
        items, self._items = self._items, []
        if items:
            self._prequential.apply_items(items)
        self._apply_profiles()

    def _apply_profiles(self) -> None:
        profiles, self._profiles = self._profiles, []
        if profiles:
            self.engine.apply_profile_records(profiles)

    def _scene(self, click: Click) -> str:
        if not self._scene_field or click.context is None:
            return ""
        return str(click.context.get(self._scene_field, ""))


def targets_of(
    group: Group, follows: Callable[[str], bool], since_ms: int
) -> Sequence[tuple[Record, Click]]:
    """The targets of a group, each event id once.

    follows: whether a user's events are scored; since_ms: earlier records only warm up
    """
    found: list[tuple[Record, Click]] = []
    ids: set[tuple[int, str]] = set()
    for one in group.records:
        if one.ignored or one.topic != CLICKS or one.record.timestamp < since_ms:
            continue
        for event in one.events:
            if not isinstance(event, Click) or event.kind == "dislike" or events.is_moved(event):
                continue
            if not follows(event.user_id):
                continue
            if event.event_id is not None:
                at = one.record.partition, event.event_id
                if at in ids:
                    continue
                ids.add(at)
            found.append((one.record, event))
    return found
