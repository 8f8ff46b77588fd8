"""Scans of Redis that remove what has no effect any more, page by page.

They raise redis-py's errors; `stores.redis` translates them. A page takes the server about a
millisecond.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence

import redis

from eddyline.schema import user_history
from eddyline.stores import scanning
from eddyline.stores.item_codec import OLD_KEPT_MS
from eddyline.stores.redis_client import Script

_KEYS_A_PAGE = 1_000


def embeddings(
    store: redis.Redis, ns: str, generation: str, slots: Collection[str]
) -> Iterator[int]:
    """See `StateStore.remove_embeddings`. ns: prefix of all keys"""
    # Matched exactly: a user id may look like one of our keys.
    ours = re.compile(rf"{re.escape(ns)}\{{(u\d+)\}}:e:{re.escape(generation)}:".encode())
    wanted = {slot.encode() for slot in slots}
    for keys in _pages(store, f"{ns}{{u*}}:e:{generation}:*"):
        found = [key for key in keys if (at := ours.match(key)) and at[1] in wanted]
        if found:
            with store.pipeline(transaction=False) as pipe:
                for key in found:
                    pipe.unlink(key)
                pipe.execute()
        yield len(found)


def idle_users(
    store: redis.Redis, ns: str, script: Script, fences: Mapping[str, str], slack_ms: int
) -> Iterator[int]:
    """See `StateStore.remove_idle_users`. fences: slot -> key of its fence of `clicks`"""
    old_ms = 1_000 * user_history.OLD_IDLE_S_MAX
    for found in _by_slot(store, ns, "u", "h", fences):
        removed = 0
        for slot, histories in found.items():
            tag = f"{ns}{{{slot}}}"
            names = [fences[slot], f"{tag}:generations", *histories]
            removed += int(script(keys=names, args=[f"{tag}:", slack_ms, old_ms]))
        yield removed


def deleted_items(
    store: redis.Redis, ns: str, script: Script, fences: Mapping[str, Sequence[str]], slack_ms: int
) -> Iterator[int]:
    """See `StateStore.remove_deleted_items`.

    fences: slot -> keys of its fences of `items`, by partition
    """
    for found in _by_slot(store, ns, "i", "c", fences):
        removed = 0
        for slot, items in found.items():
            args = [len(fences[slot]), slack_ms, OLD_KEPT_MS, f"{ns}{{{slot}}}:"]
            removed += int(script(keys=[*fences[slot], *items], args=args))
        yield removed


def _by_slot(
    store: redis.Redis, ns: str, slots: str, kind: str, wanted: Collection[str]
) -> Iterator[dict[str, list[str]]]:
    """Pages of the keys of a kind, by slot. slots: "u" or "i"; wanted: the slots whose keys count

    Matched exactly: an id may look like one of our keys.
    """
    ours = re.compile(rf"{re.escape(ns)}\{{({slots}\d+)\}}:{kind}:".encode())
    for keys in _pages(store, f"{ns}{{{slots}*}}:{kind}:*"):
        found: dict[str, list[str]] = {}
        for key in keys:
            if (at := ours.match(key)) and (slot := at[1].decode()) in wanted:
                found.setdefault(slot, []).append(key.decode())
        yield found


def _pages(store: redis.Redis, match: str) -> Iterator[Sequence[bytes]]:
    cursor: scanning.Cursor | None = scanning.BEGIN
    while cursor is not None:
        cursor, keys = scanning.page(store, cursor, match, _KEYS_A_PAGE)
        yield keys
