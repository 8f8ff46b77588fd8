"""A user's behaviour list: what he did last, newest first, and how the newest of it got here.

Binary layout in Redis, two values, so that an event writes little of a long list:

* `{u…}:h:<user>`, *recent*: MessagePack of the array `[version, partition, offset, at_ms, produced_us,
  appended_ms, read_us, length, entries]`, then 8 bytes, little-endian signed: `applied_us`, Redis' own clock
  when the write script ran. entries: at most `RECENT_MAX` that were placed since *older* was written.
* `{u…}:o:<user>`, *older*: MessagePack of the array of entries as the list was then; absent on a short list.

An entry is `[item_id, at_ms, kind, weight]`, without what is at its default at the end (kind 0, weight 1);
newest first by `at_ms`, a later offset before an earlier one where equal. The list is the first `length` of
both in that order, recent before older where equal.

Every rule here is a function of the user's events in the order of the log: time is event time, "newest" is
his own newest event, and no clock is asked.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import cast

import msgspec

from eddyline.schema.events import KINDS, Click

LAYOUT_VERSION = 2
# What one event writes of its user's list, at most. 8 entries are about 150 bytes; 4 and 16 cost as much.
RECENT_MAX = 8


CompactEntry = tuple[str | int | float, ...]


class Entry(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One behaviour. kind is an index into `events.KINDS`; weight is the event's own, see `strength`."""

    item_id: str
    at_ms: int
    kind: int = 0
    weight: float = 1.0


class UserHistory(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """A user's list and his own watermark: the last event applied to it, with its stamps.

    partition, offset: the coordinates (token) of the last event applied
    at_ms:             the largest event time seen
    produced_us, appended_ms, read_us: stamps of that event by producer, broker and ingest; 0 is unknown
    entries:           newest first; a tuple in whatever was read, ingest lends its own list to a write
    """

    version: int = LAYOUT_VERSION
    partition: int = -1
    offset: int = -1
    at_ms: int = 0
    produced_us: int = 0
    appended_ms: int = 0
    read_us: int = 0
    entries: Sequence[Entry] = ()


class _Recent(msgspec.Struct, array_like=True, frozen=True):
    """*recent* as it is stored."""

    version: int
    partition: int
    offset: int
    at_ms: int
    produced_us: int
    appended_ms: int
    read_us: int
    length: int
    entries: list[Entry]


EMPTY = UserHistory()
_encoder = msgspec.msgpack.Encoder()
_recent = msgspec.msgpack.Decoder(_Recent)
_older = msgspec.msgpack.Decoder(list[Entry])


def encode(history: UserHistory) -> bytes:
    """The list whole and its stamps, in one canonical form; two equal lists are equal in it."""
    return _encoder.encode(history)


def encode_recent(history: UserHistory, recent: Sequence[CompactEntry]) -> bytes:
    """*recent* without its last 8 bytes, which the write script appends.

    recent: in the order of the list
    """
    b = history
    stamps = (
        LAYOUT_VERSION,
        b.partition,
        b.offset,
        b.at_ms,
        b.produced_us,
        b.appended_ms,
        b.read_us,
    )
    return _encoder.encode((*stamps, len(b.entries), recent))


def encode_older(entries: Sequence[Entry]) -> bytes:
    """*older*, of the whole list."""
    return _encoder.encode([compact(e) for e in entries])


def compact(entry: Entry) -> CompactEntry:
    """An entry as it is stored, without what is at its default at the end.

    >>> compact(Entry("a", 5)), compact(Entry("a", 5, 2)), compact(Entry("a", 5, 0, 0.5))
    (('a', 5), ('a', 5, 2), ('a', 5, 0, 0.5))
    """
    if entry.weight != 1.0:
        return (entry.item_id, entry.at_ms, entry.kind, entry.weight)
    return (entry.item_id, entry.at_ms, entry.kind) if entry.kind else (entry.item_id, entry.at_ms)


def insert_compact(entries: list[CompactEntry], entry: CompactEntry) -> None:
    """As `insert`, for stored entries; one more than `RECENT_MAX` stays, to show that there are too many."""
    at_ms = cast(int, entry[1])
    if not entries or cast(int, entries[0][1]) <= at_ms:
        entries.insert(0, entry)
    else:
        entries.insert(bisect_left(entries, -at_ms, key=lambda e: -cast(int, e[1])), entry)
    del entries[RECENT_MAX + 1 :]


@dataclass(frozen=True, slots=True)
class Stored:
    """A list as it was read. recent: what is stored beside *older*."""

    history: UserHistory
    applied_us: int
    recent: list[Entry]


def decode(recent: bytes, older: bytes | None = None) -> Stored:
    """Both stored values together. Raises msgspec.MsgspecError, ValueError on a layout of another version."""
    head = _recent.decode(memoryview(recent)[:-8])
    if head.version != LAYOUT_VERSION:
        raise ValueError(f"behaviour list of layout {head.version}, not {LAYOUT_VERSION}")
    entries = head.entries
    if older is not None:
        before = _older.decode(older)
        entries = head.entries + before
        if before and head.entries and head.entries[-1].at_ms < before[0].at_ms:
            entries.sort(key=lambda e: -e.at_ms)  # stable: recent before older where equal
    history = UserHistory(
        partition=head.partition,
        offset=head.offset,
        at_ms=head.at_ms,
        produced_us=head.produced_us,
        appended_ms=head.appended_ms,
        read_us=head.read_us,
        entries=tuple(entries[: head.length]),
    )
    applied_us = int.from_bytes(recent[-8:], "little", signed=True)
    return Stored(history, applied_us, head.entries)


def insert(entries: list[Entry], entry: Entry, length_max: int) -> None:
    """Put an entry in its place by time, in place; the oldest one falls off beyond `length_max`.

    An entry goes before those of the same time: entries arrive in the order of their offsets.

    >>> entries = [Entry("b", 20), Entry("a", 10)]
    >>> insert(entries, Entry("c", 20), 3); [e.item_id for e in entries]
    ['c', 'b', 'a']
    >>> insert(entries, Entry("late", 15), 3); [e.item_id for e in entries]
    ['c', 'b', 'late']
    """
    if not entries or entries[0].at_ms <= entry.at_ms:
        entries.insert(0, entry)
    else:
        entries.insert(bisect_left(entries, -entry.at_ms, key=lambda e: -e.at_ms), entry)
    if len(entries) > length_max:
        del entries[length_max:]


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a list may hold. age_ms_max, lateness_ms_max: 0 is no limit."""

    length_max: int
    age_ms_max: int = 0
    lateness_ms_max: int = 0


def insert_event(entries: list[Entry], newest_ms: int, entry: Entry, bounds: Bounds) -> bool:
    """Put an entry in its place, in place, and cut the list to its bounds; False where it came too late.

    newest_ms: the time of the user's newest event before this one

    >>> entries, bounds = [Entry("a", 90)], Bounds(length_max=9, age_ms_max=50, lateness_ms_max=20)
    >>> insert_event(entries, 100, Entry("too late", 79), bounds), insert_event(entries, 100, Entry("late", 80), bounds)
    (False, True)
    >>> insert_event(entries, 100, Entry("b", 135), bounds), [e.item_id for e in entries]
    (True, ['b', 'a'])
    """
    if bounds.lateness_ms_max and entry.at_ms < newest_ms - bounds.lateness_ms_max:
        return False
    insert(entries, entry, bounds.length_max)
    if bounds.age_ms_max:
        oldest_ms = max(newest_ms, entry.at_ms) - bounds.age_ms_max
        while entries and entries[-1].at_ms < oldest_ms:
            entries.pop()
    return True


def insert_moved(entries: list[Entry], newest_ms: int, entry: Entry, bounds: Bounds) -> bool:
    """As `place`, for an entry that comes from another user's list: never late, and never there twice."""
    first = bisect_left(entries, -entry.at_ms, key=lambda e: -e.at_ms)
    for other in entries[first:]:
        if other.at_ms != entry.at_ms:
            break
        if other == entry:
            return True
    return insert_event(entries, newest_ms, entry, Bounds(bounds.length_max, bounds.age_ms_max))


def strength(click: Click, dwell_ms_full: int) -> float:
    """The weight of one event: its own, less where the user left before `dwell_ms_full` (0 asks for none).

    >>> strength(Click(user_id="u", item_id="i", at_ms=0, context={"dwell_ms": 500}), 2_000)
    0.25
    """
    if not dwell_ms_full or click.context is None:
        return click.weight
    dwell = click.context.get("dwell_ms")
    if not isinstance(dwell, int | float) or isinstance(dwell, bool):
        return click.weight
    return click.weight * min(1.0, max(dwell / dwell_ms_full, DWELL_FACTOR_MIN))


DISLIKE = KINDS.index("dislike")
# Who left at once has seen the item all the same.
DWELL_FACTOR_MIN = 0.001


def positive_events(entries: Sequence[Entry]) -> Iterator[Entry]:
    """The entries that count as liking, newest first: no dislikes, and nothing of an item disliked since.

    A dislike takes the item's older entries out. They are older than it, so that none of them comes back when
    the dislike leaves the list by length or age.

    >>> [e.at_ms for e in positive_events([Entry("a", 4), Entry("b", 3, DISLIKE), Entry("b", 2), Entry("a", 1)])]
    [4, 1]
    """
    disliked: set[str] = set()
    for entry in entries:
        if entry.kind == DISLIKE:
            disliked.add(entry.item_id)
        elif entry.item_id not in disliked:
            yield entry


def positive_items(entries: Sequence[Entry], limit: int) -> list[str]:
    """The item ids of the first `limit` entries of `liked`, repeats kept."""
    return [e.item_id for e in islice(positive_events(entries), limit)]
