"""`eddyline plan`: the memory that Redis and a query worker need for so many users and items.

Redis measures samples: one transaction writes a sample, runs `MEMORY USAGE` and deletes the sample.
Tests compare the sum with the memory that a real server uses, within 10 %.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from redis.client import Pipeline
from redis.exceptions import RedisError
from rich.table import Table

from cli.console import console
from eddyline.errors import SettingsError
from eddyline.schema import co_visits, seen_items, user_history
from eddyline.schema.co_visits import Visit
from eddyline.schema.event_decay import decays
from eddyline.schema.user_history import Entry, UserHistory
from eddyline.settings.loader import Settings
from eddyline.stores import outbox, redis_client, user_codec
from eddyline.stores.redis_errors import translate_error
from eddyline.stores.redis_url import target
from eddyline.stores.state_store import Fence, LogId

_UNITS = {"k": 10**3, "M": 10**6, "G": 10**9}
# Table of keys, which `MEMORY USAGE` leaves out. In Valkey: 64 bytes for 7 keys, 2/3 full.
_TABLE_KEY = 15
# An entry in the table of expiry times: a pointer and a number, tables half full.
_EXPIRY = 48
# What has ended is removed at most so much later: an hour, and the pause between two removals.
_REMOVED_S = 25_200
# Sample sizes of a window and of a bucket; larger ones cost as much for each blob and member.
_SAMPLE_BLOBS, _SAMPLE_MEMBERS = 16, 2_000
# Visits in the outbox of a partition: those of two writes to the rows.
_OUTBOX_VISITS = 256
# Up to 3 MB garbage of the Lua interpreter (measured) and buffers of some dozens of connections.
_REDIS_BASE = 6_000_000
# A query worker, per item: ids, labels, attributes, spare capacity. Measured: 854 bytes in all with
# 100,000 items of 64 dimensions and three attributes; the graph follows from hnswlib's layout.
_WORKER_ITEM = 546
# The key of an item and its slots, measured with 100,000 and 1,000,000 items; at most 40.
_WORKER_KEY = 21
# The interpreter with numpy, gRPC and hnswlib: a process without its index.
_WORKER_BASE = 150_000_000
_MS = 1_700_000_000_000


@dataclass(frozen=True, slots=True)
class Sizes:
    """The state to plan for; lengths in bytes.

    history: events of a user, the newest of which are in the history
    profile, item_json: encoded size; clicks_a_day: 0: one a user
    forgotten_a_day: users forgotten each day, merged visitors included
    visitors_a_day: users besides, who come once with one event and become idle
    deleted_a_day: items deleted each day
    generations: with embeddings of every user; 0: `generations_kept`
    """

    users: int
    items: int
    history: int
    dimension: int = 64
    user_id: int = 12
    item_id: int = 12
    event_id: int = 32
    profile: int = 64
    item_json: int = 300
    clicks_a_day: int = 0
    generations: int = 0
    forgotten_a_day: int = 0
    visitors_a_day: int = 0
    deleted_a_day: int = 0


@dataclass(frozen=True, slots=True)
class Part:
    """One line of the plan. keys: number of keys or members; size: bytes in all."""

    what: str
    keys: int
    size: int


def amount(text: str) -> int:
    """A count with a unit.

    >>> amount("10M"), amount("2.5k"), amount("300")
    (10000000, 2500, 300)
    """
    factor = _UNITS.get(text[-1:], 1)
    try:
        return round(float(text.rstrip("kMG") if factor > 1 else text) * factor)
    except ValueError:
        raise SettingsError(f"{text!r}: expected a number, as 300, 2.5k or 10M") from None


class Meter:
    """Measures sample values in the Redis of the settings; leaves no key, even when killed."""

    def __init__(self, settings: Settings) -> None:
        """Connects on first use. Raises SettingsError."""
        self._target = target(settings)
        self._redis = redis_client.client(settings)
        self._name = f"{settings.key_prefix}{{u}}:plan{uuid.uuid4().hex[:8]}"

    def string(self, key: int, value: bytes) -> int:
        """Bytes of one key of that length with a string value."""
        return self._measure(key, lambda pipe, name: pipe.set(name, value))

    def list_blob(self, blob: bytes) -> float:
        """Bytes of one blob in a long list."""
        blobs = [blob] * _SAMPLE_BLOBS
        return self._measure(0, lambda pipe, name: pipe.rpush(name, *blobs)) / _SAMPLE_BLOBS

    def sorted_set(self, members: int, member: int) -> int:
        """Bytes of a sorted set of members of that length."""
        if not members:
            return 0
        # Halving keeps the load of the member table, which grows by doubling.
        halvings = max(0, math.ceil(math.log2(members / _SAMPLE_MEMBERS)))
        scores = {f"{n:0{member}d}": 1_000 + n for n in range(members >> halvings)}
        return self._measure(0, lambda pipe, name: pipe.zadd(name, scores)) << halvings

    def close(self) -> None:
        """Close the connection."""
        self._redis.close()

    def _measure(self, key: int, write: Callable[[Pipeline, str], Any]) -> int:
        """MEMORY USAGE after a write. Raises StoreUnavailable, StoreRefused."""
        name = self._name.ljust(key, "0")
        try:
            with self._redis.pipeline(transaction=True) as pipe:
                write(pipe, name)
                pipe.memory_usage(name, samples=0)
                pipe.delete(name)
                return int(pipe.execute()[1])
        except RedisError as error:
            raise translate_error(error, self._target) from None


def redis_parts(settings: Settings, sizes: Sizes) -> list[Part]:
    """The memory of each kind of state in Redis. Raises StoreUnavailable, StoreRefused."""
    meter = Meter(settings)
    try:
        return _redis_parts(settings, sizes, meter)
    finally:
        meter.close()


def _redis_parts(settings: Settings, sizes: Sizes, meter: Meter) -> list[Part]:
    prefix = len(settings.key_prefix) + len("{u00}:h:")
    user_key, item_key = prefix + sizes.user_id, prefix + sizes.item_id
    # Those that have ended are removed.
    kept = sizes.generations or settings.generations_kept
    users, items, vectors = sizes.users, sizes.items, sizes.users * kept
    window = settings.dedupe_window_events * settings.clicks_partitions
    rows = 2 * items if settings.kept_co_visit_items else 0
    of_items = settings.item_slots * (2 if rows else 1)
    fences = settings.clicks_partitions * (2 + of_items) + 2 * settings.items_partitions
    daily = (sizes.clicks_a_day or users) * settings.popular_bucket_s // 86_400
    bucket = min(items, settings.popular_items_max, max(1, daily))
    popular = bucket * settings.popular_buckets
    fence = str(Fence(10**12, LogId("x" * 22, "x" * 22))).encode()
    recent, older = list_values(min(sizes.history, settings.history_length_max), sizes.item_id)
    lists = meter.string(user_key, recent) + (meter.string(user_key, older) if older else 0)
    room = seen_room(sizes.history - settings.history_length_max, settings.seen_items_max)
    seen = meter.string(user_key + 3, bytes(room)) if room else 0
    embedding = meter.string(user_key + 2, bytes(4 + 4 * sizes.dimension))
    visitors = _kept(sizes.visitors_a_day, settings.user_idle_s_max, "user_idle_s_max")
    deleted = _kept(sizes.deleted_a_day, settings.deleted_items_kept_s, "deleted_items_kept_s")
    once, _ = list_values(1, sizes.item_id)
    visitor = meter.string(user_key, once) + embedding if visitors else 0
    erasures = sizes.forgotten_a_day * settings.forgotten_kept_d
    erasure = meter.string(prefix + 64, bytes(24)) + _EXPIRY if erasures else 0
    names = meter.string(prefix + 8, bytes(8 * kept))
    profile = meter.string(user_key, bytes(16 + sizes.profile)) if sizes.profile else 0
    metadata = meter.string(item_key, bytes(21 + sizes.item_json))
    # Full rows: an append to a compacted one doubles its room.
    compacted = co_visits.HEADER_BYTES + settings.co_visit_row_max // 2 * co_visits.ENTRY_BYTES
    row = meter.string(item_key + 5, bytes(2 * (compacted + co_visits.ENTRY_BYTES))) if rows else 0
    row += _EXPIRY if settings.co_visit_idle_s_max else 0
    older_items = ["x" * sizes.item_id] * settings.kept_co_visit_items
    visits: list[Visit] = [(10**6, "x" * sizes.item_id, older_items)] * settings.chunk_records_max
    visit = meter.list_blob(outbox.encode(visits, 0)) / len(visits) if rows else 0
    in_outbox = _OUTBOX_VISITS * settings.clicks_partitions if rows else 0
    deletion = meter.string(item_key, bytes(29)) if deleted else 0
    ids = [f"{n:0{sizes.event_id}d}" for n in range(settings.chunk_records_max)]
    blob = user_codec.encode_accepted({event_id: n for n, event_id in enumerate(ids)}, 0)
    keys = users * (1 + bool(older) + bool(seen) + bool(sizes.profile)) + vectors + items + fences
    keys += rows + 2 * visitors + erasures + deleted + settings.clicks_partitions
    return [
        Part("user histories", users, users * lists),
        Part("seen items beyond the histories", users if seen else 0, users * seen),
        Part("user-ID embeddings", vectors, vectors * embedding),
        Part("visitors until they are idle", visitors, visitors * visitor),
        Part("profiles", users, users * profile),
        Part("forgotten users", erasures, erasures * erasure),
        Part(
            "names of generations", settings.clicks_partitions, settings.clicks_partitions * names
        ),
        Part("item metadata", items, items * metadata),
        Part("deleted items until they end", deleted, deleted * deletion),
        Part("event-id windows", window, round(window / len(ids) * meter.list_blob(blob))),
        Part(
            "popularity",
            popular,
            settings.popular_buckets * meter.sorted_set(bucket, sizes.item_id),
        ),
        _by_events(settings, sizes, meter),
        Part("co-visitation rows", rows, rows * row),
        Part("visits for those rows", in_outbox, round(in_outbox * visit)),
        Part("fences", fences, fences * meter.string(prefix + 20, fence)),
        Part("table of keys", 0, keys * _TABLE_KEY),
        Part("scripts and connections", 0, _REDIS_BASE),
    ]


def _by_events(settings: Settings, sizes: Sizes, meter: Meter) -> Part:
    """Two full epochs of each half-life, with as many items as events."""
    found = Part("popularity by events", 0, 0)
    items = min(settings.popular_items_max, math.ceil(sizes.items / settings.item_slots))
    for decay in dict.fromkeys(decays(settings)) if settings.keeps_event_sums else ():
        members, sets = min(items, math.ceil(decay.epoch_events)), 2 * settings.item_slots
        size = sets * meter.sorted_set(members, sizes.item_id)
        found = Part(found.what, found.keys + sets * members, found.size + size)
    return found


def _kept(a_day: int, kept_s: int, setting: str) -> int:
    """How many are in Redis of what ends after `kept_s`; ingest removes them some hours later."""
    if not a_day:
        return 0
    if not kept_s:
        raise SettingsError(f"{setting} = 0: they stay for ever; set it to plan for them")
    return round(a_day * (kept_s + min(kept_s / 4, _REMOVED_S)) / 86_400)


def seen_room(events: int, items_max: int) -> int:
    """Bytes that Redis keeps for the seen items of a user with so many events beyond the history.

    An append doubles the room of a string that it does not fit into.

    >>> seen_room(0, 1_000), seen_room(1, 1_000), seen_room(5, 1_000), seen_room(5_000, 1_000)
    (0, 12, 120, 24024)
    """
    if events <= 0 or not items_max:
        return 0
    size = seen_items.ENTRY_BYTES
    if events >= items_max:
        return 2 * size * (items_max + 1)  # compacted, and grown again
    room = size
    while room < size * events:
        room = 2 * (room + size)
    return room


def worker_parts(settings: Settings, sizes: Sizes) -> list[Part]:
    """The memory of a query worker: one replica of the index, and a second one during a rebuild."""
    items, vector = sizes.items, 4 * sizes.dimension
    table = items * (vector + 40)
    graph = (
        0 if items <= settings.index_exact_below else items * (vector + 8 * settings.index_m + 24)
    )
    return [
        Part("vectors and their columns", items, table),
        Part("ids and attributes", items, items * (_WORKER_ITEM + sizes.item_id)),
        Part("table of item keys", items, items * _WORKER_KEY),
        Part("graph", items, graph),
        Part("graph and vectors while it rebuilds", items, graph + (table if graph else 0)),
        Part(
            "popular list", settings.popular_limit, settings.popular_limit * (200 + sizes.item_id)
        ),
        Part("the process itself", 1, _WORKER_BASE),
    ]


def list_values(history: int, item_id: int) -> tuple[bytes, bytes]:
    """A stored history of that many entries: (*recent* with its stamps, *older*).

    *recent* has half of its maximum, the average; see `user_history`.
    """
    entries = tuple(Entry("i" * item_id, _MS - n, 1, 1.0) for n in range(history))
    short = history <= user_history.RECENT_MAX
    recent = entries if short else entries[: user_history.RECENT_MAX // 2]
    whole = UserHistory(
        partition=3,
        offset=10**6,
        at_ms=_MS,
        produced_us=_MS * 1_000,
        appended_ms=_MS,
        read_us=_MS * 1_000,
        entries=entries,
    )
    head = user_history.encode_recent(whole, [user_history.compact(e) for e in recent]) + bytes(8)
    return head, b"" if short else user_history.encode_older(entries)


def show(settings: Settings, sizes: Sizes, *, as_json: bool) -> None:
    """Print the plan. Raises StoreUnavailable, StoreRefused."""
    parts = {
        "Redis": redis_parts(settings, sizes),
        "each query worker": worker_parts(settings, sizes),
    }
    if as_json:
        listed = {
            name: [{"what": p.what, "bytes": p.size} for p in of] for name, of in parts.items()
        }
        console.print(msgspec.json.encode(listed).decode())
        return
    for name, of in parts.items():
        table = Table(name, "number", "memory", show_edge=False, pad_edge=False)
        for part in of:
            if part.size:
                table.add_row(part.what, f"{part.keys:,}" if part.keys else "", _shown(part.size))
        table.add_row("all", "", _shown(sum(part.size for part in of)))
        console.print(table)
        console.print()
    console.print(
        "Redis needs half as much again while it rewrites its file or a replica synchronizes."
    )


def _shown(size: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"
