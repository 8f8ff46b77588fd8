"""What a query reads: one immutable State, and how it is searched."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt

from index.columns import Columns
from index.port import Hit, Vector, Watermark
from index.rows import Ints, Kept, Rows, slack

# With more of the vectors in the fresh buffer than this, one exact scan of all is cheaper than graph and
# buffer.
FRESH_SHARE_MAX = 0.35
# A search for more than this share of the graph visits most of it; the exact scan is cheaper.
SEARCH_SHARE_MAX = 1 / 16


_hit: Callable[[Iterable[object]], Hit] = partial(tuple.__new__, Hit)


class Main(Protocol):
    """An immutable index over the vectors of a moment; built once, searched by many threads."""

    @property
    def size(self) -> int:
        """How many vectors it holds."""

    @property
    def name(self) -> str:
        """Which one of `index.mains` it is."""

    @property
    def memory_bytes(self) -> int:
        """Its memory, vectors of its own included."""

    def search(self, query: Vector, fetch: int) -> Ints | None:
        """The labels of about the `fetch` (<= size) best vectors, None where it cannot find so many."""


@dataclass(frozen=True, slots=True)
class State:
    """All that a query reads. Arrays may get new entries behind its back, never change what it can see.

    ids, label_of: every item ever seen and its label, appended to before a State counts it
    table, count:  the vector table and its rows in use; seq: this State's number, see `index.rows`
    live:          items a query can return
    row_of:        label -> row of its current vector, -1 where retired
    fresh_since:   label -> the number since which the fresh buffer stands for it, NEVER where the graph does
    stale:         entries of main that are retired or stand in the fresh buffer
    columns:       the attributes of the table's rows
    """

    ids: list[str]
    label_of: dict[str, int]
    table: Rows
    count: int
    seq: int
    live: int
    row_of: Ints
    fresh_since: Ints
    main: Main | None
    fresh: Rows
    fresh_count: int
    stale: int
    watermarks: Mapping[int, Watermark]
    columns: Columns

    def rows(self, item_ids: Sequence[str]) -> list[int]:
        """The current row of each item, -1 where it is not live."""
        known = len(self.row_of)
        # A label that this State has no room for is newer than the State.
        labels = [self.label_of.get(item_id, known) for item_id in item_ids]
        return [int(self.row_of[label]) if label < known else -1 for label in labels]

    def searchable(self, need: int, breadth: int) -> bool:
        """Whether graph and fresh buffer are cheaper than a scan of everything."""
        return (
            self.main is not None
            and self.fresh_count <= FRESH_SHARE_MAX * self.count
            and (need <= breadth or need <= SEARCH_SHARE_MAX * self.main.size)
        )

    def scan(self, query: Vector, wanted: int, left_out: Collection[str]) -> list[Hit]:
        """The exact answer, by looking at every row."""
        rows = self.table.scan(query, self.count, self.seq, wanted + len(left_out))
        return self.best(rows, query, wanted, left_out)

    def search(self, query: Vector, wanted: int, left_out: Collection[str], breadth: int) -> list[Hit] | None:
        """The answer by graph and fresh buffer; None where they cannot give as many as there are."""
        assert self.main is not None
        need = wanted + len(left_out)
        fresh = self.fresh.labels[self.fresh.scan(query, self.fresh_count, self.seq, need)]
        fetch = min(self.main.size, max(breadth, need))
        # Where stale entries took the places, four times as many are asked for once; then the exact scan is
        # cheaper.
        for _ in range(2):
            labels = self.main.search(query, fetch)
            if labels is None:
                return None
            labels = labels[self.fresh_since[labels] > self.seq]
            rows = self.row_of[np.concatenate((labels, fresh))]
            hits = self.best(rows[rows >= 0], query, wanted, left_out)
            if len(hits) == wanted or fetch == self.main.size:
                break
            fetch = min(self.main.size, 4 * fetch)
        if len(hits) < wanted:
            excluded = sum(row >= 0 for row in self.rows(list(left_out)))
            if len(hits) < min(wanted, self.live - excluded):
                return None
        return hits

    def newest(self, k: int, left_out: Collection[str], kept: Kept = None) -> list[Hit]:
        """The live items of the largest at_ms, equal ones by id. O(n).

        kept: bool (count,), which rows may be named
        """
        rows = self.table.alive(self.count, self.seq)
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
        return self._hits(np.array(chosen, np.int64), np.zeros(len(chosen)))

    def best(self, rows: Ints, query: Vector, wanted: int, left_out: Collection[str]) -> list[Hit]:
        """The best rows, scored in float64 row by row: the same bits wherever a row lies."""
        vectors, need = self.table.vectors[rows], wanted + len(left_out)
        if need < len(rows):
            # In float32 first: what is further below the cut than rounding carries needs no exact sum.
            near = vectors @ query
            near = near >= np.partition(near, len(rows) - need)[len(rows) - need] - 2 * slack(query)
            rows, vectors = rows[near], vectors[near]
        scores = (vectors.astype(np.float64) * query.astype(np.float64)).sum(axis=1)
        order = np.argsort(-scores, kind="stable")
        ranked = scores[order]
        ids = self.ids
        tied = bool((ranked[1:] == ranked[:-1]).any())
        if not tied and not left_out:
            return self._hits(rows[order[:wanted]], ranked[:wanted])
        labels = self.table.labels[rows[order]].tolist()
        if tied:
            by_id = sorted(range(len(order)), key=lambda at: (-ranked[at], ids[labels[at]]))
            order, labels = order[by_id], [labels[at] for at in by_id]
        kept: list[int] = []
        for at, label in enumerate(labels):
            if ids[label] not in left_out:
                kept.append(at)
                if len(kept) == wanted:
                    break
        chosen = order[kept]
        return self._hits(rows[chosen], scores[chosen])

    def _hits(self, rows: Ints, scores: npt.NDArray[np.float64]) -> list[Hit]:
        facts = self.table.facts[rows]
        names = map(self.ids.__getitem__, facts[:, 0].tolist())
        parts = zip(names, scores.tolist(), *facts[:, 1:].T.tolist(), strict=True)
        # What `Hit(*part)` does, without a Python call for each of hundreds.
        return list(map(_hit, parts))
