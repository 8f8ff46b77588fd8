"""What a query reads: one immutable State, and how it is searched."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from index.columns import Columns, Mask
from index.graphs import Fresh, Graph, Main
from index.port import Found, Hit, Vector, Watermark
from index.rows import Ints, Kept, Rows, slack

# With more of the vectors in the fresh buffer than this, one exact scan of all is cheaper than graph and
# buffer.
FRESH_SHARE_MAX = 0.35
# A search for more than this share of the graph visits most of it; the exact scan is cheaper.
SEARCH_SHARE_MAX = 1 / 16
# Where stale entries took the places so many times more are asked for, once; then the scan is cheaper.
WIDER = 4

Passes = Callable[[Ints], Mask]
Floats32 = npt.NDArray[np.float32]


class Near(NamedTuple):
    """Candidates: rows that live as this State sees it, their vectors, and their scores in float32.

    off: how far two of the scores may be off together
    """

    rows: Ints
    vectors: Vector
    scores: Floats32
    off: float


class State(NamedTuple):
    """All that a query reads. Arrays may get new entries behind its back, never change what it can see.

    ids, label_of: every item ever seen and its label, appended to before a State counts it
    table, used:   the vector table and its rows in use; seq: this State's number, see `index.rows`
    live:          items a query can return
    row_of:        label -> row of its newest vector, dead where it is retired, -1 where there never was one
    graphs:        the main index and the tiers after it; () where every query is an exact scan
    standing:      of each graph, how many of its entries count
    fresh, fresh_count: the fresh buffer and its entries in use
    columns:       the attributes of the table's rows
    """

    ids: list[str]
    label_of: dict[str, int]
    table: Rows
    used: int
    seq: int
    live: int
    row_of: Ints
    graphs: tuple[Graph, ...]
    standing: tuple[int, ...]
    fresh: Fresh
    fresh_count: int
    watermarks: Mapping[int, Watermark]
    columns: Columns

    @property
    def main(self) -> Main | None:
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
        if len(rows) and rows.max() >= self.used:
            rows = rows.copy()
            while len(newer := np.flatnonzero(rows >= self.used)):
                rows[newer] = self.table.before[rows[newer]]
        return rows

    def living(self, rows: Ints) -> Ints:
        """Of some rows, which may be -1 or newer than this State, those that live in it."""
        rows = self.seen(rows)
        alive = self.table.died_at[rows] > self.seq
        return rows if alive.all() else rows[alive]

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

    def scan(self, query: Vector, wanted: int, left_out: Collection[str]) -> Found:
        """The exact answer, by looking at every row."""
        rows = self.table.scan(query, self.used, self.seq, wanted + len(left_out))
        return self.best(rows, query, wanted, left_out)

    def search(self, query: Vector, wanted: int, left_out: Collection[str], breadth: int) -> Found | None:
        """The answer by graphs and fresh buffer; None where they cannot give as many as there are."""
        need = wanted + len(left_out)
        fetch, largest = max(breadth, need), max(graph.main.size for graph in self.graphs)
        for wider in (fetch, WIDER * fetch):
            near = self.candidates(query, need, wider)
            if near is None:
                return None
            found = self.ranked(near, query, wanted, left_out)
            if len(found) == wanted or wider >= largest:
                break
        if len(found) < wanted:
            excluded = int(np.count_nonzero(self.rows(list(left_out)) >= 0))
            if len(found) < min(wanted, self.live - excluded):
                return None
        return found

    def candidates(self, query: Vector, need: int, fetch: int, passes: Passes | None = None) -> Near | None:
        """`fetch` of each graph, and of the fresh buffer what may be among the `need` best; None where a
        graph cannot.

        passes: which of some rows may be named
        """
        parts, whole = [], True
        for graph, standing in zip(self.graphs, self.standing, strict=True):
            size = graph.main.size
            entries = graph.main.search(query, min(size, fetch))
            if entries is None:
                return None
            parts.append(graph.rows.take(entries))
            whole = whole and standing == size
        rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
        rows = self.seen(rows) if whole else self.living(rows)
        if passes is not None:
            rows = rows[passes(rows)]
        vectors = self.table.gather(rows)
        near = Near(rows, vectors, vectors @ query, 2 * slack(query))
        return self._with_fresh(near, query, need, passes) if self.fresh_count else near

    def _with_fresh(self, near: Near, query: Vector, need: int, passes: Passes | None) -> Near:
        """Candidates of the graphs, and beside them what of the fresh buffer may be among the `need` best."""
        rows, vectors, scores, off = near
        beside = self.fresh.vectors[: self.fresh_count] @ query
        if need <= len(scores):
            # Only what may push out one of the graphs' own need be looked at any further.
            at = (beside >= floor_of(scores, need, off)).nonzero()[0]
        else:
            at = np.arange(self.fresh_count)
        of_fresh = self.seen(self.fresh.rows.take(at))
        good = self.table.died_at[of_fresh] > self.seq
        if passes is not None:
            good[good] = passes(of_fresh[good])
        if not good.all():
            at, of_fresh = at[good], of_fresh[good]
        if not len(at):
            return near
        return Near(
            np.concatenate((rows, of_fresh)),
            np.concatenate((vectors, self.fresh.vectors.take(at, axis=0))),
            np.concatenate((scores, beside.take(at))),
            off,
        )

    def newest(self, k: int, left_out: Collection[str], kept: Kept = None) -> list[Hit]:
        """The live items of the largest at_ms, equal ones by id. O(n).

        kept: bool (count,), which rows may be named
        """
        rows = self.table.alive(self.used, self.seq)
        rows = rows if kept is None else rows[kept[rows]]
        times = self.table.at_ms[rows]
        need = k + len(left_out)
        if need < len(rows):
            cut = np.partition(times, len(rows) - need)[len(rows) - need]
            rows, times = rows[times >= cut], times[times >= cut]
        ids = self.ids
        names = [ids[label] for label in self.table.labels[rows].tolist()]
        # Many may be equal (all that came with a bundle), so hits are made of the chosen ones only.
        ranked = sorted(zip((-times).tolist(), names, rows.tolist(), strict=True))
        chosen = [row for _, name, row in ranked if name not in left_out][:k]
        return self._found(np.array(chosen, np.int64), np.zeros(len(chosen))).hits()

    def best(self, rows: Ints, query: Vector, wanted: int, left_out: Collection[str]) -> Found:
        """The best of some live rows."""
        vectors = self.table.gather(rows)
        return self.ranked(Near(rows, vectors, vectors @ query, 2 * slack(query)), query, wanted, left_out)

    def ranked(self, near: Near, query: Vector, wanted: int, left_out: Collection[str]) -> Found:
        """The best candidates, scored in float64 row by row: the same bits wherever a row lies."""
        rows, vectors, rough, off = near
        need = wanted + len(left_out)
        if need < len(rows):
            # What is further below the cut than rounding carries needs no exact sum.
            at = (rough >= floor_of(rough, need, off)).nonzero()[0]
            rows, vectors = rows.take(at), vectors.take(at, axis=0)
        products = vectors.astype(np.float64)
        products *= query
        scores = products.sum(axis=1)
        order = (-scores).argsort(kind="stable")
        ranked = scores.take(order)
        tied = bool((ranked[1:] == ranked[:-1]).any())
        if not tied and not left_out:
            return self._found(rows.take(order[:wanted]), ranked[:wanted])
        ids = self.ids
        labels = self.table.labels[rows[order]].tolist()
        if tied:
            by_id = sorted(range(len(order)), key=lambda n: (-ranked[n], ids[labels[n]]))
            order, labels = order[by_id], [labels[n] for n in by_id]
        kept: list[int] = []
        for n, label in enumerate(labels):
            if ids[label] not in left_out:
                kept.append(n)
                if len(kept) == wanted:
                    break
        chosen = order[kept]
        return self._found(rows[chosen], scores[chosen])

    def _found(self, rows: Ints, scores: npt.NDArray[np.float64]) -> Found:
        facts = self.table.facts.take(rows, axis=0)
        return Found(list(map(self.ids.__getitem__, facts[:, 0].tolist())), scores, facts[:, 1:])


def floor_of(scores: Floats32, need: int, off: float) -> np.float32:
    """What is below this is surely not among the `need` (<= n) best, however float32 rounded."""
    at = len(scores) - need
    return np.float32(np.partition(scores, at)[at] - off)
