"""The handlers under faults, on the memory store: whatever happens, the state is the log's.

Faults are items of the stream. An oracle applies the same log event by event, without chunks,
fences or caches, and everything is compared: lists, stamps, windows, counters, embeddings,
metadata, published records.
"""

from __future__ import annotations

import base64
import contextlib
import random
import struct
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np
import pytest

from eddyline.errors import EddylineError, FenceMoved, KafkaUnavailable, Rejected, StoreUnavailable
from eddyline.kafka.topics import CLICKS, ITEMS
from eddyline.schema import events, seen_items
from eddyline.schema.event_decay import decays
from eddyline.schema.events import KINDS, Click, Forget, Item, Merge
from eddyline.schema.item_key import item_key, key_bytes
from eddyline.schema.item_record import ItemRecord
from eddyline.schema.partitioning import item_slot, partition_of
from eddyline.settings.loader import Settings
from eddyline.stores import user_codec
from eddyline.stores.memory import MemoryStore
from eddyline.stores.state_store import LogId, Source, UserEffects, UserQuery, UserRead
from embeddings.towers.features import learn_profiles
from embeddings.towers.micro_step import MicroSettings, MicroStep
from embeddings.towers.numerics import unit
from embeddings.towers.user_tower import UserTower
from streams.clicks.handler import ClickHandler
from streams.clicks.micro_steps import MicroSteps
from streams.fences import PartitionFences, published_source
from streams.generation import Generation
from streams.items.handler import ItemHandler
from tests.applying import ingest
from tests.co_visit_totals import totals
from tests.decayed_events import NO_DECAY, plain_counts, stored_counts

LOG = LogId("cluster", "topic")
PARTITIONS, D, WINDOW, HISTORY = 2, 4, 40, 6
BASE_MS = 1_700_000_000_000
# Seen items that are kept; key -> item.
SEEN = 6
NAMES = {key_bytes(f"i{n}"): f"i{n}" for n in range(10)}
# ((item, kind), minute) of the seen items that a moved click carries.
Beyond = frozenset[tuple[tuple[str, str], int]]
STAMP = (("produced_us", b"77"),)


@dataclass(frozen=True)
class Rec:
    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...] = ()


class Died(BaseException):
    """kill -9."""


# --- a small world: towers whose rows do not depend on their batch
# -----------------------------------


class TinyUserTower:
    history_max = 4

    def encode(self, table: Any, histories: Sequence[Any], profiles: Sequence[Any]) -> Any:
        seen = [table[list(history)] for history in histories]
        rows = [h.sum(axis=0) * np.float32(0.5) if len(h) else np.ones(D, np.float32) for h in seen]
        return np.stack(rows).astype(np.float32)


class TinyMicro:
    min_steps_before = 2

    def step(self, forward: Any, embedding: Any, targets: Any, event_keys: Sequence[str]) -> Any:
        items = World.item_vectors[list(targets)]
        draws = np.array([[sum(map(ord, key)) % 7] for key in event_keys], np.float32)
        return (
            embedding * np.float32(0.9)
            + items * np.float32(0.1)
            + forward * draws * np.float32(0.01)
        ).astype(np.float32)


class TinyItemTower:
    def encode(self, items: Sequence[Item]) -> Any:
        return np.stack([of_title(item) for item in items])


def of_title(item: Item) -> Any:
    """A unit vector that tells the title's length."""
    row = np.zeros(D, np.float32)
    row[0], row[1] = np.cos(len(item.title)), np.sin(len(item.title))
    return row


class World:
    generation, dimension = "1", D
    user_tower, micro, item_tower = TinyUserTower(), TinyMicro(), TinyItemTower()
    item_vectors = np.random.default_rng(7).normal(size=(8, D)).astype(np.float32)
    rows = MappingProxyType({f"i{n}": n for n in range(8)})  # i8 and i9 are too new for the bundle


@dataclass
class Outside:
    """Dead letters, forwarded clicks and published records, as Kafka has them; may be away."""

    settings: Settings
    letters: list[tuple[int, int, str]] = field(default_factory=list)
    forwarded: list[tuple[int, bytes, bytes]] = field(default_factory=list)
    published: list[ItemRecord] = field(default_factory=list)
    queue: list[Any] = field(default_factory=list)
    away: int = 0

    def put(self, record: Any, rejected: Rejected) -> None:
        self.queue.append((self.letters, (record.partition, record.offset, rejected.reason)))

    def forward(self, record: Any, key: bytes, value: bytes | None, partition: int) -> None:
        self.queue.append((self.forwarded, (partition, key, value)))

    def flush(self) -> None:
        queue, self.queue = self.queue, []
        if queue and self.away:
            self.away -= 1
            raise KafkaUnavailable("away")
        for where, what in queue:
            where.append(what)

    def open(self, partition: int) -> None:
        pass

    def close(self) -> None:
        pass

    def publish(self, records: Mapping[int, Sequence[ItemRecord]]) -> dict[int, EddylineError]:
        failed: dict[int, EddylineError] = {}
        for partition, some in records.items():
            if self.away:
                self.away -= 1
                failed[partition] = KafkaUnavailable("away")
            else:
                self.published += some
        return failed


class Encoded(MemoryStore):
    """A store that also keeps users as bytes, as Redis does, and reads them from there."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, bytes] = {}

    def write_users(
        self, slot: str, source: Source, expected: Any, new: Any, effects: UserEffects
    ) -> int:
        applied_us = super().write_users(slot, source, expected, new, effects)
        names, args = user_codec.encode_users(slot, effects)
        _, _, _, _, lists, written, erasures, _, seen, seen_max, *values = args
        names = names[2:]
        for name in names[written + erasures + seen :]:
            self.values.pop(name, None)
        of_seen = values[written + 2 * erasures :]
        of_names = names[written + erasures : written + erasures + seen]
        for name, more in zip(of_names, of_seen, strict=True):
            self.values[name] = seen_items.append(self.values.get(name, b""), more, seen_max)
        of_erasures = values[written : written + 2 * erasures : 2]
        for name, value in zip(names[written : written + erasures], of_erasures, strict=True):
            self.values[name] = value
        for n, (name, value) in enumerate(zip(names[:written], values[:written], strict=True)):
            self.values[name] = value + bytes(8) if n < lists else value
        return applied_us

    def read_many(self, queries: Sequence[UserQuery]) -> list[UserRead]:
        reads = []
        for q, kept in zip(queries, super().read_many(queries), strict=True):
            names = user_codec.user_keys(q.slot, q.user_ids, q.generations)
            names += user_codec.erasure_keys(q.slot, q.user_ids)
            names += user_codec.seen_keys(q.slot, q.seen_of)
            found = [self.values.get(name) for name in names]
            read = user_codec.decode_users(kept.fence, q.user_ids, q.generations, found, q.seen_of)
            assert (read.histories, read.embeddings) == (kept.histories, kept.embeddings)
            assert read.seen == kept.seen
            assert read.erasures == kept.erasures
            reads.append(read)
        return reads

    def snapshot(self) -> Any:
        state: Any = super().snapshot()
        state.values = dict(self.values)
        return state

    def restore(self, state: Any) -> None:
        super().restore(state)
        self.values = dict(state.values)


class Unsure(Encoded):
    """A store whose calls fail as `faults` says: before or after the effect."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[str] = []

    def _write(self, name: str, *args: Any) -> Any:
        fault = self.faults.pop(0) if self.faults else ""
        if fault == "before":
            raise StoreUnavailable("timed out")
        if fault == "die before":
            raise Died
        answer = getattr(super(), name)(*args)
        if fault == "after":
            raise StoreUnavailable("the answer was lost")
        if fault == "die after":
            raise Died
        return answer

    def write_users(self, *args: Any) -> Any:
        return self._write("write_users", *args)

    def count_clicks(self, *args: Any) -> Any:
        return self._write("count_clicks", *args)

    def append_co_visits(self, *args: Any) -> Any:
        return self._write("append_co_visits", *args)

    def write_item_metadata(self, *args: Any) -> Any:
        return self._write("write_item_metadata", *args)


FAULTS = ["", "", "before", "after", "die before", "die after"]


# --- logs
# ------------------------------------------------------------------------------------------------


def user_of(rng: random.Random, partition: int) -> str:
    while True:
        user = f"u{rng.randrange(12)}"
        if partition_of(user, PARTITIONS) == partition:
            return user


def clicks_log(rng: random.Random, length: int) -> dict[int, list[Rec]]:
    """Re-sends near and far, late and equal times, rubbish, strays, merges; offsets with gaps."""
    logs: dict[int, list[Rec]] = {}
    for partition in range(PARTITIONS):
        records: list[Rec] = []
        offset = 0
        for n in range(length):
            offset += rng.choice([1, 1, 1, 2])  # transaction markers take offsets too
            if records and rng.random() < 0.15:
                old = records[-rng.randint(1, min(len(records), 50))]
                value, key = old.value, old.key
            elif rng.random() < 0.05:
                value, key = rng.choice([b"{", b"{}", None]), b"u1"
            elif rng.random() < 0.04:
                user, into = user_of(rng, partition), user_of(rng, rng.randrange(PARTITIONS))
                value = events.encode(Merge(user_id=user, merge_into=into, at_ms=BASE_MS))
                key = user.encode()
            elif rng.random() < 0.02:
                user = user_of(rng, partition)
                until_ms = BASE_MS + 1_000 * (n // 2) - rng.choice([0, 3_000, 90_000_000])
                value, key = (
                    events.encode(Forget(user_id=user, forget_until_ms=until_ms)),
                    user.encode(),
                )
            else:
                stray = rng.random() < 0.05
                user = user_of(rng, 1 - partition if stray else partition)
                click = Click(
                    user_id=user,
                    item_id=f"i{rng.randrange(10)}",
                    at_ms=BASE_MS
                    + 1_000 * (n // 2)
                    - rng.choice([0, 0, 3_000, 50_000_000, 90_000_000]),
                    kind=rng.choice(KINDS),  # type: ignore[arg-type]
                    event_id=f"e{partition}-{n}" if rng.random() < 0.8 else None,
                    weight=rng.choice([1.0, 0.5, 2.5]),
                )
                value, key = events.encode(click), None if rng.random() < 0.1 else user.encode()
            stamp = (
                (("produced_us", str(n).encode()),)
                if rng.random() < 0.9
                else (("produced_us", b"x"),)
            )
            records.append(Rec("clicks", partition, offset, BASE_MS + 1_000 * n, key, value, stamp))
        logs[partition] = records
    return logs


def forgotten(event: Forget, record: Rec, lists: Any, marks: Any, steps: Any, beyond: Any) -> None:
    user, mine = event.user_id, lists.get(event.user_id, [])
    for one, minute in list(beyond[user].items()):
        if minute * 60_000 <= event.forget_until_ms:
            del beyond[user][one]
    kept = [x for x in mine if x[1] > event.forget_until_ms]
    steps.pop(user, None)
    lists.pop(user, None)
    mark = marks.pop(user, None)
    if kept:
        lists[user] = kept
        marks[user] = mark_of(record, mark[1])


def mark_of(record: Rec, newest_ms: int) -> tuple[int, int, int, int]:
    """The stamps of a list whose last event is this record."""
    produced = record.headers[0][1]
    stamp = int(produced) if produced.isdigit() else 0
    return record.offset, newest_ms, stamp, record.timestamp


def liked_rows(world: World, entries: list[Any]) -> list[int]:
    """The rows of the newest four items that the bundle has and that no newer event dislikes."""
    liked = [
        x
        for n, x in enumerate(entries)
        if x[0] in world.rows
        and x[2] != "dislike"
        and all(y[0] != x[0] or y[2] != "dislike" for y in entries[:n])
    ]
    return [world.rows[x[0]] for x in liked[:4]]


def own_event(settings: Settings, record: Rec) -> Click | Merge | Forget | None:
    """The event of a record that counts in its partition."""
    try:
        event = events.decode_user_event(
            record.value,
            appended_ms=record.timestamp,
            far_future_ms_max=settings.far_future_ms_max,
            id_form=settings.id_form,
        )
    except Rejected:
        return None
    return event if partition_of(event.user_id, PARTITIONS) == record.partition else None


def oracle(settings: Settings, logs: dict[int, list[Rec]]) -> dict[str, Any]:
    """The state by the rules, one event at a time, all in plain dictionaries."""
    lists: dict[str, list[Any]] = defaultdict(list)
    marks: dict[str, Any] = {}
    steps: dict[str, tuple[int, Any]] = {}
    windows: dict[int, dict[str, int]] = {}
    counts: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    clicked: Counter[str] = Counter()
    moved: set[tuple[str, str, int, str, float, str, Beyond]] = set()
    beyond: dict[str, dict[tuple[str, str], int]] = defaultdict(dict)
    erased: dict[str, int] = {}
    visits: dict[tuple[str, str], tuple[int, int]] = {}
    world, weights = World(), settings.kind_weights
    for partition, records in logs.items():
        seen = windows.setdefault(partition, {})
        for record in records:
            click = own_event(settings, record)
            if click is None:
                continue
            gone = erased.get(click.user_id, -1)
            if isinstance(click, Merge):
                if click.at_ms > gone:
                    moved |= merged(
                        click, f"merge/{partition}/{record.offset}", lists, marks, steps, beyond
                    )
                continue
            if isinstance(click, Forget):
                if click.forget_until_ms > gone:
                    erased[click.user_id] = click.forget_until_ms
                    forgotten(click, record, lists, marks, steps, beyond)
                continue
            before = seen.get(click.event_id or "")
            if click.event_id and before is not None and record.offset - before <= WINDOW:
                continue
            if click.event_id:
                seen[click.event_id] = record.offset
            user = click.user_id
            newest = marks.get(user, (0, 0, 0, 0))[1]
            context = click.context or {}
            copied = context.get("eddyline.moved") is True
            late = newest - click.at_ms > 1_000 * settings.lateness_s_max and not copied
            if click.kind != "dislike" and not copied:
                bucket = click.at_ms // (settings.popular_bucket_s * 1_000)
                counts[bucket][click.item_id] += round(1_000 * click.weight * weights[click.kind])
                clicked[click.item_id] += 1
                target = world.rows.get(click.item_id)
                if target is not None and not late and click.at_ms > gone:
                    key = click.event_id or f"{partition}/{record.offset}"
                    steps[user] = stepped(world, lists[user], steps.get(user), target, key)
            if click.at_ms <= gone:
                continue
            entry = (click.item_id, click.at_ms, click.kind, click.weight, record.offset)
            top = max(click.at_ms, newest)
            alike = [x[:4] for x in lists[user]].count(entry[:4])
            if late:
                note(beyond[user], [entry])
            elif not (copied and alike > context.get("eddyline.equal", 0)):
                every = [*lists[user], entry]
                lists[user] = sorted([*lists[user], entry], key=lambda x: (-x[1], -x[4]))[:HISTORY]
                oldest = top - 1_000 * settings.history_age_s_max
                lists[user] = [x for x in lists[user] if x[1] >= oldest]
                note(beyond[user], [x for x in every if x not in lists[user]])
                if not copied:
                    add_visits(visits, lists[user], entry, settings.co_visit_items)
            brought(beyond[user], context, gone)
            newest_of(beyond[user])
            marks[user] = mark_of(record, top)
    shown = {"clicked": plain_counts(clicked), "visits": visits}
    shown["seen"] = {user: mine for user, mine in beyond.items() if mine}
    return shown | finished(settings, lists, marks, steps, windows, counts, moved)


def note(beyond: dict[tuple[str, str], int], entries: list[Any]) -> None:
    """Events that are not in the list: the latest minute of each item and kind."""
    for item, at_ms, kind, *_ in entries:
        beyond[item, kind] = max(at_ms // 60_000, beyond.get((item, kind), 0))


def brought(beyond: dict[tuple[str, str], int], context: Mapping[str, Any], gone: int) -> None:
    """What a moved click carries, but for what the erasure covers."""
    for _, text in sorted((k, v) for k, v in context.items() if "seen" in k):
        for key, stamp in struct.iter_unpack("<8sI", base64.b64decode(str(text))):
            minute = stamp // 8
            if minute * 60_000 > gone:
                name = NAMES[key], KINDS[stamp % 8]
                beyond[name] = max(minute, beyond.get(name, 0))


def newest_of(beyond: dict[tuple[str, str], int]) -> None:
    """Leave the newest `SEEN` of them."""
    order = {v: k for k, v in NAMES.items()}

    def age(one: tuple[str, str]) -> tuple[int, int, int]:
        return beyond[one], KINDS.index(one[1]), int.from_bytes(order[one[0]], "little")

    for one in sorted(beyond, key=age)[: max(0, len(beyond) - SEEN)]:
        del beyond[one]


def stepped(
    world: Any, entries: list[Any], before: tuple[int, Any] | None, target: int, key: str
) -> tuple[int, Any]:
    """(events, embedding) of a user after one more event."""
    count, e = before or (0, np.zeros(D, np.float32))
    if count >= 2:
        f = world.user_tower.encode(world.item_vectors, [liked_rows(world, entries)], [{}])
        e = world.micro.step(f, e[None], [target], [key])[0]
    return count + 1, e


def add_visits(
    visits: dict[tuple[str, str], tuple[int, int]], entries: list[Any], entry: Any, limit: int
) -> None:
    if entry not in entries or entry[2] == "dislike":
        return
    older = [x[0] for x in entries[entries.index(entry) + 1 :] if x[2] != "dislike"]
    for distance, other in enumerate(older[:limit], 1):
        if other != entry[0]:
            milli, after = visits.get((other, entry[0]), (0, 0))
            visits[other, entry[0]] = milli + round(1_000 / distance), after + (distance == 1)


def merged(
    merge: Merge,
    key: str,
    lists: dict[str, list[Any]],
    marks: dict[str, Any],
    steps: dict[str, tuple[int, Any]],
    beyond: dict[str, dict[tuple[str, str], int]],
) -> set[tuple[str, str, int, str, float, str, Beyond]]:
    """The clicks that a merge sends on; the visitor's state is gone afterwards."""
    entries = lists.pop(merge.user_id, [])[::-1]
    for part in (marks, steps):
        part.pop(merge.user_id, None)
    carried = frozenset(beyond.pop(merge.user_id, {}).items())
    last = len(entries) - 1
    return {
        (merge.merge_into, *x[:4], f"{key}/{n}", carried if n == last else frozenset())
        for n, x in enumerate(entries)
    }


def finished(
    settings: Settings, lists: Any, marks: Any, steps: Any, windows: Any, counts: Any, moved: Any
) -> dict[str, Any]:
    newest_bucket = max(counts, default=0)
    return {
        "lists": {u: [x[:4] for x in entries] for u, entries in lists.items()},
        "marks": marks,
        "steps": {u: (n, e.tobytes()) for u, (n, e) in steps.items()},
        "windows": windows,
        "counts": {
            b: dict(c) for b, c in counts.items() if b > newest_bucket - settings.popular_buckets
        },
        "moved": moved,
    }


def found(settings: Settings, store: MemoryStore, logs: dict[int, list[Rec]]) -> dict[str, Any]:
    """The store's state in the oracle's form; windows are cut to what can still be met."""
    state = store.snapshot()
    histories = {u: b for (_, u), (b, _) in state.histories.items()}
    counts: dict[int, dict[str, int]] = defaultdict(dict)
    for buckets in state.buckets.values():
        for bucket, counted in buckets.items():
            counts[bucket] |= counted
    return {
        "lists": {
            u: [(e.item_id, e.at_ms, KINDS[e.kind], e.weight) for e in b.entries]
            for u, b in histories.items()
        },
        "marks": {
            u: (b.offset, b.at_ms, b.produced_us, b.appended_ms) for u, b in histories.items()
        },
        "steps": {u: e for (_, _, u), e in state.embeddings.items()},
        "windows": {p: state.window.get(f"u{p}", {}) for p in logs},
        "counts": {b: c for b, c in counts.items() if c},
        "clicked": clicked(settings, store),
        "visits": visits_of(state.rows),
        "seen": {u: seen_of(value) for (_, u), value in state.seen.items() if value},
    }


def seen_of(value: bytes) -> dict[tuple[str, str], int]:
    """(item, kind) -> minute, of stored seen items."""
    found = seen_items.canonical(value, SEEN)
    return {
        (NAMES[key], KINDS[stamp % 8]): stamp // 8
        for key, stamp in struct.iter_unpack("<8sI", found)
    }


def visits_of(rows: dict[tuple[str, str, str], bytes]) -> dict[tuple[str, str], tuple[int, int]]:
    """(earlier item, later item) -> counts, which the rows of both items have."""
    names = {item_key(f"i{n}"): f"i{n}" for n in range(10)}
    found: dict[str, dict[tuple[str, str], tuple[int, int]]] = {"after": {}, "before": {}}
    for (_, kind, item), row in rows.items():
        for key, counts in totals(row)[0].items():
            pair = (item, names[key]) if kind == "after" else (names[key], item)
            found[kind][pair] = counts
    assert found["after"] == found["before"]
    return found["after"]


def clicked(settings: Settings, store: MemoryStore) -> dict[str, int]:
    """The events of each item, and of all, as `plain_counts` gives them."""
    total: Counter[str] = Counter()
    for slot in range(settings.item_slots):
        total.update(stored_counts(store, f"i{slot}", decays(settings)))
    return dict(total)


def moves(outside: Outside) -> set[tuple[str, str, int, str, float, str, Beyond]]:
    """What merges forwarded, in the oracle's form."""
    values = [value for _, _, value in outside.forwarded if b"merge/" in value]
    sent = [msgspec.json.decode(value, type=Click) for value in values]
    return {
        (
            *(c.user_id, c.item_id, c.at_ms, c.kind, c.weight, str(c.event_id)),
            frozenset(seen_of(seen_items.from_texts(seen_items.moved_texts(c))).items()),
        )
        for c in sent
    }


def same(settings: Settings, store: MemoryStore, logs: dict[int, list[Rec]]) -> None:
    wanted, got = oracle(settings, logs), found(settings, store, logs)
    for partition, records in logs.items():
        floor = records[-1].offset + 1 - WINDOW
        kept = {e: o for e, o in wanted["windows"][partition].items() if o >= floor}
        # An id leaves the window with the next one that enters.
        assert {e: o for e, o in got["windows"][partition].items() if o >= floor} == kept
    for part in ("lists", "marks", "steps", "counts", "clicked", "visits", "seen"):
        assert got[part] == wanted[part], part


# --- running
# -----------------------------------------------------------------------------------------------


def make_settings(item_slots: int = 1, **more: Any) -> Settings:
    return Settings(
        clicks_partitions=PARTITIONS,
        items_partitions=PARTITIONS,
        item_slots=item_slots,
        chunk_records_max=8,
        history_length_max=HISTORY,
        dedupe_window_events=WINDOW,
        popular_buckets=3,
        path_state="all",
        co_visit_items=4,
        seen_items_max=SEEN,
        co_visit_row_max=20,  # no row has more than nine others: none is pruned
        history_age_s_max=15,
        lateness_s_max=86_400,
        popular_fast_half_life_events=NO_DECAY,
        **more,
    )


def make_clicks(
    settings: Settings, store: MemoryStore, outside: Outside, *worlds: Any
) -> ClickHandler:
    ticks = iter(range(1_000_000))
    fences = PartitionFences(settings, store, CLICKS, {CLICKS: LOG})
    micro = [MicroSteps(world) for world in worlds or [World()]]
    return ClickHandler(
        settings, store, fences, outside, outside, micro, lambda: next(ticks) * 0.03
    )


def make_items(
    settings: Settings, store: MemoryStore, outside: Outside, wait_s: float = 0.0
) -> ItemHandler:
    ticks = iter(range(1_000_000))
    fences = PartitionFences(settings, store, ITEMS, {ITEMS: LOG}, ["1"])
    generations = [Generation(World(), outside)]
    handler = ItemHandler(settings, store, fences, outside, generations, wait_s, lambda: 5)
    handler.metadata._clock_s = lambda: next(ticks) * 0.03
    return handler


@dataclass
class Process:
    """What an ingest process does with one partition at a time: read on, apply, go back, die."""

    make: Any
    logs: dict[int, list[Rec]]
    rng: random.Random
    handler: Any = None
    at: dict[int, int] = field(default_factory=dict)
    deaths: int = 0
    rewinds: int = 0

    def start(self) -> None:
        self.handler = self.make()
        self.at = {}
        for partition in self.logs:
            self.open(partition)

    def open(self, partition: int) -> None:
        self.handler.open(partition)
        end = self.logs[partition][-1].offset + 1
        self.at |= self.handler.fences.open({partition: (0, end)})
        # As the dispatcher does: visits of the outbox are pending again, also if nothing is left
        # to read.
        self.handler.prepare([partition])

    def turn(self, partition: int, size: int) -> bool:
        """One batch; False at the end of the log."""
        records = [r for r in self.logs[partition] if r.offset >= self.at[partition]][:size]
        if not records:
            return False
        try:
            ingest(self.handler, partition, records)
            self.at[partition] = records[-1].offset + 1
        except FenceMoved:
            self.rewinds += 1
            self.open(partition)
        except (StoreUnavailable, KafkaUnavailable):
            self.open(partition)
        except Died:
            self.deaths += 1
            self.start()
        return True

    def write_pending(self, partition: int) -> bool:
        """Counts and metadata that waited for more; True where they have to be done again."""
        try:
            self.handler.write_behind.write(partition)
        except FenceMoved:
            self.open(partition)
            return True
        return False

    def finish(self) -> None:
        for _ in range(10_000):
            if [
                p
                for p in self.logs
                if self.turn(p, self.rng.randint(1, 8)) or self.write_pending(p)
            ]:
                continue
            moved = self.handler.fences.find_diverged(
                list(self.logs)
            )  # as an idle process asks now and then
            if not moved:
                return
            for partition in moved:
                self.open(partition)
        raise AssertionError("the log does not come to its end")


@pytest.mark.parametrize("seed", range(12))
def test_any_batching_gives_the_state_of_the_log(seed: int) -> None:
    rng = random.Random(seed)
    settings = make_settings(item_slots=rng.choice([1, 3]))
    store, outside = Encoded(), Outside(settings)
    process = Process(lambda: make_clicks(settings, store, outside), clicks_log(rng, 120), rng)
    process.start()
    process.finish()
    same(settings, store, process.logs)
    assert moves(outside) == oracle(settings, process.logs)["moved"] != set()


@pytest.mark.parametrize("seed", range(20))
def test_every_effect_exactly_once_whatever_fails(seed: int) -> None:
    rng = random.Random(100 + seed)
    settings = make_settings(item_slots=rng.choice([1, 3]))
    store, outside = Unsure(), Outside(settings)
    process = Process(lambda: make_clicks(settings, store, outside), clicks_log(rng, 150), rng)
    process.start()
    old = store.snapshot()
    for _ in range(400):
        if rng.random() < 0.3:
            store.faults = rng.choices(FAULTS, k=3)
        if rng.random() < 0.1:
            outside.away = rng.randint(1, 2)
        if rng.random() < 0.03:
            store.restore(old)  # Redis lost what came after
        elif rng.random() < 0.1:
            old = store.snapshot()
        process.turn(rng.randrange(PARTITIONS), rng.randint(1, 8))
    store.faults, outside.away = [], 0
    process.finish()
    assert process.deaths and process.rewinds
    same(settings, store, process.logs)
    assert moves(outside) == oracle(settings, process.logs)["moved"]
    refused = {
        (r.partition, r.offset) for p in process.logs.values() for r in p if rubbish(settings, r)
    }
    assert {letter[:2] for letter in outside.letters} == refused


def rubbish(settings: Settings, record: Rec) -> bool:
    try:
        events.decode_user_event(
            record.value, appended_ms=record.timestamp, far_future_ms_max=300_000, id_form="nfc"
        )
    except Rejected:
        return True
    return False


@pytest.mark.parametrize("seed", range(8))
def test_two_processes_on_one_partition_do_not_double(seed: int) -> None:
    """A zombie and the new owner in turns: each batch of one is refused to the other."""
    rng = random.Random(200 + seed)
    settings, store = make_settings(), MemoryStore()
    outside = Outside(settings)
    logs = clicks_log(rng, 100)
    pair = [Process(lambda: make_clicks(settings, store, outside), logs, rng) for _ in range(2)]
    for process in pair:
        process.start()
    for _ in range(200):
        rng.choice(pair).turn(rng.randrange(PARTITIONS), rng.randint(1, 8))
    pair[0].finish()
    assert pair[0].rewinds + pair[1].rewinds > 5
    same(settings, store, logs)


def test_what_was_sent_on_before_is_not_sent_again_by_an_emptied_redis() -> None:
    settings, rng = make_settings(), random.Random(3)
    logs, outside = clicks_log(rng, 120), Outside(make_settings())
    forwarded = []
    for sent in (0, 10_000):
        store = MemoryStore()
        process = Process(lambda store=store: make_clicks(settings, store, outside), logs, rng)
        process.start()
        for partition in logs:
            end = logs[partition][-1].offset + 1
            process.handler.fences.open({partition: (0, end)}, {partition: sent})
        process.finish()
        same(settings, store, logs)
        forwarded.append(len(outside.forwarded))
    assert forwarded[0] == forwarded[1] > 0


@pytest.mark.parametrize("seed", range(6))
def test_forwarded_clicks_count_once_in_their_own_partition(seed: int) -> None:
    rng = random.Random(300 + seed)
    settings, outside = make_settings(), None
    store, outside = Unsure(), Outside(settings)
    process = Process(lambda: make_clicks(settings, store, outside), clicks_log(rng, 60), rng)
    process.start()
    for _ in range(200):
        store.faults = rng.choices(FAULTS, k=3)
        process.turn(rng.randrange(PARTITIONS), rng.randint(1, 8))
    store.faults = []
    process.finish()
    # What Kafka holds after the forwarding, repeats included: appended behind each log.
    for partition, key, value in outside.forwarded:
        last = process.logs[partition][-1]
        again = Rec("clicks", partition, last.offset + 1, last.timestamp, key, value, STAMP)
        process.logs[partition].append(again)
    strays = len({v for _, _, v in outside.forwarded})
    assert strays and all(
        partition_of(k.decode(), PARTITIONS) == p for p, k, _ in outside.forwarded
    )
    forwarded_before = len(outside.forwarded)
    process.start()
    process.finish()
    assert len(outside.forwarded) == forwarded_before  # nobody forwards them again
    same(settings, store, process.logs)


class RealWorld(World):
    """The real engines, untrained: their tiles must make the batch invisible."""

    dimension = 64

    def __init__(self) -> None:
        rng = np.random.default_rng(1)

        def some(*shape: int) -> Any:
            return (rng.normal(size=shape) * 0.1).astype(np.float32)

        space = learn_profiles([{"age": 20}, {"age": 50}])
        d = self.dimension
        arrays = {
            "query": some(d, 2 * d),
            "query_bias": some(2 * d),
            "bias": some(2, 20),
            "value": some(2 * d, d),
            "start": some(d),
            "profile": some(space.rows, d),
            "w1": some(d, 32),
            "b1": some(32),
            "w2": some(32, d),
            "b2": some(d),
        }
        self.item_vectors = unit(some(8, d))
        self.user_tower = UserTower(space, arrays)  # type: ignore[assignment]
        self.micro = MicroStep(self.item_vectors, MicroSettings())  # type: ignore[assignment]


def test_the_real_engines_give_the_same_bits_whatever_the_batching() -> None:
    settings, found_bits = make_settings(), []
    logs = clicks_log(random.Random(5), 500)
    for sizes in ([1], [500], [3, 64, 17]):
        store, outside = MemoryStore(), Outside(settings)
        handler = make_clicks(settings, store, outside, RealWorld())
        handler.fences.open({p: (0, 10_000) for p in logs})
        steps = 0
        for partition, records in logs.items():
            at, turn = 0, 0
            while at < len(records):
                size = sizes[turn % len(sizes)]
                steps += ingest(handler, partition, records[at : at + size]).steps
                at, turn = at + size, turn + 1
            handler.write_behind.write(partition)
        state = store.snapshot()
        lists = {user: seen for user, (seen, _) in state.histories.items()}
        floors = {f"u{p}": records[-1].offset + 1 - WINDOW for p, records in logs.items()}
        window = {
            (s, e): o for s, ids in state.window.items() for e, o in ids.items() if o >= floors[s]
        }
        found_bits.append(
            (
                lists,
                state.embeddings,
                window,
                state.buckets,
                sorted(outside.forwarded),
                visits_of(state.rows),
            )
        )
        assert steps > 30  # those of a user who is merged away in the same batch are not taken
    assert found_bits[0] == found_bits[1] == found_bits[2]


# --- items
# -------------------------------------------------------------------------------------------------


def items_log(rng: random.Random, length: int) -> dict[int, list[Rec]]:
    logs = {}
    for partition in range(PARTITIONS):
        records = []
        for offset in range(length):
            item_id = f"i{rng.randrange(9)}"
            item: Item | None = Item(
                item_id=item_id, title="t" * offset, available=rng.random() < 0.7, tags=["x"]
            )
            if rng.random() < 0.25:
                item = None
            value = (
                b"rubbish" if rng.random() < 0.05 else None if item is None else events.encode(item)
            )
            records.append(
                Rec("items", partition, offset, BASE_MS + offset, item_id.encode(), value)
            )
        logs[partition] = records
    return logs


@pytest.mark.parametrize("wait_s", [0.0, 0.1])
@pytest.mark.parametrize("seed", range(10))
def test_items_end_as_their_last_change(seed: int, wait_s: float) -> None:
    rng = random.Random(400 + seed)
    settings = make_settings(item_slots=rng.choice([1, 3]))
    store, outside = Unsure(), Outside(settings)
    logs = items_log(rng, 80)
    process = Process(lambda: make_items(settings, store, outside, wait_s), logs, rng)
    process.start()
    old = store.snapshot()
    for _ in range(200):
        if rng.random() < 0.3:
            store.faults = rng.choices(FAULTS, k=4)
        outside.away = int(rng.random() < 0.1)
        if rng.random() < 0.03:
            store.restore(old)
        elif rng.random() < 0.1:
            old = store.snapshot()
        process.turn(rng.randrange(PARTITIONS), rng.randint(1, 8))
    store.faults, outside.away = [], 0
    process.finish()
    last: dict[str, Rec] = {}
    for partition, records in logs.items():
        for r in records:
            item_id = r.key.decode()  # type: ignore[union-attr]
            right = partition_of(item_id, PARTITIONS) == partition
            if right and r.value != b"rubbish":
                last[item_id] = r
    replica: dict[str, ItemRecord] = {}
    for record in outside.published:  # as a worker applies them: the highest version stands
        if record.item_id not in replica or record.offset >= replica[record.item_id].offset:
            replica[record.item_id] = record
    metadata = store.read_item_metadata(list(last), settings.item_slots)
    assert set(metadata) == set(last) == set(replica)
    for item_id, r in last.items():
        item = None if r.value is None else msgspec.json.decode(r.value, type=Item)
        assert (metadata[item_id].partition, metadata[item_id].offset) == (r.partition, r.offset)
        assert metadata[item_id].body == (b"" if item is None else events.encode(item))
        assert (replica[item_id].partition, replica[item_id].offset) == (r.partition, r.offset)
        assert replica[item_id].retired == (item is None or not item.available)
        if item is not None and item.available:
            assert np.array_equal(replica[item_id].vector, of_title(item))  # type: ignore[arg-type]
    assert item_slot("i1", 1) == "i0"


@pytest.mark.parametrize("wait_s", [0.0, 10.0])
@pytest.mark.parametrize("seed", range(12))
def test_an_owner_who_froze_leaves_no_older_record_behind_a_newer_one(
    seed: int, wait_s: float
) -> None:
    """It published, lost the partition, and wakes to write the fence that its successor expects.

    The topic is compacted: what lies last of an item is what a new worker finds.
    """
    rng = random.Random(500 + seed)
    settings, store = make_settings(), MemoryStore()
    outside, log = Outside(settings), items_log(rng, 32)[0]
    old, new = (
        make_items(settings, store, outside, 10.0),
        make_items(settings, store, outside, wait_s),
    )
    at = 0

    def opened() -> int:
        new.open(0)
        return new.fences.open({0: (0, len(log))})[0]

    old.fences.open({0: (0, len(log))})
    for start in range(0, 30, 10):
        ingest(old, 0, log[start : start + 10])
    at = opened()
    wakes = rng.randint(1, 4)
    for turn in range(200):
        if turn == wakes:
            with contextlib.suppress(FenceMoved):  # it may be too late
                old.metadata.write(0)
        records = log[at : at + rng.randint(1, 8)]
        try:
            if records:
                ingest(new, 0, records)
                at = records[-1].offset + 1
            if rng.random() < 0.4 or not records:
                new.metadata.write(0)  # as the clock has it
            if not records and turn > wakes:
                break
        except FenceMoved:
            at = opened()
    newest, last = dict[str, int](), dict[str, int]()
    for record in outside.published:
        newest[record.item_id] = max(record.offset, newest.get(record.item_id, -1))
        last[record.item_id] = record.offset
    assert last == newest and new.fences.lowest(0) == len(log) - 1
    assert new.metadata.unconfirmed(published_source("1", 0)) is None
