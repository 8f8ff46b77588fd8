"""The k nearest items of one IndexVersion: by an exact scan, or by segments and fresh buffer.

Every candidate is rescored in float64 from the vector table, so answers have exact scores.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

import numpy as np

from index.arrays import Floats, Ints, Mask, Vector
from index.port import Hit, SearchResult
from index.storage.index_version import IndexVersion
from index.storage.segments import Segment
from index.storage.vector_table import score_error

# With a larger share of the rows in the fresh buffer, one exact scan of all rows is cheaper.
FRESH_SHARE_MAX = 0.35
# A search for a larger share of the main segment visits most of it; the exact scan is cheaper.
SEARCH_SHARE_MAX = 1 / 16
# If stale entries leave too few candidates, one retry fetches this many times more; then the scan
# is cheaper.
RETRY_FACTOR = 4
# Over-fetch, as a share of what is needed and at least the minimum: items have turned (each within
# the gate of `index.writing.placement`) since a segment was built. With nine of ten items turned,
# a quarter more found all of the hundred nearest that twice as many found.
OVERFETCH = 0.3
OVERFETCH_MIN = 30
# With more candidates than four times what is needed plus this, float32 products select those that
# can rank among the best before the float64 rescoring.
PREFILTER_ABOVE = 100

Passes = Callable[[Ints], Mask]


class Candidates(NamedTuple):
    """Live rows (n,) and their exact scores (n,)."""

    rows: Ints
    scores: Floats


def searchable(version: IndexVersion, need: int, breadth: int) -> bool:
    """Whether segments and fresh buffer are cheaper than a scan of all rows."""
    return (
        len(version.segments) > 0
        and version.fresh_count <= FRESH_SHARE_MAX * version.used
        and (need <= breadth or need <= SEARCH_SHARE_MAX * version.segments[0].index.size)
    )


def scan(version: IndexVersion, query: Vector, k: int, excluded: Collection[str]) -> SearchResult:
    """The exact answer, from all rows."""
    rows = version.table.scan(query, version.used, version.seq, k + len(excluded))
    return rank_rows(version, rows, query, k, excluded)


def search(
    version: IndexVersion, query: Vector, k: int, excluded: Collection[str], breadth: int
) -> SearchResult | None:
    """The answer from segments and fresh buffer; None if they yield fewer items than there are."""
    need = k + len(excluded)
    fetch, largest = max(breadth, need), max(s.index.size for s in version.segments)
    few = min(fetch, need + max(OVERFETCH_MIN, int(OVERFETCH * need)))
    retry = RETRY_FACTOR * fetch
    for count, wide in ((few, fetch), (fetch, fetch), (retry, retry)):
        found = candidates(version, query, need, count, wide)
        if found is None:
            return None
        result = rank(version, found, k, excluded)
        # If no candidate scores below the last result, items that were cut off may tie with it.
        tied = count < wide and len(result) and np.minimum.reduce(found.scores) >= result.scores[-1]
        if (len(result) == k and not tied) or count >= largest:
            break
    if len(result) < k:
        excluded_live = int(np.count_nonzero(version.rows_of(list(excluded)) >= 0))
        if len(result) < min(k, version.live - excluded_live):
            return None
    return result


def candidates(
    version: IndexVersion,
    query: Vector,
    need: int,
    few: int,
    fetch: int,
    passes: Passes | None = None,
) -> Candidates | None:
    """About `few` rows of each segment (search breadth `fetch`), and fresh rows that could rank.

    passes: which of some rows to keep; need: only fresh rows that could be in the top `need`
    Returns None if the search of a segment fails.
    """
    parts = []
    for segment, live_entries in zip(version.segments, version.live_entries, strict=True):
        found = _of_segment(version, segment, live_entries, query, need, few, fetch)
        if found is None:
            return None
        parts.append(found)
    rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if passes is not None:
        rows = rows[passes(rows)]
    wide = query.astype(np.float64)
    scored = _scored(version, rows, query, wide, need)
    return (
        _with_fresh(version, scored, query, wide, need, passes) if version.fresh_count else scored
    )


def newest(
    version: IndexVersion, k: int, excluded: Collection[str], mask: Mask | None = None
) -> list[Hit]:
    """The k live items of the largest at_ms, equal ones by id. O(n).

    mask: bool (count,), rows to consider
    """
    table = version.table
    rows = table.live_rows(version.used, version.seq)
    rows = rows if mask is None else rows[mask[rows]]
    times = table.at_ms[rows]
    need = k + len(excluded)
    if need < len(rows):
        cut = np.partition(times, len(rows) - need)[len(rows) - need]
        rows, times = rows[times >= cut], times[times >= cut]
    ids = version.ids
    names = [ids[label] for label in table.labels[rows].tolist()]
    # Many times may be equal (all items of a bundle), so only the chosen rows become hits.
    ranked = sorted(zip((-times).tolist(), names, rows.tolist(), strict=True))
    chosen = [row for _, name, row in ranked if name not in excluded][:k]
    return _result(version, np.array(chosen, np.int64), np.zeros(len(chosen))).hits()


def rank_rows(
    version: IndexVersion, rows: Ints, query: Vector, k: int, excluded: Collection[str]
) -> SearchResult:
    """The k best of these live rows."""
    scored = _scored(version, rows, query, query.astype(np.float64), k + len(excluded))
    return rank(version, scored, k, excluded)


def rank(
    version: IndexVersion, found: Candidates, k: int, excluded: Collection[str]
) -> SearchResult:
    """The k best candidates, equal scores by id."""
    rows, scores = found
    order = (-scores).argsort(kind="stable")
    ranked = scores.take(order)
    tied = np.count_nonzero(ranked[1:] == ranked[:-1])
    if not tied and not excluded:
        return _result(version, rows.take(order[:k]), ranked[:k])
    names = version.names[version.table.labels.take(rows.take(order))].tolist()
    places = list(range(len(order)))
    if tied:
        places.sort(key=lambda n: (-ranked[n], names[n]))
    kept = [n for n in places if names[n] not in excluded][:k]
    chosen = order.take(np.array(kept, np.int64))
    return _result(version, rows.take(chosen), scores.take(chosen))


def _of_segment(
    version: IndexVersion,
    segment: Segment,
    live_entries: int,
    query: Vector,
    need: int,
    few: int,
    fetch: int,
) -> Ints | None:
    """About `few` live rows of a segment; if those are too few, of all `fetch` entries."""
    size, search = segment.index.size, segment.index.search
    fetch = min(size, fetch)
    count = min(fetch, few * size // max(1, live_entries))
    while (entries := search(query, count, fetch)) is not None:
        rows = segment.rows.take(entries)
        rows = version.seen(rows) if live_entries == size else version.living(rows)
        if count == fetch or len(rows) >= min(need, live_entries):
            return rows
        count = fetch
    return None


def _scored(
    version: IndexVersion, rows: Ints, query: Vector, wide: Floats, need: int
) -> Candidates:
    """These live rows with scores; of many rows only those that could be in the top `need`."""
    vectors = version.table.gather(rows)
    if len(rows) > PREFILTER_ABOVE + 4 * need:
        rough = vectors @ query
        # Twice: both scores of a comparison may be off.
        at = (rough >= _floor(rough, need, 2 * score_error(wide))).nonzero()[0]
        rows, vectors = rows.take(at), vectors.take(at, axis=0)
    return Candidates(rows, _exact_scores(vectors, wide))


def _with_fresh(
    version: IndexVersion,
    found: Candidates,
    query: Vector,
    wide: Floats,
    need: int,
    passes: Passes | None,
) -> Candidates:
    """The candidates of the segments plus fresh rows that could rank in the top `need`."""
    fresh, count = version.fresh, version.fresh_count
    if need <= len(found.scores):
        rough = fresh.vectors[:count] @ query
        at = (rough >= _floor(found.scores, need, score_error(wide))).nonzero()[0]
    else:
        at = np.arange(count)
    rows = version.seen(fresh.rows.take(at))
    good = version.table.died_at.take(rows) > version.seq
    if passes is not None:
        good[good] = passes(rows[good])
    kept = good.nonzero()[0]
    if not len(kept):
        return found
    scores = _exact_scores(fresh.vectors.take(at.take(kept), axis=0), wide)
    return Candidates(
        np.concatenate((found.rows, rows.take(kept))), np.concatenate((found.scores, scores))
    )


def _result(version: IndexVersion, rows: Ints, scores: Floats) -> SearchResult:
    facts = version.table.facts.take(rows, axis=0)
    return SearchResult(version.names[facts[:, 0]].tolist(), scores, facts[:, 1:])


def _exact_scores(vectors: Vector, wide: Floats) -> Floats:
    """Products with the query, summed in float64 row by row: the same bits wherever a row lies."""
    products = vectors.astype(np.float64)
    products *= wide
    sums: Floats = np.add.reduce(products, axis=1)
    return sums


def _floor(scores: Vector | Floats, need: int, error: float) -> np.float32:
    """Scores below this cannot be among the `need` (<= n) best, given the error bound."""
    at = len(scores) - need
    ordered = scores.copy()
    ordered.partition(at)
    return np.float32(ordered[at] - error)
