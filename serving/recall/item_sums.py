"""Sums by item in arrays: names by row, the first items, and their order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from heapq import nsmallest
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray


class ItemSums(NamedTuple):
    """Sums by row of an `ItemNames`.

    clicks:  float64 (rows,); counted: bool (rows,), whether the item has any
    """

    clicks: NDArray[np.float64]
    counted: NDArray[np.bool_]

    def resized(self, names: int) -> ItemSums:
        """A copy with room for further names."""
        more = names - len(self.clicks)
        return ItemSums(
            np.concatenate((self.clicks, np.zeros(more))),
            np.concatenate((self.counted, np.zeros(more, bool))),
        )

    @classmethod
    def zero(cls, names: int) -> ItemSums:
        """No item has any."""
        return cls(np.zeros(names), np.zeros(names, bool))

    def add(self, rows: NDArray[np.int64], clicks: NDArray[np.float64]) -> None:
        """Add to the sums of distinct rows."""
        self.clicks[rows] += clicks
        self.counted[rows] = True


class ItemNames:
    """The row of each item. Thread rule: one thread."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._row_of: dict[bytes, int] = {}
        # Of the last `by_place`: its argument, and the place of each name in it, -1 for none.
        self._place_of: Mapping[str, int] = {}
        self._places: NDArray[np.int64] = np.zeros(0, np.int64)

    def __len__(self) -> int:
        return len(self._names)

    def rows(self, items: Sequence[bytes]) -> NDArray[np.int64]:
        """The row of each of these distinct items, UTF-8; one that has none gets the next."""
        rows = [*map(self._row_of.get, items)]
        if None in rows:
            for at in [at for at, row in enumerate(rows) if row is None]:
                rows[at] = self._row_of[items[at]] = len(self._names)
                self._names.append(items[at].decode())
        return np.array(cast("list[int]", rows), np.int64)

    def keep(self, rows: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
        """Drop the names of all other rows. Returns the kept ones; their new rows are 0, 1, …."""
        used = np.unique(np.concatenate(rows)) if rows else np.zeros(0, np.int64)
        self._names = [self._names[row] for row in used.tolist()]
        self._row_of = {name.encode(): row for row, name in enumerate(self._names)}
        self._places = np.zeros(0, np.int64)
        return used

    def top(self, sums: ItemSums, size: int) -> list[tuple[str, float]]:
        """(item id, sum) of the `size` items with the largest sums, equal ones by id."""
        rows = self._first_rows(sums, size)
        rows = rows[np.argsort(-sums.clicks[rows])]
        clicks = sums.clicks[rows]
        pairs = [*zip(map(self._names.__getitem__, rows.tolist()), clicks.tolist(), strict=True)]
        for start, end in _equal_runs(clicks):
            pairs[start:end] = sorted(pairs[start:end])
        return pairs

    def by_place(
        self, sums: ItemSums, size: int, place_of: Mapping[str, int]
    ) -> NDArray[np.float64]:
        """The sums of the items that `top` lists, by place; -inf for others.

        place_of: item id -> place, 0 … n − 1; must not change, as its places are kept
        """
        if place_of is not self._place_of:
            self._place_of, self._places = place_of, np.zeros(0, np.int64)
        if (known := len(self._places)) < len(self._names):
            more = [place_of.get(name, -1) for name in self._names[known:]]
            self._places = np.concatenate((self._places, np.array(more, np.int64)))
        rows = self._first_rows(sums, size)
        # The last place collects the items that are not in `place_of`.
        found = np.full(len(place_of) + 1, -np.inf)
        found[self._places[rows]] = sums.clicks[rows]
        return found[:-1]

    def _first_rows(self, sums: ItemSums, size: int) -> NDArray[np.int64]:
        """Rows of the `size` items with the largest sums, equal ones by id; in any order."""
        rows = np.flatnonzero(sums.counted)
        if len(rows) <= size:
            return rows
        clicks, at = sums.clicks[rows], len(rows) - size
        cut = np.partition(clicks, at)[at]
        above, equal = rows[clicks > cut], rows[clicks == cut]
        if len(above) + len(equal) > size:
            names = self._names
            first = nsmallest(size - len(above), equal.tolist(), key=names.__getitem__)
            equal = np.array(first, np.int64)
        return np.concatenate((above, equal))


def _equal_runs(values: NDArray[np.float64]) -> Iterator[tuple[int, int]]:
    """(start, end) of each run of two or more equal values."""
    starts = np.flatnonzero(np.diff(values, prepend=np.nan))
    ends = np.append(starts[1:], len(values))
    longer = ends - starts > 1
    return zip(starts[longer].tolist(), ends[longer].tolist(), strict=True)
