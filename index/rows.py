"""Append-only rows of vectors that readers scan without a lock.

A row is written once, before the State that counts it is published, and never changed: an item's new vector
                                                                                        is a
new row. The old row dies at a sequence number; a reader that holds the State of sequence s sees the rows
that were born at or before s and had not died by s, so it sees whole batches whatever the writer does
meanwhile.
A full buffer is not moved under its readers: the writer copies the live rows into a new one and publishes
                                              that.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from index.port import Vector

Ints = npt.NDArray[np.int64]

NEVER = np.iinfo(np.int64).max
# float32 dot products of unit vectors differ by less than this from the float64 ones that decide the order,
# whatever the BLAS and the row's place in the buffer: candidates within it of the cut are kept, so the order
# is exact.
ROUNDING = 1e-5
CAPACITY_MIN = 1_024


class Rows:
    """A buffer of rows; the count of rows in use is kept in the State, not here.

    vectors: float32 (capacity, d); labels, died_at, at_ms, written_us, offsets: int64 (capacity,)
    Thread rule: one writer at a time; any number of readers, each with the count and sequence of its State.
    """

    __slots__ = ("at_ms", "died_at", "labels", "offsets", "vectors", "written_us")

    def __init__(self, capacity: int, dimension: int) -> None:
        """Room for `capacity` rows, none in use."""
        self.vectors: Vector = np.zeros((capacity, dimension), np.float32)
        self.labels: Ints = np.zeros(capacity, np.int64)
        self.died_at: Ints = np.full(capacity, NEVER)
        self.at_ms: Ints = np.zeros(capacity, np.int64)
        self.written_us: Ints = np.zeros(capacity, np.int64)
        self.offsets: Ints = np.zeros(capacity, np.int64)

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

    def scan(self, query: Vector, count: int, seq: int, need: int) -> Ints:
        """Row numbers among which the `need` best ones of the first `count` are; some more where scores are
        close.

        query: float32 (d,). In no order; fewer where fewer live.
        """
        if count == 0:
            return np.empty(0, np.int64)
        scores = self.vectors[:count] @ query
        scores[self.died_at[:count] <= seq] = -np.inf
        floor = np.float32(-np.inf)
        if need < count:
            floor = np.partition(scores, count - need)[count - need]
            slack = ROUNDING * max(1.0, float(np.sqrt(query @ query)))
            floor = np.float32(floor - slack)
        return np.flatnonzero(scores >= floor) if floor > -np.inf else np.flatnonzero(scores > floor)

    def compacted(self, count: int, seq: int, room: int) -> tuple[Rows, Ints]:
        """(a new buffer with the live rows first and at least as much room again, their old numbers)."""
        keep = self.alive(count, seq)
        fresh = Rows(max(CAPACITY_MIN, 2 * (len(keep) + room)), self.vectors.shape[1])
        for name in ("vectors", "labels", "at_ms", "written_us", "offsets"):
            getattr(fresh, name)[: len(keep)] = getattr(self, name)[keep]
        return fresh, keep
