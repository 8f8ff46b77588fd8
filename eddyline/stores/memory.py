"""State in a dictionary, for simulations and tests. It passes the same contract suite as Redis."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain, takewhile

import msgspec
from typing_extensions import override

from eddyline.errors import EddylineError, FenceMoved, StoreRefused, StoreUnavailable
from eddyline.schema import co_visits, seen_items, user_history
from eddyline.schema.co_visits import CoVisits
from eddyline.schema.erasure import digest, is_outdated
from eddyline.schema.event_decay import EventDecay
from eddyline.schema.partitioning import item_slot
from eddyline.stores.layout import Layout
from eddyline.stores.log_reset import Logs
from eddyline.stores.memory_popularity import BucketOrders, MemoryTrend
from eddyline.stores.memory_state import (
    State,
    accept_in_memory,
    remove_deleted_items,
    remove_idle_users,
)
from eddyline.stores.popularity import NO_TREND, PopularBucket, SlotTrend
from eddyline.stores.state_store import (
    Fence,
    ItemMetadata,
    ItemMetadataWrite,
    ProfilePlace,
    SlotRead,
    Source,
    StateStore,
    UserEffects,
    UserPlace,
    UserQuery,
    UserRead,
    UserState,
    UserWrite,
)
from eddyline.stores.stored_ids import check


class MemoryStore(StateStore):
    """A `StateStore` in a dictionary. Nothing expires by the clock.

    Thread rule: any thread; one lock for every call.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._state = State()
        self._orders = BucketOrders()
        self._closed = False

    def export(self) -> bytes:
        """All state, for `load`."""
        with self._lock:
            return msgspec.msgpack.encode(self._state)

    @classmethod
    def load(cls, exported: bytes) -> MemoryStore:
        """A store with the state that `export` returned. Raises msgspec.MsgspecError."""
        store, state = cls(), msgspec.msgpack.decode(exported, type=State)
        for key, (history, applied_us) in state.histories.items():
            entries = tuple(history.entries)
            state.histories[key] = (msgspec.structs.replace(history, entries=entries), applied_us)
        store._state = state
        for slot, buckets in state.buckets.items():
            store._orders.note(slot, buckets)
        return store

    def every_item(self) -> list[ItemMetadata]:
        """The metadata of every item, deleted ones included."""
        with self._lock:
            return list(self._state.items.values())

    def snapshot(self) -> State:
        """A copy of all state, for `restore`."""
        with self._lock:
            return copy.deepcopy(self._state)

    def restore(self, state: State) -> None:
        """Return to a snapshot, as a Redis that lost its last second does."""
        with self._lock:
            self._state = copy.deepcopy(state)
            self._orders.clear()
            for slot, buckets in self._state.buckets.items():
                self._orders.note(slot, buckets)

    @override
    def check(self) -> None:
        self._open()

    @override
    def check_eviction(self) -> None:
        self._open()

    @override
    def check_rights(self) -> None:
        self._open()

    @override
    def claim_layout(self, layout: Layout) -> None:
        with self._lock:
            self._open()
            stored = self._state.layout
            if stored is not None and stored.agrees(layout):
                if layout.id_form == "nfc":
                    state = self._state
                    users = (user for _, user in chain(state.histories, state.profiles))
                    items = (key.partition(":")[2] for key in state.items)
                    check("the store", chain(users, items))
            elif stored is not None and stored != layout:
                raise StoreRefused(f"the store {stored.refusal(layout)}")
            self._state.layout = layout

    @override
    def layout(self) -> Layout | None:
        self._open()
        return self._state.layout

    @override
    def fences(self, source: Source, slots: Sequence[str]) -> dict[str, Fence | None]:
        with self._lock:
            self._open()
            return {slot: self._state.fences.get((slot, source)) for slot in slots}

    @override
    def write_users(
        self, slot: str, source: Source, expected: Fence | None, new: Fence, effects: UserEffects
    ) -> int:
        with self._lock:
            users_fence = self._users_fence(slot, source)
            if effects.profiles not in (None, users_fence):
                key = f"fence:{slot}:users:{source.partition}"
                raise FenceMoved(key, effects.profiles or "", users_fence)
            self._move(slot, source, expected, new)
            state, applied_us = self._state, time.time_ns() // 1000
            window = state.window.setdefault(slot, {})
            for event_id, offset in effects.accepted.items():
                window.pop(event_id, None)  # accepted again: it moves to the end
                window[event_id] = offset
            if effects.accepted:
                # By offset: those that may leave are first.
                below = takewhile(lambda e: e[1] < effects.window_floor, window.items())
                for event_id, _ in list(below):
                    del window[event_id]
            if effects.visits:
                _, visits = state.visits.get(slot, (0, []))
                kept = [visit for visit in visits if visit[0] >= effects.visits_floor]
                state.visits[slot] = effects.visits_floor, [*kept, *effects.visits]
            for user in effects.emptied:
                state.histories.pop((slot, user), None)
                state.seen.pop((slot, user), None)
                for generation in {*effects.embeddings, *effects.generations}:
                    state.embeddings.pop((slot, generation, user), None)
            for user in effects.dropped_profiles:
                state.profiles.pop((slot, user), None)
                state.profile_places.pop((slot, user), None)
            for hashed, erasure in effects.erasures.items():
                state.erasures[slot, hashed] = erasure
            if effects.step_ranges is not None:
                state.step_ranges[slot] = dict(effects.step_ranges)
            for user, history in effects.histories.items():
                stored = msgspec.structs.replace(history, entries=tuple(history.entries))
                state.histories[slot, user] = (stored, applied_us)
            for user, more in effects.seen.items():
                before = state.seen.get((slot, user), b"")
                state.seen[slot, user] = seen_items.append(before, more, effects.seen_max)
            for generation, embeddings in effects.embeddings.items():
                for user, embedding in embeddings.items():
                    state.embeddings[slot, generation, user] = embedding
            return applied_us

    @override
    def read_slot(self, slot: str, source: Source) -> SlotRead:
        with self._lock:
            self._open()
            accepted = dict(self._state.window.get(slot, {}))
            fence = self._state.fences.get((slot, source))
            ranges = self._state.step_ranges.get(slot, {})
            floor, visits = self._state.visits.get(slot, (0, []))
            users_fence = self._users_fence(slot, source)
            return SlotRead(fence, users_fence, accepted, ranges, list(visits), floor)

    @override
    def read_many(self, queries: Sequence[UserQuery]) -> list[UserRead]:
        with self._lock:
            self._open()
            return [self._read_users(query) for query in queries]

    @override
    def write_many(self, writes: Sequence[UserWrite]) -> list[int | EddylineError]:
        answers: list[int | EddylineError] = []
        for w in writes:
            try:
                answers.append(self.write_users(w.slot, w.source, w.expected, w.new, w.effects))
            except (FenceMoved, StoreUnavailable) as error:
                answers.append(error)
        return answers

    @override
    def write_profiles(
        self,
        slot: str,
        source: Source,
        expected: Fence | None,
        new: Fence,
        profiles: Mapping[str, Mapping[str, object] | None],
        generations: Sequence[str],
        until_ms: Mapping[str, int] | None = None,
        places: Mapping[str, ProfilePlace] | None = None,
    ) -> None:
        with self._lock:
            self._move(slot, source, expected, new)
            for user, profile in profiles.items():
                if profile is not None:
                    place = (places or {}).get(user, (new.offset, 0))
                    erasure = self._state.erasures.get((slot, digest(user)))
                    stored = self._state.profile_places.get((slot, user), (-1, -1))
                    covered = erasure is not None and erasure.covers_profile(*place)
                    if not covered and not is_outdated(place, stored):
                        self._state.profiles[slot, user] = dict(profile)
                        self._state.profile_places[slot, user] = place
                    continue
                self._state.profiles.pop((slot, user), None)
                self._state.profile_places.pop((slot, user), None)
                listed = self._state.histories.get((slot, user))
                limit = (until_ms or {}).get(user)
                if listed is not None and limit is not None and listed[0].appended_ms > limit:
                    continue
                self._state.histories.pop((slot, user), None)
                self._state.seen.pop((slot, user), None)
                for generation in generations:
                    self._state.embeddings.pop((slot, generation, user), None)

    @override
    def count_clicks(
        self,
        slot: str,
        source: Source,
        expected: Fence | None,
        new: Fence,
        counts: Mapping[int, Mapping[str, int]],
        buckets_kept: int,
        items_max: int = 1_000_000,
        clicked: Sequence[str] = (),
        decays: Sequence[EventDecay] = (),
    ) -> None:
        with self._lock:
            self._move(slot, source, expected, new)
            buckets = self._state.buckets.setdefault(slot, {})
            self._orders.count(slot, buckets, counts, buckets_kept, items_max)
            if not decays:
                self._state.trends.pop(slot, None)
            elif clicked:
                trend = self._state.trends.setdefault(slot, MemoryTrend())
                trend.count(clicked, decays, items_max)

    @override
    def append_co_visits(
        self,
        slot: str,
        source: Source,
        expected: Fence | None,
        new: Fence,
        after: Mapping[str, bytes],
        before: Mapping[str, bytes],
        row_max: int,
        idle_ms: int = 0,
        renewed: Collection[tuple[str, str]] | None = None,
    ) -> None:
        with self._lock:
            self._move(slot, source, expected, new)
            rows = self._state.rows
            for kind, items in (("after", after), ("before", before)):
                for item_id, more in items.items():
                    key = slot, kind, item_id
                    rows[key] = co_visits.append(rows.get(key, b""), more, row_max)

    @override
    def read_co_visits(
        self, after: Sequence[str], before: Sequence[str], item_slots: int
    ) -> tuple[list[CoVisits], list[CoVisits]]:
        with self._lock:
            self._open()
            found_after, found_before = (
                [
                    co_visits.decode(self._state.rows.get((item_slot(i, item_slots), kind, i)))
                    for i in items
                ]
                for kind, items in (("after", after), ("before", before))
            )
            return found_after, found_before

    @override
    def read_item_metadata(
        self, item_ids: Sequence[str], item_slots: int
    ) -> dict[str, ItemMetadata]:
        with self._lock:
            self._open()
            keys = {item_id: f"{item_slot(item_id, item_slots)}:{item_id}" for item_id in item_ids}
            return {i: self._state.items[k] for i, k in keys.items() if k in self._state.items}

    @override
    def write_item_metadata(
        self,
        slot: str,
        source: Source,
        expected: Fence | None,
        new: Fence,
        metadata: Mapping[str, ItemMetadata],
    ) -> None:
        with self._lock:
            self._move(slot, source, expected, new)
            for item_id, item in metadata.items():
                stored = self._state.items.get(f"{slot}:{item_id}")
                if stored is None or stored.offset <= item.offset:
                    self._state.items[f"{slot}:{item_id}"] = item

    @override
    def write_item_metadata_many(
        self, writes: Sequence[ItemMetadataWrite]
    ) -> list[EddylineError | None]:
        answers: list[EddylineError | None] = []
        for w in writes:
            try:
                self.write_item_metadata(w.slot, w.source, w.expected, w.new, w.metadata)
                answers.append(None)
            except (FenceMoved, StoreUnavailable) as error:
                answers.append(error)
        return answers

    @override
    def refused_items(self, slot: str) -> Iterator[list[str]]:
        with self._lock:
            self._open()
            items = list(self._state.items.items())
        found = (key.partition(":") for key, item in items if item.refused is not None)
        yield [item_id for of_slot, _, item_id in found if of_slot == slot]

    @override
    def count_refused_items(self, slots: Sequence[str]) -> int:
        return sum(len(some) for slot in slots for some in self.refused_items(slot))

    @override
    def read_user(self, slot: str, partition: int, user_id: str, generation: str) -> UserState:
        with self._lock:
            self._open()
            state = self._state
            history, applied_us = state.histories.get((slot, user_id), (user_history.EMPTY, 0))
            return UserState(
                fence=state.fences.get((slot, Source("clicks", partition))),
                history=history,
                applied_us=applied_us,
                embedding=state.embeddings.get((slot, generation, user_id)),
                profile=state.profiles.get((slot, user_id), {}),
                seen=state.seen.get((slot, user_id), b""),
            ).without_idle()

    @override
    def read_users(self, users: Sequence[UserPlace], generation: str) -> list[UserState]:
        return [self.read_user(*user, generation) for user in users]

    @override
    def popular_buckets(
        self, slot: str, limit: int, known: Mapping[int, bytes]
    ) -> dict[int, PopularBucket]:
        with self._lock:
            self._open()
            return self._orders.read(slot, self._state.buckets.get(slot, {}), limit, known)

    @override
    def popular_trend(
        self, slot: str, decays: Sequence[EventDecay], limit: int, known: SlotTrend = NO_TREND
    ) -> SlotTrend:
        with self._lock:
            self._open()
            return self._state.trends.get(slot, MemoryTrend()).read(decays, limit, known)

    @override
    def remove_embeddings(self, generation: str, slots: Collection[str]) -> Iterator[int]:
        with self._lock:
            self._open()
            embeddings = self._state.embeddings
            found = [key for key in embeddings if key[0] in slots and key[1] == generation]
            for key in found:
                del embeddings[key]
        yield len(found)

    @override
    def remove_idle_users(self, slots: Collection[str], slack_ms: int) -> Iterator[int]:
        with self._lock:
            self._open()
            found = remove_idle_users(self._state, slots, slack_ms)
        yield found

    @override
    def remove_deleted_items(
        self, slots: Collection[str], partitions: int, slack_ms: int
    ) -> Iterator[int]:
        with self._lock:
            self._open()
            found = remove_deleted_items(self._state, slots, partitions, slack_ms)
        yield found

    @override
    def drop_fences(self, slot: str, sources: Sequence[Source]) -> None:
        with self._lock:
            self._open()
            for source in sources:
                self._state.fences.pop((slot, source), None)

    @override
    def accept_log(self, logs: Logs) -> int:
        with self._lock:
            self._open()
            return accept_in_memory(self._state, logs)

    @override
    def close(self) -> None:
        self._closed = True

    def _open(self) -> None:
        if self._closed:
            raise StoreUnavailable("the store is closed")

    def _read_users(self, query: UserQuery) -> UserRead:
        state, slot, user_ids = self._state, query.slot, query.user_ids
        return UserRead(
            fence=state.fences.get((slot, query.source)),
            histories={
                u: state.histories[slot, u][0] for u in user_ids if (slot, u) in state.histories
            },
            embeddings={
                generation: {
                    u: state.embeddings[slot, generation, u]
                    for u in user_ids
                    if (slot, generation, u) in state.embeddings
                }
                for generation in query.generations
            },
            profiles={u: state.profiles[slot, u] for u in user_ids if (slot, u) in state.profiles},
            erasures={
                u: state.erasures[slot, hashed]
                for u in user_ids
                if (slot, hashed := digest(u)) in state.erasures
            },
            profile_places={
                u: state.profile_places[slot, u]
                for u in user_ids
                if (slot, u) in state.profile_places
            },
            seen={u: state.seen[slot, u] for u in query.seen_of if (slot, u) in state.seen},
        )

    def _users_fence(self, slot: str, source: Source) -> str:
        return str(self._state.fences.get((slot, Source("users", source.partition))) or "")

    def _move(self, slot: str, source: Source, expected: Fence | None, new: Fence) -> None:
        self._open()
        if (found := self._state.fences.get((slot, source))) != expected:
            key = f"fence:{slot}:{source.name}:{source.partition}"
            raise FenceMoved(key, str(expected or ""), str(found or ""))
        self._state.fences[slot, source] = new
