"""The immutable state that one query reads; it hides dead rows, those of deleted items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from index.arrays import Ints, Mask, Names
from index.backends.base import AnnIndex
from index.port import Watermark
from index.storage.columns import Columns
from index.storage.key_table import KeyTable
from index.storage.segments import FreshBuffer, Segment
from index.storage.vector_table import CAPACITY_MIN, VectorTable


class IndexVersion(NamedTuple):
    """All that a query reads. Its arrays may gain entries, but never change what it can see.

    ids, label_of: every item ever seen and its label; appended to before a version counts it
    table, used:   the vector table and its rows in use
    seq:           sequence number of this version, see `index.storage.vector_table`
    live:          items a query can return
    row_of:        label -> row of its newest vector; dead if retired, -1 if it never had one
    names:         label -> item id, from its first row on; taking a hundred from this array costs
                   a third of a hundred look-ups in a list
    segments:      the main segment, then the small ones; () if every query is an exact scan
    live_entries:  of each segment
    fresh, fresh_count: the fresh buffer and its entries in use
    columns:       attributes of the table's rows
    keys:          item key -> label, of the items that have or had a row
    """

    ids: list[str]
    label_of: dict[str, int]
    table: VectorTable
    used: int
    seq: int
    live: int
    row_of: Ints
    names: Names
    segments: tuple[Segment, ...]
    live_entries: tuple[int, ...]
    fresh: FreshBuffer
    fresh_count: int
    watermarks: Mapping[int, Watermark]
    columns: Columns
    keys: KeyTable

    @classmethod
    def empty(cls, dimension: int, text_names: frozenset[str] = frozenset()) -> IndexVersion:
        """The version without items. text_names: see `Columns`."""
        table = VectorTable(CAPACITY_MIN, dimension)
        row_of: Ints = np.full(CAPACITY_MIN, -1)
        return cls(
            ids=[],
            label_of={},
            table=table,
            used=0,
            seq=0,
            live=0,
            row_of=row_of,
            names=np.full(CAPACITY_MIN, None),
            segments=(),
            live_entries=(),
            fresh=FreshBuffer.of(1, table.own[:0], row_of[:0]),
            fresh_count=0,
            watermarks={},
            columns=Columns(text_names=text_names),
            keys=KeyTable(len(row_of)),
        )

    @property
    def main(self) -> AnnIndex | None:
        """The index of the main segment, None if there is none."""
        return self.segments[0].index if self.segments else None

    @property
    def stale(self) -> int:
        """Dead entries of the main segment."""
        return self.segments[0].index.size - self.live_entries[0] if self.segments else 0

    @property
    def outside_main(self) -> int:
        """Entries of the fresh buffer, dead ones included, and live ones of small segments."""
        return self.fresh_count + sum(self.live_entries[1:])

    def seen(self, rows: Ints) -> Ints:
        """These rows as of this version: a newer row becomes the row that it replaced."""
        if self.table.written > self.used and len(rows) and rows.max() >= self.used:
            rows = rows.copy()
            while len(newer := np.flatnonzero(rows >= self.used)):
                rows[newer] = self.table.replaced[rows[newer]]
        return rows

    def living(self, rows: Ints) -> Ints:
        """Of these rows, which may be -1 or newer than this version, those that live in it."""
        rows = self.seen(rows)
        alive = (self.table.died_at.take(rows) > self.seq).nonzero()[0]
        return rows if len(alive) == len(rows) else rows.take(alive)

    def lack_time(self, labels: Ints) -> Mask:
        """bool (n,): which of these labels are live items without a time; for the writer."""
        rows = np.full(len(labels), -1)
        known = labels < len(self.row_of)
        rows[known] = self.row_of[labels[known]]
        lacking: Mask = (self.table.died_at[rows] > self.seq) & (self.table.at_ms[rows] == 0)
        return lacking

    def rows_of(self, item_ids: Sequence[str]) -> Ints:
        """int64 (n,): current row of each item, -1 if not live."""
        label_of = self.label_of
        return self.rows_at(np.array([label_of.get(item_id, -1) for item_id in item_ids], np.int64))

    def rows_at(self, labels: Ints) -> Ints:
        """int64 (n,): current row of each label, -1 if the item is not live or the label is -1."""
        if not len(self.row_of):
            return np.full(len(labels), -1)
        # A label beyond `row_of` is newer than this version.
        inside = (labels >= 0) & (labels < len(self.row_of))
        rows = np.where(inside, self.row_of.take(labels, mode="clip"), -1)
        rows = self.seen(rows)
        alive = self.table.died_at.take(rows) > self.seq
        found: Ints = np.where(alive, rows, -1)
        return found
