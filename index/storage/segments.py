"""What stands beside the vector table, so that a query need not look at every row: graphs and fresh buffer.

An entry of either names a row of the table and counts, for a reader of State s, where that row lives at s.
That is all there is to staleness: the row of an item that turned too far, or was retired, is dead, and its
entry with it. A live item is in exactly one of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from index.arrays import Ints, Vector
from index.port import AnnIndex


@dataclass(frozen=True, slots=True)
class Segment:
    """A main index or a tier in use.

    number: its own among all graphs of the index
    main:   what is searched; its labels are the entries 0 … size − 1
    rows:   int64 (size,), entry -> the row it stands for; the writer sets a newer one where an item turned
            a little
    """

    number: int
    main: AnnIndex
    rows: Ints


class FreshBuffer:
    """The fresh buffer: vectors side by side, scanned whole. Append-only, as the table is.

    vectors: float32 (capacity, d); rows: int64 (capacity,), entry -> the row it stands for
    """

    __slots__ = ("rows", "vectors")

    def __init__(self, vectors: Vector, rows: Ints) -> None:
        """Over these arrays, of the same length."""
        self.vectors, self.rows = vectors, rows

    @classmethod
    def of(cls, capacity: int, vectors: Vector, rows: Ints) -> FreshBuffer:
        """With room for `capacity` entries, the first of which are these."""
        n, dimension = vectors.shape
        made = cls(np.zeros((capacity, dimension), np.float32), np.full(capacity, -1))
        made.vectors[:n], made.rows[:n] = vectors, rows
        return made

    def room_for(self, count: int, more: int) -> bool:
        """Whether `more` entries fit behind the first `count`."""
        return count + more <= len(self.rows)
