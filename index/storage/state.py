"""What a query reads: one immutable State, and how it is searched."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from index.arrays import Ints, Kept, Vector, Wide
from index.port import AnnIndex, Hit, SearchResult, Watermark
from index.storage.columns import Columns, Mask
from index.storage.segments import FreshBuffer, Segment
from index.storage.vector_table import VectorTable, slack

# With more of the vectors in the fresh buffer than this, one exact scan of all is cheaper than graph and
# buffer.
FRESH_SHARE_MAX = 0.35
# A search for more than this share of the graph visits most of it; the exact scan is cheaper.
SEARCH_SHARE_MAX = 1 / 16
# Where stale entries took the places so many times more are asked for, once; then the scan is cheaper.
WIDER = 4
# The graph is asked for so much more than is needed, because it was built before items turned (each within
# the gate): with nine of ten items turned, a quarter more found all of the hundred nearest that twice as many
# found. For small k it is at least so many.
SPARE = 0.3
SPARE_MIN = 30
# Up to so many candidates beyond four times what is needed are scored in float64 straight away; of more, a
# float32 product first says which can be among the best.
ROUGH_ABOVE = 100

Passes = Callable[[Ints], Mask]
Names = npt.NDArray[np.object_]


class Near(NamedTuple):
    """Candidates: rows that live as this State sees it, and their scores as they are told."""

    rows: Ints
    scores: Wide


class IndexVersion(NamedTuple):
    """All that a query reads. Arrays may get new entries behind its back, never change what it can see.

    ids, label_of: every item ever seen and its label, appended to before a State counts it
    table, used:   the vector table and its rows in use; seq: this State's number, see `index.storage.vector_table`
    live:          items a query can return
    row_of:        label -> row of its newest vector, dead where it is retired, -1 where there never was one
    names:         label -> its item, from its first row on; an array, because a hundred of it are taken at a
                   third of the time that as many look-ups in a list cost
    graphs:        the main index and the tiers after it; () where every query is an exact scan
    standing:      of each graph, how many of its entries count
    fresh, fresh_count: the fresh buffer and its entries in use
    columns:       the attributes of the table's rows
    """

    ids: list[str]
    label_of: dict[str, int]
    table: VectorTable
    used: int
    seq: int
    live: int
    row_of: Ints
    names: Names
    graphs: tuple[Segment, ...]
    standing: tuple[int, ...]
    fresh: FreshBuffer
    fresh_count: int
    watermarks: Mapping[int, Watermark]
    columns: Columns

    @property
    def main(self) -> AnnIndex | None:
        """The main index, None where there is none."""
        return self.graphs[0].main if self.graphs else None

    @property
    def stale(self) -> int:
        """Entries of the main index that no longer count."""
        return self.graphs[0].main.size - self.standing[0] if self.graphs else 0

    @property
    def outside(self) -> int:
        """How many items, or dead entries of the fresh buffer, the main index does not stand for."""
        return self.fresh_count + sum(self.standing[1:])

    def seen(self, rows: Ints) -> Ints:
        """The rows as this State sees them: those that came later are taken back to what they replaced."""
        if self.table.written > self.used and len(rows) and rows.max() >= self.used:
            rows = rows.copy()
            while len(newer := np.flatnonzero(rows >= self.used)):
                rows[newer] = self.table.before[rows[newer]]
        return rows

    def living(self, rows: Ints) -> Ints:
        """Of some rows, which may be -1 or newer than this State, those that live in it."""
        rows = self.seen(rows)
        alive = (self.table.died_at.take(rows) > self.seq).nonzero()[0]
        return rows if len(alive) == len(rows) else rows.take(alive)

    def rows(self, item_ids: Sequence[str]) -> Ints:
        """int64 (n,): the current row of each item, -1 where it is not live."""
        label_of, known = self.label_of, len(self.row_of)
        labels = np.array([label_of.get(item_id, known) for item_id in item_ids], np.int64)
        # A label that this State has no room for is newer than the State.
        inside = labels < known
        rows = np.full(len(labels), -1)
        rows[inside] = self.seen(self.row_of[labels[inside]])
        rows[self.table.died_at[rows] <= self.seq] = -1
        return rows

    def searchable(self, need: int, breadth: int) -> bool:
        """Whether graphs and fresh buffer are cheaper than a scan of everything."""
        return (
            len(self.graphs) > 0
            and self.fresh_count <= FRESH_SHARE_MAX * self.used
            and (need <= breadth or need <= SEARCH_SHARE_MAX * self.graphs[0].main.size)
        )

    def scan(self, query: Vector, wanted: int, excluded: Collection[str]) -> SearchResult:
        """The exact answer, by looking at every row."""
        rows = self.table.scan(query, self.used, self.seq, wanted + len(excluded))
        return self.best(rows, query, wanted, excluded)

    def search(
        self, query: Vector, wanted: int, excluded: Collection[str], breadth: int
    ) -> SearchResult | None:
        """The answer by graphs and fresh buffer; None where they cannot give as many as there are."""
        need = wanted + len(excluded)
        fetch, largest = max(breadth, need), max(graph.main.size for graph in self.graphs)
        few = min(fetch, need + max(SPARE_MIN, int(SPARE * need)))
        for named, wide in ((few, fetch), (fetch, fetch), (WIDER * fetch, WIDER * fetch)):
            near = self.candidates(query, need, named, wide)
            if near is None:
                return None
            found = self.ranked(near, wanted, excluded)
            # Where nothing that was named is below the last one found, more may be level with it.
            level = (
                named < wide and len(found) and np.minimum.reduce(near.scores) >= found.scores[-1]
            )
            if (len(found) == wanted and not level) or named >= largest:
                break
        if len(found) < wanted:
            excluded_live = int(np.count_nonzero(self.rows(list(excluded)) >= 0))
            if len(found) < min(wanted, self.live - excluded_live):
                return None
        return found

    def candidates(
        self, query: Vector, need: int, few: int, fetch: int, passes: Passes | None = None
    ) -> Near | None:
        """About `few` of graphs searched as wide as for `fetch`, and of the fresh buffer what may be among
        the `need` best; None where a graph cannot.

        passes: which of some rows may be named
        """
        parts = []
        for graph, standing in zip(self.graphs, self.standing, strict=True):
            found = self._of_graph(graph, standing, query, need, few, fetch)
            if found is None:
                return None
            parts.append(found)
        rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if passes is not None:
            rows = rows[passes(rows)]
        wide = query.astype(np.float64)
        near = self._scored(rows, query, wide, need)
        return self._with_fresh(near, query, wide, need, passes) if self.fresh_count else near

    def _of_graph(
        self, graph: Segment, standing: int, query: Vector, need: int, few: int, fetch: int
    ) -> Ints | None:
        """The rows of about `few` entries of one graph that count; of all `fetch` where those are too few."""
        size, search = graph.main.size, graph.main.search
        fetch = min(size, fetch)
        named = min(fetch, few * size // max(1, standing))
        while (entries := search(query, named, fetch)) is not None:
            rows = graph.rows.take(entries)
            rows = self.seen(rows) if standing == size else self.living(rows)
            if named == fetch or len(rows) >= min(need, standing):
                return rows
            named = fetch
        return None

    def _scored(self, rows: Ints, query: Vector, wide: Wide, need: int) -> Near:
        """Some live rows and their scores; without what surely is not among the `need` best, where it is
        much."""
        vectors = self.table.gather(rows)
        if len(rows) > ROUGH_ABOVE + 4 * need:
            # Two scores may be off together.
            rough = vectors @ query
            at = (rough >= floor_of(rough, need, 2 * slack(wide))).nonzero()[0]
            rows, vectors = rows.take(at), vectors.take(at, axis=0)
        return Near(rows, exact_scores(vectors, wide))

    def _with_fresh(
        self, near: Near, query: Vector, wide: Wide, need: int, passes: Passes | None
    ) -> Near:
        """Candidates of the graphs, and beside them what of the fresh buffer may be among the `need` best."""
        beside = self.fresh.vectors[: self.fresh_count] @ query
        if need <= len(near.scores):
            # Only what may push out one of the graphs' own need be looked at any further.
            at = (beside >= floor_of(near.scores, need, slack(wide))).nonzero()[0]
        else:
            at = np.arange(self.fresh_count)
        rows = self.seen(self.fresh.rows.take(at))
        good = self.table.died_at.take(rows) > self.seq
        if passes is not None:
            good[good] = passes(rows[good])
        kept = good.nonzero()[0]
        if not len(kept):
            return near
        scores = exact_scores(self.fresh.vectors.take(at.take(kept), axis=0), wide)
        return Near(
            np.concatenate((near.rows, rows.take(kept))), np.concatenate((near.scores, scores))
        )

    def newest(self, k: int, excluded: Collection[str], kept: Kept = None) -> list[Hit]:
        """The live items of the largest at_ms, equal ones by id. O(n).

        kept: bool (count,), which rows may be named
        """
        rows = self.table.alive(self.used, self.seq)
        rows = rows if kept is None else rows[kept[rows]]
        times = self.table.at_ms[rows]
        need = k + len(excluded)
        if need < len(rows):
            cut = np.partition(times, len(rows) - need)[len(rows) - need]
            rows, times = rows[times >= cut], times[times >= cut]
        ids = self.ids
        names = [ids[label] for label in self.table.labels[rows].tolist()]
        # Many may be equal (all that came with a bundle), so hits are made of the chosen ones only.
        ranked = sorted(zip((-times).tolist(), names, rows.tolist(), strict=True))
        chosen = [row for _, name, row in ranked if name not in excluded][:k]
        return self._found(np.array(chosen, np.int64), np.zeros(len(chosen))).hits()

    def best(
        self, rows: Ints, query: Vector, wanted: int, excluded: Collection[str]
    ) -> SearchResult:
        """The best of some live rows."""
        near = self._scored(rows, query, query.astype(np.float64), wanted + len(excluded))
        return self.ranked(near, wanted, excluded)

    def ranked(self, near: Near, wanted: int, excluded: Collection[str]) -> SearchResult:
        """The best candidates; equal scores by id."""
        rows, scores = near
        order = (-scores).argsort(kind="stable")
        ranked = scores.take(order)
        tied = np.count_nonzero(ranked[1:] == ranked[:-1])
        if not tied and not excluded:
            return self._found(rows.take(order[:wanted]), ranked[:wanted])
        names = self.names[self.table.labels.take(rows.take(order))].tolist()
        places = list(range(len(order)))
        if tied:
            places.sort(key=lambda n: (-ranked[n], names[n]))
        kept = [n for n in places if names[n] not in excluded][:wanted]
        chosen = order.take(np.array(kept, np.int64))
        return self._found(rows.take(chosen), scores.take(chosen))

    def _found(self, rows: Ints, scores: Wide) -> SearchResult:
        facts = self.table.facts.take(rows, axis=0)
        return SearchResult(self.names[facts[:, 0]].tolist(), scores, facts[:, 1:])


def exact_scores(vectors: Vector, wide: Wide) -> Wide:
    """Their products with the query, summed in float64 row by row: the same bits wherever a row lies."""
    products = vectors.astype(np.float64)
    products *= wide
    sums: Wide = np.add.reduce(products, axis=1)
    return sums


def floor_of(scores: npt.NDArray[np.float32] | Wide, need: int, off: float) -> np.float32:
    """What is below this is surely not among the `need` (<= n) best, however float32 rounded."""
    at = len(scores) - need
    ordered = scores.copy()
    ordered.partition(at)
    return np.float32(ordered[at] - off)
