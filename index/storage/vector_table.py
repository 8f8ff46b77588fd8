"""Append-only rows of vectors that readers scan without a lock; deleted items have dead rows.

The writer fills a row before it publishes the IndexVersion that counts the row, and never changes
it: a new vector of an item is a new row, which names the row it replaces. The old row dies at a
sequence number. A reader of the IndexVersion with sequence number s sees the rows that existed at
s and had not died by s, so it sees whole batches at any time. A full table stays where its readers
are: the writer copies the live rows into a new table and publishes that.
"""

from __future__ import annotations

import math

import numpy as np

from index.arrays import Floats, Ints, Mask, Vector

NEVER = np.iinfo(np.int64).max
# float32 products of unit vectors differ by less than this from the float64 products that decide
# the order, with any BLAS and at any row. Candidates this close to the cut are kept, so the order
# is exact.
ROUNDING = 1e-5
CAPACITY_MIN = 1_024
# Room behind a mapped base, as a share of its rows: a copy still reads the facts of all rows.
ROOM_SHARE = 8


def score_error(query: Vector | Floats) -> float:
    """Upper bound of the error of a float32 product of this query and a unit vector."""
    wide = query.astype(np.float64, copy=False)  # squares may overflow float32
    return ROUNDING * max(1.0, math.sqrt(wide.dot(wide)))


class VectorTable:
    """The rows; the IndexVersion, not the table, holds the count of rows in use.

    base:     float32 (b, d), vectors of the first rows, all in use from the start. May be mapped
              read-only, which shares it between processes. Never written, and never copied while
              half of its rows live
    own:      float32 (capacity - b, d), vectors of the rows behind the base
    facts:    int64 (capacity, 4), label, at_ms, written_us and offset of a row, adjacent so that a
              hit costs one cache miss, not four; the arrays of these names are views of it
    replaced: int64 (capacity,), the row that a row replaced, -1 if none
    died_at:  int64 (capacity + 1,), sequence number; the last entry is 0, so row -1 is always dead
    dropped:  rows of earlier tables that compactions left out; with the count of rows in use it
              numbers the rows ever written
    written:  rows that the writer has begun to write; a reader whose IndexVersion counts as many
              meets no newer row
    Thread rule: one writer; any number of readers, each with its IndexVersion's count and seq.
    """

    __slots__ = (
        "at_ms",
        "base",
        "died_at",
        "dropped",
        "facts",
        "labels",
        "offsets",
        "own",
        "replaced",
        "written",
        "written_us",
    )

    def __init__(self, capacity: int, dimension: int, base: Vector | None = None) -> None:
        """capacity: number of rows behind the base."""
        self.base: Vector = np.empty((0, dimension), np.float32) if base is None else base
        self.own: Vector = np.zeros((capacity, dimension), np.float32)
        total = len(self.base) + capacity
        self.facts: Ints = np.zeros((total, 4), np.int64)
        self.labels, self.at_ms, self.written_us, self.offsets = self.facts.T
        self.replaced: Ints = np.full(total, -1)
        self.died_at: Ints = np.full(total + 1, NEVER)
        self.died_at[-1] = 0
        self.dropped = 0
        self.written = 0

    @property
    def capacity(self) -> int:
        """Number of rows that fit, the base included."""
        return len(self.facts)

    def has_room(self, count: int, more: int) -> bool:
        """Whether `more` rows fit behind the first `count`."""
        return count + more <= self.capacity

    def live_rows(self, count: int, seq: int) -> Ints:
        """Of the first `count` rows those that live at this sequence number, ascending."""
        return np.flatnonzero(self.died_at[:count] > seq)

    def gather(self, rows: Ints) -> Vector:
        """float32 (n, d): vectors of these rows, none of which is -1."""
        first = len(self.base)
        if not first:
            return self.own.take(rows, axis=0)
        in_base = rows < first
        if in_base.all():
            return self.base.take(rows, axis=0)
        vectors = np.empty((len(rows), self.own.shape[1]), np.float32)
        vectors[in_base] = self.base.take(rows[in_base], axis=0)
        vectors[~in_base] = self.own.take(rows[~in_base] - first, axis=0)
        return vectors

    def scan(
        self, query: Vector, count: int, seq: int, need: int, mask: Mask | None = None
    ) -> Ints:
        """Live rows of the first `count` that include the `need` best, unordered.

        query: float32 (d,); mask: bool (count,), rows to consider
        Returns more than `need` rows if scores are close, fewer if fewer live.
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
        if mask is not None:
            scores[~mask] = -np.inf
        if need < count:
            cut = np.partition(scores, count - need)[count - need]
            floor = np.float32(cut - score_error(query))
            if floor > -np.inf:
                return np.flatnonzero(scores >= floor)
        return np.flatnonzero(scores > -np.inf)

    def write(
        self, start: int, vectors: Vector, labels: Ints, stamps: Ints, replaced: Ints
    ) -> None:
        """Fill the rows `start`, `start` + 1, …, which no IndexVersion counts yet.

        stamps: int64 (n, 4), as `records.stamps_of`; labels, replaced: see the arrays
        """
        end, first = start + len(vectors), len(self.base)
        # First, so that it counts every row that a reader can meet.
        self.written = end
        self.own[start - first : end - first] = vectors
        facts = self.facts[start:end]
        facts[:] = stamps
        facts[:, 0] = labels  # the partition is not kept
        self.replaced[start:end] = replaced

    def compact(self, count: int, seq: int, room: int) -> tuple[VectorTable, Ints]:
        """(a new table of the live rows with room for `room` more, their old rows ascending).

        The base stays, its dead rows included, while at least half of its rows live.
        """
        kept, base = self.live_rows(count, seq), None
        live_in_base = int(np.searchsorted(kept, len(self.base)))
        if live_in_base and 2 * live_in_base >= len(self.base):
            base = self.base
            kept = np.concatenate((np.arange(len(base)), kept[live_in_base:]))
        first = 0 if base is None else len(base)
        capacity = max(CAPACITY_MIN, 2 * (len(kept) - first + room), first // ROOM_SHARE)
        table = VectorTable(capacity, self.own.shape[1], base)
        table.own[: len(kept) - first] = self.gather(kept[first:])
        table.facts[: len(kept)] = self.facts[kept]
        table.died_at[: len(kept)] = self.died_at[kept]
        table.dropped = self.dropped + count - len(kept)
        return table, kept
