"""Ingest and one query worker of a generation in one object, on stores in memory.

Ingest's own handlers apply the records of `clicks`, `items` and `users` to a memory store; item
records go to a live index as a worker's replica would put them there; the worker's recall paths and
fusion read both. Nothing lags. Thread rule: one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack

import msgspec
from typing_extensions import override

from eddyline.errors import EddylineError, Rejected, VectorRejected
from eddyline.kafka.topics import CLICKS, ITEMS, SOURCES, USERS
from eddyline.schema import events
from eddyline.schema.erasure import erased_after
from eddyline.schema.events import Click, Forget, Item, Merge
from eddyline.schema.item_record import ItemRecord, attributes_of
from eddyline.schema.partitioning import user_slot
from eddyline.schema.records import Record
from eddyline.settings.loader import Settings
from eddyline.stores.memory import MemoryStore
from eddyline.stores.state_store import ItemMetadata, Source, UserQuery, UserState
from embeddings.bundle.bundle import Bundle
from index.factory import ann_backend, live_index
from index.port import LiveItems
from serving.answer.co_visit_reader import CoVisitReader
from serving.answer.deadline import Deadline
from serving.answer.fusions import make_fusion
from serving.answer.user_reader import UserReader
from serving.recall import registry
from serving.recall.base import (
    AFTER,
    BEFORE,
    QueryCoVisits,
    RecallContext,
    RecallPath,
    RecallRequest,
)
from serving.recall.popularity import Popularity
from serving.recall.towers import TowersPath
from streams.clicks.step_ranges import StepRangeRule
from streams.fences import LogIds
from streams.generation import Generation
from streams.handlers import Handlers, Outputs
from streams.items.handler import encode_items
from streams.ports import RecordBatch, RecordPublisher

# Records that are applied at a time, at most; the window of event ids has to be twice as long.
BATCH_RECORDS = 256
# No topic is so long.
_END = 2**62
_NO_DEADLINE_S = 1e9
# More than there are: a list by events has every counted item.
_EVERY_ITEM = 2**31 - 1


class _Sinks(RecordPublisher):
    """The outputs of the handlers: item records go to the index, rejected ones are counted."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def put(self, record: Record, rejected: Rejected) -> None:
        """A rejected record."""
        counts = self._engine.rejected
        counts[rejected.reason] = counts.get(rejected.reason, 0) + 1

    def forward(self, record: Record, key: bytes, value: bytes | None, partition: int) -> None:
        """A record of another partition: ingest appends it there."""

    @override
    def open(self, partition: int) -> None:
        pass

    def flush(self) -> None:
        """Nothing waits."""

    @override
    def publish(self, records: Mapping[int, Sequence[ItemRecord]]) -> dict[int, EddylineError]:
        for some in records.values():
            self._engine.index.apply(some)
        return {}


class Engine:
    """What ingest and a worker would know and answer after the records that were applied.

    rejected: reason -> records that ingest refused
    paths:    name -> path, of those that answers are made of; fusion: makes them
    follows:  whether a user's list and embedding are kept; the events of others count for items
    """

    def __init__(
        self,
        settings: Settings,
        bundle: Bundle,
        logs: LogIds,
        *,
        store: MemoryStore | None = None,
        follows: Callable[[str], bool] | None = None,
        steps: StepRangeRule | None = None,
    ) -> None:
        """An empty index. store: with the state of before; default: an empty one

        steps: at which offsets micro-steps are taken; default: at all
        """
        self.settings = settings
        self.bundle = bundle
        self.rejected: dict[str, int] = {}
        self.index = live_index(settings, ann_backend(settings), bundle.dimension)
        self.index.background = False
        self.store = store or MemoryStore()
        sinks = _Sinks(self)
        self.handlers = Handlers(
            settings,
            self.store,
            logs,
            [Generation(bundle, sinks)],
            Outputs.to_sink(sinks, steps),
            [bundle.generation],
            items_wait_s=0.0,
            clock_us=lambda: 0,
            follows=follows,
        )
        for topic in SOURCES:
            partitions = settings.items_partitions if topic == ITEMS else settings.clicks_partitions
            bounds = dict.fromkeys(range(partitions), (0, _END))
            self.handlers.of(topic).fences.open(bounds)
        self._users = UserReader(
            self.store, clicks_partitions=settings.clicks_partitions, generation=bundle.generation
        )
        self.popularity = Popularity(settings, self.store, trend_limit=_EVERY_ITEM)
        self._co_visits = CoVisitReader(
            self.store, settings.item_slots, self._users.outages, (AFTER, BEFORE)
        )
        self._closing = ExitStack()
        self._closing.callback(self.index.close)
        self._context = RecallContext(
            settings, self.store, bundle.user_tower, self.popularity, self._closing
        )
        self.paths: dict[str, RecallPath] = {
            path.name: path for path in registry.make_paths(self._context)
        }
        self._other_paths: dict[str, RecallPath] = {}
        self.fusion = make_fusion(settings)
        self._items: LiveItems | None = None
        self._counted = self._listed = self._written = False
        # The rows that were last read, and of whom.
        self._rows: tuple[UserState, QueryCoVisits | None] | None = None
        # Partition -> events that are not applied yet, as nothing has asked for what they change.
        self._waiting: dict[int, list[Record]] = {}
        self._waiting_records = 0
        self._waiting_users: set[str] = set()
        # (partition, event id) -> offset, of the same.
        self._waiting_ids: dict[tuple[int, str], int] = {}

    @property
    def towers(self) -> TowersPath:
        """The path of the towers."""
        path = self.path(TowersPath.name)
        assert isinstance(path, TowersPath)
        return path

    def path(self, name: str) -> RecallPath:
        """A path of the registry, whether the settings use it or not."""
        found = self.paths.get(name) or self._other_paths.get(name)
        if found is None:
            found = self._other_paths[name] = registry.PATHS[name](self._context)
            self._counted = False  # it may follow what was not read yet
        return found

    @property
    def items(self) -> LiveItems:
        """The live items now; the same object until an item changes."""
        if self._items is None:
            self._items = self.index.live_items()
        return self._items

    def user(self, user_id: str) -> UserState:
        """The user as a query would read it now."""
        if user_id in self._waiting_users:
            self.write()
        return self._users.read(user_id)

    def is_dropped(self, record: Record, click: Click) -> bool:
        """Whether ingest drops this event of a followed user, which was not applied yet.

        So it is where the event was sent again, and where its user was forgotten.
        """
        partition, slot = record.partition, user_slot(record.partition)
        source = Source(CLICKS, partition)
        if click.event_id is not None:
            before = self._waiting_ids.get((partition, click.event_id))
            if before is None:
                fence = self.handlers.clicks.fences.expected(source, slot)
                known = self.handlers.clicks.cache.slot(slot, source, fence).window.known
                before = known.get(click.event_id)
            if before is not None:
                return record.offset - before <= self.settings.dedupe_window_events
        if click.user_id in self._waiting_users:
            self.write()
        [read] = self.store.read_many([UserQuery(slot, source, [click.user_id], [])])
        origin_ms = events.origin_ms(record.headers)
        erasure = read.erasures.get(click.user_id)
        return erased_after(erasure, click.at_ms, record.timestamp, origin_ms)

    def fill_index(self) -> None:
        """Have the empty index hold the live items that the store has, encoded again."""
        live: list[tuple[Item, ItemMetadata]] = []
        for metadata in self.store.every_item():
            hidden = metadata.refused is not None and metadata.refused.hidden
            if not metadata.deleted and not hidden:
                item = msgspec.json.decode(metadata.body, type=Item)
                if item.available:
                    live.append((item, metadata))
        for start in range(0, len(live), BATCH_RECORDS):
            some = live[start : start + BATCH_RECORDS]
            vectors = encode_items(self.bundle.item_tower, [item for item, _ in some])
            self.index.apply(
                [
                    ItemRecord(
                        item.item_id,
                        metadata.partition,
                        metadata.offset,
                        item.at_ms or metadata.born_ms,
                        0,
                        vector,
                        attributes_of(item),
                    )
                    for (item, metadata), vector in zip(some, vectors, strict=True)
                    if not isinstance(vector, VectorRejected)
                ]
            )
        self._items = None

    def open_steps_again(self) -> None:
        """Ask anew at which offsets micro-steps are taken, from the next record on."""
        for slot in self.handlers.clicks.cache.slots_of(self.bundle.generation).values():
            slot.ranges = None

    def request(self, user: UserState, k: int) -> RecallRequest:
        """The request of a query; whether seen items are excluded is left to the caller."""
        deadline, found = Deadline(_NO_DEADLINE_S), None
        if any(path.reads for path in (*self.paths.values(), *self._other_paths.values())):
            if self._rows is None or self._rows[0] is not user:
                self._write_all()
                self._rows = user, self._co_visits.read(user, deadline)[0]
            found = self._rows[1]
        return RecallRequest(user, k, frozenset(), None, 0.0, deadline, co_visits=found)

    def read_popularity(self) -> None:
        """Have the popular paths know every event that was applied."""
        if not self._counted:
            self._write_all()
            self.popularity.read()
            self._counted = True

    def list_popularity(self) -> None:
        """Have the popular paths recall by every event that was applied.

        `read_popularity` is enough for their `score_all`, and costs less.
        """
        self.read_popularity()
        if not self._listed:
            self.popularity.refresh()
            self._listed = True

    def _write_all(self) -> None:
        """Have the store know every event that was applied, in counts and co-visits, too."""
        if not self._written:
            self.write()
            self.write_counts()
            self._written = True

    def write_counts(self) -> None:
        """Have the store know every event that was written."""
        for partition in range(self.settings.clicks_partitions):
            self.handlers.clicks.write_behind.write(partition)

    def apply_item_records(self, records: Sequence[Record]) -> None:
        """Apply records of `items`, in the order of each partition."""
        self._items = None
        self._apply(ITEMS, records)

    def apply_profile_records(self, records: Sequence[Record]) -> None:
        """Apply records of `users`, after the events that wait."""
        self.write()
        self._apply(USERS, records)

    def queue(self, record: Record, found: Iterable[Click | Merge | Forget]) -> None:
        """Apply a record of `clicks`, at the latest before something reads what it changes.

        found: its events
        """
        self._counted = self._listed = self._written = False
        self._rows = None
        self._waiting.setdefault(record.partition, []).append(record)
        self._waiting_records += 1
        for event in found:
            self._waiting_users.add(event.user_id)
            if event.event_id is not None:
                self._waiting_ids.setdefault((record.partition, event.event_id), record.offset)
        if self._waiting_records >= BATCH_RECORDS:
            self.write()

    def write(self) -> None:
        """Have ingest's handler apply the events that wait."""
        waiting, self._waiting = self._waiting, {}
        self._waiting_users.clear()
        self._waiting_ids.clear()
        self._waiting_records = 0
        for records in waiting.values():
            self._apply(CLICKS, records)

    def close(self) -> None:
        """Stop what runs."""
        self._closing.close()

    def _apply(self, topic: str, records: Sequence[Record]) -> None:
        """Have a topic's handler apply records, in their order within each partition."""
        of_partition: dict[int, list[Record]] = {}
        for record in records:
            of_partition.setdefault(record.partition, []).append(record)
        handler, name = self.handlers.of(topic), self.settings.prefixed(topic)
        for partition, mine in of_partition.items():
            for start in range(0, len(mine), BATCH_RECORDS):
                some = mine[start : start + BATCH_RECORDS]
                handler.apply_one(RecordBatch(name, partition, some, read_us=0))
