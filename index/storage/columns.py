"""The attributes of the vector table's rows, as columns that a filter is evaluated on.

For every category, every tag and every numeric attribute there is one list of the rows that have it, in the
order of the rows. Memory follows what items carry, whatever the number of names. A row's entries are written
before the State that counts the row is published and never changed, so readers need no lock: of each list
they see the rows below the count of their State.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from index.arrays import Ints
from index.filters import Filter, numbers, texts
from index.storage.vector_table import NEVER

Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
# (which of "categories", "tags", "attributes"; the name)
Key = tuple[str, str]

_FIRST = 4


class Column:
    """The rows that have one label or number, ascending; unused places hold NEVER.

    arrays: (rows int64, values float64 or None), replaced as one where they are full
    """

    __slots__ = ("arrays", "count")

    def __init__(self, rows: Ints, values: Floats | None) -> None:
        """Full with these."""
        self.arrays = (rows, values)
        self.count = len(rows)

    def add(self, row: int, value: float) -> None:
        """Append a row that is higher than all before it."""
        rows, values = self.arrays
        if self.count == len(rows):
            rows = np.concatenate((rows, np.full(max(_FIRST, self.count), NEVER)))
            if values is not None:
                values = np.concatenate((values, np.zeros(len(rows) - self.count)))
            self.arrays = (rows, values)
        if values is not None:
            values[self.count] = value
        rows[self.count] = row
        self.count += 1

    def below(self, count: int) -> tuple[Ints, Floats | None]:
        """Its rows below `count`, and their values."""
        rows, values = self.arrays
        n = int(np.searchsorted(rows, count))
        return rows[:n], None if values is None else values[:n]


class Columns:
    """All columns of one table. Thread rule: one writer; any number of readers, each with its own count."""

    __slots__ = ("_columns",)

    def __init__(self) -> None:
        """No row yet."""
        self._columns: dict[Key, Column] = {}

    def append(self, first: int, attributes: Sequence[Mapping[str, Any]]) -> None:
        """The attributes of the rows `first`, `first` + 1, …"""
        if not any(attributes):
            return
        for row, of_item in enumerate(attributes, first):
            if not of_item:
                continue
            for part in ("categories", "tags"):
                for text in texts(of_item, part):
                    self._column((part, text)).add(row, 0.0)
            for name, value in numbers(of_item).items():
                self._column(("attributes", name)).add(row, value)

    def mask(self, filters: Filter, count: int) -> Mask:
        """bool (count,): the rows that pass all that is asked of columns; dead rows are not told apart."""
        kept = np.ones(count, bool)
        for part, any_of in (("categories", filters.categories), ("tags", filters.tags)):
            if any_of:
                kept &= self._any(part, any_of, count)
        for text in filters.tags_all:
            kept &= self._any("tags", (text,), count)
        for name, between in filters.ranges.items():
            inside = np.zeros(count, bool)
            column = self._columns.get(("attributes", name))
            if column is not None:
                rows, values = column.below(count)
                assert values is not None
                inside[rows[(values >= between.low) & (values <= between.high)]] = True
            kept &= inside
        return kept

    def passing(self, filters: Filter, rows: Ints) -> Mask:
        """bool (n,): which of some rows pass; cheaper than `mask` for few of them."""
        kept = np.ones(len(rows), bool)
        for part, any_of in (("categories", filters.categories), ("tags", filters.tags)):
            if any_of:
                kept &= np.logical_or.reduce(
                    [self._places((part, name), rows)[0] for name in any_of]
                )
        for name in filters.tags_all:
            kept &= self._places(("tags", name), rows)[0]
        for name, between in filters.ranges.items():
            has, values = self._places(("attributes", name), rows)
            kept &= has & (values >= between.low) & (values <= between.high)
        return kept

    def compacted(self, kept: Ints, count: int) -> Columns:
        """Those of a table that holds only the rows `kept` (of `count`), renumbered 0, 1, …"""
        new_row = np.full(count, -1)
        new_row[kept] = np.arange(len(kept))
        after = Columns()
        for key, rows, values in self.items(count):
            moved = new_row[rows]
            stays = moved >= 0
            if stays.any():
                after.put(key, moved[stays], None if values is None else values[stays])
        return after

    def items(self, count: int) -> Iterator[tuple[Key, Ints, Floats | None]]:
        """(key, its rows below `count`, their values) of every column."""
        for key, column in list(self._columns.items()):
            yield key, *column.below(count)

    def put(self, key: Key, rows: Ints, values: Floats | None) -> None:
        """Set one column as a whole; rows ascending."""
        self._columns[key] = Column(rows, values)

    def _column(self, key: Key) -> Column:
        column = self._columns.get(key)
        if column is None:
            empty = np.empty(0) if key[0] == "attributes" else None
            column = self._columns[key] = Column(np.empty(0, np.int64), empty)
        return column

    def _any(self, part: str, names: Iterable[str], count: int) -> Mask:
        """The rows that have one of these labels at least."""
        found = np.zeros(count, bool)
        for name in names:
            column = self._columns.get((part, name))
            if column is not None:
                found[column.below(count)[0]] = True
        return found

    def _places(self, key: Key, rows: Ints) -> tuple[Mask, Floats]:
        """(which of the rows stand in a column, their values there, 0.0 where there is none)."""
        column = self._columns.get(key)
        listed, values = (np.empty(0, np.int64), None) if column is None else column.arrays
        if not len(listed):
            return np.zeros(len(rows), bool), np.zeros(len(rows))
        at = np.minimum(np.searchsorted(listed, rows), len(listed) - 1)
        return listed[at] == rows, np.zeros(len(rows)) if values is None else values[at]
