"""The port to state: `StateStore` and its data classes. Adapters: `stores.memory`, `stores.redis`.

Every write is fenced: it names the fence that its caller read, and fails whole (`FenceMoved`) if
the stored fence differs. There is one fence per (slot, source, partition). A source is a topic, or
a topic as read by one generation (`items@1`). A partition's position is its lowest fence plus one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from eddyline.errors import EddylineError
from eddyline.schema import user_history
from eddyline.schema.co_visits import CoVisits, Visit
from eddyline.schema.erasure import Erasure
from eddyline.schema.event_decay import EventDecay
from eddyline.schema.records import Record
from eddyline.schema.step_ranges import StepRanges
from eddyline.schema.user_history import CompactEntry, UserHistory
from eddyline.stores.fence import Fence as Fence
from eddyline.stores.fence import LogId as LogId
from eddyline.stores.fence import Mark as Mark
from eddyline.stores.fence import Source as Source
from eddyline.stores.layout import Layout
from eddyline.stores.popularity import NO_TREND, PopularBucket, SlotTrend

# Of a profile: its offset in `users`, -1 for one that was forwarded or replayed; ms of its first
# append.
ProfilePlace = tuple[int, int]


@dataclass(frozen=True, slots=True)
class UserRead:
    """The state that a batch of clicks reads; see `StateStore.read_many`.

    embeddings:  generation -> user id -> (steps, bytes of float32[d]); users without one are absent
    profiles:    user id -> attributes; users without a profile are absent
    recent:      user id -> stored *recent* entries, to extend on the next write; if absent, the
                 next write stores the whole history
    erasures:    user id -> what is kept of a user who was forgotten; other users are absent
    profile_places: user id -> (offset in `users`, ms of the first append) of the stored profile
    seen:        user id -> stored seen items, of the users of `UserQuery.seen_of` that have some
    """

    fence: Fence | None
    histories: Mapping[str, UserHistory]
    embeddings: Mapping[str, Mapping[str, tuple[int, bytes]]]
    profiles: Mapping[str, Mapping[str, object]]
    recent: Mapping[str, Sequence[CompactEntry]] = field(default_factory=dict)
    erasures: Mapping[str, Erasure] = field(default_factory=dict)
    profile_places: Mapping[str, ProfilePlace] = field(default_factory=dict)
    seen: Mapping[str, bytes] = field(default_factory=dict)

    def is_idle(self, user_id: str) -> bool:
        """Whether the user's history and embeddings have ended at the fence; see `is_idle`."""
        history = self.histories.get(user_id)
        return history is not None and is_idle(history, self.fence)


@dataclass(frozen=True, slots=True)
class SlotRead:
    """State of a user slot, read once by the new owner of its partition.

    fence:    fence of `clicks`
    profiles: fence of `users`, as text; "" for none
    accepted: event id -> offset, every id of the window, by offset
    step_ranges: every generation of which the slot may have embeddings -> where its micro-steps
              were taken
    visits:   the outbox of co-visits, by offset: at least those from `visits_floor` on
    visits_floor: visits below it have left the outbox
    """

    fence: Fence | None
    profiles: str
    accepted: dict[str, int]
    step_ranges: Mapping[str, StepRanges] = field(default_factory=dict)
    visits: Sequence[Visit] = ()
    visits_floor: int = 0


@dataclass(frozen=True, slots=True)
class UserQuery:
    """The users of one slot to read, with their embeddings of `generations`.

    seen_of: users whose seen items are read, too
    """

    slot: str
    source: Source
    user_ids: Sequence[str]
    generations: Sequence[str]
    seen_of: Sequence[str] = ()


class UserPlace(NamedTuple):
    """A user, and the slot and partition of `clicks` that hold their state."""

    slot: str
    partition: int
    user_id: str


@dataclass(slots=True)
class UserEffects:
    """All effects of one batch of clicks on one user slot.

    accepted:     event id -> offset, new events, by offset
    window_floor: ids with a lower offset leave the window; applies only if `accepted` is not empty
    histories:    user id -> the whole new history; its entries may change after the write
    recent:       user id -> entries since the last whole write; if absent, the history is written
                  whole
    embeddings:   generation -> user id -> (steps, bytes of float32[d])
    seen:         user id -> entries to append to the seen items, see `schema.seen_items`
    seen_max:     from twice as many entries on they are compacted; at least 1 where `seen` has any
    emptied:      users whose history and seen items, and embeddings of each generation in
                  `embeddings` and in `generations`, are deleted first
    generations:  every generation of which the slot may have embeddings
    step_ranges:  generation -> where its micro-steps are taken, of all generations of the slot;
                  None leaves what is stored
    erasures:     SHA-256 of a user id -> what is kept of that forgotten user
    dropped_profiles: users whose profile is deleted
    visits:       for the outbox of co-visits, by offset
    visits_floor: visits below it may leave the outbox; applies only if `visits` is not empty
    profiles:     expected fence of `users`, "" for none. If the stored fence differs the write
                  fails: a user may have been forgotten since. None skips the check
    """

    accepted: dict[str, int] = field(default_factory=dict)
    window_floor: int = 0
    histories: dict[str, UserHistory] = field(default_factory=dict)
    recent: dict[str, Sequence[CompactEntry]] = field(default_factory=dict)
    embeddings: dict[str, dict[str, tuple[int, bytes]]] = field(default_factory=dict)
    seen: dict[str, bytes] = field(default_factory=dict)
    seen_max: int = 0
    emptied: tuple[str, ...] = ()
    profiles: str | None = None
    generations: tuple[str, ...] = ()
    step_ranges: Mapping[str, StepRanges] | None = None
    erasures: dict[str, Erasure] = field(default_factory=dict)
    dropped_profiles: tuple[str, ...] = ()
    visits: Sequence[Visit] = ()
    visits_floor: int = 0


@dataclass(frozen=True, slots=True)
class UserWrite:
    """One slot of `StateStore.write_many`; see `write_users`."""

    slot: str
    source: Source
    expected: Fence | None
    new: Fence
    effects: UserEffects


@dataclass(frozen=True, slots=True)
class RefusedRecord:
    """A refused record of `items` that is newer than the state of its item.

    partition, offset: of the record
    first_ms:          broker's time stamp of its first append
    reason:            of its dead letter
    hidden:            whether the item is in no answer until a newer record is accepted
    """

    partition: int
    offset: int
    first_ms: int
    reason: str
    hidden: bool = False

    def includes(self, record: Record) -> bool:
        """Whether this is this record of `items` or a later one of its partition."""
        return self.partition == record.partition and self.offset >= record.offset


@dataclass(frozen=True, slots=True)
class ItemMetadata:
    """Metadata of an item. A deleted item keeps its version, so that no older record revives it,
    until it ends (ADR 32).

    partition, offset: source record in `items`; the offset is the version
    body:              the item as JSON (`events.encode`); b"" if deleted
    first_ms:          broker's time stamp of the first append of that record; 0 if unknown
    stray:             the record was forwarded from another partition
    refused:           the last refused record, if it is newer than this one; None if deleted
    born_ms:           of an item without a time: first append of the first of these records; else 0
    ends_ms:           of a deleted item: a record that is appended later finds no item; 0: never
    """

    partition: int
    offset: int
    body: bytes
    first_ms: int = 0
    stray: bool = False
    refused: RefusedRecord | None = None
    born_ms: int = 0
    ends_ms: int = 0

    @property
    def deleted(self) -> bool:
        """Whether the last change of the item was a delete."""
        return not self.body

    def has_ended(self, appended_ms: int) -> bool:
        """Whether it is deleted, and a record that the broker appended then finds no item."""
        return self.deleted and 0 < self.ends_ms < appended_ms

    def includes(self, record: Record) -> bool:
        """Whether this state comes from this record of `items` or a later one of its partition."""
        return self.partition == record.partition and self.offset >= record.offset


@dataclass(frozen=True, slots=True)
class ItemMetadataWrite:
    """One slot of `StateStore.write_item_metadata_many`; see `write_item_metadata`."""

    slot: str
    source: Source
    expected: Fence | None
    new: Fence
    metadata: Mapping[str, ItemMetadata]


@dataclass(frozen=True, slots=True)
class UserState:
    """State of one user for one query, read in one round trip.

    fence:      fence of `clicks` of the user's slot; None if nothing was applied there
    history:    `user_history.EMPTY` for an unknown user
    applied_us: server clock of the last write of the history, microseconds; 0 for an unknown user
    embedding:  (steps, bytes of float32[d]) of the requested generation
    seen:       stored seen items, see `schema.seen_items`
    """

    fence: Fence | None
    history: UserHistory
    applied_us: int
    embedding: tuple[int, bytes] | None
    profile: Mapping[str, object]
    seen: bytes = b""

    def without_idle(self) -> UserState:
        """The state that counts: an idle user has neither history, seen items nor embedding."""
        if not is_idle(self.history, self.fence):
            return self
        return replace(self, history=user_history.EMPTY, applied_us=0, embedding=None, seen=b"")


def is_idle(history: UserHistory, fence: Fence | None) -> bool:
    """Whether a user is idle at the last record that the fence of `clicks` has.

    Ingest removes the history and the embeddings of such a user some time later (ADR 29).
    """
    if fence is None or fence.mark is None:
        return False
    return user_history.is_idle(history.idle_after_ms, fence.mark.appended_ms)


class StateStore(Protocol):
    """State behind fences. One contract suite tests every adapter.

    Thread rule: any thread. Every call has a time-out and raises StoreUnavailable if the server
    does not answer in time; the caller retries with back-off.
    """

    def check(self) -> None:
        """Raise StoreRefused if the server may evict keys or is not writable."""

    def check_eviction(self) -> None:
        """Raise StoreRefused if a server may evict keys: its configuration may have changed."""

    def check_rights(self) -> None:
        """Raise StoreRefused, naming the commands, if writes need a right that is missing."""

    def claim_layout(self, layout: Layout) -> None:
        """Store the layout if there is none; raise StoreRefused if another one is stored.

        One that does not say the form of ids is replaced, if all stored ids are in that form.
        """

    def layout(self) -> Layout | None:
        """The stored layout; None on a new store."""

    def fences(self, source: Source, slots: Sequence[str]) -> dict[str, Fence | None]:
        """The fence of each slot for one partition of a source."""

    def write_users(
        self, slot: str, source: Source, expected: Fence | None, new: Fence, effects: UserEffects
    ) -> int:
        """Apply all effects and move the fence, or raise FenceMoved. Returns server time, µs."""

    def read_slot(self, slot: str, source: Source) -> SlotRead:
        """Fences, event-id window and outbox of a user slot. source: the partition of clicks."""

    def read_many(self, queries: Sequence[UserQuery]) -> list[UserRead]:
        """The state of users of several slots, in one round trip; each slot at one instant."""

    def write_many(self, writes: Sequence[UserWrite]) -> list[int | EddylineError]:
        """`write_users` of several slots in one round trip; each succeeds or fails on its own.

        A failed write returns its error: FenceMoved, or StoreUnavailable (then it may be applied).
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
        places: Mapping[str, ProfilePlace] | None = None,
    ) -> None:
        """Set profiles and move the fence, or raise FenceMoved.

        places: user id -> place of the profile; (offset of `new`, 0) if absent. A profile that the
        user's `Erasure` covers, or that is outdated (`erasure.is_outdated`), is not set.
        A profile of None forgets the user: profile, history, seen items and the embeddings of all
        `generations` are deleted. until_ms: user id -> broker's time stamp of the null record, ms.
        If the history has an event appended after it, only the profile is deleted; `events.Forget`
        removes the older events.
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
        clicked: Sequence[str] = (),
        decays: Sequence[EventDecay] = (),
    ) -> None:
        """Add clicks to the popularity that the slot keeps and move the fence, or raise FenceMoved.

        counts:    bucket number -> item id -> thousandths of a click; integers, so sums of many
                   writers are exact in any order. Only the newest `buckets_kept` buckets are kept
        items_max: items of a bucket or an epoch; beyond it the least counted items are dropped and
                   sums are not exact
        clicked:   the item of each event that counts for the sums by events, in their order
        decays:    the half-lives of those sums, of the same number of slots; none: the sums of all
                   half-lives end. Those of another one end once they were not written for an epoch
        """

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
        """Append to co-visitation rows of an item slot and move the fence, or raise FenceMoved.

        source:  Source("co-visits", partition of clicks)
        after:   item id -> `co_visits.entries` of the items visited after it
        before:  item id -> those of the items visited before it
        row_max: a row of so many entries is compacted, see `schema.co_visits`; at least 2
        idle_ms: a row ends so long after it was made or renewed, by the server's clock; 0: never
        renewed: ("after" or "before", item id) of the rows to renew; None: all
        """

    def read_co_visits(
        self, after: Sequence[str], before: Sequence[str], item_slots: int
    ) -> tuple[list[CoVisits], list[CoVisits]]:
        """The rows of the items visited after, and before, these items, in one round trip.

        An unknown item has `co_visits.EMPTY`. Raises StoreRefused for a damaged row.
        """

    def read_item_metadata(
        self, item_ids: Sequence[str], item_slots: int
    ) -> dict[str, ItemMetadata]:
        """Metadata by item id, deleted items included; unknown items are absent."""

    def write_item_metadata(
        self,
        slot: str,
        source: Source,
        expected: Fence | None,
        new: Fence,
        metadata: Mapping[str, ItemMetadata],
    ) -> None:
        """Store metadata by item id and move the fence, or raise FenceMoved.

        Metadata with a lower offset than the stored one is skipped. Empty metadata moves the fence
        only.
        """

    def write_item_metadata_many(
        self, writes: Sequence[ItemMetadataWrite]
    ) -> list[EddylineError | None]:
        """`write_item_metadata` of several slots in one round trip; errors as for `write_many`."""

    def refused_items(self, slot: str) -> Iterator[list[str]]:
        """The items whose metadata has a refused record, some at a time; maybe an item twice."""

    def count_refused_items(self, slots: Sequence[str]) -> int:
        """How many items of the slots have a refused record, in one round trip."""

    def read_user(self, slot: str, partition: int, user_id: str, generation: str) -> UserState:
        """State of one user for a query, in one round trip; without that of an idle user."""

    def read_users(self, users: Sequence[UserPlace], generation: str) -> list[UserState]:
        """As `read_user` for each of these users, in one round trip to each server."""

    def server_of(self, slot: str) -> str:
        """The server that holds this slot; slots of one server fail together. "" for the only one.

        Makes no call.
        """
        return ""

    def popular_buckets(
        self, slot: str, limit: int, known: Mapping[int, bytes]
    ) -> dict[int, PopularBucket]:
        """Each kept bucket with its `limit` top items, by bucket number.

        known: bucket number -> version that the caller holds
        """

    def popular_trend(
        self, slot: str, decays: Sequence[EventDecay], limit: int, known: SlotTrend = NO_TREND
    ) -> SlotTrend:
        """The `limit` top items of each epoch of these half-lives.

        known: the last answer to the same call, returned again if nothing was counted since
        """

    def popular(self, slot: str, limit: int) -> dict[int, dict[str, int]]:
        """The `limit` top items of each bucket: bucket number -> item id -> milli-clicks."""
        found = self.popular_buckets(slot, limit, {})
        return {
            bucket: {item.decode(): int(n) for item, n in zip(*read.counted, strict=True)}
            for bucket, read in found.items()
            if read.counted and read.counted[0]
        }

    def remove_embeddings(self, generation: str, slots: Collection[str]) -> Iterator[int]:
        """Remove the embeddings of an ended generation from user slots, page by page.

        Yields how many each page had; a page takes the server about a millisecond. A slot that is
        written meanwhile may keep what is written.
        """

    def remove_idle_users(self, slots: Collection[str], slack_ms: int) -> Iterator[int]:
        """Remove histories, seen items and embeddings of idle users of these slots, page by page.

        Yields how many users each page had; a page takes the server about a millisecond. No fence
        moves: see `is_idle`.
        slack_ms: users who have been idle for less stay: a broker's clock may go back
        """

    def remove_deleted_items(
        self, slots: Collection[str], partitions: int, slack_ms: int
    ) -> Iterator[int]:
        """Remove the metadata of deleted items that have ended, page by page.

        An item has ended at the fence of its partition (`ItemMetadata.has_ended`), or at those of
        all partitions where its own is not known. For the rest see `remove_idle_users`.
        slots: item slots; partitions: how many `items` has
        """

    def drop_fences(self, slot: str, sources: Sequence[Source]) -> None:
        """Remove fences of sources that will never be read again."""

    def accept_log(self, logs: Mapping[str, tuple[LogId, Mapping[int, int]]]) -> int:
        """Adopt Kafka's present logs; returns how many fences `stores.log_reset` changed.

        logs: topic -> (its log, partition -> end offset)
        Histories, embeddings and counts stay. No ingest process may run meanwhile.
        """

    def close(self) -> None:
        """Close all connections. Later calls raise StoreUnavailable."""
