"""Co-visitation rows: which items users visited before or after an item, and how often.

A row is a header, then entries, all little-endian:

* header, 16 bytes: float64 thousandths of visits and float64 next visits that were pruned away;
* entry, 16 bytes: uint64 key of the other item (`schema.item_key`), uint32 thousandths of visits,
  uint32 next visits.

A visit at distance d counts 1/d; one at distance 1 is a next visit too. A write appends entries, so
a row may have several of one key: readers add them up. A row that reaches `row_max` entries is
compacted: equal keys are summed where the key came first; where more than half of `row_max` remain,
the half with the most visits stays, of equally visited ones those that came last. The rest goes to
the header, so the sums of a row stay exact. `append_co_visits.lua` gives the same bytes as
`append`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_HEADER = struct.Struct("<dd")
_ENTRY = struct.Struct("<QII")
ENTRIES = np.dtype([("key", "<u8"), ("milli", "<u4"), ("next", "<u4")])
# A click that entered a user's list: its offset in `clicks`, its item, and the items of the next
# older entries, newest first. The place of an item is its distance from the click.
Visit = tuple[int, str, list[str]]
HEADER_BYTES = _HEADER.size
ENTRY_BYTES = _ENTRY.size
COUNT_MAX = 2**32 - 1


class CoVisits(NamedTuple):
    """One row.

    keys:       uint64 (n,), `item_key` of the other items; a key may repeat
    visits:     float32 (n,), 1.0 is one visit at distance 1
    next:       float32 (n,), visits at distance 1
    visits_sum: all visits of the row, those of pruned entries included
    next_sum:   all next visits, likewise
    """

    keys: NDArray[np.uint64]
    visits: NDArray[np.float32]
    next: NDArray[np.float32]
    visits_sum: float
    next_sum: float


class DamagedRow(ValueError):
    """One of several rows is damaged. place: which"""

    def __init__(self, place: int, why: str) -> None:
        super().__init__(why)
        self.place = place


EMPTY = CoVisits(np.empty(0, np.uint64), np.empty(0, np.float32), np.empty(0, np.float32), 0.0, 0.0)


def entries(visits: Iterable[tuple[int, int, int]]) -> bytes:
    """Entries in stored form. visits: (key of the other item, thousandths of visits, next visits).

    >>> entries([(1, 1_000, 1)]).hex()
    '0100000000000000e803000001000000'
    """
    return b"".join(
        _ENTRY.pack(key, min(milli, COUNT_MAX), min(after, COUNT_MAX))
        for key, milli, after in visits
    )


def decode(row: bytes | None) -> CoVisits:
    """A stored row; None is an empty one. Raises ValueError for a damaged one."""
    if row is None:
        return EMPTY
    check(row)
    found = np.frombuffer(row, ENTRIES, offset=HEADER_BYTES)
    pruned_milli, pruned_next = _HEADER.unpack_from(row)
    return CoVisits(
        found["key"].astype(np.uint64),
        found["milli"].astype(np.float32) / np.float32(1_000),
        found["next"].astype(np.float32),
        (pruned_milli + int(found["milli"].sum(dtype=np.int64))) / 1_000,
        pruned_next + int(found["next"].sum(dtype=np.int64)),
    )


def decode_all(rows: Sequence[bytes | None]) -> list[CoVisits]:
    """As `decode` of each, in one go. Raises DamagedRow with the place of the first damaged one."""
    for place, row in enumerate(rows):
        if row is not None:
            try:
                check(row)
            except ValueError as error:
                raise DamagedRow(place, str(error)) from None
    bodies = [b"" if row is None else memoryview(row)[HEADER_BYTES:] for row in rows]
    found = np.frombuffer(b"".join(bodies), ENTRIES)
    keys, milli = found["key"].astype(np.uint64), found["milli"]
    visits, after = milli.astype(np.float32) / np.float32(1_000), found["next"].astype(np.float32)
    ends = np.cumsum([len(body) // ENTRY_BYTES for body in bodies], dtype=np.int64)
    sums = _sums(milli, ends), _sums(found["next"], ends)
    made, start = [], 0
    for row, end, milli_sum, next_sum in zip(rows, ends.tolist(), *sums, strict=True):
        if row is None:
            made.append(EMPTY)
            continue
        pruned_milli, pruned_next = _HEADER.unpack_from(row)
        made.append(
            CoVisits(
                keys[start:end],
                visits[start:end],
                after[start:end],
                (pruned_milli + milli_sum) / 1_000,
                pruned_next + next_sum,
            )
        )
        start = end
    return made


def _sums(values: NDArray[np.uint32], ends: NDArray[np.int64]) -> list[int]:
    """The sum of each piece; ends: of the pieces, exclusive."""
    running = np.concatenate(([0], np.cumsum(values, dtype=np.int64)))[ends]
    sums: list[int] = np.diff(running, prepend=0).tolist()
    return sums


def append(row: bytes, more: bytes, row_max: int) -> bytes:
    """The row after a write. row: b"" for a new one; more: `entries`; row_max: at least 2.

    Raises ValueError for a damaged row.
    """
    row = (row or bytes(HEADER_BYTES)) + more
    check(row)
    return compact(row, row_max) if len(row) >= HEADER_BYTES + row_max * ENTRY_BYTES else row


def compact(row: bytes, row_max: int) -> bytes:
    """The row with equal keys summed, and at most half of `row_max` entries.

    What a count has beyond 32 bits goes to the header. Raises ValueError for a damaged row.
    """
    check(row)
    whole = np.frombuffer(row, ENTRIES, offset=HEADER_BYTES)
    keys, first, place = np.unique(whole["key"], return_index=True, return_inverse=True)
    # Sums of some thousand 32-bit counts are exact in float64.
    sums = [np.bincount(place, whole[name], len(keys)) for name in ("milli", "next")]
    order = np.argsort(first)  # where a key came first
    keys, milli, after = keys[order], *(one[order] for one in sums)
    most = row_max // 2
    if len(keys) > most:
        kept = np.sort(np.lexsort((np.arange(len(keys)), milli))[len(keys) - most :])
        keys, milli, after = keys[kept], milli[kept], after[kept]
    stored = np.empty(len(keys), ENTRIES)
    stored["key"] = keys
    stored["milli"], stored["next"] = np.minimum(milli, COUNT_MAX), np.minimum(after, COUNT_MAX)
    pruned = (
        before + int(one.sum()) - int(stored[name].sum(dtype=np.int64))
        for before, one, name in zip(_HEADER.unpack_from(row), sums, ("milli", "next"), strict=True)
    )
    return _HEADER.pack(*pruned) + stored.tobytes()


class Summary(NamedTuple):
    """What a row has whatever the batches were: sums, and the counts unless it may be pruned.

    milli, next: thousandths of visits, next visits
    counts:      key -> the same; None if it has more than half of `row_max` keys, or had
    """

    milli: int
    next: int
    counts: dict[int, tuple[int, int]] | None


def summary(row: CoVisits, row_max: int) -> Summary:
    """The summary of a row. Exact for rows of less than eight thousand visits an entry."""
    counts: dict[int, tuple[int, int]] = {}
    for key, visits, after in zip(*(column.tolist() for column in row[:3]), strict=True):
        before = counts.get(key, (0, 0))
        counts[key] = before[0] + round(1_000 * visits), before[1] + round(after)
    milli_sum = round(1_000 * row.visits_sum)
    whole = len(counts) <= row_max // 2 and milli_sum == sum(milli for milli, _ in counts.values())
    return Summary(milli_sum, round(row.next_sum), counts if whole else None)


def check(row: bytes) -> None:
    """Raise ValueError for bytes that are no row."""
    if len(row) < HEADER_BYTES or len(row) % ENTRY_BYTES:
        raise ValueError(f"a co-visitation row of {len(row)} bytes is damaged")
