"""The attributes of the vector table's rows as columns, to evaluate filters on.

Every category, tag and numeric attribute is a column: the rows that carry it. All columns lie in a
few flat arrays, so their cost grows with what items carry, not with the number of names.
The writer adds a row's entries before it publishes the IndexVersion that counts the row, and never
changes them. So readers need no lock: they see the rows below the count of their IndexVersion.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import compress
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from eddyline.schema.events import LISTS
from index.arrays import Floats, Ints, Mask
from index.filters import Filter, Range, numbers, terms, text_of
from index.port import Term
from index.storage.vector_table import NEVER

# ("categories", "tags" or "attributes"; the name), or (`TEXT` and an attribute's name; its text)
Key = tuple[str, str]
TEXT = "="

# So many new entries, or this share of the sorted ones, are scanned by each look-up before they
# are sorted in: 32,768 take 10 µs to scan, and the share keeps the sorting linear.
NEW_MAX = 32_768
NEW_SHARE = 16
# With more columns of numbers than these, those without rows go too.
EMPTY_COLUMNS_MAX = 1_000
_CAPACITY_MIN = 64
# The terms of all columns are kept for so many choices of names: a site has one or two.
WANTED_MAX = 8
# Readers get the interpreter lock between the steps of larger work.
YIELD_ABOVE = 10_000
YIELD_S = 1e-6
_NONE: Ints = np.empty(0, np.int64)


class ColumnData(NamedTuple):
    """Whole columns, one after the other.

    keys: one for each column; starts: int64 (keys + 1,), place of the first entry of each
    rows: int64 (n,), ascending within a column; values: float64 (n,), None for terms
    """

    keys: list[Key]
    starts: Ints
    rows: Ints
    values: Floats | None


class _Entries(NamedTuple):
    """What readers see: entries sorted by column, then new ones in the order of their rows.

    starts, rows, values: as in `ColumnData`, of the first columns
    new_rows: int64 (capacity,), ascending; unused places hold NEVER
    new_columns: int64 (capacity,), number of the column; new_values: float64, unused for terms
    """

    starts: Ints
    rows: Ints
    values: Floats | None
    new_rows: Ints
    new_columns: Ints
    new_values: Floats

    def sorted_rows(self, column: int) -> slice:
        """The sorted entries of a column."""
        if column + 1 >= len(self.starts):
            return slice(0, 0)
        return slice(int(self.starts[column]), int(self.starts[column + 1]))


class _ByRow(NamedTuple):
    """The sorted entries in the order of their rows.

    rows:    of `_Entries`, that this was made of
    starts:  int64 (highest row + 2,), place of the first entry of each row
    columns: int32 (n,), numbers of the columns
    """

    rows: Ints
    starts: Ints
    columns: npt.NDArray[np.int32]

    @classmethod
    def of(cls, entries: _Entries) -> _ByRow:
        """Sorts all entries: 0.2 s for a million."""
        columns = np.repeat(
            np.arange(len(entries.starts) - 1, dtype=np.int32), np.diff(entries.starts)
        )
        order = np.argsort(entries.rows, kind="stable")
        starts = np.concatenate(([0], np.cumsum(np.bincount(entries.rows))))
        return cls(entries.rows, starts, columns.take(order))

    def columns_of(self, row: int) -> list[int]:
        """The columns with an entry of this row."""
        if row + 1 >= len(self.starts):
            return []
        found: list[int] = self.columns[self.starts[row] : self.starts[row + 1]].tolist()
        return found


class Postings:
    """Columns of one kind. Thread rule: one writer; any number of readers.

    numeric: whether entries have values
    """

    __slots__ = ("_by_row", "_count", "_entries", "_keys", "_number_of", "_numeric", "_wanted")

    def __init__(self, *, numeric: bool, data: ColumnData | None = None) -> None:
        """data: the first entries."""
        if data is None:
            empty: Floats | None = np.empty(0) if numeric else None
            data = ColumnData([], np.zeros(1, np.int64), _NONE, empty)
        self._numeric = numeric
        self._number_of = {key: number for number, key in enumerate(data.keys)}
        # By number; a name is here before an entry has its number.
        self._keys = [*data.keys]
        # Made when it is first asked for: few sites ask for the terms of a row.
        self._by_row: _ByRow | None = None
        self._wanted: dict[tuple[str, ...], list[Term | None]] = {}
        self._entries = _Entries(*data[1:], _NONE, _NONE, np.empty(0))
        # New entries in use; of the writer alone.
        self._count = 0

    def append(self, rows: list[int], keys: list[Key], values: list[float]) -> None:
        """Add entries of ascending rows, all higher than those before; values: [] for terms."""
        number_of, start, end = self._number_of, self._count, self._count + len(rows)
        for key in keys:
            if key not in number_of:
                self._keys.append(key)
                number_of[key] = len(number_of)
        entries = self._entries
        if end > len(entries.new_rows):
            if start > max(NEW_MAX, len(entries.rows) // NEW_SHARE):
                found = self._sorted(entries, start)
                entries, start, end = _Entries(*found, _NONE, _NONE, np.empty(0)), 0, len(rows)
            room = max(_CAPACITY_MIN, start, end - start)
            entries = entries._replace(
                new_rows=np.concatenate((entries.new_rows[:start], np.full(room, NEVER))),
                new_columns=np.concatenate((entries.new_columns[:start], np.zeros(room, int))),
                new_values=np.concatenate(
                    (entries.new_values[:start], np.zeros(room if self._numeric else 0))
                ),
            )
        entries.new_columns[start:end] = [*map(number_of.__getitem__, keys)]
        if self._numeric:
            entries.new_values[start:end] = values
        entries.new_rows[start:end] = rows
        self._entries, self._count = entries, end

    def __len__(self) -> int:
        """Number of columns."""
        return len(self._number_of)

    def keys(self) -> list[Key]:
        """Every column that a row had; of numbers also those whose rows have all gone."""
        return [*self._number_of]

    def rows(self, keys: Iterable[Key], count: int, between: Range | None = None) -> Mask:
        """bool (count,): rows in at least one of these columns, with a value in the range."""
        mask, columns, entries = np.zeros(count, bool), self._numbers(keys), self._entries
        for column in columns:
            here = entries.sorted_rows(column)
            rows = entries.rows[here]
            rows = rows[: np.searchsorted(rows, count)]
            if between is not None:
                assert entries.values is not None
                rows = rows[_inside(entries.values[here][: len(rows)], between)]
            mask[rows] = True
        mask[_new_rows(entries, count, columns, between)] = True
        return mask

    def contain(self, keys: Iterable[Key], rows: Ints, between: Range | None = None) -> Mask:
        """bool (n,): which of these rows are in at least one column; cheaper for few rows."""
        found, columns, entries = np.zeros(len(rows), bool), self._numbers(keys), self._entries
        for column in columns:
            here = entries.sorted_rows(column)
            listed = entries.rows[here]
            if len(listed):
                at = np.minimum(np.searchsorted(listed, rows), len(listed) - 1)
                hit = listed[at] == rows
                if between is not None:
                    assert entries.values is not None
                    hit &= _inside(entries.values[here][at], between)
                found |= hit
        return found | _are_in_new(entries, rows, columns, between)

    def terms(self, rows: Ints, name_of: Mapping[str, str]) -> list[frozenset[Term]]:
        """The terms of each of these rows.

        name_of: first part of a key -> name of its terms, of the keys that are wanted
        """
        entries, by_row = self._entries, self._by_row
        if by_row is None or by_row.rows is not entries.rows:
            self._by_row = by_row = _ByRow.of(entries)
        first = np.searchsorted(entries.new_rows, rows).tolist()
        after = np.searchsorted(entries.new_rows, rows, "right").tolist()
        of_column = self._terms_by_column(name_of).__getitem__
        found = []
        for row, start, end in zip(rows.tolist(), first, after, strict=True):
            columns = by_row.columns_of(row)
            if start < end:
                columns = columns + entries.new_columns[start:end].tolist()
            found.append(frozenset(filter(None, map(of_column, columns))))
        return found

    def _terms_by_column(self, name_of: Mapping[str, str]) -> list[Term | None]:
        """The term of each column, None for columns that are not wanted. Never changed in place."""
        wanted, keys = tuple(name_of), self._keys
        made = self._wanted.get(wanted, [])
        if (count := len(keys)) > len(made):
            more = keys[len(made) : count]
            made = made + [
                None if (name := name_of.get(field_name)) is None else (name, text)
                for field_name, text in more
            ]
            if len(self._wanted) >= WANTED_MAX:
                self._wanted = {}
            self._wanted[wanted] = made
        return made

    def data(self, kept: Ints, count: int, *, by_name: bool = False) -> ColumnData:
        """The entries of the rows `kept` of `count`, renumbered 0, 1, …

        Empty columns of terms are left out, and those of numbers if there are many: see `keys`.
        by_name: sort the columns by their keys
        """
        entries = self._entries
        used = int(np.searchsorted(entries.new_rows, count))
        starts, rows, values = self._sorted(entries, used)
        _yield_gil(rows)
        # Rows from `count` on get the number -1 too.
        new_row = np.full(max(count, int(rows.max(initial=-1)) + 1), -1)
        new_row[kept] = np.arange(len(kept))
        rows = new_row.take(rows)
        stays = rows >= 0
        _yield_gil(rows)
        # Number of entries that stay before each column, and before the end.
        starts = np.concatenate(([0], np.cumsum(stays)))[starts]
        rows = rows[stays]
        values = None if values is None else values[stays]
        _yield_gil(rows)
        filled = starts[1:] > starts[:-1]
        if self._numeric and len(filled) <= EMPTY_COLUMNS_MAX:
            filled[:] = True
        # A copy: the writer may add names meanwhile.
        keys = [*compress([*self._number_of], filled.tolist())]
        starts = np.concatenate((starts[:-1][filled], starts[-1:]))
        found = ColumnData(keys, starts, rows, values)
        return _by_name(found) if by_name else found

    def _numbers(self, keys: Iterable[Key]) -> list[int]:
        number_of = self._number_of
        return [number for key in keys if (number := number_of.get(key)) is not None]

    def _sorted(self, entries: _Entries, used: int) -> tuple[Ints, Ints, Floats | None]:
        """(starts, rows, values) of the sorted entries and the first `used` new ones."""
        columns = np.repeat(np.arange(len(entries.starts) - 1), np.diff(entries.starts))
        columns = np.concatenate((columns, entries.new_columns[:used]))
        # Two sorted runs at most of these are long, so a stable sort is nearly linear.
        order = np.argsort(columns, kind="stable")
        starts = np.searchsorted(columns.take(order), np.arange(len(self._number_of) + 1))
        rows = np.concatenate((entries.rows, entries.new_rows[:used])).take(order)
        if entries.values is None:
            return starts, rows, None
        return starts, rows, np.concatenate((entries.values, entries.new_values[:used])).take(order)


class Columns:
    """All columns of one table.

    Thread rule: one writer; any number of readers, each with its IndexVersion's count.
    text_names: attributes whose texts are columns
    """

    __slots__ = ("_names", "_numbers", "_terms", "text_names")

    def __init__(
        self,
        numbers_data: ColumnData | None = None,
        terms_data: ColumnData | None = None,
        *,
        text_names: frozenset[str] = frozenset(),
    ) -> None:
        """The first entries; see `data`."""
        self.text_names = text_names
        self._numbers = Postings(numeric=True, data=numbers_data)
        self._terms = Postings(numeric=False, data=terms_data)
        self._names = frozenset[str]()

    def append(self, first: int, attributes: Sequence[Mapping[str, Any]]) -> None:
        """Add the attributes of the rows `first`, `first` + 1, …"""
        if not any(attributes):
            return
        term_rows, term_keys = list[int](), list[Key]()
        rows, keys, values = list[int](), list[Key](), list[float]()
        for row, of_row in enumerate(attributes, first):
            for field_name in ("categories", "tags"):
                for term in terms(of_row, field_name):
                    term_rows.append(row)
                    term_keys.append((field_name, term))
            for name in self.text_names:
                if (text := text_of(of_row, name)) is not None:
                    term_rows.append(row)
                    term_keys.append((TEXT + name, text))
            for name, value in numbers(of_row).items():
                rows.append(row)
                keys.append(("attributes", name))
                values.append(value)
        self._terms.append(term_rows, term_keys, [])
        self._numbers.append(rows, keys, values)

    def number_names(self) -> frozenset[str]:
        """Names of the numeric attributes that rows have or had."""
        # Every query with a range reads them. Names only come, so their number shows new ones.
        if len(self._names) != len(self._numbers):
            self._names = frozenset(name for _, name in self._numbers.keys())
        return self._names

    def mask(self, filters: Filter, count: int) -> Mask:
        """bool (count,): rows, live or dead, that pass all but the id lists of the filter."""
        mask = np.ones(count, bool)
        for any_of in _term_conditions(filters):
            mask &= self._terms.rows(any_of, count)
        if none_of := _barred_terms(filters):
            mask &= ~self._terms.rows(none_of, count)
        for name, between in filters.ranges.items():
            mask &= self._numbers.rows([("attributes", name)], count, between)
        return mask

    def passing(self, filters: Filter, rows: Ints) -> Mask:
        """bool (n,): which of these rows pass; cheaper than `mask` for few rows."""
        mask = np.ones(len(rows), bool)
        for any_of in _term_conditions(filters):
            mask &= self._terms.contain(any_of, rows)
        if none_of := _barred_terms(filters):
            mask &= ~self._terms.contain(none_of, rows)
        for name, between in filters.ranges.items():
            mask &= self._numbers.contain([("attributes", name)], rows, between)
        return mask

    def terms(self, rows: Ints, names: Collection[str]) -> list[frozenset[Term]]:
        """What each of these rows has of these attributes; see `IndexReader.terms_of`."""
        name_of = {name if name in LISTS else TEXT + name: name for name in sorted(names)}
        return self._terms.terms(rows, name_of)

    def compact(self, kept: Ints, count: int) -> Columns:
        """The columns of a table that holds only the rows `kept` of `count`, renumbered 0, 1, …"""
        return Columns(
            self._numbers.data(kept, count),
            self._terms.data(kept, count),
            text_names=self.text_names,
        )

    def data(self, kept: Ints, count: int) -> tuple[ColumnData, ColumnData]:
        """(numbers, terms) of these rows as in `compact`, by name: equal contents, equal data."""
        return (
            self._numbers.data(kept, count, by_name=True),
            self._terms.data(kept, count, by_name=True),
        )


def _term_conditions(filters: Filter) -> list[list[Key]]:
    """The conditions on terms; each holds if a row has at least one of its keys."""
    fields = (("categories", filters.categories), ("tags", filters.tags))
    any_of = [[(field_name, name) for name in names] for field_name, names in fields if names]
    any_of += [_text_keys(name, wanted) for name, wanted in filters.texts.items()]
    return any_of + [[("tags", name)] for name in filters.tags_all]


def _barred_terms(filters: Filter) -> list[Key]:
    """No row with one of these keys passes."""
    if not (filters.categories_none or filters.tags_none or filters.texts_none):
        return []
    keys = [("categories", name) for name in filters.categories_none]
    keys += [("tags", name) for name in filters.tags_none]
    return keys + [key for name, of in filters.texts_none.items() for key in _text_keys(name, of)]


def _text_keys(name: str, wanted: Iterable[str]) -> list[Key]:
    return [(TEXT + name, text) for text in wanted]


def _yield_gil(entries: Ints) -> None:
    if len(entries) > YIELD_ABOVE:
        time.sleep(YIELD_S)


def _inside(values: Floats, between: Range) -> Mask:
    return (values >= between.low) & (values <= between.high)


def _is_one_of(numbers: Ints, columns: list[int]) -> Mask:
    # numpy's search for one number costs far more than a comparison.
    return numbers == columns[0] if len(columns) == 1 else np.isin(numbers, columns)


def _new_rows(entries: _Entries, count: int, columns: list[int], between: Range | None) -> Ints:
    """The rows below `count` of new entries in these columns, with a value in the range."""
    # The entries behind them may be written right now.
    used = int(np.searchsorted(entries.new_rows, count))
    if not used or not columns:
        return _NONE
    picked = np.flatnonzero(_is_one_of(entries.new_columns[:used], columns))
    if between is not None:
        picked = picked[_inside(entries.new_values[picked], between)]
    return entries.new_rows[picked]


def _are_in_new(entries: _Entries, rows: Ints, columns: list[int], between: Range | None) -> Mask:
    """bool (n,): which rows have new entries as in `_new_rows`; reads no entries of other rows."""
    found = np.zeros(len(rows), bool)
    if not columns:
        return found
    first = np.searchsorted(entries.new_rows, rows)
    sizes = np.searchsorted(entries.new_rows, rows, "right") - first
    of = np.repeat(np.arange(len(rows)), sizes)
    # Place of every entry: that of its row's first one, and its number in the row.
    at = np.arange(len(of)) + np.repeat(first + sizes - np.cumsum(sizes), sizes)
    picked = _is_one_of(entries.new_columns[at], columns)
    if between is not None:
        picked &= _inside(entries.new_values[at], between)
    found[of[picked]] = True
    return found


def _by_name(data: ColumnData) -> ColumnData:
    """The same columns in the order of their keys."""
    order = np.array(sorted(range(len(data.keys)), key=data.keys.__getitem__), np.int64)
    sizes = np.diff(data.starts).take(order)
    starts = np.concatenate(([0], np.cumsum(sizes)))
    # Old place of every entry: its distance from the start of its column stays.
    places = np.arange(len(data.rows)) + np.repeat(
        data.starts[:-1].take(order) - starts[:-1], sizes
    )
    values = None if data.values is None else data.values.take(places)
    keys = [data.keys[at] for at in order.tolist()]
    return ColumnData(keys, starts, data.rows.take(places), values)
