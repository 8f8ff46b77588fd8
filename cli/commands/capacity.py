"""`eddyline plan`: the memory that Redis and a query worker need for so many users and items.

The sizes of values are those of the real encoders. What the server adds is modelled as Valkey 9 allocates it
(measured with its libc build); tests compare the sum with the memory that a real one uses, within 10%.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec
from rich.console import Console
from rich.table import Table

from eddyline.errors import SettingsError
from eddyline.schema import user_history
from eddyline.schema.user_history import Entry, UserHistory
from eddyline.settings.loader import Settings
from eddyline.stores import user_codec
from eddyline.stores.state_store import Fence, LogId

Allocator = Literal["jemalloc", "libc"]

_UNITS = {"k": 10**3, "M": 10**6, "G": 10**9}
# A value object with its key inside: 16 bytes, and the key as a short string. Up to 128 bytes, the value too.
_OBJECT, _EMBEDDED_MAX = 16, 128
# A table of keys or members: buckets of 64 bytes for 7 of them, a power of two of buckets. Fuller than this,
# it grows chains of buckets: so many bytes more for each key.
_BUCKET_BYTES, _BUCKET_KEYS, _FULL, _CHAINS = 64, 7, 0.75, 3.4
# A member of a sorted set: score, the node before, the first level; on average a third of a level more.
_MEMBER, _LEVEL = 32, 16
# A node of a list that holds one large value.
_LIST_NODE = 48
# Garbage of the Lua interpreter (up to 3 MB seen) and the buffers of some dozens of connections.
_REDIS_BASE = 6_000_000
# A query worker, per item: ids, labels, attributes and the room to grow. 854 bytes in all were measured with
# 100,000 items of 64 dimensions and three attributes; the graph is reckoned by hnswlib's own layout.
_WORKER_ITEM = 546
# The interpreter with numpy, gRPC and hnswlib, and what a process holds beside its index.
_WORKER_BASE = 150_000_000
_MS = 1_700_000_000_000


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is to be held; lengths in bytes.

    history: behaviours of a user; profile, card: their encoded size; clicks_a_day: 0 is one for each user
    """

    users: int
    items: int
    history: int
    dimension: int = 64
    user_id: int = 12
    item_id: int = 12
    event_id: int = 32
    profile: int = 64
    card: int = 300
    clicks_a_day: int = 0
    generations: int = 1


@dataclass(frozen=True, slots=True)
class Part:
    """One line of the plan. keys: how many keys or members; size: bytes in all."""

    what: str
    keys: int
    size: int


def amount(text: str) -> int:
    """A count as people write it.

    >>> amount("10M"), amount("2.5k"), amount("300")
    (10000000, 2500, 300)
    """
    factor = _UNITS.get(text[-1:], 1)
    try:
        return round(float(text.rstrip("kMG") if factor > 1 else text) * factor)
    except ValueError:
        raise SettingsError(f"{text!r}: expected a number, as 300, 2.5k or 10M") from None


def redis_parts(settings: Settings, sizes: Sizes, allocator: Allocator = "jemalloc") -> list[Part]:
    """The memory of each kind of state in Redis, by the settings' partitions, windows and buckets."""
    prefix = len(f"{settings.namespace}:" if settings.namespace else "") + len("{u00}:h:")
    user_key, item_key = prefix + sizes.user_id, prefix + sizes.item_id
    users, items = sizes.users, sizes.items
    history = min(sizes.history, settings.history_length_max)
    vectors, window = (
        users * sizes.generations,
        settings.dedupe_window_events * settings.clicks_partitions,
    )
    fences = settings.clicks_partitions * (2 + settings.item_slots) + 2 * settings.items_partitions
    daily = sizes.clicks_a_day or users
    bucket_items = min(
        items, settings.popular_items_max, max(1, daily * settings.popular_bucket_s // 86_400)
    )
    popular = bucket_items * settings.popular_buckets
    fence = len(str(Fence(10**12, LogId("x" * 22, "x" * 22))))

    def one(key: int, value: int) -> int:
        return string_bytes(key, value, allocator)

    recent, older = list_bytes(history, sizes.item_id)
    lists = one(user_key, recent) + (one(user_key, older) if older else 0)
    return [
        Part("behaviour lists", users, users * lists),
        Part("user-ID embeddings", vectors, vectors * one(user_key + 2, 4 + 4 * sizes.dimension)),
        Part("profiles", users, users * one(user_key, sizes.profile) if sizes.profile else 0),
        Part("item cards", items, items * one(item_key, 12 + sizes.card)),
        Part(
            "event-id windows",
            window,
            settings.clicks_partitions * window_bytes(settings, sizes.event_id, allocator),
        ),
        Part(
            "popularity",
            popular,
            settings.popular_buckets * set_bytes(bucket_items, sizes.item_id, allocator),
        ),
        Part("fences", fences, fences * one(prefix + 20, fence)),
        Part(
            "table of keys",
            0,
            table_bytes(users * (1 + bool(older) + bool(sizes.profile)) + vectors + items + fences),
        ),
        Part("scripts and connections", 0, _REDIS_BASE),
    ]


def worker_parts(settings: Settings, sizes: Sizes) -> list[Part]:
    """The memory of a query worker: one replica of the index, and a second one while it rebuilds."""
    items, vector = sizes.items, 4 * sizes.dimension
    table = items * (vector + 40)
    graph = (
        0 if items <= settings.index_exact_below else items * (vector + 8 * settings.index_m + 24)
    )
    return [
        Part("vectors and their facts", items, table),
        Part("ids and attributes", items, items * (_WORKER_ITEM + sizes.item_id)),
        Part("graph", items, graph),
        Part("graph and vectors while it rebuilds", items, graph + (table if graph else 0)),
        Part(
            "popular list", settings.popular_limit, settings.popular_limit * (200 + sizes.item_id)
        ),
        Part("the process itself", 1, _WORKER_BASE),
    ]


def list_bytes(history: int, item_id: int) -> tuple[int, int]:
    """A list of that many entries as it is stored: (*recent* with its stamps, *older*), see `behaviour`.

    As many are recent as on average: half of the most there may be.
    """
    entries = tuple(Entry("i" * item_id, _MS - n, 1, 1.0) for n in range(history))
    few = history <= user_history.RECENT_MAX
    recent = [
        user_history.compact(e) for e in entries[: history if few else user_history.RECENT_MAX // 2]
    ]
    full = UserHistory(
        partition=3,
        offset=10**6,
        at_ms=_MS,
        produced_us=_MS * 1_000,
        appended_ms=_MS,
        read_us=_MS * 1_000,
        entries=entries,
    )
    return len(user_history.encode_recent(full, recent)) + 8, 0 if few else len(
        user_history.encode_older(entries)
    )


def window_bytes(settings: Settings, event_id: int, allocator: Allocator) -> int:
    """One event-id window: a list of blobs, each with a chunk's ids; smaller and more at low rates."""
    ids = [f"{n:0{event_id}d}" for n in range(settings.chunk_records_max)]
    blob = len(user_codec.encode_accepted({e: n for n, e in enumerate(ids)}, 0))
    return round(
        settings.dedupe_window_events / len(ids) * (allocated(blob, allocator) + _LIST_NODE)
    )


def string_bytes(key: int, value: int, allocator: Allocator) -> int:
    """What one key with a string value takes, without its place in the table of keys."""
    named = _OBJECT + 1 + _text(key)
    if named + 3 + value + 1 <= _EMBEDDED_MAX:
        return allocated(named + 3 + value + 1, allocator)
    return allocated(named, allocator) + allocated(_text(value, short=False), allocator)


def set_bytes(members: int, member: int, allocator: Allocator) -> int:
    """What a sorted set of so many members of that length takes; more than 128 of them."""
    node = allocated(_MEMBER + 1 + _text(member), allocator) + _LEVEL / 3
    return round(members * node) + table_bytes(members)


def table_bytes(keys: int) -> int:
    """The table of so many keys or members."""
    buckets = 1
    while buckets * _BUCKET_KEYS < keys:
        buckets *= 2
    full = keys > _FULL * buckets * _BUCKET_KEYS
    return buckets * _BUCKET_BYTES + (round(_CHAINS * keys) if full else 0)


def allocated(size: int, allocator: Allocator) -> int:
    """The bytes that the allocator sets aside.

    >>> [allocated(n, "jemalloc") for n in (40, 65, 266, 2506)], [allocated(n, "libc") for n in (40, 65, 266)]
    ([40, 80, 320, 2560], [40, 72, 280])
    """
    if allocator == "libc":
        return max(24, -(-(size - 8) // 16) * 16 + 8)
    if size <= 64:
        return max(8, -(-size // 8) * 8)
    step = 1 << ((size - 1).bit_length() - 3)  # four classes from one power of two to the next
    return -(-size // step) * step


def _text(length: int, *, short: bool = True) -> int:
    """A string with its head and its end."""
    head = 1 if short and length < 32 else 3 if length < 256 else 5 if length < 65_536 else 9
    return head + length + 1


def show(settings: Settings, sizes: Sizes, *, allocator: Allocator, as_json: bool) -> None:
    """Print the plan."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    in_redis, in_worker = redis_parts(settings, sizes, allocator), worker_parts(settings, sizes)
    parts = {"Redis": in_redis, "each query worker": in_worker}
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
        "Redis needs about half as much again while it rewrites its file or a replica begins."
    )


def _shown(size: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"
