"""Append-only rows of vectors that readers scan without a lock.

A row is written once, before the State that counts it is published, and never changed: an item's new vector
is a new row, which names the row it replaces. The old row dies at a sequence number; a reader that holds the
State of sequence s sees the rows that were born at or before s and had not died by s, so it sees whole
batches whatever the writer does meanwhile. A full buffer is not moved under its readers: the writer copies
the live rows into a new one and publishes that.
"""

from __future__ import annotations

import math

import numpy as np

from index.arrays import Ints, Kept, Vector, Wide

NEVER = np.iinfo(np.int64).max
# float32 dot products of unit vectors differ by less than this from the float64 ones that decide the order,
# whatever the BLAS and the row's place in the buffer: candidates within it of the cut are kept, so the order
# is exact.
ROUNDING = 1e-5
CAPACITY_MIN = 1_024
# Where a mapped base lies below, a copy of the rest still costs a pass over the facts of all rows.
ROOM_SHARE = 8


def slack(query: Vector | Wide) -> float:
    """How far a float32 product with this query may be off."""
    wide = query.astype(np.float64, copy=False)  # squares of float32 may be too large for it
    return ROUNDING * max(1.0, math.sqrt(wide.dot(wide)))


class VectorTable:
    """A buffer of rows; the count of rows in use is kept in the State, not here.

    base:    float32 (b, d), the vectors of the first rows, all in use from the beginning; may be read-only
             and mapped, then every process that maps the file shares it. Never written, never copied while
             half of its rows live
    own:     float32 (capacity - b, d), the vectors of the rows behind them
    facts:   int64 (capacity, 4), the label, at_ms, written_us and offset of a row side by side, so that a hit
             costs one miss of the cache and not four; the arrays of these names are views of it
    before:  int64 (capacity,), the row that a row replaced, -1 is none
    died_at: int64 (capacity + 1,); the last one is 0, so that row -1, which is none, is always dead
    written: how many rows the writer has begun to write; a reader whose State counts as many can meet no
             newer one
    Thread rule: one writer at a time; any number of readers, each with the count and sequence of its State.
    """

    __slots__ = (
        "at_ms",
        "base",
        "before",
        "died_at",
        "facts",
        "labels",
        "offsets",
        "own",
        "written",
        "written_us",
    )

    def __init__(self, capacity: int, dimension: int, base: Vector | None = None) -> None:
        """Room for `capacity` rows behind those of the base."""
        self.base: Vector = np.empty((0, dimension), np.float32) if base is None else base
        self.own: Vector = np.zeros((capacity, dimension), np.float32)
        total = len(self.base) + capacity
        self.facts: Ints = np.zeros((total, 4), np.int64)
        self.labels, self.at_ms, self.written_us, self.offsets = self.facts.T
        self.before: Ints = np.full(total, -1)
        self.died_at: Ints = np.full(total + 1, NEVER)
        self.died_at[-1] = 0
        self.written = 0

    @property
    def capacity(self) -> int:
        """How many rows fit."""
        return len(self.facts)

    def room_for(self, count: int, more: int) -> bool:
        """Whether `more` rows fit behind the first `count`."""
        return count + more <= self.capacity

    def alive(self, count: int, seq: int) -> Ints:
        """The numbers of the rows that live at this sequence number, ascending."""
        return np.flatnonzero(self.died_at[:count] > seq)

    def gather(self, rows: Ints) -> Vector:
        """float32 (n, d): the vectors of these rows, none of them -1."""
        first = len(self.base)
        if not first:
            return self.own.take(rows, axis=0)
        below = rows < first
        if below.all():
            return self.base.take(rows, axis=0)
        found = np.empty((len(rows), self.own.shape[1]), np.float32)
        found[below] = self.base.take(rows[below], axis=0)
        found[~below] = self.own.take(rows[~below] - first, axis=0)
        return found

    def scan(self, query: Vector, count: int, seq: int, need: int, kept: Kept = None) -> Ints:
        """Row numbers among which the `need` best ones of the first `count` are; some more where scores are
        close.

        query: float32 (d,); kept: bool (count,), which rows may be named
        In no order; fewer where fewer live.
        """
        if count == 0:
            return np.empty(0, np.int64)
        first = len(self.base)
        if first:
            scores = np.empty(count, np.float32)
            np.dot(self.base, query, out=scores[:first])
            np.dot(self.own[: count - first], query, out=scores[first:])
        else:
            scores = self.own[:count] @ query
        scores[self.died_at[:count] <= seq] = -np.inf
        if kept is not None:
            scores[~kept] = -np.inf
        floor = np.float32(-np.inf)
        if need < count:
            floor = np.partition(scores, count - need)[count - need]
            floor = np.float32(floor - slack(query))
        return (
            np.flatnonzero(scores >= floor) if floor > -np.inf else np.flatnonzero(scores > floor)
        )

    def write(self, start: int, vectors: Vector, labels: Ints, stamps: Ints, before: Ints) -> None:
        """Fill the rows `start`, `start` + 1, …, which no State counts yet.

        stamps: int64 (n, 4), as of `port.stamps_of`; the others: see the arrays of these names
        """
        end, first = start + len(vectors), len(self.base)
        # Before anything that a reader looks at names one of these rows.
        self.written = end
        self.own[start - first : end - first] = vectors
        facts = self.facts[start:end]
        facts[:] = stamps  # the partition of a record is not kept
        facts[:, 0] = labels
        self.before[start:end] = before

    def compacted(self, count: int, seq: int, room: int) -> tuple[VectorTable, Ints]:
        """(a new buffer with the live rows and at least as much room again, their old numbers ascending).

        The dead rows of a base stay with it while at least half of its rows live.
        """
        kept, base = self.alive(count, seq), None
        living = int(np.searchsorted(kept, len(self.base)))
        if living and 2 * living >= len(self.base):
            base = self.base
            kept = np.concatenate((np.arange(len(base)), kept[living:]))
        first = 0 if base is None else len(base)
        capacity = max(CAPACITY_MIN, 2 * (len(kept) - first + room), first // ROOM_SHARE)
        after = VectorTable(capacity, self.own.shape[1], base)
        after.own[: len(kept) - first] = self.gather(kept[first:])
        after.facts[: len(kept)] = self.facts[kept]
        after.died_at[: len(kept)] = self.died_at[kept]
        return after, kept
