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
    ours = re.compile(rf"{re.escape(ns)}\{{(u\d+)\}}:h:".encode())
    old_ms = 1_000 * user_history.OLD_IDLE_S_MAX
    for keys in _pages(store, f"{ns}{{u*}}:h:*"):
        of_slots: dict[str, list[str]] = {}
        for key in keys:
            if (at := ours.match(key)) and (slot := at[1].decode()) in fences:
                of_slots.setdefault(slot, []).append(key.decode())
        removed = 0
        for slot, histories in of_slots.items():
            tag = f"{ns}{{{slot}}}"
            names = [fences[slot], f"{tag}:generations", *histories]
            removed += int(script(keys=names, args=[f"{tag}:", slack_ms, old_ms]))
        yield removed


def _pages(store: redis.Redis, match: str) -> Iterator[Sequence[bytes]]:
    cursor: scanning.Cursor | None = scanning.BEGIN
    while cursor is not None:
        cursor, keys = scanning.page(store, cursor, match, _KEYS_A_PAGE)
        yield keys
