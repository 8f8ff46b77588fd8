"""The users of the owned partitions, cached: Redis is read once and then only written to.

The cache is exact, not merely fresh: a partition's owner is the only writer of its slot, every
write compares the fences of `clicks` and of `users` with those under which the users were read, and
every error drops the slot. So a stale cache may have a write refused; it never falsifies one.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from eddyline.errors import FenceMoved
from eddyline.schema import user_history
from eddyline.schema.co_visits import Visit
from eddyline.schema.erasure import Erasure
from eddyline.schema.records import Record
from eddyline.schema.step_ranges import StepRanges
from eddyline.schema.user_history import CompactEntry, Entry
from eddyline.stores.state_store import Fence, ProfilePlace, SlotRead, Source, StateStore, UserRead

# An embedding and a small profile take about as much memory as four entries.
_USER_ENTRIES = 4
# So many characters of a profile, or one attribute, take about as much memory as one more entry.
_ENTRY_CHARS = 150
# An eviction skips at most so many used users; after that it evicts the next one, used or not.
_SKIPPED_MAX = 256


@dataclass(slots=True)
class UserEmbedding:
    """A user's embedding in one generation.

    steps:   events counted; vector: float32[d] as bytes, None before the first one
    counted: whether `steps` changed in this batch
    """

    steps: int = 0
    vector: bytes | None = None
    counted: bool = False


@dataclass(slots=True)
class CachedUser:
    """A user's state, while a batch is applied and between batches.

    recent:     entries that are new since the list was last written whole; None: write it whole
    embeddings: one for each live generation, in the order of the micro-steps
    erasure:    what is kept of a user who was forgotten; None for other users
    profile_place: place of the stored profile; None without one
    idle_after_ms: of the user's history, see `schema.user_history`
    left:       what left the list in this batch, or came too late for it: `seen_items.stored`
    seen:       the stored seen items of before the batch; read only where a merge or a Forget needs
                them
    last:       the event of this batch that was applied last
    more:       what the profile adds to the size in the cache, beyond a small profile
    kept:       whether the cache holds the user; size: the user's size in the cache, 0 where not
    used:       whether the user was needed since the last eviction that skipped them
    """

    entries: list[Entry]
    recent: list[CompactEntry] | None
    at_ms: int
    embeddings: tuple[UserEmbedding, ...] = ()
    profile: Mapping[str, object] = field(default_factory=dict)
    erasure: Erasure | None = None
    profile_place: ProfilePlace | None = None
    idle_after_ms: int = 0
    left: bytes = b""
    seen: bytes = b""
    last: Record | None = None
    more: int = 0
    kept: bool = False
    size: int = 0
    used: bool = False


class Window:
    """The accepted event ids of one partition, id -> offset: all that can still match."""

    def __init__(self, accepted: dict[str, int]) -> None:
        self.known = accepted
        self._groups: deque[tuple[int, Sequence[str]]] = deque()
        ids = list(accepted)
        for first in range(0, len(ids), 256):
            group = ids[first : first + 256]
            self._groups.append((accepted[group[-1]], group))

    def add(self, accepted: dict[str, int], floor: int) -> None:
        """Add ids that were just written, by offset; ids below `floor` may leave."""
        if accepted:
            self.known.update(accepted)
            self._groups.append((next(reversed(accepted.values())), tuple(accepted)))
        while self._groups and self._groups[0][0] < floor:
            for event_id in self._groups.popleft()[1]:
                if self.known.get(event_id, floor) < floor:
                    del self.known[event_id]


@dataclass(slots=True)
class Slot:
    """One user slot.

    profiles: the fence of `users` under which its users were read, as text
    stored:   generation -> where its micro-steps are taken, as the slot has it
    ranges:   the same, as this process goes on; None until that is decided
    outbox:   the outbox of co-visits and its floor, as they were read; None once taken
    """

    window: Window
    profiles: str
    stored: Mapping[str, StepRanges] = field(default_factory=dict)
    ranges: Mapping[str, StepRanges] | None = None
    outbox: tuple[Sequence[Visit], int] | None = None


class UserCache:
    """Slots and users, evicted by the clock algorithm (Corbató 1968). Thread rule: one thread.

    Users are evicted in the order in which they came; one that was used since is skipped once. A
    hit costs one look-up, where an order of use costs three and touches the neighbours.

    generations: whose embeddings are kept
    entries_max: entries of all lists together; a user counts as four more, a large profile as more
    entries:     the present number; requested, found: users looked up, and those of them that were
                 cached
    """

    def __init__(self, store: StateStore, generations: Sequence[str], entries_max: int) -> None:
        self._store = store
        self._generations = generations
        self._entries_max = entries_max
        self._slots: dict[str, Slot] = {}
        self._users: OrderedDict[tuple[str, str], CachedUser] = OrderedDict()
        self.entries = 0
        self.requested = 0
        self.found = 0

    def slot(self, slot: str, source: Source, fence: Fence | None) -> Slot:
        """The slot, read where it is not cached.

        Raises FenceMoved where its fence is not `fence`.
        """
        known = self._slots.get(slot)
        if known is None:
            read = self._store.read_slot(slot, source)
            check(slot, source, fence, read)
            known = self._slots[slot] = Slot(
                Window(read.accepted),
                read.profiles,
                read.step_ranges,
                outbox=(read.visits, read.visits_floor),
            )
        return known

    def slot_names(self) -> list[str]:
        """The names of the cached slots."""
        return list(self._slots)

    def slots_of(self, generation: str) -> dict[str, Slot]:
        """The cached slots that may have embeddings of this generation."""
        return {
            name: slot
            for name, slot in self._slots.items()
            if generation in slot.stored or generation in (slot.ranges or ())
        }

    def remove_generation(self, generation: str, slots: Mapping[str, Slot]) -> None:
        """Its embeddings are gone from these slots; their next writes say so.

        slots: of `slots_of`; one that was read again since keeps the generation
        """
        for name, slot in slots.items():
            if self._slots.get(name) is slot and slot.ranges is not None:
                slot.ranges = {n: r for n, r in slot.ranges.items() if n != generation}

    def look(
        self, slot: str, user_ids: Iterable[str]
    ) -> tuple[dict[str, CachedUser | None], list[str]]:
        """Return (users by id, None for those that are not cached; the ids of those)."""
        users = self._users
        found = {user_id: users.get((slot, user_id)) for user_id in user_ids}
        missing = [user_id for user_id, user in found.items() if user is None]
        self.requested += len(found)
        self.found += len(found) - len(missing)
        return found, missing

    def complete(
        self, found: Mapping[str, CachedUser | None], read: UserRead | None
    ) -> dict[str, CachedUser]:
        """The users of `look`, missing ones as they were read. The batch changes them in place.

        Where the batch fails, the slot has to be dropped.
        """
        users = {user_id: user or self._user_of(user_id, read) for user_id, user in found.items()}
        for user_id, value in read.seen.items() if read is not None else ():
            users[user_id].seen = value
        return users

    def keep(self, slot: str, users: Mapping[str, CachedUser]) -> None:
        """Cache users as they were just written, as far as there is room."""
        more = 0
        for user_id, user in users.items():
            user.last = None
            user.left = user.seen = b""
            for embedding in user.embeddings:
                embedding.counted = False
            # The user may have been evicted since `look`, for users of another slot, or emptied.
            if user.kept:
                user.used = True
            else:
                self._evict((slot, user_id))
                self._users[slot, user_id] = user
                user.kept = True
            size = len(user.entries) + _USER_ENTRIES + user.more
            more += size - user.size
            user.size = size
        self.entries += more
        if self.entries > self._entries_max:
            self._make_room()

    def profiles_written(
        self, slot: str, before: Fence | None, fence: Fence, user_ids: Collection[str]
    ) -> None:
        """This process just wrote profiles of these users, or forgot them.

        before: the fence that the write expected. Where another one is known here, an earlier write
                went unnoticed (its answer was lost). Its users are unknown, so the whole slot is
                dropped.
        """
        known = self._slots.get(slot)
        if known is not None and known.profiles != str(before or ""):
            self.drop(slot)
        elif known is not None:
            known.profiles = str(fence)
        for user_id in user_ids:
            self._evict((slot, user_id))

    def drop(self, slot: str) -> None:
        """Discard a slot and its users: its partition is read again, or a write failed."""
        if self._slots.pop(slot, None) is None:
            return
        for key in [key for key in self._users if key[0] == slot]:
            self._evict(key)

    def _make_room(self) -> None:
        users, skipped = self._users, 0
        while self.entries > self._entries_max:
            key = next(iter(users))
            user = users[key]
            if user.used and skipped < _SKIPPED_MAX:
                skipped += 1
                user.used = False
                users.move_to_end(key)
            else:
                self._evict(key)

    def _evict(self, key: tuple[str, str]) -> None:
        user = self._users.pop(key, None)
        if user is not None:
            self.entries -= user.size
            user.kept, user.size, user.used = False, 0, False

    def _user_of(self, user_id: str, read: UserRead | None) -> CachedUser:
        if read is None:
            return CachedUser([], [], 0, tuple(UserEmbedding() for _ in self._generations))
        before = read.histories.get(user_id, user_history.EMPTY)
        recent: list[CompactEntry] | None = None
        if user_id in read.recent:
            recent = list(read.recent[user_id])
        elif not before.entries:
            recent = []
        embeddings = tuple(
            UserEmbedding(*read.embeddings[generation].get(user_id, (0, None)))
            for generation in self._generations
        )
        profile = read.profiles.get(user_id, {})
        more = _profile_entries(profile) if profile else 0
        entries = list(before.entries)
        return CachedUser(
            entries,
            recent,
            before.at_ms,
            embeddings,
            profile,
            read.erasures.get(user_id),
            read.profile_places.get(user_id),
            before.idle_after_ms,
            more=more,
        )


def check(slot: str, source: Source, fence: Fence | None, read: SlotRead | UserRead) -> None:
    """Raise FenceMoved where a read found another fence than expected."""
    if read.fence != fence:
        raise FenceMoved(f"{slot}:{source}", str(fence or ""), str(read.fence or ""))


def _profile_entries(profile: Mapping[str, object]) -> int:
    texts = sum(len(name) + len(value) for name, value in profile.items() if isinstance(value, str))
    return len(profile) - 1 + texts // _ENTRY_CHARS
