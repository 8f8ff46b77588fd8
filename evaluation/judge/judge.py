"""The judge: groups of the merged log in, rates out. It reads no clock and no server."""

from __future__ import annotations

from eddyline.schema.events import Click, Forget
from eddyline.schema.user_sample import is_sampled
from eddyline.settings.loader import Settings
from evaluation.blend_learner import BlendLearner
from evaluation.engine import Engine
from evaluation.judge.drift import DriftWatch
from evaluation.judge.impressions import ImpressionJoin
from evaluation.judge.merging import Group
from evaluation.judge.rates import Rates
from evaluation.judge.track import Ranked, Track, targets_of
from evaluation.judge.windows import GENERATIONS_MAX
from serving.answer.blend import Blend
from serving.recall.registry import reads_co_visits

# A judge that falls behind scores this share of the targets at least.
SHARE_MIN = 1 / 64


def keeps_all_lists(settings: Settings) -> bool:
    """Whether the lists of all users are kept: what they visited counts for those who are judged.

    `blend` keeps them whatever its paths are, so that other paths can be named later.
    """
    return settings.fusion == Blend.name or reads_co_visits(settings.recall_path_names)


class Judge:
    """Scores the targets of each group, then applies it. Thread rule: one thread.

    share:   of the followed users, those whose events are scored now
    scored:  targets that were scored; skipped: those that were not, as the judge was behind
    applied: records
    impressions: clicks joined with the answers that led to them
    """

    def __init__(self, settings: Settings, rates: Rates | None = None, *, since_ms: int) -> None:
        """since_ms: targets that were appended before only warm up."""
        self.settings = settings
        # By generation.
        self.tracks: dict[str, Track] = {}
        self.rates = rates or Rates()
        self.impressions = ImpressionJoin(self.is_recorded)
        self.drifts: dict[str, DriftWatch] = {}
        self.since_ms = since_ms
        self._keeps_all = keeps_all_lists(settings)
        # What the fusion `blend` goes on with, across generations.
        self.learned = b""
        self.share = 1.0
        self.scored = self.skipped = self.applied = 0

    @property
    def learner(self) -> BlendLearner | None:
        """What learns the fusion now; None where it is another than `blend`."""
        return next((track.learner for track in self.tracks.values()), None)

    def follows(self, user_id: str) -> bool:
        """Whether the user's list and embedding are kept."""
        return self._keeps_all or self.is_judged(user_id)

    def is_judged(self, user_id: str) -> bool:
        """Whether the user's events are scored."""
        return is_sampled(user_id, self.settings.judge_sample)

    def is_recorded(self, user_id: str) -> bool:
        """Whether workers with the same settings record the answers to this user."""
        return is_sampled(user_id, self.settings.answers_sample)

    def open(self, engine: Engine) -> None:
        """Judge a generation from here on."""
        self.tracks[engine.bundle.generation] = Track(
            engine,
            self._count,
            keeps_repeats=self.settings.judge_repeats == "keep",
            scene_field=self.settings.judge_scene_field,
            learned=self.learned,
        )

    def replace(self, engine: Engine) -> None:
        """Judge this generation from here on, and no other one."""
        learner = self.learner
        self.learned = b"" if learner is None else learner.encode()
        for track in self.tracks.values():
            track.settle()
            track.close()
        self.tracks.clear()
        self.open(engine)

    def take(self, group: Group) -> None:
        """Score and apply the records of one time."""
        targets = targets_of(group, self.is_judged, self.since_ms)
        if targets and self.share < 1:
            share = self.settings.judge_sample * self.share
            chosen = [one for one in targets if is_sampled(one[1].user_id, share)]
            self.skipped += len(targets) - len(chosen)
            targets = chosen
        self.scored += len(targets)
        for track in self.tracks.values():
            for record, click in targets:
                track.score(record, click)
        for track in self.tracks.values():
            track.apply(group)
        self._join(group)
        self.applied += len(group.records)

    def settle(self) -> None:
        """Have the rates count every target so far."""
        for track in self.tracks.values():
            track.settle()

    def write(self) -> None:
        """Have the rates and stores hold everything so far."""
        for track in self.tracks.values():
            track.write()

    def fall_behind(self, behind: bool) -> None:
        """Score half as many targets where the judge is behind, else twice as many."""
        self.share = max(SHARE_MIN, self.share / 2) if behind else min(1.0, 2 * self.share)

    def _join(self, group: Group) -> None:
        """Join the answers of one time, then the clicks."""
        chosen = [one for one in group.records if one.record.timestamp >= self.since_ms]
        for one in chosen:
            if one.answer is not None:
                self.impressions.add_answer(one.answer, group.at_ms)
        for one in chosen:
            for event in one.events:
                if isinstance(event, Click):
                    self.impressions.add_click(event, group.at_ms)
                elif isinstance(event, Forget):
                    self.impressions.forget(event.user_id)

    def _count(self, generation: str, target: Ranked) -> None:
        """Count a target, see `Track`."""
        at_ms = target.at_ms
        self.rates.add(generation, at_ms, target.scene, target.stage, target.ranks)
        if generation not in self.drifts:
            self.drifts[generation] = DriftWatch(generation)
            for old in list(self.drifts)[:-GENERATIONS_MAX]:
                del self.drifts[old]
        self.drifts[generation].add(at_ms, target.ranks[self.settings.fusion] <= 10)
