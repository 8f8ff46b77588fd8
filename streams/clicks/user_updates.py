"""The users of one batch while its events are applied one by one, in the order of the log.

The result is a function of the state that was read and of the events; batch boundaries make no
difference.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from eddyline.schema import events, seen_items, user_history
from eddyline.schema.co_visits import Visit
from eddyline.schema.erasure import Erasure, digest, erased_after, erased_before
from eddyline.schema.events import KINDS, Click, Forget, Merge
from eddyline.schema.records import Record
from eddyline.schema.step_ranges import StepRanges
from eddyline.schema.user_history import Bounds, Entry, UserHistory
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import UserEffects
from streams.clicks.micro_steps import MicroSteps, Step
from streams.clicks.user_cache import CachedUser, UserEmbedding

_KIND_NUMBER = {kind: number for number, kind in enumerate(KINDS)}


class UserUpdates:
    """Histories and embeddings of the users of one batch. Thread rule: one thread.

    micro: the micro-steps of each live generation; empty leaves embeddings alone
    ranges: for each of them, at which offsets it takes steps
    users: their state before the batch; changed in place
    moved: (record, click) of what merges move to other users: delivered before the fence moves
    late:  events that came too late for their user's list
    forgotten: events that the erasure of their user covers
    steps: by generation: micro-steps to take, in the order of the log
    visits: clicks that entered a list, with the items before them there; see `co_visits`
    """

    def __init__(
        self,
        settings: Settings,
        micro: Sequence[MicroSteps],
        ranges: Sequence[StepRanges],
        users: dict[str, CachedUser],
    ) -> None:
        self.moved: list[tuple[Record, Click]] = []
        self.late = self.forgotten = 0
        self.steps: list[list[Step]] = [[] for _ in micro]
        self.visits: list[Visit] = []
        self.users = users
        self._micro = micro
        self._co_visit_items = settings.kept_co_visit_items
        self._ranges = ranges
        self._dwell_ms_full = settings.dwell_ms_full
        self._idle_s_max = settings.user_idle_s_max
        self._bounds = bounds(settings)
        self._seen_max = settings.seen_items_max
        self._emptied: dict[str, None] = {}
        self._erasures: dict[str, Erasure] = {}
        self._dropped_profiles: dict[str, None] = {}

    def apply(self, record: Record, event: Click | Merge | Forget) -> None:
        """Apply one accepted event."""
        user = self.users[event.user_id]
        if isinstance(event, Forget):
            self._forget(user, record, event)
        elif user.erasure is not None and erased_after(
            user.erasure, event.at_ms, record.timestamp, events.origin_ms(record.headers)
        ):
            self.forgotten += 1
        else:
            if user_history.is_idle(user.idle_after_ms, record.timestamp):
                user = self._empty(user, event.user_id)
            if isinstance(event, Merge):
                self._merge(user, record, event)
            else:
                self._click(user, record, event)

    def learners(self, generation: int) -> Iterator[tuple[str, CachedUser]]:
        """The users whose counted events changed in this generation: they get a new embedding."""
        for user_id, user in self.users.items():
            if user.embeddings[generation].counted:
                yield user_id, user

    def effects(
        self, read_us: int, embeddings: Sequence[Mapping[str, tuple[int, bytes]]]
    ) -> UserEffects:
        """Histories and embeddings after all events.

        read_us: when the batch was read; embeddings: by generation, of the learners
        """
        effects = UserEffects(
            emptied=tuple(self._emptied),
            erasures=self._erasures,
            dropped_profiles=tuple(self._dropped_profiles),
            visits=self.visits,
        )
        for user_id, user in self.users.items():
            if user.left:
                effects.seen[user_id] = user.left
            if user.last is None:
                continue
            effects.histories[user_id] = _history(user, user.last, read_us)
            if user.recent is not None and len(user.recent) <= user_history.RECENT_MAX:
                effects.recent[user_id] = user.recent
            else:
                user.recent = []
        for number, micro in enumerate(self._micro):
            learned = effects.embeddings[micro.generation] = {}
            for user_id, user in self.learners(number):
                learned[user_id] = steps, vector = embeddings[number][user_id]
                user.embeddings[number].steps = steps
                user.embeddings[number].vector = vector
        return effects

    def _click(self, user: CachedUser, record: Record, click: Click) -> None:
        weight = user_history.strength(click, self._dwell_ms_full)
        entry = Entry(click.item_id, click.at_ms, _KIND_NUMBER[click.kind], weight)
        left: list[Entry] | None = [] if self._seen_max else None
        if events.is_moved(click):
            equal = events.equal_before(click)
            user_history.insert_moved(user.entries, user.at_ms, entry, self._bounds, equal, left)
            user.recent = None
            if self._seen_max:
                user.left += self._moved_seen(user, record, click)
        else:
            # The history of a step is the list just before its event.
            steps = self._next_steps(user, record, click)
            if not user_history.insert_event(user.entries, user.at_ms, entry, self._bounds, left):
                self.late += 1
            else:
                if click.at_ms < user.at_ms and user.entries[-1:] == [entry]:
                    # In Redis the oldest entry may follow entries that left the list under stricter
                    # limits. Written whole, the list has none of those.
                    user.recent = None
                elif user.recent is not None:
                    user_history.insert_compact(user.recent, user_history.compact(entry))
                for number, step in steps:
                    self._learn(number, user.embeddings[number], step)
                if self._co_visit_items and click.kind != "dislike":
                    self._visit(user, record, entry)
        if left:
            user.left += seen_items.stored(left)
        if click.at_ms > user.at_ms:
            user.at_ms = click.at_ms
        self._touch(user, record)

    def _moved_seen(self, user: CachedUser, record: Record, click: Click) -> bytes:
        """The seen items that a moved click carries, without those of before a Forget."""
        if not (texts := seen_items.moved_texts(click)):
            return b""
        value, erasure = seen_items.from_texts(texts), user.erasure
        if erasure is not None and record.timestamp <= erasure.ends_ms:
            value = seen_items.after(value, erasure.until_ms)
        return seen_items.canonical(value, self._seen_max)

    def _visit(self, user: CachedUser, record: Record, entry: Entry) -> None:
        older = user_history.older_items(user.entries, entry, self._co_visit_items)
        if older:
            self.visits.append((record.offset, entry.item_id, older))

    def _touch(self, user: CachedUser, record: Record) -> None:
        """Note the record as the user's last one."""
        user.last = record
        user.idle_after_ms = user_history.idle_after_ms(record.timestamp, self._idle_s_max)

    def _next_steps(
        self, user: CachedUser, record: Record, click: Click
    ) -> Sequence[tuple[int, Step]]:
        """The event's step in each generation that has the item; no history while only counting."""
        if click.kind == "dislike":
            return ()
        steps = []
        for number, micro in enumerate(self._micro):
            row = micro.row(click.item_id)
            if row is not None and self._ranges[number].covers(record.offset):
                enough = user.embeddings[number].steps >= micro.min_steps_before
                history = micro.history(user.entries) if enough else ()
                key = click.event_id or f"{record.partition}/{record.offset}"
                steps.append((number, Step(click.user_id, history, row, key)))
        return steps

    def _learn(self, number: int, embedding: UserEmbedding, step: Step) -> None:
        """Count the event; take its step once enough events were counted."""
        if embedding.steps >= self._micro[number].min_steps_before:
            self.steps[number].append(step)
        embedding.steps += 1
        embedding.counted = True

    def _merge(self, user: CachedUser, record: Record, merge: Merge) -> None:
        """Move the user's list to the other user, oldest entry first, and start an empty one.

        The last click carries the seen items: where a Forget covers it, it covers them all.
        """
        equal: Counter[Entry] = Counter()
        seen = seen_items.canonical(user.seen + user.left, self._seen_max)
        for number, entry in enumerate(reversed(user.entries)):
            texts = seen_items.to_texts(seen) if number == len(user.entries) - 1 else ()
            click = Click(
                user_id=merge.merge_into,
                item_id=entry.item_id,
                at_ms=entry.at_ms,
                kind=KINDS[entry.kind],  # type: ignore[arg-type]
                weight=entry.weight,
                event_id=f"merge/{record.partition}/{record.offset}/{number}",
                context=events.moved_context(equal[entry], texts),
            )
            equal[entry] += 1
            self.moved.append((record, click))
        self._empty(user, merge.user_id)

    def _forget(self, user: CachedUser, record: Record, forget: Forget) -> None:
        """Remove all but the entries of a user who returned, the embedding and the profile."""
        erasure = Erasure.of(forget)
        if erasure.repeats(user.erasure, record.timestamp):
            return
        bound_ms = forget.bound_ms
        kept = [entry for entry in user.entries if not erased_before(bound_ms, entry.at_ms)]
        if user_history.is_idle(user.idle_after_ms, record.timestamp):
            kept = []
        fresh = self._empty(user, forget.user_id)
        fresh.erasure = self._erasures[digest(forget.user_id)] = erasure.after(user.erasure)
        place = user.profile_place
        if place is not None and erasure.covers_profile(*place):
            fresh.profile, fresh.profile_place, fresh.more = {}, None, 0
            self._dropped_profiles[forget.user_id] = None
        if kept:
            fresh.entries, fresh.recent, fresh.at_ms = kept, None, user.at_ms
            seen = seen_items.after(user.seen + user.left, bound_ms)
            fresh.left = seen_items.canonical(seen, self._seen_max)
            self._touch(fresh, record)

    def _empty(self, user: CachedUser, user_id: str) -> CachedUser:
        """Start an empty list and embedding."""
        self.steps = [[s for s in steps if s.user_id != user_id] for steps in self.steps]
        self._emptied[user_id] = None
        embeddings = tuple(UserEmbedding() for _ in self._micro)
        fresh = CachedUser(
            [], [], 0, embeddings, user.profile, user.erasure, user.profile_place, more=user.more
        )
        self.users[user_id] = fresh
        return fresh


def bounds(settings: Settings) -> Bounds:
    """The limits of a history, by the settings."""
    age_ms, lateness_ms = settings.history_age_s_max * 1_000, settings.lateness_s_max * 1_000
    return Bounds(settings.history_length_max, age_ms, lateness_ms)


def _history(user: CachedUser, last: Record, read_us: int) -> UserHistory:
    return UserHistory(
        partition=last.partition,
        offset=last.offset,
        at_ms=user.at_ms,
        produced_us=events.produced_us(last.headers),
        appended_ms=last.timestamp,
        read_us=read_us,
        entries=user.entries,
        idle_after_ms=user.idle_after_ms,
    )
