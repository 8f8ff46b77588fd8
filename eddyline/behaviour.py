"""A user's behaviour list: what he did last, newest first, and how the newest of it got here.

Binary layout (the value of `{u…}:h:<user>` in Redis): MessagePack of the array
`[version, partition, offset, at_ms, produced_us, appended_ms, read_us, entries]`, where entries is an
array of `[item_id, at_ms, kind, weight]`, newest first by `at_ms`, a later offset before an earlier one
where equal; then 8 bytes, little-endian signed: `applied_us`, Redis' own clock when the write script ran.
"""

from __future__ import annotations

from bisect import bisect_left

import msgspec

from eddyline.events import KINDS

LAYOUT_VERSION = 1


class Entry(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One behaviour. kind is an index into `events.KINDS`."""

    item_id: str
    at_ms: int
    kind: int = 0
    weight: float = 1.0


class Behaviour(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """A user's list and his own watermark: the last event applied to it, with its stamps.

    partition, offset: the coordinates (token) of the last event applied
    at_ms:             the largest event time seen
    produced_us, appended_ms, read_us: stamps of that event by producer, broker and ingest; 0 is unknown
    """

    version: int = LAYOUT_VERSION
    partition: int = -1
    offset: int = -1
    at_ms: int = 0
    produced_us: int = 0
    appended_ms: int = 0
    read_us: int = 0
    entries: tuple[Entry, ...] = ()


EMPTY = Behaviour()
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Behaviour)


def encode(behaviour: Behaviour) -> bytes:
    """The layout above without its last 8 bytes, which the write script appends."""
    return _encoder.encode(behaviour)


def decode(value: bytes) -> tuple[Behaviour, int]:
    """(behaviour, applied_us) from a stored value."""
    return _decoder.decode(value[:-8]), int.from_bytes(value[-8:], "little", signed=True)


def insert(entries: list[Entry], entry: Entry, length_max: int) -> None:
    """Put an entry in its place by time, in place; the oldest one falls off beyond `length_max`.

    An entry goes before those of the same time: entries arrive in the order of their offsets.

    >>> entries = [Entry("b", 20), Entry("a", 10)]
    >>> insert(entries, Entry("c", 20), 3); [e.item_id for e in entries]
    ['c', 'b', 'a']
    >>> insert(entries, Entry("late", 15), 3); [e.item_id for e in entries]
    ['c', 'b', 'late']
    """
    entries.insert(bisect_left(entries, -entry.at_ms, key=lambda e: -e.at_ms), entry)
    del entries[length_max:]


DISLIKE = KINDS.index("dislike")


def liked_items(entries: tuple[Entry, ...] | list[Entry], limit: int) -> list[str]:
    """The ids of the last `limit` behaviours that are not dislikes, newest first, repeats kept."""
    return [e.item_id for e in entries if e.kind != DISLIKE][:limit]
