"""Queries with a filter: over-fetch from the graph where most is kept, else scan what is kept."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from index.columns import Mask
from index.filters import Filter
from index.port import Found, Vector
from index.rows import Ints, slack
from index.state import FRESH_SHARE_MAX, State

# One candidate more from the graph costs about as much as scanning so many rows: some 2 µs against 0.08 µs,
# an estimate; both ways give k items, so it decides time only.
ROWS_A_CANDIDATE = 25
# Near the query more may be left out than elsewhere: so many times the candidates that selectivity asks for.
SPARE = 1.3
# From this share of the table on, the product with all rows is cheaper than gathering the kept ones first.
GATHER_SHARE_MAX = 0.25


def kept(state: State, asked: Filter) -> Mask:
    """bool (count,): the rows of live items that pass; lists of denied ids are the caller's."""
    mask = state.columns.mask(asked, state.used)
    mask &= state.table.died_at[: state.used] > state.seq
    if asked.allow is not None:
        labels = state.table.labels[: state.used]
        wanted = [label for name in asked.allow if (label := state.label_of.get(name)) is not None]
        allowed = np.zeros(max(len(state.row_of), max(wanted, default=0) + 1), bool)
        allowed[wanted] = True
        mask &= allowed[labels]
    return mask


def passing(state: State, rows: Ints, asked: Filter) -> Ints:
    """The rows, −1 in the place of one that is −1 or does not pass."""
    found = rows >= 0
    found[found] = state.columns.passing(asked, rows[found])
    ids, labels = state.ids, state.table.labels
    for at in np.flatnonzero(found).tolist():
        found[at] = _listed(ids[labels[rows[at]]], asked)
    return np.where(found, rows, -1)


def query(
    state: State, vector: Vector, k: int, left_out: Collection[str], asked: Filter, breadth: int
) -> Found:
    """The k best items that pass. breadth: of the search of the graph, 0 for an exact scan."""
    mask = kept(state, asked)
    n = int(np.count_nonzero(mask))
    left_out = frozenset(left_out) | asked.deny
    wanted = min(k, n)
    if wanted == 0:
        return Found.of(())
    if breadth and asked.allow is None and state.main is not None:
        need = wanted + len(left_out)
        fetch = max(breadth, int(SPARE * need * state.live / n))
        if fetch <= state.main.size and fetch * ROWS_A_CANDIDATE < n:
            found = _by_graph(state, vector, wanted, left_out, asked, fetch)
            if found is not None:
                return found
    return _by_scan(state, vector, mask, n, wanted, left_out)


def _by_graph(
    state: State, vector: Vector, wanted: int, left_out: Collection[str], asked: Filter, fetch: int
) -> Found | None:
    """By graphs and fresh buffer, candidates that do not pass left out; None where too few are left."""
    if state.fresh_count > FRESH_SHARE_MAX * state.used:
        return None
    need = wanted + len(left_out)
    near = state.candidates(vector, need, fetch, fetch, lambda rows: state.columns.passing(asked, rows))
    if near is None:
        return None
    found = state.ranked(near, wanted, left_out)
    return found if len(found) == wanted else None


def _by_scan(
    state: State, vector: Vector, mask: Mask, n: int, wanted: int, left_out: Collection[str]
) -> Found:
    """Exact: every row that is kept."""
    if n > GATHER_SHARE_MAX * state.used:
        rows = state.table.scan(vector, state.used, state.seq, wanted + len(left_out), mask)
    else:
        rows = np.flatnonzero(mask)
        need = wanted + len(left_out)
        if need < n:
            scores = state.table.gather(rows) @ vector
            rows = rows[scores >= np.partition(scores, n - need)[n - need] - slack(vector)]
    return state.best(rows, vector, wanted, left_out)


def _listed(item_id: str, asked: Filter) -> bool:
    return item_id not in asked.deny and (asked.allow is None or item_id in asked.allow)
