"""The ports: what the rooms ask of state. One file; one adapter per file under `eddyline/stores/`.

Every write is fenced: it names the fence that was read, and is refused whole (`FenceMoved`) where the
stored one differs. A fence is kept per (slot, source, partition); a source is a topic, or a topic seen by one
generation (`items@1`). The position of a partition is the lowest of its fences, plus one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from eddyline.errors import EddylineError
from eddyline.schema.user_history import CompactEntry, UserHistory


@dataclass(frozen=True, slots=True)
class LogId:
    """Which log an offset belongs to: Kafka's cluster id and the topic's id."""

    cluster_id: str
    topic_id: str


@dataclass(frozen=True, slots=True)
class Fence:
    """Everything of the partition up to and with `offset` has been applied."""

    offset: int
    log: LogId

    def __str__(self) -> str:
        """As it is stored: `offset|cluster id|topic id`."""
        return f"{self.offset}|{self.log.cluster_id}|{self.log.topic_id}"

    @classmethod
    def parse(cls, text: str) -> Fence:
        """The reverse of `str()`."""
        offset, cluster_id, topic_id = text.split("|")
        return cls(int(offset), LogId(cluster_id, topic_id))


@dataclass(frozen=True, slots=True)
class Source:
    """One partition of a source: ("clicks", 3), ("items", 0) or ("items@1", 0)."""

    name: str
    partition: int


@dataclass(frozen=True, slots=True)
class UserRead:
    """What one chunk of clicks needs to be computed; see `StateStore.read_users`.

    accepted_at: event id -> the offset under which it was accepted; absent where it is new
    embeddings:  generation -> user id -> (steps, bytes of float32[d]); users without one are absent
    profiles:    user id -> attributes; absent where there is none
    recent:      user id -> the entries that a write of the newest few has to begin with; absent where the
                 whole list has to be written
    """

    fence: Fence | None
    accepted_at: Mapping[str, int]
    histories: Mapping[str, UserHistory]
    embeddings: Mapping[str, Mapping[str, tuple[int, bytes]]]
    profiles: Mapping[str, Mapping[str, object]]
    recent: Mapping[str, Sequence[CompactEntry]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SlotRead:
    """What is read of a user slot when its partition is taken over; see `StateStore.read_slot`.

    fence:    of clicks; profiles: of users, as text, "" for none
    accepted: event id -> offset, of all ids in the window, by offset
    """

    fence: Fence | None
    profiles: str
    accepted: dict[str, int]


@dataclass(frozen=True, slots=True)
class UserQuery:
    """One slot of `StateStore.read_many`; see `read_users`."""

    slot: str
    source: Source
    user_ids: Sequence[str]
    generations: Sequence[str]


@dataclass(slots=True)
class UserEffects:
    """All effects of one chunk of clicks on one user slot.

    accepted:     event id -> offset, for the events that are new, by offset
    window_floor: accepted ids with a lower offset leave the window (once there are accepted ones)
    behaviours:   user id -> his whole new list; its entries may change once the write has ended
    recent:       user id -> the entries that are new since his list was last written whole; absent: write it
                  whole now
    embeddings:   generation -> user id -> (steps, bytes of float32[d])
    emptied:      users whose list goes, and their embeddings of every generation in `embeddings`, before
                  those above are written
    profiles:     the fence of `users` that this was computed under, "" for none; another one refuses the
                  write, for it may have forgotten a user. None is not checked
    """

    accepted: dict[str, int] = field(default_factory=dict)
    window_floor: int = 0
    histories: dict[str, UserHistory] = field(default_factory=dict)
    recent: dict[str, Sequence[CompactEntry]] = field(default_factory=dict)
    embeddings: dict[str, dict[str, tuple[int, bytes]]] = field(default_factory=dict)
    emptied: tuple[str, ...] = ()
    profiles: str | None = None


@dataclass(frozen=True, slots=True)
class UserWrite:
    """One slot of `StateStore.write_many`; see `write_users`."""

    slot: str
    source: Source
    expected: Fence | None
    new: Fence
    effects: UserEffects


@dataclass(frozen=True, slots=True)
class ItemMetadata:
    """What is stored of an item. A deleted one keeps its version, so that a delete wins for ever.

    body: the item as JSON (`events.encode`), b"" where it is deleted
    """

    partition: int
    offset: int
    body: bytes

    @property
    def deleted(self) -> bool:
        """Whether the last change of this item was a delete."""
        return not self.body


@dataclass(frozen=True, slots=True)
class ItemMetadataWrite:
    """One slot of `StateStore.write_item_metadata_many`; see `write_item_metadata`."""

    slot: str
    source: Source
    expected: Fence | None
    new: Fence
    cards: Mapping[str, ItemMetadata]


@dataclass(frozen=True, slots=True)
class UserState:
    """All that one query needs of one user, read in one round trip.

    fence:      the clicks fence of the user's slot; None where nothing was ever applied there
    behaviour:  `behaviour.EMPTY` for an unknown user
    applied_us: Redis' clock when the list was last written, 0 for an unknown user
    embedding:  (steps, bytes of float32[d]) of the generation asked for
    """

    fence: Fence | None
    history: UserHistory
    applied_us: int
    embedding: tuple[int, bytes] | None
    profile: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Layout:
    """How state is cut; written once, refused where a process comes with another one."""

    version: int
    clicks_partitions: int
    items_partitions: int
    item_slots: int


class StateStore(Protocol):
    """State behind fences. Implemented by `stores.memory` and `stores.redis`; one contract suite.

    Thread rule: any thread. Every call has a time-out and raises StoreUnavailable where the server
    does not answer in time; the caller waits with back-off.
    """

    def check(self) -> None:
        """Raise StoreRefused where the server may drop keys (its eviction policy) or is not writable."""

    def claim_layout(self, layout: Layout) -> None:
        """Write the layout where there is none; raise StoreRefused where another one is stored."""

    def layout(self) -> Layout | None:
        """The stored layout, None on a new store."""

    def fences(self, source: Source, slots: Sequence[str]) -> dict[str, Fence | None]:
        """The fence of each slot for one partition of a source."""

    def read_users(
        self,
        slot: str,
        source: Source,
        event_ids: Sequence[str],
        user_ids: Sequence[str],
        generations: Sequence[str] = (),
    ) -> UserRead:
        """All that a batch needs, read at one instant. generations: whose embeddings are read."""

    def write_users(
        self, slot: str, source: Source, expected: Fence | None, new: Fence, effects: UserEffects
    ) -> int:
        """Apply all effects and move the fence, or raise FenceMoved. Returns applied_us (server clock)."""

    def read_slot(self, slot: str, source: Source) -> SlotRead:
        """The fences and the event-id window of a user slot. source: the partition of clicks."""

    def read_many(self, queries: Sequence[UserQuery]) -> list[UserRead]:
        """`read_users` of several slots in one round trip, without event ids."""

    def write_many(self, writes: Sequence[UserWrite]) -> list[int | EddylineError]:
        """`write_users` of several slots in one round trip; each stands or fails for itself.

        What one of them would raise is in its place: FenceMoved, StoreUnavailable (it may have been applied).
        """

    def write_profiles(
        self,
        slot: str,
        source: Source,
        expected: Fence | None,
        new: Fence,
        profiles: Mapping[str, Mapping[str, object] | None],
        generations: Sequence[str],
        until_ms: Mapping[str, int] | None = None,
    ) -> None:
        """Set profiles and move the fence, or raise FenceMoved.

        None forgets the user: profile, list and the embeddings of all `generations` are deleted. Where
        `until_ms` has him (the broker's clock when that was said), only a profile is deleted of a user who
        was appended to the log since: `events.Forget` takes the older ones out of his list.
        """

    def count_clicks(
        self,
        slot: str,
        source: Source,
        expected: Fence | None,
        new: Fence,
        counts: Mapping[int, Mapping[str, int]],
        buckets_kept: int,
        items_max: int = 1_000_000,
    ) -> None:
        """Add clicks to the popularity buckets and move the fence, or raise FenceMoved.

        counts: bucket number -> item id -> milli_counts of a click (integers, so that sums of many writers
                are exact in any order); buckets older than the newest `buckets_kept` are dropped
        items_max: a bucket that has more items loses the least counted ones; only below this are sums exact
        """

    def read_item_metadata(
        self, item_ids: Sequence[str], item_slots: int
    ) -> dict[str, ItemMetadata]:
        """The cards that exist, deleted ones included, by item id."""

    def write_item_metadata(
        self,
        slot: str,
        source: Source,
        expected: Fence | None,
        new: Fence,
        cards: Mapping[str, ItemMetadata],
    ) -> None:
        """Store cards (a card with a lower source offset than the stored one is skipped) and move the
        fence, or raise FenceMoved. With no cards it only moves the fence.
        """

    def write_item_metadata_many(
        self, writes: Sequence[ItemMetadataWrite]
    ) -> list[EddylineError | None]:
        """`write_item_metadata` of several slots in one round trip; each stands or fails for itself.

        What one of them would raise is in its place: FenceMoved, StoreUnavailable (it may have been applied).
        """

    def read_user(self, slot: str, partition: int, user_id: str, generation: str) -> UserState:
        """All that a query needs of a user, in one round trip."""

    def popular(self, slot: str, limit: int) -> dict[int, dict[str, int]]:
        """The `limit` most counted items of each kept bucket: bucket number -> item id -> milli_counts."""

    def accept_log(self, logs: Mapping[str, tuple[LogId, Mapping[int, int]]]) -> int:
        """Take Kafka's present logs for the truth; see `stores.acceptance` for what becomes of a fence.

        logs: topic -> (its log, partition -> end offset). Lists, embeddings and counts stay. Only while no
        ingest runs. Returns how many fences were changed.
        """

    def close(self) -> None:
        """Let go of connections. Calls after it raise StoreUnavailable."""
