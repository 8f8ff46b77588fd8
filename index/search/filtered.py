"""Queries with a filter: over-fetch from the graph where most is kept, else scan what is kept."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from index.arrays import Ints, Vector
from index.filters import Filter
from index.port import SearchResult
from index.storage.columns import Mask
from index.storage.state import FRESH_SHARE_MAX, IndexVersion
from index.storage.vector_table import slack

# One candidate more from the graph costs about as much as scanning so many rows: some 2 µs against 0.08 µs,
# an estimate; both ways give k items, so it decides time only.
ROWS_A_CANDIDATE = 25
# Near the query more may be left out than elsewhere: so many times the candidates that selectivity asks for.
SPARE = 1.3
# From this share of the table on, the product with all rows is cheaper than gathering the kept ones first.
GATHER_SHARE_MAX = 0.25


def kept(state: IndexVersion, filters: Filter) -> Mask:
    """bool (count,): the rows of live items that pass; lists of denied ids are the caller's."""
    mask = state.columns.mask(filters, state.used)
    mask &= state.table.died_at[: state.used] > state.seq
    if filters.allow is not None:
        labels = state.table.labels[: state.used]
        wanted = [
            label for name in filters.allow if (label := state.label_of.get(name)) is not None
        ]
        allowed = np.zeros(max(len(state.row_of), max(wanted, default=0) + 1), bool)
        allowed[wanted] = True
        mask &= allowed[labels]
    return mask


def passing(state: IndexVersion, rows: Ints, filters: Filter) -> Ints:
    """The rows, −1 in the place of one that is −1 or does not pass."""
    found = rows >= 0
    found[found] = state.columns.passing(filters, rows[found])
    ids, labels = state.ids, state.table.labels
    for at in np.flatnonzero(found).tolist():
        found[at] = _listed(ids[labels[rows[at]]], filters)
    return np.where(found, rows, -1)


def query(
    state: IndexVersion,
    vector: Vector,
    k: int,
    excluded: Collection[str],
    filters: Filter,
    breadth: int,
) -> SearchResult:
    """The k best items that pass. breadth: of the search of the graph, 0 for an exact scan."""
    mask = kept(state, filters)
    n = int(np.count_nonzero(mask))
    excluded = frozenset(excluded) | filters.deny
    wanted = min(k, n)
    if wanted == 0:
        return SearchResult.of(())
    if breadth and filters.allow is None and state.main is not None:
        need = wanted + len(excluded)
        fetch = max(breadth, int(SPARE * need * state.live / n))
        if fetch <= state.main.size and fetch * ROWS_A_CANDIDATE < n:
            found = _by_graph(state, vector, wanted, excluded, filters, fetch)
            if found is not None:
                return found
    return _by_scan(state, vector, mask, n, wanted, excluded)


def _by_graph(
    state: IndexVersion,
    vector: Vector,
    wanted: int,
    excluded: Collection[str],
    filters: Filter,
    fetch: int,
) -> SearchResult | None:
    """By graphs and fresh buffer, candidates that do not pass left out; None where too few are left."""
    if state.fresh_count > FRESH_SHARE_MAX * state.used:
        return None
    need = wanted + len(excluded)
    near = state.candidates(
        vector, need, fetch, fetch, lambda rows: state.columns.passing(filters, rows)
    )
    if near is None:
        return None
    found = state.ranked(near, wanted, excluded)
    return found if len(found) == wanted else None


def _by_scan(
    state: IndexVersion, vector: Vector, mask: Mask, n: int, wanted: int, excluded: Collection[str]
) -> SearchResult:
    """Exact: every row that is kept."""
    if n > GATHER_SHARE_MAX * state.used:
        rows = state.table.scan(vector, state.used, state.seq, wanted + len(excluded), mask)
    else:
        rows = np.flatnonzero(mask)
        need = wanted + len(excluded)
        if need < n:
            scores = state.table.gather(rows) @ vector
            rows = rows[scores >= np.partition(scores, n - need)[n - need] - slack(vector)]
    return state.best(rows, vector, wanted, excluded)


def _listed(item_id: str, filters: Filter) -> bool:
    return item_id not in filters.deny and (filters.allow is None or item_id in filters.allow)
