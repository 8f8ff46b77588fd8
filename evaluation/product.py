"""What a worker would know and answer at one moment of a log, on stores in memory.

Ingest's own handlers apply events, items and profiles to a memory store; item records go to a live
index as a worker's replica would put them there; the worker's recall paths and fusion read both.
Kafka's topics have one partition each here, and nothing lags.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import msgspec
from typing_extensions import override

from eddyline.errors import EddylineError, Rejected
from eddyline.kafka.topics import CLICKS, ITEMS, SOURCES, USERS
from eddyline.schema import events
from eddyline.schema.events import Click, Item, UserProfile
from eddyline.schema.item_record import ItemRecord
from eddyline.schema.records import BuiltRecord, Record
from eddyline.settings.loader import Settings
from eddyline.stores.memory import MemoryStore
from eddyline.stores.state_store import LogId, UserState
from embeddings.bundle.bundle import Bundle
from index.factory import ann_backend, live_index
from index.port import LiveItems
from serving.answer.deadline import Deadline
from serving.answer.fusion import Cascade
from serving.answer.user_reader import UserReader
from serving.recall import registry
from serving.recall.base import RecallContext, RecallPath, RecallRequest
from serving.recall.popularity import Popularity
from serving.recall.towers import TowersPath
from streams.generation import Generation
from streams.handlers import Handlers, Outputs
from streams.ports import RecordBatch, RecordPublisher

# Records of one batch; the window of event ids has to be at least twice as long. A memory store
# looks through the whole window at each write, and a log's own event ids are all different.
BATCH_RECORDS = 256
_WINDOW_EVENTS = 2 * BATCH_RECORDS
# No topic is so long.
_END = 2**62
_NO_DEADLINE_S = 1e9


def offline(settings: Settings) -> Settings:
    """The settings, for topics of one partition in Eddyline's own format."""
    return msgspec.structs.replace(
        settings,
        clicks_partitions=1,
        items_partitions=1,
        item_slots=1,
        clicks_map="",
        items_map="",
        users_map="",
        chunk_records_max=min(settings.chunk_records_max, BATCH_RECORDS),
        dedupe_window_events=_WINDOW_EVENTS,
    )


class _Sinks(RecordPublisher):
    """The outputs of the handlers: item records go to the index, rejected ones are counted."""

    def __init__(self, product: Product) -> None:
        self._product = product

    def put(self, record: Record, rejected: Rejected) -> None:
        """A rejected record."""
        self._product.rejected[rejected.reason] = self._product.rejected.get(rejected.reason, 0) + 1

    def forward(self, record: Record, key: bytes, value: bytes | None, partition: int) -> None:
        """A record of another partition; there is only one."""

    @override
    def open(self, partition: int) -> None:
        pass

    def flush(self) -> None:
        """Nothing waits."""

    @override
    def publish(self, records: Mapping[int, Sequence[ItemRecord]]) -> dict[int, EddylineError]:
        for some in records.values():
            self._product.index.apply(some)
        return {}


class Product:
    """Ingest and one worker of a generation in one object. Thread rule: one thread.

    rejected: reason -> records that ingest refused
    """

    def __init__(self, settings: Settings, bundle: Bundle) -> None:
        """Without events and items. settings: any; see `offline`."""
        self.settings = settings = offline(settings)
        self.bundle = bundle
        self.rejected: dict[str, int] = {}
        self.index = live_index(settings, ann_backend(settings), bundle.dimension)
        self.index.background = False
        store, sinks = MemoryStore(), _Sinks(self)
        self._handlers = Handlers(
            settings,
            store,
            {topic: LogId("evaluate", topic) for topic in SOURCES},
            [Generation(bundle, sinks)],
            Outputs.to_sink(sinks),
            [bundle.generation],
            items_wait_s=0.0,
            clock_us=lambda: 0,
        )
        for topic in SOURCES:
            self._handlers.of(topic).fences.open({0: (0, _END)})
        self._offsets = dict.fromkeys(SOURCES, 0)
        self._users = UserReader(store, clicks_partitions=1, generation=bundle.generation)
        self.popularity = Popularity(settings, store)
        self._closing = ExitStack()
        self._closing.callback(self.index.close)
        self.paths: dict[str, RecallPath] = {
            path.name: path
            for path in registry.make_paths(
                RecallContext(settings, store, bundle.user_tower, self.popularity, self._closing)
            )
        }
        self.fusion = Cascade()
        self._items: LiveItems | None = None
        self._counted = False
        # Events that were applied but that nothing has asked for yet.
        self._waiting: list[Click] = []
        self._waiting_users: set[str] = set()

    @property
    def towers(self) -> TowersPath:
        """The path of the towers."""
        path = self.paths[TowersPath.name]
        assert isinstance(path, TowersPath)
        return path

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

    def request(self, user: UserState, k: int) -> RecallRequest:
        """The request of a query; whether seen items are excluded is left to the caller."""
        return RecallRequest(user, k, frozenset(), None, 0.0, Deadline(_NO_DEADLINE_S))

    def read_popularity(self) -> None:
        """Have the popular path know every event that was applied."""
        if not self._counted:
            self.write()
            self._handlers.clicks.popularity.write(0)
            self.popularity.read()
            self._counted = True

    def apply_items(self, items: Sequence[Item]) -> None:
        """Apply changes of items, in their order."""
        self._items = None
        self._apply(ITEMS, [(item.item_id, item, item.at_ms) for item in items])

    def apply_profiles(self, profiles: Sequence[UserProfile]) -> None:
        """Apply profiles, in their order."""
        self.write()
        self._apply(USERS, [(one.user_id, one, one.at_ms) for one in profiles])

    def apply_events(self, clicks: Sequence[Click]) -> None:
        """Apply events, in their order, at the latest before something reads what they change."""
        self._counted = False
        self._waiting += clicks
        self._waiting_users.update(click.user_id for click in clicks)
        if len(self._waiting) >= BATCH_RECORDS:
            self.write()

    def write(self) -> None:
        """Have ingest's handler apply the events that wait."""
        waiting, self._waiting = self._waiting, []
        self._waiting_users.clear()
        self._apply(CLICKS, [(click.user_id, click, click.at_ms) for click in waiting])

    def close(self) -> None:
        """Stop what runs."""
        self._closing.close()

    def _apply(
        self, topic: str, keyed: Sequence[tuple[str, Click | Item | UserProfile, int]]
    ) -> None:
        """Append to a topic and have its handler apply it. The broker's clock is the event's."""
        handler, name = self._handlers.of(topic), self.settings.prefixed(topic)
        for start in range(0, len(keyed), BATCH_RECORDS):
            first = self._offsets[topic]
            records = [
                BuiltRecord(name, 0, first + n, at_ms, key.encode(), events.encode(event))
                for n, (key, event, at_ms) in enumerate(keyed[start : start + BATCH_RECORDS])
            ]
            self._offsets[topic] += len(records)
            handler.apply_one(RecordBatch(name, 0, records, read_us=0))
