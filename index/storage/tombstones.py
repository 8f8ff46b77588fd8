"""Deletes whose offsets are kept, and the rule by which they end.

An item's delete is kept so that no older record revives the item. It ends when the log is
`kept_us` past it: the largest `written_us` of the index's watermarks is that much larger than the
delete's own. So two workers that have read the same log agree. Its id then has no entry any more,
and its partition of `items` has a floor: the highest offset of its ended deletes.

* A record of an unknown item at or below the floor is older than an ended delete: it is ignored.
  Such a record comes only from reading the log again (a lost position) or from an ingest that
  publishes the catalogue again.
* A record above the floor is a new version, even of an id that was deleted: the item is created.
* A producer's clock that is far ahead ends deletes early. The floors hold all the same.
* No live item is refused: the caller ends deletes only once it has read the whole log, and then it
  knows every live item of it; records of known items compare with the item's own offset.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from index.arrays import Ints

_CHUNK_ROWS = 4_096
# Columns of a row.
LABEL, OFFSET, PARTITION, WRITTEN_US = range(4)


class Tombstones:
    """Rows int64 (n, 4): label, offset, partition, written_us. Thread rule: under the write lock.

    A row is outdated if its item has another offset by now; the reader of the rows compares.
    floors: partition of `items` -> highest offset of its ended deletes
    """

    def __init__(self) -> None:
        self.floors: dict[int, int] = {}
        self._chunks: list[Ints] = []

    def add(self, rows: Ints) -> None:
        """Keep more deletes."""
        if not len(rows):
            return
        if self._chunks and len(self._chunks[-1]) + len(rows) <= _CHUNK_ROWS:
            rows = np.concatenate((self._chunks.pop(), rows))
        self._chunks.append(rows)

    def take(self, before_us: int, limit: int) -> Ints:
        """Remove and return the rows written before a time, about `limit` at most."""
        taken, kept, n = [np.empty((0, 4), np.int64)], list[Ints](), 0
        for chunk in self._chunks:
            due = chunk[:, WRITTEN_US] < before_us
            if n < limit and due.any():
                taken.append(chunk[due])
                n += len(taken[-1])
                chunk = chunk[~due]
            if len(chunk):
                kept.append(chunk)
        self._chunks = kept
        return np.concatenate(taken)

    def rows(self) -> Iterator[Ints]:
        """All rows, in blocks."""
        return iter(self._chunks)

    def end(self, rows: Ints) -> None:
        """Raise the floors by these rows; partition -1 is unknown and has none."""
        for partition in set(rows[:, PARTITION].tolist()) - {-1}:
            highest = int(rows[rows[:, PARTITION] == partition, OFFSET].max())
            self.floors[partition] = max(highest, self.floors.get(partition, highest))

    def is_below(self, partition: int, offset: int) -> bool:
        """Whether a record of an unknown item is older than an ended delete."""
        floor = self.floors.get(partition)
        return floor is not None and offset <= floor
