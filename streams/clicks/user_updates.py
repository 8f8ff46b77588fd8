"""The users of one chunk while its events are applied to them, one after the other, in the order of the log.

What comes out is a function of the state that was read and of the events; where the chunk begins and ends
makes no difference.
"""

from __future__ import annotations

from collections.abc import Mapping

from eddyline.schema import events, user_history
from eddyline.schema.events import KINDS, MOVED, Click, Forget, Merge
from eddyline.schema.user_history import Bounds, Entry, UserHistory
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import UserEffects
from streams.clicks.micro_steps import MicroSteps, Step
from streams.clicks.user_cache import CachedUser
from streams.ports import Record

_KIND_NUMBER = {kind: number for number, kind in enumerate(KINDS)}


class UserUpdates:
    """Lists and embeddings of the users of one chunk. Thread rule: one thread.

    users: their state before the chunk; changed in place
    micro: the generation that learns; None leaves embeddings alone
    moved: (record, click) of what merges send elsewhere: to be delivered before the fence moves
    late:  events that came too late for their list
    steps: micro-steps to take, in the order of the log
    """

    def __init__(
        self, settings: Settings, micro: MicroSteps | None, users: dict[str, CachedUser]
    ) -> None:
        self.moved: list[tuple[Record, Click]] = []
        self.late = 0
        self.steps: list[Step] = []
        self.users = users
        self._micro = micro
        self._dwell_ms_full = settings.dwell_ms_full
        self._bounds = bounds(settings)
        self._emptied: dict[str, None] = {}

    def apply(self, record: Record, event: Click | Merge | Forget) -> None:
        """Apply one event that counts."""
        draft = self.users[event.user_id]
        if isinstance(event, Merge):
            self._merge(draft, record, event)
        elif isinstance(event, Forget):
            self._forget(draft, record, event)
        else:
            self._click(draft, record, event)

    def counts(self) -> dict[str, int]:
        """User id -> events counted, of those whose count moved: they get a new embedding."""
        return {user: draft.steps for user, draft in self.users.items() if draft.counted}

    def effects(self, read_us: int, embeddings: Mapping[str, tuple[int, bytes]]) -> UserEffects:
        """Lists and embeddings after all events. read_us: when the chunk was read."""
        effects = UserEffects(emptied=tuple(self._emptied))
        for user, draft in self.users.items():
            if draft.last is None:
                continue
            effects.histories[user] = _behaviour(draft, draft.last, read_us)
            if draft.recent is not None and len(draft.recent) <= user_history.RECENT_MAX:
                effects.recent[user] = draft.recent
            else:
                draft.recent = []
        if self._micro is not None:
            learned = effects.embeddings[self._micro.generation] = {}
            for user in self.counts():
                steps, vector = learned[user] = embeddings[user]
                self.users[user].steps, self.users[user].vector = steps, vector
        return effects

    def _click(self, draft: CachedUser, record: Record, click: Click) -> None:
        weight = user_history.strength(click, self._dwell_ms_full)
        entry = Entry(click.item_id, click.at_ms, _KIND_NUMBER[click.kind], weight)
        if is_moved(click):
            user_history.insert_moved(draft.entries, draft.at_ms, entry, self._bounds)
            draft.recent = None
        else:
            # The history of a step is what was known just before its event.
            step = self._step(draft, record, click)
            if not user_history.insert_event(draft.entries, draft.at_ms, entry, self._bounds):
                self.late += 1
            else:
                _note(draft, entry)
                if step is not None:
                    self._learn(draft, step)
        if click.at_ms > draft.at_ms:
            draft.at_ms = click.at_ms
        draft.last = record

    def _step(self, draft: CachedUser, record: Record, click: Click) -> Step | None:
        """The step to take for this event, with an empty history where it is only to be counted."""
        if (
            self._micro is None
            or click.kind == "dislike"
            or (row := self._micro.row(click.item_id)) is None
        ):
            return None
        enough = draft.steps >= self._micro.min_steps_before
        history = self._micro.history(draft.entries) if enough else ()
        return Step(
            click.user_id, history, row, click.event_id or f"{record.partition}/{record.offset}"
        )

    def _learn(self, draft: CachedUser, step: Step) -> None:
        """Count the event; take its step, once enough were counted."""
        if self._micro is not None and draft.steps >= self._micro.min_steps_before:
            self.steps.append(step)
        draft.steps += 1
        draft.counted = True

    def _merge(self, draft: CachedUser, record: Record, merge: Merge) -> None:
        """Send his list on, the oldest first, and let him begin anew."""
        for number, entry in enumerate(reversed(draft.entries)):
            click = Click(
                user_id=merge.merge_into,
                item_id=entry.item_id,
                at_ms=entry.at_ms,
                kind=KINDS[entry.kind],  # type: ignore[arg-type]
                weight=entry.weight,
                event_id=f"merge/{record.partition}/{record.offset}/{number}",
                context=dict(MOVED),
            )
            self.moved.append((record, click))
        self._empty(draft, merge.user_id)

    def _forget(self, draft: CachedUser, record: Record, forget: Forget) -> None:
        """Take out what he did until then; what was learned goes with it, whole."""
        kept = [entry for entry in draft.entries if entry.at_ms > forget.forget_until_ms]
        if kept and len(kept) == len(draft.entries):
            return
        anew = self._empty(draft, forget.user_id)
        if kept:
            anew.entries, anew.recent, anew.at_ms, anew.last = kept, None, draft.at_ms, record

    def _empty(self, draft: CachedUser, user_id: str) -> CachedUser:
        """His list and embedding begin anew."""
        self.steps = [step for step in self.steps if step.user_id != user_id]
        self._emptied[user_id] = None
        anew = self.users[user_id] = CachedUser([], [], 0, profile=draft.profile, more=draft.more)
        return anew


def bounds(settings: Settings) -> Bounds:
    """What a behaviour list may hold, by the settings."""
    age_ms, lateness_ms = settings.history_age_s_max * 1_000, settings.lateness_s_max * 1_000
    return Bounds(settings.history_length_max, age_ms, lateness_ms)


def is_moved(click: Click) -> bool:
    """Whether it was another user's before a merge, and has counted there."""
    return click.context is not None and MOVED.items() <= click.context.items()


def _note(draft: CachedUser, entry: Entry) -> None:
    """Remember that an entry is new since the list was last written whole."""
    if draft.recent is not None:
        user_history.insert_compact(draft.recent, user_history.compact(entry))


def _behaviour(draft: CachedUser, last: Record, read_us: int) -> UserHistory:
    return UserHistory(
        partition=last.partition,
        offset=last.offset,
        at_ms=draft.at_ms,
        produced_us=events.produced_us(last.headers),
        appended_ms=last.timestamp,
        read_us=read_us,
        entries=draft.entries,
    )
