"""What ingest knows of the user slots that it writes, so that Redis is asked once and then only written to.

Exact, not merely fresh: a partition's owner is the only writer of its slot, every write compares the fences
of `clicks` and of `users` with those under which this was read, and whatever goes wrong drops the slot. So a
cache that is behind can have a write refused, never falsify one.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from eddyline.errors import FenceMoved
from eddyline.schema import user_history
from eddyline.schema.user_history import CompactEntry, Entry
from eddyline.stores.state_store import Fence, SlotRead, Source, StateStore, UserQuery, UserRead
from streams.ports import Record

# What a user counts beside his entries: an embedding and a small profile take about as much as four of them.
_USER_ENTRIES = 4
# So many characters of a profile, or an attribute of it, take as much as one more.
_ENTRY_CHARS = 150
# So many users are passed over at once; after that the next one leaves, used or not.
_PASSED_OVER_MAX = 256


@dataclass(slots=True)
class CachedUser:
    """A user's state, while a chunk is applied to it and between chunks.

    recent:  entries that are new since his list was last written whole; None: write it whole
    steps:   events counted; vector: float32[d] as bytes, None while he has none
    last:    the event of this chunk that was applied last; counted: whether steps moved in this chunk
    more:    what his profile counts in the cache, beyond a small one
    kept:    whether the cache has him; size: what he counts in it then, else 0
    used:    whether he was needed again since he came, or was last passed over
    """

    entries: list[Entry]
    recent: list[CompactEntry] | None
    at_ms: int
    steps: int = 0
    vector: bytes | None = None
    profile: Mapping[str, object] = field(default_factory=dict)
    last: Record | None = None
    counted: bool = False
    more: int = 0
    kept: bool = False
    size: int = 0
    used: bool = False


class Window:
    """The accepted event ids of one partition: id -> offset, at least those that can still be met."""

    def __init__(self, accepted: dict[str, int]) -> None:
        self.known = accepted
        self._groups: deque[tuple[int, Sequence[str]]] = deque()
        ids = list(accepted)
        for first in range(0, len(ids), 256):
            group = ids[first : first + 256]
            self._groups.append((accepted[group[-1]], group))

    def add(self, accepted: dict[str, int], floor: int) -> None:
        """Ids that were just written, by offset; those below `floor` may go."""
        if accepted:
            self.known.update(accepted)
            self._groups.append((next(reversed(accepted.values())), tuple(accepted)))
        while self._groups and self._groups[0][0] < floor:
            for event_id in self._groups.popleft()[1]:
                if self.known.get(event_id, floor) < floor:
                    del self.known[event_id]


@dataclass(slots=True)
class Slot:
    """One user slot. profiles: the fence of `users` under which its users were read, as text."""

    window: Window
    profiles: str


class UserCache:
    """Slots and users; who was not needed again leaves first. Thread rule: one thread.

    Users leave in the order in which they came, but one that was used since is passed over once (the clock
    algorithm, Corbató 1968): a user who is here costs one look, where keeping them in the order of use costs
    three and touches his neighbours in it.

    entries_max: behaviours kept in all; a user counts for four more, one with a large profile for more
    entries:     kept now; asked, found: users that were needed, and of those, that were here
    """

    def __init__(self, store: StateStore, generation: str, entries_max: int) -> None:
        self._store = store
        self._generation = generation
        self._entries_max = entries_max
        self._slots: dict[str, Slot] = {}
        self._users: OrderedDict[tuple[str, str], CachedUser] = OrderedDict()
        self.entries = 0
        self.asked = 0
        self.found = 0

    def slot(self, slot: str, source: Source, fence: Fence | None) -> Slot:
        """The slot, read where it is not known. Raises FenceMoved where its fence is not this one."""
        known = self._slots.get(slot)
        if known is None:
            read = self._store.read_slot(slot, source)
            check(slot, source, fence, read)
            known = self._slots[slot] = Slot(Window(read.accepted), read.profiles)
        return known

    def look(
        self, slot: str, user_ids: Iterable[str]
    ) -> tuple[dict[str, CachedUser | None], list[str]]:
        """(users as they are known, None for unknown ones; those that have to be read)."""
        users = self._users
        looked = {user: users.get((slot, user)) for user in user_ids}
        missing = [user for user, draft in looked.items() if draft is None]
        self.asked += len(looked)
        self.found += len(looked) - len(missing)
        return looked, missing

    def query(self, slot: str, source: Source, user_ids: Sequence[str]) -> UserQuery:
        """What reads these users."""
        return UserQuery(slot, source, user_ids, [self._generation] if self._generation else [])

    def take(
        self, looked: Mapping[str, CachedUser | None], read: UserRead | None
    ) -> dict[str, CachedUser]:
        """The users of a chunk, ready to be changed: those of `look` and those that were read since.

        Where the chunk fails, the slot has to be dropped.
        """
        return {user: draft or _draft(user, read) for user, draft in looked.items()}

    def give_back(self, slot: str, drafts: Mapping[str, CachedUser]) -> None:
        """Keep users as they were just written, as far as there is room."""
        more = 0
        for user, draft in drafts.items():
            draft.last, draft.counted = None, False
            # Who was taken may have left meanwhile, for users of another slot, or have begun anew.
            if draft.kept:
                draft.used = True
            else:
                self._leave((slot, user))
                self._users[slot, user] = draft
                draft.kept = True
            size = len(draft.entries) + _USER_ENTRIES + draft.more
            more += size - draft.size
            draft.size = size
        self.entries += more
        if self.entries > self._entries_max:
            self._make_room()

    def _make_room(self) -> None:
        users, passed_over = self._users, 0
        while self.entries > self._entries_max:
            key = next(iter(users))
            draft = users[key]
            if draft.used and passed_over < _PASSED_OVER_MAX:
                passed_over += 1
                draft.used = False
                users.move_to_end(key)
            else:
                self._leave(key)

    def _leave(self, key: tuple[str, str]) -> None:
        draft = self._users.pop(key, None)
        if draft is not None:
            self.entries -= draft.size
            draft.kept, draft.size, draft.used = False, 0, False

    def profiles_written(
        self, slot: str, before: Fence | None, fence: Fence, user_ids: Collection[str]
    ) -> None:
        """Profiles of these users were just written or forgotten, by this process.

        before: the fence that they were written under. Where it is not the one that is known here, there was
                a write that nobody told of (its answer was lost): of whom it was is unknown, so the slot goes
        """
        known = self._slots.get(slot)
        if known is not None and known.profiles != str(before or ""):
            self.drop(slot)
        elif known is not None:
            known.profiles = str(fence)
        for user in user_ids:
            self._leave((slot, user))

    def drop(self, slot: str) -> None:
        """Forget all of a slot: its partition is read anew, or was lost, or a write has failed."""
        if self._slots.pop(slot, None) is None:
            return
        for key in [key for key in self._users if key[0] == slot]:
            self._leave(key)


def check(slot: str, source: Source, fence: Fence | None, read: SlotRead | UserRead) -> None:
    """Raise FenceMoved where what was read stands under another fence than expected."""
    if read.fence != fence:
        raise FenceMoved(f"{slot}:{source}", str(fence or ""), str(read.fence or ""))


def _draft(user: str, read: UserRead | None) -> CachedUser:
    if read is None:
        return CachedUser([], [], 0)
    before = read.histories.get(user, user_history.EMPTY)
    recent = list(read.recent[user]) if user in read.recent else None if before.entries else []
    steps, vector = next(iter(read.embeddings.values()), {}).get(user, (0, None))
    profile = read.profiles.get(user, {})
    more = _profile_entries(profile) if profile else 0
    return CachedUser(list(before.entries), recent, before.at_ms, steps, vector, profile, more=more)


def _profile_entries(profile: Mapping[str, object]) -> int:
    texts = sum(len(name) + len(value) for name, value in profile.items() if isinstance(value, str))
    return len(profile) - 1 + texts // _ENTRY_CHARS
