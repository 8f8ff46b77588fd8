"""Queries with a filter: over-fetch from the segments if most rows pass, else scan rows."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from typing_extensions import override

from index.arrays import Ints, Mask, Vector
from index.filters import Filter
from index.port import SearchResult
from index.search.nearest import FRESH_SHARE_MAX, NearestSearch
from index.storage.index_version import IndexVersion
from index.storage.vector_table import score_error

# One candidate of the segments costs about as much as scanning this many rows (an estimate: 2 µs
# against 0.08 µs). Both ways give k items, so it decides time only.
ROWS_A_CANDIDATE = 25
# Near the query a smaller share may pass than elsewhere: over-fetch on top of the selectivity.
OVERFETCH = 1.3
# Above this share of the table, the product with all rows is cheaper than gathering the kept ones.
GATHER_SHARE_MAX = 0.25


def passing_mask(version: IndexVersion, filters: Filter) -> Mask:
    """bool (count,): live rows that pass; the caller handles `filters.deny`."""
    mask = version.columns.mask(filters, version.used)
    mask &= version.table.died_at[: version.used] > version.seq
    if filters.allow is not None:
        label_of = version.label_of
        labels = [label for name in filters.allow if (label := label_of.get(name)) is not None]
        allowed = np.zeros(max(len(version.row_of), max(labels, default=0) + 1), bool)
        allowed[labels] = True
        mask &= allowed[version.table.labels[: version.used]]
    return mask


def passing_rows(version: IndexVersion, rows: Ints, filters: Filter) -> Ints:
    """The rows, with -1 for a row that is -1 or does not pass."""
    passes = rows >= 0
    passes[passes] = version.columns.passing(filters, rows[passes])
    if filters.allow is None and not filters.deny:
        return np.where(passes, rows, -1)
    ids, labels = version.ids, version.table.labels
    for at in np.flatnonzero(passes).tolist():
        item_id = ids[labels[rows[at]]]
        passes[at] = item_id not in filters.deny and (
            filters.allow is None or item_id in filters.allow
        )
    return np.where(passes, rows, -1)


class FilteredSearch(NearestSearch):
    """One query among the items that pass a filter. Thread rule: one thread.

    mask: bool (count,), live rows that pass; passing: their number. k: at most `passing`
    """

    __slots__ = ("filters", "mask", "passing")

    def __init__(
        self,
        version: IndexVersion,
        query: Vector,
        k: int,
        excluded: Collection[str],
        filters: Filter,
    ) -> None:
        self.filters = filters
        self.mask = passing_mask(version, filters)
        self.passing = int(np.count_nonzero(self.mask))
        k = min(k, self.passing)
        super().__init__(version, query, k, frozenset(excluded) | filters.deny, self._passes)

    @override
    def segments_pay(self, breadth: int) -> bool:
        version, fetch = self.version, self._fetch(breadth)
        return (
            self.filters.allow is None
            and version.main is not None
            and fetch <= version.main.size
            and fetch * ROWS_A_CANDIDATE < self.passing
            and version.fresh_count <= FRESH_SHARE_MAX * version.used
        )

    @override
    def by_segments(self, breadth: int) -> SearchResult | None:
        fetch = self._fetch(breadth)
        found = self.candidates(fetch, fetch)
        result = None if found is None else self.rank(found)
        return result if result is not None and len(result) == self.k else None

    @override
    def scan(self) -> SearchResult:
        return self.rank_rows(_best_rows(self, self.mask, self.passing))

    def _fetch(self, breadth: int) -> int:
        """Candidates to request, so that enough of them pass."""
        live, passing = self.version.live, max(1, self.passing)
        return max(breadth, int(OVERFETCH * self.need * live / passing))

    def _passes(self, rows: Ints) -> Mask:
        return self.version.columns.passing(self.filters, rows)


def _best_rows(search: NearestSearch, mask: Mask, n: int) -> Ints:
    """Of the n rows of the mask some that include the `need` best."""
    version, table, need = search.version, search.version.table, search.need
    if n > GATHER_SHARE_MAX * version.used:
        return table.scan(search.query, version.used, version.seq, need, mask)
    rows = np.flatnonzero(mask)
    if need < n:
        scores = table.gather(rows) @ search.query
        cut = np.partition(scores, n - need)[n - need]
        rows = rows[scores >= cut - score_error(search.query)]
    return rows
