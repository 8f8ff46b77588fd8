"""The oracle: the state that the topics give, whatever happened on the way; all of it is compared
with Redis.

`Topics.read` reads clicks, items, users, dead letters and item vectors to their ends. `truth`
applies the first three, in batches of another size than ingest's, through the handlers of ingest to
a store in memory. `differences` then compares every fence, event-id window, list, embedding,
profile, count, co-visitation row and card, the last record of every item in the item vectors, every
dead letter, and looks for keys that should not be there. The popularity counts are also counted by
hand, event by event.

A store in memory and batches of 97 have their own tests against Redis; what the oracle does not
share with a running system are its processes, its scripts, its retries and its faults.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from eddyline import generations
from eddyline.errors import EddylineError, Rejected
from eddyline.kafka import topics as kafka_topics
from eddyline.schema import co_visits, seen_items
from eddyline.schema.erasure import digest
from eddyline.schema.event_decay import decays
from eddyline.schema.item_record import ItemRecord, decode_record
from eddyline.schema.partitioning import partition_of
from eddyline.schema.records import Record
from eddyline.settings.loader import Settings
from eddyline.stores import layout, redis_client
from eddyline.stores.memory import MemoryStore
from eddyline.stores.redis import RedisStore
from eddyline.stores.state_store import Fence, Source, UserQuery, UserRead
from embeddings.bundle import bundle as bundles
from embeddings.bundle.bundle import Bundle
from streams.clicks.step_ranges import FixedStepRanges
from streams.fences import co_visit_sources, sources
from streams.generation import Generation
from streams.handlers import Handlers, Outputs
from tests.applying import ingest
from tests.decayed_events import plain_counts, stored_counts
from tests.model.eras import Era, end_of
from tests.model.reading import in_nfc
from tests.topics import Topics, counted_plainly

# Not a divisor of ingest's 256, so that no batch of the oracle ends where one of ingest does.
BATCH = 97
# Users in one read. Event ids go all at once: a store may have to read its whole window for any of
# them.
AT_A_TIME = 500
# More than any bucket of popularity counts holds.
ALL = 2**31 - 1


@dataclass
class Truth:
    """What the topics say.

    published: item id -> the last record that workers should have of it
    refused:   `topic/partition/offset` -> reason, of every record that is no event
    """

    store: MemoryStore = field(default_factory=MemoryStore)
    published: dict[str, ItemRecord] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    # The ports to Kafka, as the handlers need them.

    def put(self, record: Record, rejected: Rejected) -> None:
        self.refused[f"{record.topic}/{record.partition}/{record.offset}"] = rejected.reason

    def forward(self, record: Record, key: bytes, value: bytes | None, partition: int) -> None:
        """What ingest forwarded lies in the topic, and counts there."""

    def flush(self) -> None:
        """Nothing waits."""

    def open(self, partition: int) -> None:
        """There is no other writer."""

    def close(self) -> None:
        """Nothing is open."""

    def publish(self, records: Mapping[int, Sequence[ItemRecord]]) -> dict[int, EddylineError]:
        for some in records.values():
            self.published.update({record.item_id: record for record in some})
        return {}


def truth(
    settings: Settings,
    topics: Topics,
    towers: Bundle,
    batch: int = BATCH,
    eras: Sequence[tuple[Era, Bundle]] = (),
) -> Truth:
    """Apply the topics to an empty store in memory, `batch` records at a time.

    eras: settings and generations that changed; default: these settings and this generation
    Users come before clicks. That is exact where no user whose clicks take micro-steps has a
    profile that changes: between two topics there is no order that a second reading would find
    again.
    """
    found, spans = Truth(), list(eras) or [(Era(settings, towers.generation), towers)]
    steps = FixedStepRanges(generations.step_ranges(settings))
    published: dict[str, dict[str, ItemRecord]] = {}
    for number, (era, bundle) in enumerate(spans):
        found.published = published.setdefault(bundle.generation, {})
        handlers = Handlers(
            era.settings,
            found.store,
            topics.logs,
            [Generation(bundle, found)],
            Outputs.to_sink(found, steps),
            [towers.generation for _, towers in spans],
            items_wait_s=0.0,
            clock_us=lambda: 0,
        )
        for name in (kafka_topics.ITEMS, kafka_topics.USERS, kafka_topics.CLICKS):
            handler = handlers.of(name)
            for partition, records in topics.by_partition(name).items():
                end = end_of([era for era, _ in spans], number, name, partition)
                bounds = {partition: (0, min(end, records[-1].offset + 1))}
                first = handler.fences.open(bounds)[partition]
                some = [record for record in records if first <= record.offset < end]
                for at in range(0, len(some), batch):
                    ingest(handler, partition, some[at : at + batch])
                if handler is handlers.clicks:
                    handlers.clicks.write_behind.write(partition)
    return found


@dataclass
class Compared:
    """What was compared, in numbers, and what differs, in sentences that name the key."""

    differences: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def same(self, what: str, key: object, have: object, want: object) -> None:
        """Note one comparison."""
        self.counts[what] = self.counts.get(what, 0) + 1
        if have != want:
            self.differences.append(
                f"{what} {key}: Redis has {_short(have)}, the topic gives {_short(want)}"
            )

    def same_maps(
        self, what: str, where: str, have: Mapping[Any, Any], want: Mapping[Any, Any]
    ) -> None:
        """Compare two maps, key by key, in both directions."""
        for key in sorted(have.keys() | want.keys(), key=str):
            self.same(what, f"{where}:{key}" if where else key, have.get(key), want.get(key))


def compare(settings: Settings, generation: str = "1", batch: int = BATCH) -> Compared:
    """Read the topics, recompute everything, and compare it with what Redis and Kafka hold."""
    topics = Topics.read(settings, generation)
    towers = bundles.load(settings.bundles / generation)
    return differences(settings, topics, truth(settings, topics, towers, batch), generation)


def differences(
    settings: Settings,
    topics: Topics,
    expected: Truth,
    generation: str = "1",
    optional: frozenset[str] = frozenset(),
    value_of: Callable[[Any], bytes | None] = lambda record: record.value,
) -> Compared:
    """Compare all that ingest wrote with the truth.

    value_of: the value of a record of `clicks` in Eddyline's own format
    optional: records that compaction removed, perhaps before ingest read and refused them
    """
    found, real = Compared(), RedisStore(settings)
    try:
        names = _Names.of(settings, topics, expected, value_of)
        _fences(settings, topics, generation, real, expected.store, found)
        for partition in range(settings.clicks_partitions):
            _users(settings, partition, names, generation, (real, expected.store), found)
        for slot in (f"i{shard}" for shard in range(settings.item_slots)):
            have, want = real.popular(slot, ALL), expected.store.popular(slot, ALL)
            found.same_maps("bucket", slot, {b: len(n) for b, n in have.items()}, _sizes(want))
            for bucket in have.keys() & want.keys():
                found.same_maps("count", f"{slot}:{bucket}", have[bucket], want[bucket])
            sums = [
                stored_counts(store, slot, decays(settings)) for store in (real, expected.store)
            ]
            found.same_maps("events of an item", slot, *sums)
        if settings.item_slots == 1:
            plain, clicked = counted_plainly(settings, topics, value_of)
            have = real.popular("i0", ALL)
            for bucket in plain.keys() & have.keys():
                found.same_maps("count by hand", bucket, have[bucket], plain[bucket])
            if settings.keeps_event_sums:
                have_all = stored_counts(real, "i0", decays(settings))
                by_hand = plain_counts(clicked, decays(settings))
                found.same_maps("events by hand", "", have_all, by_hand)
        _rows(settings, topics, value_of, (real, expected.store), found)
        ids = sorted(names.items)
        log_ms = {p: r[-1].timestamp for p, r in topics.by_partition(kafka_topics.ITEMS).items()}
        cards = (
            # Those that have ended may be there or not.
            {i: c for i, c in read.items() if not c.has_ended(log_ms.get(c.partition, 0))}
            for read in (
                s.read_item_metadata(ids, settings.item_slots) for s in (real, expected.store)
            )
        )
        found.same_maps("card", "", *cards)
        if (
            stored := real.layout()
        ) is not None:  # of an emptied Redis the next start of an ingest writes it
            found.same("layout", "", stored, layout.layout(settings))
    finally:
        real.close()
    _keys(settings, expected, found)
    _vectors(topics.records[kafka_topics.item_vectors(generation)], expected, found)
    letters = {
        record.key.decode(): _reason(record)
        for record in topics.records[kafka_topics.DEAD_LETTERS]
        if "replayed" not in dict(record.headers)
    }
    refused = {a: why for a, why in expected.refused.items() if a in letters or a not in optional}
    found.same_maps("dead letter", "", letters, refused)
    return found


@dataclass
class _Names:
    """Every id that a topic names, by the partition of clicks whose slot it belongs to."""

    users: dict[int, set[str]]
    events: dict[int, set[str]]
    items: set[str]

    @classmethod
    def of(
        cls,
        settings: Settings,
        topics: Topics,
        expected: Truth,
        value_of: Callable[[Any], bytes | None],
    ) -> _Names:
        n = settings.clicks_partitions
        names = cls({p: set() for p in range(n)}, {p: set() for p in range(n)}, set())
        for record in topics.records[kafka_topics.CLICKS]:
            try:
                event = msgspec.json.decode(value_of(record) or b"null")
            except msgspec.DecodeError:
                continue
            if not isinstance(event, dict):
                continue
            if isinstance(user := event.get("user_id"), str):
                user = own_form(settings, user)
                names.users[partition_of(user, n)].add(user)
            if isinstance(event_id := event.get("event_id"), str):
                names.events[record.partition].add(event_id)
        for record in topics.records[kafka_topics.USERS]:
            user = own_form(settings, record.key.decode())
            names.users[partition_of(user, n)].add(user)
        names.items |= {
            own_form(settings, record.key.decode())
            for record in topics.records[kafka_topics.ITEMS]
            if record.key
        }
        return names


def own_form(settings: Settings, sent_id: str) -> str:
    """The id that state lies under."""
    return in_nfc(sent_id) if settings.id_form == "nfc" else sent_id


def _fences(
    settings: Settings,
    topics: Topics,
    generation: str,
    real: RedisStore,
    expected: MemoryStore,
    found: Compared,
) -> None:
    sizes = {
        kafka_topics.CLICKS: settings.clicks_partitions,
        kafka_topics.USERS: settings.clicks_partitions,
        kafka_topics.ITEMS: settings.items_partitions,
    }
    for name, partitions in sizes.items():
        last = {p: some[-1].offset for p, some in topics.by_partition(name).items()}
        for partition in range(partitions):
            every = sources(settings, name, partition, [generation])
            if name == kafka_topics.CLICKS:
                every |= co_visit_sources(settings, partition)
            for source, slots in every.items():
                have, want = real.fences(source, slots), expected.fences(source, slots)
                for slot in slots:
                    key = f"{slot}:{source.name}:{source.partition}"
                    there = have[slot]
                    if there is not None and last.get(partition, there.offset) < there.offset:
                        end = kafka_topics.end_offsets(settings, name)[partition]
                        there = _at_last_record(there, last[partition], end)
                    found.same("fence", key, _shown(there), _shown(want[slot]))


def _at_last_record(fence: Fence, last: int, end: int) -> Fence:
    """The fence, at the last record where it passed offsets without a record at the log's end.

    Transactions leave such offsets, and ingest passes them when it finds the time.
    """
    return Fence(last, fence.log, fence.mark) if last < fence.offset < end else fence


def _users(
    settings: Settings,
    partition: int,
    names: _Names,
    generation: str,
    stores: tuple[RedisStore, MemoryStore],
    found: Compared,
) -> None:
    slot, source = f"u{partition}", Source(kafka_topics.CLICKS, partition)
    fence = stores[1].fences(source, [slot])[slot]
    # Ids that lie lower can no longer be met; when they leave depends on where batches end.
    floor = 0 if fence is None else fence.offset + 1 - settings.dedupe_window_events
    known = names.events[partition]
    windows = [s.read_slot(slot, source).accepted for s in stores]
    kept = ({e: at for e, at in one.items() if at >= floor and e in known} for one in windows)
    found.same_maps("event id", slot, *kept)
    for ids in _some(names.users[partition]):
        query = UserQuery(slot, source, ids, [generation], ids)
        reads: list[UserRead] = [s.read_many([query])[0] for s in stores]
        have, want = reads
        # When ingest read an event is a stamp of this run, not of the log.
        lists = [
            {
                u: msgspec.structs.replace(b, read_us=0)
                for u, b in one.histories.items()
                if not one.is_idle(u)
            }
            for one in reads
        ]
        found.same_maps("list", slot, *lists)
        embeddings = [
            {u: e for u, e in one.embeddings[generation].items() if not one.is_idle(u)}
            for one in reads
        ]
        found.same_maps("embedding", f"{slot}:{generation}", *embeddings)
        seen = [
            {
                u: seen_items.canonical(value, settings.seen_items_max)
                for u, value in one.seen.items()
                if not one.is_idle(u)
            }
            for one in reads
        ]
        found.same_maps("seen items", slot, *seen)
        found.same_maps("profile", slot, have.profiles, want.profiles)
        found.same_maps("erasure", slot, have.erasures, want.erasures)
        found.counts["list entry"] = found.counts.get("list entry", 0) + sum(
            len(b.entries) for b in lists[1].values()
        )


def _rows(
    settings: Settings,
    topics: Topics,
    value_of: Callable[[Any], bytes | None],
    stores: tuple[RedisStore, MemoryStore],
    found: Compared,
) -> None:
    """Co-visitation rows, but for those of deleted items, which may have ended with them.

    And but for those of items that a forgotten user clicked: the null record deletes the history at
    once, so the user's clicks before its Forget may be in fewer pairs. The model has bounds there.
    """
    state = stores[1].snapshot()
    unsure = {key.partition(":")[2] for key, item in state.items.items() if item.deleted}
    forgotten = {hashed for _, hashed in state.erasures}
    for record in topics.records[kafka_topics.CLICKS] if forgotten else ():
        with suppress(msgspec.MsgspecError):
            click = msgspec.json.decode(value_of(record) or b"", type=_Click)
            if digest(own_form(settings, click.user_id)) in forgotten:
                unsure.add(own_form(settings, click.item_id))
    for ids in _some({item for _, _, item in state.rows} - unsure):
        reads = [s.read_co_visits(ids, ids, settings.item_slots) for s in stores]
        for kind, have, want in zip(("after", "before"), *reads, strict=True):
            for item, mine, its in zip(ids, have, want, strict=True):
                rows = (co_visits.summary(row, settings.co_visit_row_max) for row in (mine, its))
                found.same(f"row {kind}", item, *rows)


class _Click(msgspec.Struct):
    user_id: str
    item_id: str


# The key schema at the top of `eddyline/stores/redis.py`: the layout, a fence, what is behind a
# slot's tag.
_KEY = re.compile(
    r"(?:(?P<layout>layout)|fence:\{(?P<fence>[ui]\d+)\}:[^:]+:\d+|\{(?P<slot>[ui]\d+)\}:"
    r"(?:(?P<whole>window|visits|buckets|generations|refused|trend)|trend:(?P<half_life>\d+):[01]|"
    r"(?:popular|version):(?P<bucket>\d+)|"
    r"(?P<kind>[hopcf]|seen):(?P<id>.+)"
    r"|(?P<row>after|before):(?P<item>.+)"
    r"|e:(?P<generation>[^:]+):(?P<learner>.+)))",
    re.DOTALL,
)


def _keys(settings: Settings, expected: Truth, found: Compared) -> None:
    """Every key has to be one that the truth has; a kind that is not known is a difference."""
    state = expected.store.snapshot()
    prefix = f"{settings.namespace}:" if settings.namespace else ""
    lists = {f"{slot}:{user}" for slot, user in state.histories}
    known = {
        "h": lists,
        "o": lists,
        "p": {f"{slot}:{user}" for slot, user in state.profiles},
        "c": set(state.items),
        "f": {f"{slot}:{hashed}" for slot, hashed in state.erasures},
        "seen": {f"{slot}:{user}" for slot, user in state.seen},
    }
    for slot, gen, user in state.embeddings:
        known.setdefault(f"e:{gen}", set()).add(f"{slot}:{user}")
    client = redis_client.client(settings, timeout_ms=30_000)
    try:
        for raw in client.scan_iter(match=f"{prefix}*", count=1_000):
            key = raw.decode().removeprefix(prefix)
            parts = _KEY.fullmatch(key)
            found.counts["key"] = found.counts.get("key", 0) + 1
            if parts is None:
                found.differences.append(f"key {key}: of a kind that the oracle does not know")
            elif parts["kind"] or parts["generation"]:
                kind = parts["kind"] or f"e:{parts['generation']}"
                if f"{parts['slot']}:{parts['id'] or parts['learner']}" not in known.get(kind, ()):
                    found.differences.append(f"key {key}: Redis has it, the topic does not give it")
            elif parts["row"]:
                if (parts["slot"], parts["row"], parts["item"]) not in state.rows:
                    found.differences.append(f"key {key}: Redis has it, the topic does not give it")
            elif parts["half_life"]:
                half_lives = {str(decay.half_life_events) for decay in decays(settings)}
                if parts["half_life"] not in half_lives:
                    found.differences.append(f"key {key}: of a half-life that is not set")
            elif parts["bucket"] and int(parts["bucket"]) not in state.buckets.get(
                parts["slot"], {}
            ):
                found.differences.append(f"key {key}: Redis has it, the topic does not give it")
    finally:
        client.close()


def _vectors(records: Iterable[Any], expected: Truth, found: Compared) -> None:
    """The last record of every item, to the bit; when it was written is a stamp of this run."""
    last: dict[str, ItemRecord] = {}
    for record in records:
        made = decode_record(record.key, record.value)
        last[made.item_id] = made
    found.same_maps(
        "item vector",
        "",
        {i: _bits(r) for i, r in last.items()},
        {i: _bits(r) for i, r in expected.published.items()},
    )


def _bits(record: ItemRecord) -> tuple[Any, ...]:
    vector = None if record.vector is None else np.ascontiguousarray(record.vector, "<f4").tobytes()
    return record.partition, record.offset, record.at_ms, vector, record.attributes


def _reason(record: Any) -> str:
    return dict(record.headers).get("reason", b"").decode()


def _sizes(buckets: Mapping[int, Mapping[str, int]]) -> dict[int, int]:
    return {bucket: len(counted) for bucket, counted in buckets.items()}


def _shown(fence: Fence | None) -> str:
    return str(fence or "")


def _some(ids: Iterable[str]) -> Iterator[list[str]]:
    ordered = sorted(ids)
    for first in range(0, len(ordered), AT_A_TIME):
        yield ordered[first : first + AT_A_TIME]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:200]} … {text[-99:]}"
