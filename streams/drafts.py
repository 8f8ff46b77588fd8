"""The users of one chunk while its events are applied to them, one after the other, in the order of the log.

What comes out is a function of the state that was read and of the events; where the chunk begins and ends
makes no difference.
"""

from __future__ import annotations

from dataclasses import dataclass

from eddyline import accept, behaviour
from eddyline.behaviour import Behaviour, Bounds, Entry
from eddyline.events import KINDS, MOVED, Click, Merge
from eddyline.ports import UserEffects, UserRead
from eddyline.settings import Settings
from streams.chunk import Record
from streams.micro_steps import MicroSteps, Step

_KIND_NUMBER = {kind: number for number, kind in enumerate(KINDS)}


@dataclass(slots=True)
class _Draft:
    """A user's state. steps: events counted; last: the event that was applied last, None while none was."""

    entries: list[Entry]
    at_ms: int
    steps: int
    last: Record | None = None
    counted: bool = False


class Drafts:
    """Lists and embeddings of the users of one chunk. Thread rule: one thread.

    read:  their state before the chunk
    micro: the generation that learns; None leaves embeddings alone
    moved: (record, click) of what merges send elsewhere: to be delivered before the fence moves
    late:  events that came too late for their list
    """

    def __init__(self, settings: Settings, micro: MicroSteps | None, read: UserRead) -> None:
        self.moved: list[tuple[Record, Click]] = []
        self.late = 0
        self._micro = micro
        self._read = read
        self._dwell_ms_full = settings.dwell_ms_full
        self._bounds = bounds(settings)
        self._drafts: dict[str, _Draft] = {}
        self._steps: list[Step] = []
        self._emptied: dict[str, None] = {}

    def apply(self, record: Record, event: Click | Merge) -> None:
        """Apply one event that counts."""
        draft = self._drafts.get(event.user_id)
        if draft is None:
            draft = self._drafts[event.user_id] = self._begin(event.user_id)
        if isinstance(event, Merge):
            self._merge(draft, record, event)
        else:
            self._click(draft, record, event)

    def effects(self, read_us: int) -> tuple[UserEffects, int]:
        """(lists and embeddings after all events, micro-steps taken). read_us: when the chunk was read."""
        effects = UserEffects(emptied=tuple(self._emptied))
        effects.behaviours = {
            user: _behaviour(draft, draft.last, read_us)
            for user, draft in self._drafts.items()
            if draft.last is not None
        }
        if self._micro is not None:
            effects.generation = self._micro.generation
            counts = {user: draft.steps for user, draft in self._drafts.items() if draft.counted}
            before = {u: e for u, e in self._read.embeddings.items() if u not in self._emptied}
            effects.embeddings = self._micro.run(self._steps, counts, before, self._read.profiles)
        return effects, len(self._steps)

    def _begin(self, user_id: str) -> _Draft:
        before = self._read.behaviours.get(user_id, behaviour.EMPTY)
        steps = self._read.embeddings[user_id][0] if user_id in self._read.embeddings else 0
        return _Draft(list(before.entries), before.at_ms, steps)

    def _click(self, draft: _Draft, record: Record, click: Click) -> None:
        weight = behaviour.strength(click, self._dwell_ms_full)
        entry = Entry(click.item_id, click.at_ms, _KIND_NUMBER[click.kind], weight)
        if is_moved(click):
            behaviour.place_moved(draft.entries, draft.at_ms, entry, self._bounds)
        else:
            # The history of a step is what was known just before its event.
            step = self._step(draft, record, click)
            if not behaviour.place(draft.entries, draft.at_ms, entry, self._bounds):
                self.late += 1
            elif step is not None:
                self._learn(draft, step)
        draft.at_ms = max(draft.at_ms, click.at_ms)
        draft.last = record

    def _step(self, draft: _Draft, record: Record, click: Click) -> Step | None:
        """The step to take for this event, with an empty history where it is only to be counted."""
        if self._micro is None or click.kind == "dislike" or (row := self._micro.row(click.item_id)) is None:
            return None
        enough = draft.steps >= self._micro.min_steps_before
        history = self._micro.history(draft.entries) if enough else ()
        return Step(click.user_id, history, row, click.event_id or f"{record.partition}/{record.offset}")

    def _learn(self, draft: _Draft, step: Step) -> None:
        """Count the event; take its step, once enough were counted."""
        if self._micro is not None and draft.steps >= self._micro.min_steps_before:
            self._steps.append(step)
        draft.steps += 1
        draft.counted = True

    def _merge(self, draft: _Draft, record: Record, merge: Merge) -> None:
        """Send his list on, the oldest first, and let him begin anew."""
        for number, entry in enumerate(reversed(draft.entries)):
            click = Click(
                user_id=merge.merge_into, item_id=entry.item_id, at_ms=entry.at_ms,
                kind=KINDS[entry.kind], weight=entry.weight,  # type: ignore[arg-type]
                event_id=f"merge/{record.partition}/{record.offset}/{number}", context=dict(MOVED),
            )  # fmt: skip
            self.moved.append((record, click))
        self._steps = [step for step in self._steps if step.user_id != merge.user_id]
        self._emptied[merge.user_id] = None
        self._drafts[merge.user_id] = _Draft([], 0, 0)


def bounds(settings: Settings) -> Bounds:
    """What a behaviour list may hold, by the settings."""
    age_ms, lateness_ms = settings.history_age_s_max * 1_000, settings.lateness_s_max * 1_000
    return Bounds(settings.history_length_max, age_ms, lateness_ms)


def is_moved(click: Click) -> bool:
    """Whether it was another user's before a merge, and has counted there."""
    return click.context is not None and MOVED.items() <= click.context.items()


def _behaviour(draft: _Draft, last: Record, read_us: int) -> Behaviour:
    return Behaviour(
        partition=last.partition,
        offset=last.offset,
        at_ms=draft.at_ms,
        produced_us=accept.produced_us(last.headers),
        appended_ms=last.timestamp,
        read_us=read_us,
        entries=tuple(draft.entries),
    )
