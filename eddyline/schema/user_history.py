"""A user's history: the last events, newest first; a late event finds its place here or is refused.

Binary layout in Redis. Two values, so that an event rewrites only a short one:

* `{u…}:h:<user>`, *recent*: MessagePack of the array `[version, partition, offset, at_ms,
  produced_us, appended_ms, read_us, length, entries, idle_after_ms]`, then 8 bytes,
  little-endian signed: `applied_us`, Redis' clock at the write. entries: at most `RECENT_MAX`,
  inserted since *older* was written.
* `{u…}:o:<user>`, *older*: MessagePack of the array of all entries at that time; absent if the
  history is short.

An entry is `[item_id, at_ms, kind, weight]`, trailing defaults omitted (kind 0, weight 1). Entries
are newest first by `at_ms`; at equal times the later offset is first. The history is the first
`length` entries of both values in that order, recent before older at equal times.

A user whose next event is appended after `idle_after_ms` starts afresh: without history, without
embeddings (ADR 29).

What leaves the history, and what is too late for it, goes to `schema.seen_items`.

Every rule is a function of the user's events in log order. Time is event time; no clock is read.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import cast

import msgspec

from eddyline.schema.events import KINDS, Click

LAYOUT_VERSION = 2
# Entries of *recent*. 8 entries are about 150 bytes; measured cost is the same with 4 and 16.
RECENT_MAX = 8

# Histories of older versions do not say when their user is idle: the default of the setting.
OLD_IDLE_S_MAX = 34_560_000
DISLIKE = KINDS.index("dislike")
# A user who left at once has still seen the item.
DWELL_FACTOR_MIN = 0.001
# The smallest positive float64.
WEIGHT_MIN = math.ulp(0.0)

# `Entry` in stored form, see `compact`.
CompactEntry = tuple[str | int | float, ...]


class Entry(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One event. kind: index into `events.KINDS`; weight: see `strength`."""

    item_id: str
    at_ms: int
    kind: int = 0
    weight: float = 1.0


class UserHistory(msgspec.Struct, array_like=True, frozen=True, kw_only=True):
    """A user's entries and the last event applied to them, with its stamps.

    partition, offset: coordinates (token) of the last event applied
    at_ms:             largest event time seen
    produced_us, appended_ms, read_us: stamps of that event by producer, broker, ingest; 0: unknown
    entries:           newest first; a tuple when read, a list of ingest when written
    idle_after_ms:     broker's time stamp from which on, exclusive, the user is idle; 0: never
    """

    version: int = LAYOUT_VERSION
    partition: int = -1
    offset: int = -1
    at_ms: int = 0
    produced_us: int = 0
    appended_ms: int = 0
    read_us: int = 0
    entries: Sequence[Entry] = ()
    idle_after_ms: int = 0


class _Recent(msgspec.Struct, array_like=True, frozen=True):
    """The stored form of *recent*."""

    version: int
    partition: int
    offset: int
    at_ms: int
    produced_us: int
    appended_ms: int
    read_us: int
    length: int
    entries: list[Entry]
    idle_after_ms: int = -1


EMPTY = UserHistory()
_encoder = msgspec.msgpack.Encoder()
_recent = msgspec.msgpack.Decoder(_Recent)
_older = msgspec.msgpack.Decoder(list[Entry])


def encode(history: UserHistory) -> bytes:
    """The whole history in one canonical form: equal histories have equal bytes."""
    return _encoder.encode(history)


def encode_recent(history: UserHistory, recent: Sequence[CompactEntry]) -> bytes:
    """*recent* without its last 8 bytes, which the write script appends. recent: newest first."""
    return _encoder.encode(
        (
            LAYOUT_VERSION,
            history.partition,
            history.offset,
            history.at_ms,
            history.produced_us,
            history.appended_ms,
            history.read_us,
            len(history.entries),
            recent,
            history.idle_after_ms,
        )
    )


def encode_older(entries: Sequence[Entry]) -> bytes:
    """*older*, from all entries."""
    return _encoder.encode([compact(e) for e in entries])


def compact(entry: Entry) -> CompactEntry:
    """The stored form of an entry, trailing defaults omitted.

    >>> compact(Entry("a", 5)), compact(Entry("a", 5, 2)), compact(Entry("a", 5, 0, 0.5))
    (('a', 5), ('a', 5, 2), ('a', 5, 0, 0.5))
    """
    if entry.weight != 1.0:
        return (entry.item_id, entry.at_ms, entry.kind, entry.weight)
    return (entry.item_id, entry.at_ms, entry.kind) if entry.kind else (entry.item_id, entry.at_ms)


def insert_compact(entries: list[CompactEntry], entry: CompactEntry) -> None:
    """`insert` for stored entries. Keeps `RECENT_MAX` + 1 entries, so that overflow is visible."""
    at_ms = cast(int, entry[1])
    if not entries or cast(int, entries[0][1]) <= at_ms:
        entries.insert(0, entry)
    else:
        entries.insert(bisect_left(entries, -at_ms, key=lambda e: -cast(int, e[1])), entry)
    del entries[RECENT_MAX + 1 :]


@dataclass(frozen=True, slots=True)
class StoredHistory:
    """A decoded history. recent: the entries of *recent* alone."""

    history: UserHistory
    applied_us: int
    recent: list[Entry]


def decode(recent: bytes, older: bytes | None = None) -> StoredHistory:
    """Decode both values. Raises msgspec.MsgspecError; ValueError for another layout version."""
    head = _recent.decode(memoryview(recent)[:-8])
    if head.version != LAYOUT_VERSION:
        raise ValueError(f"history of layout {head.version}, not {LAYOUT_VERSION}")
    entries = head.entries
    if older is not None:
        before = _older.decode(older)
        entries = head.entries + before
        if before and head.entries and head.entries[-1].at_ms < before[0].at_ms:
            entries.sort(key=lambda e: -e.at_ms)  # stable: recent before older at equal times
    history = UserHistory(
        partition=head.partition,
        offset=head.offset,
        at_ms=head.at_ms,
        produced_us=head.produced_us,
        appended_ms=head.appended_ms,
        read_us=head.read_us,
        entries=tuple(entries[: head.length]),
        idle_after_ms=head.idle_after_ms
        if head.idle_after_ms >= 0
        else idle_after_ms(head.appended_ms, OLD_IDLE_S_MAX),
    )
    applied_us = int.from_bytes(recent[-8:], "little", signed=True)
    return StoredHistory(history, applied_us, head.entries)


def idle_after_ms(appended_ms: int, idle_s_max: int) -> int:
    """When a user with this last event becomes idle, in ms of the broker's clock; 0: never.

    appended_ms: the broker's time stamp of the event; negative: unknown
    idle_s_max:  setting `user_idle_s_max`; 0: never

    >>> idle_after_ms(5_000, 10), idle_after_ms(5_000, 0), idle_after_ms(-1, 10)
    (15000, 0, 0)
    """
    return appended_ms + 1_000 * idle_s_max if idle_s_max and appended_ms >= 0 else 0


def is_idle(idle_after_ms: int, now_ms: int) -> bool:
    """Whether a user is idle at a place of the log.

    idle_after_ms: of the user's history; now_ms: the broker's time stamp at that place

    >>> is_idle(15_000, 15_000), is_idle(15_000, 15_001), is_idle(0, 15_001)
    (False, True, False)
    """
    return 0 < idle_after_ms < now_ms


def insert(
    entries: list[Entry], entry: Entry, length_max: int, left: list[Entry] | None = None
) -> None:
    """Insert an entry by time, in place; the oldest entries are removed beyond `length_max`.

    An entry goes before entries of the same time: entries arrive in offset order.
    left: what is removed is appended to it

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
        if left is not None:
            left += entries[length_max:]
        del entries[length_max:]


@dataclass(frozen=True, slots=True)
class Bounds:
    """Limits of a history. age_ms_max, lateness_ms_max: 0 is no limit."""

    length_max: int
    age_ms_max: int = 0
    lateness_ms_max: int = 0


def insert_event(
    entries: list[Entry],
    newest_ms: int,
    entry: Entry,
    bounds: Bounds,
    left: list[Entry] | None = None,
) -> bool:
    """Insert an entry and apply the bounds, in place; False if the entry is too late.

    newest_ms: largest event time of the user before this event
    left: gets every entry that is not in the list now: removed, or too late for it

    >>> entries, bounds = [Entry("a", 90)], Bounds(length_max=9, age_ms_max=50, lateness_ms_max=20)
    >>> [insert_event(entries, 100, Entry("late", at_ms), bounds) for at_ms in (79, 80)]
    [False, True]
    >>> insert_event(entries, 100, Entry("b", 135), bounds), [e.item_id for e in entries]
    (True, ['b', 'a'])
    """
    if bounds.lateness_ms_max and entry.at_ms < newest_ms - bounds.lateness_ms_max:
        if left is not None:
            left.append(entry)
        return False
    insert(entries, entry, bounds.length_max, left)
    if bounds.age_ms_max:
        oldest_ms = max(newest_ms, entry.at_ms) - bounds.age_ms_max
        while entries and entries[-1].at_ms < oldest_ms:
            oldest = entries.pop()
            if left is not None:
                left.append(oldest)
    return True


def insert_moved(
    entries: list[Entry],
    newest_ms: int,
    entry: Entry,
    bounds: Bounds,
    equal: int = 0,
    left: list[Entry] | None = None,
) -> bool:
    """`insert_event` for an entry of a merged user: never too late, and inserted once.

    equal: how many equal entries of the same merge come before; with one more, it is here already
    """
    first = bisect_left(entries, -entry.at_ms, key=lambda e: -e.at_ms)
    for other in entries[first:]:
        if other.at_ms != entry.at_ms:
            break
        equal -= other == entry
        if equal < 0:
            return True
    never_late = Bounds(bounds.length_max, bounds.age_ms_max)
    return insert_event(entries, newest_ms, entry, never_late, left)


def older_items(entries: Sequence[Entry], entry: Entry, limit: int) -> list[str]:
    """Item ids of the next `limit` entries older than one that was just inserted, newest first.

    Dislikes are left out. Empty if the entry is not in the list.

    >>> new = Entry("c", 3)
    >>> older_items([new, Entry("b", 2, DISLIKE), Entry("a", 1)], new, 2)
    ['a']
    """
    first = 0
    if not entries or entries[0] is not entry:
        first = bisect_left(entries, -entry.at_ms, key=lambda e: -e.at_ms)
        if first == len(entries) or entries[first] is not entry:
            return []
    older = islice(entries, first + 1, None)
    return list(islice((e.item_id for e in older if e.kind != DISLIKE), limit))


def strength(click: Click, dwell_ms_full: int) -> float:
    """Weight of an event, reduced if the dwell time is below `dwell_ms_full` (0: never reduced).

    Never 0: a weight of 0 is refused where a merge moves the entry.

    >>> strength(Click(user_id="u", item_id="i", at_ms=0, context={"dwell_ms": 500}), 2_000)
    0.25
    """
    if not dwell_ms_full or click.context is None:
        return click.weight
    dwell = click.context.get("dwell_ms")
    if not isinstance(dwell, int | float) or isinstance(dwell, bool):
        return click.weight
    weight = click.weight * min(1.0, max(dwell / dwell_ms_full, DWELL_FACTOR_MIN))
    return max(weight, WEIGHT_MIN)


def positive_events(entries: Sequence[Entry]) -> Iterator[Entry]:
    """Entries newest first, without dislikes and without older entries of a disliked item.

    Older entries leave the history before their dislike does, so they never count again.

    >>> entries = [Entry("a", 4), Entry("b", 3, DISLIKE), Entry("b", 2), Entry("a", 1)]
    >>> [entry.at_ms for entry in positive_events(entries)]
    [4, 1]
    """
    disliked: set[str] = set()
    for entry in entries:
        if entry.kind == DISLIKE:
            disliked.add(entry.item_id)
        elif entry.item_id not in disliked:
            yield entry


def positive_items(entries: Sequence[Entry], limit: int) -> list[str]:
    """Item ids of the first `limit` positive events, repeats kept."""
    return [e.item_id for e in islice(positive_events(entries), limit)]
