"""What ingest knows of the user slots that it writes, so that Redis is asked once and then only written to.

Exact, not merely fresh: a partition's owner is the only writer of its slot, every write compares the fences
of `clicks` and of `users` with those under which this was read, and whatever goes wrong drops the slot. So a
cache that is behind can have a write refused, never falsify one.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from eddyline import behaviour
from eddyline.behaviour import Entry, Short
from eddyline.errors import FenceMoved
from eddyline.ports import Fence, SlotRead, Source, StateStore, UserQuery, UserRead
from streams.chunk import Record

# What a user counts beside his entries: an embedding and a small profile take about as much as four of them.
_USER_ENTRIES = 4
# So many characters of a profile, or an attribute of it, take as much as one more.
_ENTRY_CHARS = 150


@dataclass(slots=True)
class Draft:
    """A user's state, while a chunk is applied to it and between chunks.

    recent:  entries that are new since his list was last written whole; None: write it whole
    steps:   events counted; vector: float32[d] as bytes, None while he has none
    last:    the event of this chunk that was applied last; counted: whether steps moved in this chunk
    size:    what he counts in the cache, as of when he was given back to it
    more:    what of that his profile counts, beyond a small one
    """

    entries: list[Entry]
    recent: list[Short] | None
    at_ms: int
    steps: int = 0
    vector: bytes | None = None
    profile: Mapping[str, object] = field(default_factory=dict)
    last: Record | None = None
    counted: bool = False
    size: int = 0
    more: int = 0


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
    """Slots and users, the least recently used ones dropped. Thread rule: one thread.

    entries_max: behaviours kept in all; a user counts for four more, one with a large profile for more
    entries:     kept now; asked, found: users that were needed, and of those, that were here
    """

    def __init__(self, store: StateStore, generation: str, entries_max: int) -> None:
        self._store = store
        self._generation = generation
        self._entries_max = entries_max
        self._slots: dict[str, Slot] = {}
        self._users: OrderedDict[tuple[str, str], Draft] = OrderedDict()
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

    def missing(self, slot: str, user_ids: Sequence[str]) -> list[str]:
        """Those of these users that have to be read."""
        missing = [user for user in user_ids if (slot, user) not in self._users]
        self.asked += len(user_ids)
        self.found += len(user_ids) - len(missing)
        return missing

    def query(self, slot: str, source: Source, user_ids: Sequence[str]) -> UserQuery:
        """What reads these users."""
        return UserQuery(slot, source, user_ids, self._generation)

    def take(self, slot: str, user_ids: Sequence[str], read: UserRead | None) -> dict[str, Draft]:
        """The users of a chunk, ready to be changed; with those that were read.

        Where the chunk fails, the slot has to be dropped.
        """
        users = self._users
        return {user: users.get((slot, user)) or _draft(user, read) for user in user_ids}

    def give_back(self, slot: str, drafts: Mapping[str, Draft]) -> None:
        """Keep users as they were just written, as far as there is room."""
        users = self._users
        for user, draft in drafts.items():
            draft.last, draft.counted = None, False
            # Who was taken may have left meanwhile, for users of another slot: what is here now counts.
            before = users.get((slot, user))
            self.entries -= before.size if before else 0
            draft.size = len(draft.entries) + _USER_ENTRIES + draft.more
            self.entries += draft.size
            users[slot, user] = draft
            users.move_to_end((slot, user))
        while self.entries > self._entries_max:
            self.entries -= users.popitem(last=False)[1].size

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
            kept = self._users.pop((slot, user), None)
            self.entries -= kept.size if kept else 0

    def drop(self, slot: str) -> None:
        """Forget all of a slot: its partition is read anew, or was lost, or a write has failed."""
        if self._slots.pop(slot, None) is None:
            return
        for key in [key for key in self._users if key[0] == slot]:
            self.entries -= self._users.pop(key).size


def check(slot: str, source: Source, fence: Fence | None, read: SlotRead | UserRead) -> None:
    """Raise FenceMoved where what was read stands under another fence than expected."""
    if read.fence != fence:
        raise FenceMoved(f"{slot}:{source}", str(fence or ""), str(read.fence or ""))


def _draft(user: str, read: UserRead | None) -> Draft:
    if read is None:
        return Draft([], [], 0)
    before = read.behaviours.get(user, behaviour.EMPTY)
    recent = list(read.recent[user]) if user in read.recent else None if before.entries else []
    steps, vector = read.embeddings.get(user, (0, None))
    profile = read.profiles.get(user, {})
    more = _profile_entries(profile) if profile else 0
    return Draft(list(before.entries), recent, before.at_ms, steps, vector, profile, more=more)


def _profile_entries(profile: Mapping[str, object]) -> int:
    texts = sum(len(name) + len(value) for name, value in profile.items() if isinstance(value, str))
    return len(profile) - 1 + texts // _ENTRY_CHARS
