"""The attributes of the vector table's rows as columns, to evaluate filters on.

Every category, tag and numeric attribute has an ascending list of the rows that carry it, so memory
grows with what items carry, not with the number of names. The writer adds a row's entries before
it publishes the IndexVersion that counts the row, and never changes them. So readers need no lock:
of each list they see the rows below the count of their IndexVersion.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from index.arrays import Floats, Ints, Mask
from index.filters import Filter, numbers, terms
from index.storage.vector_table import NEVER

# ("categories", "tags" or "attributes"; the name)
Key = tuple[str, str]

_CAPACITY_MIN = 4
# Names that are handled between two moments at which readers get the interpreter lock: about 2 ms.
NAMES_AT_ONCE = 1_024
YIELD_S = 1e-6


class Column:
    """The rows that carry one term or number, ascending; unused places hold NEVER.

    arrays: (rows int64, values float64 or None), replaced together when full
    """

    __slots__ = ("arrays", "count")

    def __init__(self, rows: Ints, values: Floats | None) -> None:
        """rows, values: the first entries; no room behind them."""
        self.arrays = (rows, values)
        self.count = len(rows)

    def add(self, row: int, value: float) -> None:
        """Append a row higher than all before it."""
        rows, values = self.arrays
        if self.count == len(rows):
            room = max(_CAPACITY_MIN, self.count)
            rows = np.concatenate((rows, np.full(room, NEVER)))
            if values is not None:
                values = np.concatenate((values, np.zeros(room)))
            self.arrays = (rows, values)
        if values is not None:
            values[self.count] = value
        rows[self.count] = row
        self.count += 1

    def below(self, count: int) -> tuple[Ints, Floats | None]:
        """(its rows below `count`, their values)."""
        rows, values = self.arrays
        n = int(np.searchsorted(rows, count))
        return rows[:n], None if values is None else values[:n]


class Columns:
    """All columns of one table.

    Thread rule: one writer; any number of readers, each with its IndexVersion's count.
    """

    __slots__ = ("_columns",)

    def __init__(self) -> None:
        self._columns: dict[Key, Column] = {}

    def append(self, first: int, attributes: Sequence[Mapping[str, Any]]) -> None:
        """Add the attributes of the rows `first`, `first` + 1, …"""
        if not any(attributes):
            return
        for row, of_row in enumerate(attributes, first):
            if not of_row:
                continue
            for field_name in ("categories", "tags"):
                for term in terms(of_row, field_name):
                    self._column((field_name, term)).add(row, 0.0)
            for name, value in numbers(of_row).items():
                self._column(("attributes", name)).add(row, value)

    def mask(self, filters: Filter, count: int) -> Mask:
        """bool (count,): rows, live or dead, that pass all but the id lists of the filter."""
        mask = np.ones(count, bool)
        if filters.categories:
            mask &= self._any("categories", filters.categories, count)
        if filters.tags:
            mask &= self._any("tags", filters.tags, count)
        for tag in filters.tags_all:
            mask &= self._any("tags", (tag,), count)
        for name, between in filters.ranges.items():
            inside = np.zeros(count, bool)
            column = self._columns.get(("attributes", name))
            if column is not None:
                rows, values = column.below(count)
                assert values is not None
                inside[rows[(values >= between.low) & (values <= between.high)]] = True
            mask &= inside
        return mask

    def passing(self, filters: Filter, rows: Ints) -> Mask:
        """bool (n,): which of these rows pass; cheaper than `mask` for few rows."""
        mask = np.ones(len(rows), bool)
        for field_name, any_of in (("categories", filters.categories), ("tags", filters.tags)):
            if any_of:
                mask &= np.logical_or.reduce(
                    [self._look_up((field_name, name), rows)[0] for name in any_of]
                )
        for tag in filters.tags_all:
            mask &= self._look_up(("tags", tag), rows)[0]
        for name, between in filters.ranges.items():
            has, values = self._look_up(("attributes", name), rows)
            mask &= has & (values >= between.low) & (values <= between.high)
        return mask

    def compact(self, kept: Ints, count: int) -> Columns:
        """The columns of a table that holds only the rows `kept` of `count`, renumbered 0, 1, …"""
        new_row = np.full(count, -1)
        new_row[kept] = np.arange(len(kept))
        columns = Columns()
        named = [of_key for of_key in self.items(count) if len(of_key[1])]
        # One array per call for many names: numpy's calls, not its work, would cost seconds.
        for at in range(0, len(named), NAMES_AT_ONCE):
            time.sleep(YIELD_S)
            _renumber(columns, named[at : at + NAMES_AT_ONCE], new_row)
        return columns

    def items(self, count: int) -> Iterator[tuple[Key, Ints, Floats | None]]:
        """(key, its rows below `count`, their values) of every column."""
        for n, (key, column) in enumerate(list(self._columns.items())):
            if n % NAMES_AT_ONCE == NAMES_AT_ONCE - 1:
                time.sleep(YIELD_S)
            yield key, *column.below(count)

    def put(self, key: Key, rows: Ints, values: Floats | None) -> None:
        """Set a whole column; rows ascending."""
        self._columns[key] = Column(rows, values)

    def _column(self, key: Key) -> Column:
        column = self._columns.get(key)
        if column is None:
            values = np.empty(0) if key[0] == "attributes" else None
            column = self._columns[key] = Column(np.empty(0, np.int64), values)
        return column

    def _any(self, field_name: str, names: Iterable[str], count: int) -> Mask:
        """bool (count,): rows that carry at least one of these terms."""
        mask = np.zeros(count, bool)
        for name in names:
            column = self._columns.get((field_name, name))
            if column is not None:
                mask[column.below(count)[0]] = True
        return mask

    def _look_up(self, key: Key, rows: Ints) -> tuple[Mask, Floats]:
        """(which rows are in a column, their values there, 0.0 if none)."""
        column = self._columns.get(key)
        listed, values = (np.empty(0, np.int64), None) if column is None else column.arrays
        if not len(listed):
            return np.zeros(len(rows), bool), np.zeros(len(rows))
        at = np.minimum(np.searchsorted(listed, rows), len(listed) - 1)
        return listed[at] == rows, np.zeros(len(rows)) if values is None else values[at]


def _renumber(
    columns: Columns, named: Sequence[tuple[Key, Ints, Floats | None]], new_row: Ints
) -> None:
    """Put these columns, none of them empty, under new row numbers; rows of -1 are left out."""
    rows = new_row[np.concatenate([rows for _, rows, _ in named])]
    stays = rows >= 0
    first = np.cumsum([0, *(len(rows) for _, rows, _ in named)])
    # Number of rows that stay before each column, and before the end.
    before = np.concatenate(([0], np.cumsum(stays)))[first].tolist()
    rows = rows[stays]
    for n, (key, _, values) in enumerate(named):
        begin, end = before[n], before[n + 1]
        if end > begin:
            kept = None if values is None else values[stays[first[n] : first[n + 1]]]
            columns.put(key, rows[begin:end], kept)
