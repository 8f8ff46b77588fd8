"""The k nearest items of one IndexVersion: by an exact scan, or by segments and fresh buffer.

Every candidate is rescored in float64 from the vector table, so answers have exact scores.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import NamedTuple

import numpy as np

from index.arrays import Floats, Ints, Mask, Vector
from index.port import SearchResult
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


# Of many excluded items so many, or twice k, are taken to be among the best ones. A user's thousand
# seen items cost a search of 100,000 items 2 ms instead of 0.2.
EXCLUDED_FEW = 64


class Candidates(NamedTuple):
    """Live rows (n,) and their exact scores (n,)."""

    rows: Ints
    scores: Floats


class NearestSearch:
    """One query over one IndexVersion. Thread rule: one thread.

    query: float32 (d,), contiguous; k: <= the live items; excluded: item ids to leave out
    need:  the best `need` items hold the answer; query64: the query in float64
    is_narrow: they may hold too few
    passes: which of some rows are candidates of segments or fresh buffer; None: all
    """

    __slots__ = ("excluded", "is_narrow", "k", "need", "passes", "query", "query64", "version")

    def __init__(
        self,
        version: IndexVersion,
        query: Vector,
        k: int,
        excluded: Collection[str],
        passes: Callable[[Ints], Mask] | None = None,
    ) -> None:
        self.version = version
        self.query = query
        self.k = k
        self.excluded = excluded
        self.passes = passes
        self.need = k + len(excluded)
        self.query64 = query.astype(np.float64)
        self.is_narrow = False

    def narrowed(self) -> NearestSearch | None:
        """The same search for the case that few of the best items are excluded; None: as it is.

        If it finds k items, they are the answer.
        """
        need = self.k + max(EXCLUDED_FEW, 2 * self.k)
        if need >= self.need:
            return None
        search = copy.copy(self)
        search.need, search.is_narrow = need, True
        return search

    def detached(self) -> NearestSearch:
        """The same search with a query array of its own: the caller may reuse the other."""
        search = copy.copy(self)
        search.query = self.query.copy()
        return search

    def segments_pay(self, breadth: int) -> bool:
        """Whether segments and fresh buffer are cheaper than a scan of all rows."""
        version, need = self.version, self.need
        return (
            len(version.segments) > 0
            and version.fresh_count <= FRESH_SHARE_MAX * version.used
            and (need <= breadth or need <= SEARCH_SHARE_MAX * version.segments[0].index.size)
        )

    def scan(self) -> SearchResult:
        """The exact answer, from all rows."""
        version = self.version
        return self.rank_rows(version.table.scan(self.query, version.used, version.seq, self.need))

    def by_segments(self, breadth: int) -> SearchResult | None:
        """The answer from segments and fresh buffer; None if they yield too few items."""
        version, need = self.version, self.need
        fetch, largest = max(breadth, need), max(s.index.size for s in version.segments)
        few = min(fetch, need + max(OVERFETCH_MIN, int(OVERFETCH * need)))
        retry = RETRY_FACTOR * fetch
        for count, width in ((few, fetch), (fetch, fetch), (retry, retry)):
            found = self.candidates(count, width)
            if found is None:
                return None
            result = self.rank(found)
            # If no candidate scores below the last result, items that were cut off may tie with it.
            tied = (
                count < width
                and len(result)
                and np.minimum.reduce(found.scores) >= result.scores[-1]
            )
            if (len(result) == self.k and not tied) or count >= largest:
                break
        if len(result) < self.k:
            excluded_live = int(np.count_nonzero(version.rows_of(list(self.excluded)) >= 0))
            if len(result) < min(self.k, version.live - excluded_live):
                return None
        return result

    def candidates(self, few: int, fetch: int) -> Candidates | None:
        """About `few` rows per segment (search breadth `fetch`), and fresh rows that could rank.

        Returns None if the search of a segment fails.
        """
        version = self.version
        parts = []
        for segment, live_entries in zip(version.segments, version.live_entries, strict=True):
            found = self._of_segment(segment, live_entries, few, fetch)
            if found is None:
                return None
            parts.append(found)
        rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if self.passes is not None:
            rows = rows[self.passes(rows)]
        scored = self._scored(rows)
        return self._with_fresh(scored) if version.fresh_count else scored

    def rank_rows(self, rows: Ints) -> SearchResult:
        """The k best of these live rows."""
        return self.rank(self._scored(rows))

    def rank(self, found: Candidates) -> SearchResult:
        """The k best candidates, equal scores by id."""
        version, (rows, scores) = self.version, found
        order = (-scores).argsort(kind="stable")
        ranked = scores.take(order)
        tied = np.count_nonzero(ranked[1:] == ranked[:-1])
        if not tied and not self.excluded:
            return _result(version, rows.take(order[: self.k]), ranked[: self.k])
        names = version.names[version.table.labels[rows.take(order)]].tolist()
        places = list(range(len(order)))
        if tied:
            places.sort(key=lambda n: (-ranked[n], names[n]))
        excluded = self.excluded
        kept = [n for n in places if names[n] not in excluded][: self.k]
        chosen = order.take(np.array(kept, np.int64))
        return _result(version, rows.take(chosen), scores.take(chosen))

    def _of_segment(self, segment: Segment, live_entries: int, few: int, fetch: int) -> Ints | None:
        """About `few` live rows of a segment; if those are too few, of all `fetch` entries."""
        version, size = self.version, segment.index.size
        fetch = min(size, fetch)
        count = min(fetch, few * size // max(1, live_entries))
        while (entries := segment.index.search(self.query, count, fetch)) is not None:
            rows = segment.rows.take(entries)
            rows = version.seen(rows) if live_entries == size else version.living(rows)
            if count == fetch or len(rows) >= min(self.need, live_entries):
                return rows
            count = fetch
        return None

    def _scored(self, rows: Ints) -> Candidates:
        """These live rows with scores; of many rows only those that could be in the top `need`."""
        vectors = self.version.table.gather(rows)
        if len(rows) > PREFILTER_ABOVE + 4 * self.need:
            rough = vectors @ self.query
            # Twice: both scores of a comparison may be off.
            floor = _floor(rough, self.need, 2 * score_error(self.query64))
            at = (rough >= floor).nonzero()[0]
            rows, vectors = rows.take(at), vectors.take(at, axis=0)
        return Candidates(rows, exact_scores(vectors, self.query64))

    def _with_fresh(self, found: Candidates) -> Candidates:
        """The candidates of the segments plus fresh rows that could rank in the top `need`."""
        version, fresh, count = self.version, self.version.fresh, self.version.fresh_count
        if self.need <= len(found.scores):
            rough = fresh.vectors[:count] @ self.query
            floor = _floor(found.scores, self.need, score_error(self.query64))
            at = (rough >= floor).nonzero()[0]
        else:
            at = np.arange(count)
        rows = version.seen(fresh.rows.take(at))
        good = version.table.died_at.take(rows) > version.seq
        if self.passes is not None:
            good[good] = self.passes(rows[good])
        kept = good.nonzero()[0]
        if not len(kept):
            return found
        scores = exact_scores(fresh.vectors.take(at.take(kept), axis=0), self.query64)
        return Candidates(
            np.concatenate((found.rows, rows.take(kept))), np.concatenate((found.scores, scores))
        )


def _result(version: IndexVersion, rows: Ints, scores: Floats) -> SearchResult:
    facts = version.table.facts.take(rows, axis=0)
    return SearchResult(None, scores, facts[:, 1:], version.names, facts[:, 0])


def exact_scores(vectors: Vector, query64: Floats) -> Floats:
    """Products with the query, summed in float64 row by row: the same bits wherever a row lies."""
    products = vectors.astype(np.float64)
    products *= query64
    sums: Floats = np.add.reduce(products, axis=1)
    return sums


def _floor(scores: Vector | Floats, need: int, error: float) -> np.float32:
    """Scores below this cannot be among the `need` (<= n) best, given the error bound."""
    at = len(scores) - need
    ordered = scores.copy()
    ordered.partition(at)
    return np.float32(ordered[at] - error)
