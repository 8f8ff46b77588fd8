"""What spares a query the scan of every row: segments and the fresh buffer.

An entry of either names a row of the vector table. For a reader of an IndexVersion the entry lives
if that row lives in the version. Each live item has exactly one live entry, in one segment or in
the fresh buffer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from index.arrays import Ints, Vector
from index.backends.base import AnnIndex


@dataclass(frozen=True, slots=True)
class Segment:
    """An immutable ANN index and the rows of its entries.

    number: unique among the segments of a live index
    index:  its labels are the entries 0 … size - 1
    rows:   int64 (size,), entry -> row; the writer sets a newer row if an item turned a little
    """

    number: int
    index: AnnIndex
    rows: Ints


class FreshBuffer:
    """Vectors that every query scans exactly. Append-only, as the table is.

    vectors: float32 (capacity, d); rows: int64 (capacity,), entry -> row
    """

    __slots__ = ("rows", "vectors")

    def __init__(self, vectors: Vector, rows: Ints) -> None:
        self.vectors = vectors
        self.rows = rows

    @classmethod
    def of(cls, capacity: int, vectors: Vector, rows: Ints) -> FreshBuffer:
        """A buffer of `capacity` entries, the first of which are these."""
        n, dimension = vectors.shape
        fresh = cls(np.zeros((capacity, dimension), np.float32), np.full(capacity, -1))
        fresh.vectors[:n] = vectors
        fresh.rows[:n] = rows
        return fresh

    def has_room(self, count: int, more: int) -> bool:
        """Whether `more` entries fit behind the first `count`."""
        return count + more <= len(self.rows)
