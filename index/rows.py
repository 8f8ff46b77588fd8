"""Append-only rows of vectors that readers scan without a lock.

A row is written once, before the State that counts it is published, and never changed: an item's new vector
is a new row. The old row dies at a sequence number; a reader that holds the State of sequence s sees the rows
that were born at or before s and had not died by s, so it sees whole batches whatever the writer does
meanwhile. A full buffer is not moved under its readers: the writer copies the live rows into a new one and
publishes that.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from index.port import Vector

Ints = npt.NDArray[np.int64]
Kept = npt.NDArray[np.bool_] | None

NEVER = np.iinfo(np.int64).max
# float32 dot products of unit vectors differ by less than this from the float64 ones that decide the order,
# whatever the BLAS and the row's place in the buffer: candidates within it of the cut are kept, so the order
# is exact.
ROUNDING = 1e-5
CAPACITY_MIN = 1_024


def slack(query: Vector) -> float:
    """How far a float32 product with this query may be off."""
    return ROUNDING * max(1.0, float(np.sqrt(query @ query)))


class Rows:
    """A buffer of rows; the count of rows in use is kept in the State, not here.

    vectors: float32 (capacity, d); labels, died_at, at_ms, written_us, offsets: int64 (capacity,)
    facts:   int64 (capacity, 4), the label, at_ms, written_us and offset of a row side by side, so that a hit
             costs one miss of the cache and not four; the arrays of these names are views of it
    Thread rule: one writer at a time; any number of readers, each with the count and sequence of its State.
    """

    __slots__ = ("at_ms", "died_at", "facts", "labels", "offsets", "vectors", "written_us")

    def __init__(self, capacity: int, dimension: int) -> None:
        """Room for `capacity` rows, none in use."""
        self.vectors: Vector = np.zeros((capacity, dimension), np.float32)
        self.facts: Ints = np.zeros((capacity, 4), np.int64)
        self.labels, self.at_ms, self.written_us, self.offsets = self.facts.T
        self.died_at: Ints = np.full(capacity, NEVER)

    @classmethod
    def over(cls, vectors: Vector, facts: Ints) -> Rows:
        """Full, over arrays as they lie; vectors may be read-only: a row in use is never written."""
        made = cls(0, vectors.shape[1])
        made.vectors, made.facts = vectors, facts
        made.labels, made.at_ms, made.written_us, made.offsets = facts.T
        made.died_at = np.full(len(vectors), NEVER)
        return made

    @property
    def capacity(self) -> int:
        """How many rows fit."""
        return len(self.labels)

    def room_for(self, count: int, more: int) -> bool:
        """Whether `more` rows fit behind the first `count`."""
        return count + more <= self.capacity

    def alive(self, count: int, seq: int) -> Ints:
        """The numbers of the rows that live at this sequence number, ascending."""
        return np.flatnonzero(self.died_at[:count] > seq)

    def scan(self, query: Vector, count: int, seq: int, need: int, kept: Kept = None) -> Ints:
        """Row numbers among which the `need` best ones of the first `count` are; some more where scores are
        close.

        query: float32 (d,); kept: bool (count,), which rows may be named
        In no order; fewer where fewer live.
        """
        if count == 0:
            return np.empty(0, np.int64)
        scores = self.vectors[:count] @ query
        scores[self.died_at[:count] <= seq] = -np.inf
        if kept is not None:
            scores[~kept] = -np.inf
        floor = np.float32(-np.inf)
        if need < count:
            floor = np.partition(scores, count - need)[count - need]
            floor = np.float32(floor - slack(query))
        return np.flatnonzero(scores >= floor) if floor > -np.inf else np.flatnonzero(scores > floor)

    def compacted(self, count: int, seq: int, room: int) -> tuple[Rows, Ints]:
        """(a new buffer with the live rows first and at least as much room again, their old numbers)."""
        keep = self.alive(count, seq)
        fresh = Rows(max(CAPACITY_MIN, 2 * (len(keep) + room)), self.vectors.shape[1])
        fresh.vectors[: len(keep)] = self.vectors[keep]
        fresh.facts[: len(keep)] = self.facts[keep]
        return fresh, keep
