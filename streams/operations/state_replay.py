"""`eddyline replay --from … --to … --into memory|redis`: a hash of the state that a slice of Kafka gives.

The slice goes through ingest's own functions into a store of its own; Kafka is only read. The same slice
gives the same hash, in either store, whatever the chunks. Order: items first, then each partition's clicks
and users together, by the broker's append time, users first where equal.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any

import msgspec
from kafka import TopicPartition

from cli.console import console
from eddyline import generations
from eddyline.errors import EddylineError, Rejected, SettingsError
from eddyline.kafka import topics
from eddyline.kafka.topics import CLICKS, ITEMS, USERS
from eddyline.schema import item_record, user_history
from eddyline.schema.item_record import ItemRecord
from eddyline.schema.partitioning import user_slot
from eddyline.settings.loader import Settings
from eddyline.stores import redis_client
from eddyline.stores.memory import MemoryStore
from eddyline.stores.redis import RedisStore
from eddyline.stores.state_store import Source, StateStore
from embeddings.bundle import bundle as bundles
from embeddings.bundle.bundle import Bundle
from streams import users
from streams.clicks import handler
from streams.clicks.handler import ClickIngest
from streams.clicks.micro_steps import MicroSteps
from streams.fences import PartitionFences
from streams.items import metadata
from streams.items.handler import ItemIngest
from streams.operations import topic_slices
from streams.operations.topic_slices import Slices
from streams.ports import Outcome, Record
from streams.users import UserIngest

_IDS_AT_A_TIME = 1_000
# More than any bucket of popularity counts can hold.
_ALL = 2**31 - 1


@dataclass
class Replayed:
    """What a slice gave. hash: of the whole state; the ids are those that the slice touched.

    published: digest of the last item record of each item"""

    hash: str = ""
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    users: dict[int, set[str]] = field(default_factory=dict)
    items: set[str] = field(default_factory=set)
    published: dict[str, bytes] = field(default_factory=dict)


class _Outside:
    """Where ingest's outputs go here: refused and stray records nowhere, item records into a digest each."""

    def __init__(self, published: dict[str, bytes]) -> None:
        self.published = published

    def put(self, record: Record, rejected: Rejected) -> None:
        pass

    def forward(self, record: Record, key: bytes, value: bytes, partition: int) -> None:
        pass

    def flush(self) -> None:
        pass

    def open(self, partition: int) -> None:
        pass

    def publish(self, published: Mapping[int, Sequence[ItemRecord]]) -> dict[int, EddylineError]:
        for record in (record for some in published.values() for record in some):
            self.published[record.item_id] = hashlib.sha256(
                item_record.encode_record(record)
            ).digest()
        return {}


def run(settings: Settings, *, begin: str, end: str, into: str, chunk: int) -> None:
    """Replay a slice and print the hash of its state.

    begin, end: `earliest`, `latest`, a time (ISO 8601, or milliseconds since 1970; the broker's append time),
                or offsets by partition, `clicks:0=100,items:1=5`; of topics that are not named: all, or none
                for an end
    into:       memory, or redis: there under a namespace of its own, which is removed after it
    Raises SettingsError, Unavailable, BundleError.
    """
    if into not in ("memory", "redis"):
        raise SettingsError(f"--into {into!r}: expected memory or redis")
    if chunk < 1:
        raise SettingsError(f"--chunk {chunk}: must be 1 or above")
    towers = bundles.recorded(settings, generations.active_generation(settings))
    slices = topic_slices.between(settings, begin, end)
    with _store(settings, into) as store:
        done = replay(settings, store, slices, towers, chunk)
    for name, outcome in done.outcomes.items():
        counts = (f"{value:,} {what}" for what, value in outcome.counts().items() if value)
        console.print(f"{name}: {', '.join(counts) or 'nothing'}")
    console.print(f"state {done.hash}")


def replay(
    settings: Settings, store: StateStore, slices: Slices, towers: Bundle, chunk: int
) -> Replayed:
    """Apply slices of the topics to an empty store, `chunk` records at a time. Raises KafkaUnavailable."""
    done = Replayed()
    outside = _Outside(done.published)
    ids = topics.log_ids(settings, topics.SOURCES)
    micro = MicroSteps(towers)

    def at(name: str, sources_of: Any) -> PartitionFences:
        positions = PartitionFences(store, settings.prefixed(name), sources_of, lambda: ids[name])
        # From 0 on: what lies before the slice is left out on purpose, not lost.
        ends = {p.partition: end for p, (_, end) in slices.items() if _name(settings, p) == name}
        positions.open({partition: (0, end) for partition, end in ends.items()})
        return positions

    of_clicks = at(CLICKS, lambda p: handler.sources(settings, p))
    of_users = at(USERS, lambda p: users.sources(settings, p))
    of_items = at(ITEMS, lambda p: metadata.sources(settings, towers.generation, p))
    by_clicks = ClickIngest(settings, store, of_clicks, outside, outside, micro)
    ingests: dict[str, Any] = {
        ITEMS: ItemIngest(settings, store, of_items, outside, outside, towers, lambda: 0),
        USERS: UserIngest(
            settings, store, of_users, outside, [towers.generation], by_clicks.profiles_written
        ),
        CLICKS: by_clicks,
    }
    done.outcomes = {name: Outcome() for name in ingests}
    for partition, merged in topic_slices.merged(settings, slices):
        for topic, run_ in groupby(merged, key=lambda record: record.topic):
            name = topic.removeprefix(settings.prefixed(""))
            while part := list(islice(run_, chunk)):
                _note(done, name, partition, part, settings)
                done.outcomes[name].add(ingests[name].ingest(partition, part, 0))
        by_clicks.count(partition)
    done.hash = state_hash(settings, store, done, towers.generation)
    return done


def state_hash(settings: Settings, store: StateStore, touched: Replayed, generation: str) -> str:
    """SHA-256 of all state of the touched users and items, in a fixed order.

    Fences' offsets, event-id windows, lists, embeddings' bits, profiles, popularity counts, cards, and the
    last item record published. Left out: `read_us` and `applied_us`, stamps of this run, and the log's id.
    """
    state = hashlib.sha256()

    def add(*parts: object) -> None:
        state.update(msgspec.msgpack.encode(parts))

    for p in range(settings.clicks_partitions):
        slot = user_slot(p)
        for source, slots in {**handler.sources(settings, p), **users.sources(settings, p)}.items():
            for name, fence in sorted(store.fences(source, slots).items()):
                add("fence", source.name, p, name, -1 if fence is None else fence.offset)
        # The ids that can still be met; how many older ones are there yet depends on the chunks.
        window = store.read_slot(slot, Source(CLICKS, p))
        floor = (
            0 if window.fence is None else window.fence.offset + 1 - settings.dedupe_window_events
        )
        add("window", p, sorted((e, at) for e, at in window.accepted.items() if at >= floor))
        for user_ids in _batches(touched.users.get(p, ())):
            read = store.read_users(slot, Source(CLICKS, p), [], user_ids, [generation])
            for user in user_ids:
                found = read.histories.get(user, user_history.EMPTY)
                profile = msgspec.json.encode(read.profiles.get(user), order="sorted")
                listed = user_history.encode(msgspec.structs.replace(found, read_us=0))
                add("user", user, listed, read.embeddings[generation].get(user), profile)
    for p in range(settings.items_partitions):
        for source, slots in metadata.sources(settings, generation, p).items():
            for name, fence in sorted(store.fences(source, slots).items()):
                add("fence", source.name, p, name, -1 if fence is None else fence.offset)
    for item_ids in _batches(touched.items):
        cards = store.read_item_metadata(item_ids, settings.item_slots)
        for item_id in item_ids:
            card = cards.get(item_id)
            place = None if card is None else (card.partition, card.offset, card.body)
            add("item", item_id, place, touched.published.get(item_id))
    for shard in range(settings.item_slots):
        for bucket, counts in sorted(store.popular(f"i{shard}", _ALL).items()):
            add("popular", shard, bucket, sorted(counts.items()))
    return state.hexdigest()


@contextmanager
def _store(settings: Settings, into: str) -> Iterator[StateStore]:
    if into == "memory":
        yield MemoryStore()
        return
    namespace = f"{settings.namespace[:24]}-replay-{uuid.uuid4().hex[:8]}".lstrip("-")
    store = RedisStore(msgspec.structs.replace(settings, namespace=namespace))
    try:
        store.check()
        yield store
    finally:
        store.close()
        _remove(settings, namespace)


def _remove(settings: Settings, namespace: str) -> None:
    with redis_client.client(settings) as client:
        keys = client.scan_iter(match=f"{namespace}:*", count=1_000)
        while some := list(islice(keys, 1_000)):
            with client.pipeline(transaction=False) as pipe:
                for key in some:
                    pipe.unlink(key)
                pipe.execute()


def _note(
    done: Replayed, name: str, partition: int, part: Sequence[Any], settings: Settings
) -> None:
    """Remember whom the records are about: the ids under which state may lie now."""
    keys = {(r.key or b"").decode(errors="replace") for r in part}
    if name == ITEMS:
        done.items |= keys
        return
    people = done.users.setdefault(partition, set())
    if name == USERS:
        people |= keys
        return
    for record in part:
        try:
            found = msgspec.json.decode(record.value or b"", type=_Ids)
        except msgspec.DecodeError:
            continue
        people.add(found.user_id)


class _Ids(msgspec.Struct):
    user_id: str


def _batches(ids: Iterable[str]) -> Iterator[list[str]]:
    """Sorted, a thousand at a time."""
    ordered = sorted(ids)
    for at in range(0, len(ordered), _IDS_AT_A_TIME):
        yield ordered[at : at + _IDS_AT_A_TIME]


def _name(settings: Settings, place: TopicPartition) -> str:
    return str(place.topic).removeprefix(settings.prefixed(""))
