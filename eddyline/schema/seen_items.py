"""What a user had beyond the list: the latest event of each item and kind that is not in it.

Binary layout, `{u…}:seen:<user>` in Redis: entries of 12 bytes, little-endian: uint64 key of the
item (`schema.item_key`), uint32 stamp: minutes since 1970 · 8 + kind.

What leaves the user's list, and what comes too late for it, is appended. The set is the newest
`items_max` entries, by (stamp, key), of the latest ones of each (key, kind). Which those are
depends on neither order nor batches: an entry that was dropped once has enough newer ones for ever.
So the stored value may have more: it is compacted once it has twice as many. `write_users.lua`
gives the same bytes as `append`.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from eddyline.schema.events import SEEN_KEY, Click
from eddyline.schema.item_key import KEY_BYTES, key_bytes
from eddyline.schema.user_history import Entry

_ENTRY = struct.Struct(f"<{KEY_BYTES}sI")
_ENTRIES = np.dtype([("key", "<u8"), ("stamp", "<u4")])
ENTRY_BYTES = _ENTRY.size
KIND_BITS = 3
MINUTE_MS = 60_000
# Later events, from the year 2990 on, count as of then.
MINUTES_MAX = 2 ** (32 - KIND_BITS) - 1
# The largest setting `seen_items_max`: one moved click carries so many, in `to_texts`.
ITEMS_MAX = 3_000
# Entries of a text: in base64 they are no longer than the text of an attribute may be.
TEXT_ENTRIES = 62
TEXTS_MAX = -(-ITEMS_MAX // TEXT_ENTRIES)


class SeenItems(NamedTuple):
    """The entries of one user, in no order; of those of a key and kind the latest counts.

    keys:  uint64 (n,), which may repeat
    kinds: int64 (n,), index into `events.KINDS`
    at_ms: int64 (n,), whole minutes
    """

    keys: NDArray[np.uint64]
    kinds: NDArray[np.int64]
    at_ms: NDArray[np.int64]


NONE = SeenItems(np.empty(0, np.uint64), np.empty(0, np.int64), np.empty(0, np.int64))


def stored(entries: Iterable[Entry]) -> bytes:
    """Events as entries, in their order.

    >>> stored([Entry("50", 120_500, 2)]).hex()
    '24eb507b06b6d4ad12000000'
    """
    pack = _ENTRY.pack
    return b"".join(
        pack(key_bytes(e.item_id), min(e.at_ms // MINUTE_MS, MINUTES_MAX) << KIND_BITS | e.kind)
        for e in entries
    )


def append(value: bytes, more: bytes, items_max: int) -> bytes:
    """The stored value after `more` was appended. items_max: at least 1"""
    whole = value + more
    if len(whole) < 2 * items_max * ENTRY_BYTES:
        return whole
    newest: dict[tuple[bytes, int], int] = {}
    for key, stamp in _ENTRY.iter_unpack(whole):
        name = key, stamp % (1 << KIND_BITS)
        newest[name] = max(stamp, newest.get(name, 0))
    entries = [(stamp, int.from_bytes(key, "little")) for (key, _), stamp in newest.items()]
    if len(entries) > items_max:
        least = sorted(entries)[-items_max]
        entries = [entry for entry in entries if entry >= least]
    return b"".join(_ENTRY.pack(key.to_bytes(KEY_BYTES, "little"), stamp) for stamp, key in entries)


def canonical(value: bytes, items_max: int) -> bytes:
    """The set in one form, newest first: equal sets have equal bytes."""
    entries = np.frombuffer(value, _ENTRIES)
    keys, stamps = _newest(entries["key"], entries["stamp"], items_max)
    order = np.lexsort((keys, stamps))[::-1]
    found = np.empty(len(order), _ENTRIES)
    found["key"], found["stamp"] = keys[order], stamps[order]
    return found.tobytes()


def decode(value: bytes, items_max: int) -> SeenItems:
    """The set of a stored value. Raises ValueError for a damaged one; see `check`."""
    if not value or not items_max:
        return NONE
    check(value)
    entries = np.frombuffer(value, _ENTRIES)
    keys, stamps = entries["key"], entries["stamp"]
    if len(keys) > items_max:
        keys, stamps = _newest(keys, stamps, items_max)
    minutes = (stamps >> KIND_BITS).astype(np.int64)
    kinds = (stamps & ((1 << KIND_BITS) - 1)).astype(np.int64)
    return SeenItems(keys.astype(np.uint64), kinds, minutes * MINUTE_MS)


def check(value: bytes) -> None:
    """Raise ValueError for what is no sequence of entries."""
    if len(value) % ENTRY_BYTES:
        raise ValueError(f"seen items of {len(value)} bytes, not a multiple of {ENTRY_BYTES}")


def after(value: bytes, bound_ms: int) -> bytes:
    """The entries that are surely later than `bound_ms`: their whole minute is."""
    entries = np.frombuffer(value, _ENTRIES)
    minutes = (entries["stamp"] >> KIND_BITS).astype(np.int64)
    return entries[minutes * MINUTE_MS > bound_ms].tobytes()


def to_texts(value: bytes) -> list[str]:
    """Entries as texts for the context of a moved click."""
    size = TEXT_ENTRIES * ENTRY_BYTES
    parts = (value[start : start + size] for start in range(0, len(value), size))
    return [base64.b64encode(part).decode() for part in parts]


def moved_texts(click: Click) -> dict[int, object]:
    """What a moved click carries of the visitor's seen items: number -> text."""
    head = len(SEEN_KEY)
    return {
        int(name[head:]): text
        for name, text in (click.context or {}).items()
        if name.startswith(SEEN_KEY) and name[head:].isdecimal() and name.isascii()
    }


def from_texts(texts: Mapping[int, object]) -> bytes:
    """The entries of `to_texts`. A text that is none is left out: a producer made it."""
    found = b""
    for number in sorted(texts):
        text = texts[number]
        try:
            part = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
        except (binascii.Error, ValueError):
            continue
        if len(part) % ENTRY_BYTES == 0:
            found += part
    return found


def _newest(
    keys: NDArray[np.uint64], stamps: NDArray[np.uint32], items_max: int
) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
    """The latest entry of each key and kind; of those the newest `items_max`."""
    kinds = stamps & ((1 << KIND_BITS) - 1)
    order = np.lexsort((stamps, kinds, keys))
    keys, stamps, kinds = keys[order], stamps[order], kinds[order]
    last = np.ones(len(keys), bool)
    last[:-1] = (keys[1:] != keys[:-1]) | (kinds[1:] != kinds[:-1])
    keys, stamps = keys[last], stamps[last]
    if len(keys) > items_max:
        chosen = np.lexsort((keys, stamps))[len(keys) - items_max :]
        keys, stamps = keys[chosen], stamps[chosen]
    return keys, stamps
