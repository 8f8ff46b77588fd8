"""Replay a slice of Kafka's topics into an empty store and hash the resulting state.

The slice goes through ingest's own handlers into a store of its own; Kafka is only read. The same
slice gives the same hash, in either store, whatever the batches. Order: items first, then each
partition's clicks and users together, by the broker's append time, users first where equal.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import groupby, islice

import msgspec

from eddyline import generations
from eddyline.errors import EddylineError, Rejected, SettingsError
from eddyline.kafka import topics
from eddyline.kafka.topics import CLICKS, ITEMS, USERS
from eddyline.schema import co_visits, item_record, seen_items, user_history, validation
from eddyline.schema.id_form import in_form, key_in_form
from eddyline.schema.item_record import ItemRecord
from eddyline.schema.partitioning import user_slot
from eddyline.schema.records import Record
from eddyline.settings.loader import Settings
from eddyline.stores import redis_client
from eddyline.stores.memory import MemoryStore
from eddyline.stores.redis import RedisStore
from eddyline.stores.state_store import Source, StateStore, UserQuery
from embeddings.bundle import bundle as bundles
from embeddings.bundle.bundle import Bundle
from streams.clicks.step_ranges import FixedStepRanges
from streams.fences import co_visit_sources, sources
from streams.generation import Generation
from streams.handlers import Handlers, Outputs
from streams.operations import topic_slices
from streams.operations.topic_slices import Slices
from streams.ports import Outcome, RecordBatch, RecordPublisher

_IDS_PER_READ = 1_000
_KEYS_PER_SCAN = 1_000
# More than any bucket of popularity counts can hold.
_ALL = 2**31 - 1


@dataclass
class ReplayResult:
    """What a slice gave.

    hash:      of the whole state of the users and items that the slice touched
    outcomes:  by topic; users: ids by partition; items: ids
    published: item id -> digest of the item's last record in the item vectors
    """

    hash: str = ""
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    users: dict[int, set[str]] = field(default_factory=dict)
    items: set[str] = field(default_factory=set)
    published: dict[str, bytes] = field(default_factory=dict)


class _ReplaySinks(RecordPublisher):
    """The outputs of ingest's handlers: item records become digests, all others are dropped."""

    def __init__(self, published: dict[str, bytes]) -> None:
        self.published = published

    def put(self, record: Record, rejected: Rejected) -> None:
        pass

    def forward(self, record: Record, key: bytes, value: bytes | None, partition: int) -> None:
        pass

    def flush(self) -> None:
        pass

    def open(self, partition: int) -> None:
        pass

    def publish(self, published: Mapping[int, Sequence[ItemRecord]]) -> dict[int, EddylineError]:
        for records in published.values():
            for record in records:
                encoded = item_record.encode_record(record)
                self.published[record.item_id] = hashlib.sha256(encoded).digest()
        return {}


def run(settings: Settings, *, begin: str, end: str, into: str, batch: int) -> ReplayResult:
    """Replay a slice into a new store and remove what it wrote.

    begin, end: `earliest`, `latest`, a time (ISO 8601, or milliseconds since 1970; the broker's
                append time), or offsets by partition, `clicks:0=100,items:1=5`; topics that are not
                named: all, or nothing for an end
    into:       memory, or redis: there under a namespace of its own
    batch:      records applied at once, at most
    Raises SettingsError, Unavailable, BundleError.
    """
    if into not in ("memory", "redis"):
        raise SettingsError(f"--into {into!r}: expected memory or redis")
    if batch < 1:
        raise SettingsError(f"--chunk {batch}: must be 1 or above")
    towers = bundles.recorded(settings, generations.active_generation(settings))
    slices = topic_slices.between(settings, begin, end)
    with temporary_store(settings, into) as store:
        return replay(settings, store, slices, towers, batch)


def replay(
    settings: Settings, store: StateStore, slices: Slices, towers: Bundle, batch_records: int
) -> ReplayResult:
    """Apply slices of the topics to an empty store, `batch_records` at a time.

    Micro-steps are taken where ingest took them, as recorded; from the beginning of the slice if
    no ingest has loaded the generation yet. Raises KafkaUnavailable.
    """
    result = ReplayResult()
    sinks = _ReplaySinks(result.published)
    ids = topics.log_ids(settings, topics.SOURCES)

    handlers = Handlers(
        settings,
        store,
        ids,
        [Generation(towers, sinks)],
        Outputs.to_sink(sinks, FixedStepRanges(generations.step_ranges(settings))),
        [towers.generation],
        items_wait_s=0.0,
        clock_us=lambda: 0,
    )
    for name in (ITEMS, USERS, CLICKS):
        # From 0 on: what lies before the slice is left out on purpose, not lost.
        topic = settings.prefixed(name)
        ends = {p.partition: end for p, (_, end) in slices.items() if p.topic == topic}
        handlers.of(name).fences.open({partition: (0, end) for partition, end in ends.items()})
        result.outcomes[name] = Outcome()
    names = {settings.prefixed(name): name for name in topics.SOURCES}
    for partition, merged in topic_slices.merged(settings, slices):
        for topic, run_ in groupby(merged, key=lambda record: record.topic):
            name = names[topic]
            while records := list(islice(run_, batch_records)):
                _note_ids(settings, result, name, partition, records)
                batch = RecordBatch(topic, partition, records, read_us=0)
                result.outcomes[name].add(handlers.of(name).apply_one(batch))
        handlers.clicks.write_behind.write(partition)
    result.hash = state_hash(settings, store, result, towers.generation)
    return result


def state_hash(
    settings: Settings, store: StateStore, touched: ReplayResult, generation: str
) -> str:
    """SHA-256 of all state of the touched users and items, in a fixed order.

    Covers fences' offsets, event-id windows, histories, seen items, embeddings' bits, profiles,
    popularity counts, the number of events in those by events, item metadata and the last published
    item records. Leaves out `read_us` and `applied_us`, stamps of this run, and the log's id.
    """
    state = hashlib.sha256()

    def add(*parts: object) -> None:
        state.update(msgspec.msgpack.encode(parts))

    for p in range(settings.clicks_partitions):
        slot = user_slot(p)
        of_users = sources(settings, CLICKS, p) | sources(settings, USERS, p)
        of_users |= co_visit_sources(settings, p)
        for source, slots in of_users.items():
            for name, fence in sorted(store.fences(source, slots).items()):
                add("fence", source.name, p, name, -1 if fence is None else fence.offset)
        # Ids that can still be met; how many older ones are kept depends on the batches.
        window = store.read_slot(slot, Source(CLICKS, p))
        floor = (
            0 if window.fence is None else window.fence.offset + 1 - settings.dedupe_window_events
        )
        add("window", p, sorted((e, at) for e, at in window.accepted.items() if at >= floor))
        for user_ids in _batches(touched.users.get(p, ())):
            query = UserQuery(slot, Source(CLICKS, p), user_ids, [generation], user_ids)
            [read] = store.read_many([query])
            for user in user_ids:
                # When ingest removes what idle users left makes no difference.
                history = read.histories.get(user, user_history.EMPTY)
                embedding = read.embeddings[generation].get(user)
                seen = seen_items.canonical(read.seen.get(user, b""), settings.seen_items_max)
                if read.is_idle(user):
                    history, embedding, seen = user_history.EMPTY, None, b""
                encoded = user_history.encode(msgspec.structs.replace(history, read_us=0))
                profile = msgspec.json.encode(read.profiles.get(user), order="sorted")
                add("user", user, encoded, embedding, profile, seen)
    times: dict[int, int] = {}
    for p in range(settings.items_partitions):
        for source, slots in sources(settings, ITEMS, p, [generation]).items():
            for name, fence in sorted(store.fences(source, slots).items()):
                if fence is not None and fence.mark is not None:
                    times[p] = fence.mark.appended_ms
                add("fence", source.name, p, name, -1 if fence is None else fence.offset)
    for item_ids in _batches(touched.items):
        found = store.read_item_metadata(item_ids, settings.item_slots)
        rows = store.read_co_visits(item_ids, item_ids, settings.item_slots)
        for item_id, *directions in zip(item_ids, *rows, strict=True):
            item = found.get(item_id)
            if item is not None and item.has_ended(times.get(item.partition, 0)):
                item = None  # as of idle users
                directions = []
            for row in directions:
                found_row = co_visits.summary(row, settings.co_visit_row_max)
                visits = None if found_row.counts is None else sorted(found_row.counts.items())
                add("row", item_id, found_row.milli, found_row.next, visits)
            place = None if item is None else (item.partition, item.offset, item.body)
            refused = () if item is None or item.refused is None else (item.refused,)
            add("item", item_id, place, touched.published.get(item_id), *refused)
    for shard in range(settings.item_slots):
        for bucket, counts in sorted(store.popular(f"i{shard}", _ALL).items()):
            add("popular", shard, bucket, sorted(counts.items()))
        # Their sums are floating-point numbers: not of the same bits on every machine.
        add("popular by events", shard, store.popular_trend(f"i{shard}", (), _ALL).events)
    return state.hexdigest()


@contextmanager
def temporary_store(settings: Settings, into: str) -> Iterator[StateStore]:
    """An empty store: in memory, or in Redis under a namespace that is removed with the block."""
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
        remove_namespace(settings, namespace)


def remove_namespace(settings: Settings, namespace: str) -> None:
    """Delete every key of a namespace."""
    with redis_client.client(settings) as client:
        keys = client.scan_iter(match=f"{namespace}:*", count=_KEYS_PER_SCAN)
        while found := list(islice(keys, _KEYS_PER_SCAN)):
            with client.pipeline(transaction=False) as pipe:
                for key in found:
                    pipe.unlink(key)
                pipe.execute()


def _note_ids(
    settings: Settings, result: ReplayResult, name: str, partition: int, batch: Sequence[Record]
) -> None:
    """Note the ids of the records' users and items: state may lie under them now."""
    own: list[Record] = []
    for record in batch:
        with suppress(Rejected):
            own += validation.own_records(settings, name, record)
    form = settings.id_form
    keys = {key_in_form(record.key, form).decode(errors="replace") for record in own}
    if name == ITEMS:
        result.items |= keys
        return
    user_ids = result.users.setdefault(partition, set())
    if name == USERS:
        user_ids |= keys
        return
    for one in own:
        with suppress(msgspec.DecodeError):
            event = msgspec.json.decode(one.value or b"", type=_EventIds)
            user_ids.add(in_form(event.user_id, form))
            if event.item_id:
                result.items.add(in_form(event.item_id, form))


class _EventIds(msgspec.Struct):
    user_id: str
    item_id: str = ""


def _batches(ids: Iterable[str]) -> Iterator[list[str]]:
    ordered = sorted(ids)
    for at in range(0, len(ordered), _IDS_PER_READ):
        yield ordered[at : at + _IDS_PER_READ]
