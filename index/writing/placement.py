"""Where each item stands, in a graph or in the fresh buffer: the writer's side of it.

An item that is new, or turned further than the gate since its graph was built, moves to the fresh buffer; one
that turned less stays where the graph has it. One that was retired leaves: when it comes back it is fresh.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from index.arrays import Ints, Vector
from index.port import AnnIndex
from index.storage.segments import FreshBuffer, Segment
from index.storage.state import IndexVersion
from index.storage.vector_table import CAPACITY_MIN

# An item that turned less than this since the graph was built is still found through its old place:
# measured, recall never fell below a fresh build's.
GATE_COSINE = math.cos(math.radians(8.0))

NOWHERE, FRESH, FIRST_GRAPH = 0, 1, 2


class Frozen(NamedTuple):
    """What a graph is built from: labels (n,), ascending; vectors (n, d); versions (n,) of its items then."""

    labels: Ints
    vectors: Vector
    versions: Ints


@dataclass(slots=True)
class Built:
    """What only the writer knows of one graph.

    labels:   entry -> label; standing: how many of the entries count
    drift_at: entry -> its place in `drifted`, the vectors that entries were built with and no longer have; -1
              where the row that the entry stands for still has it
    """

    labels: Ints
    standing: int
    drift_at: Ints
    drifted: Vector
    drifts: int = 0

    def vectors(self, state: IndexVersion, graph: Segment, entries: Ints) -> Vector:
        """The vectors that some entries which count were built with."""
        at = self.drift_at[entries]
        kept = at >= 0
        if not kept.any():
            return state.table.gather(graph.rows[entries])
        found = self.drifted[at]
        found[~kept] = state.table.gather(graph.rows[entries[~kept]])
        return found

    def remember(self, entries: Ints, then: Vector, now: Vector) -> None:
        """Keep the vectors that some entries were built with, where they turn now for the first time."""
        first = (self.drift_at[entries] < 0).nonzero()[0]
        if not len(first):
            return
        then = then[first]
        turned = (then != now[first]).any(axis=1)
        entries, then = entries[first[turned]], then[turned]
        n = len(entries)
        if not n:
            return
        if self.drifts + n > len(self.drifted):
            room = max(CAPACITY_MIN, self.drifts + n)
            self.drifted = np.concatenate(
                (self.drifted, np.empty((room, self.drifted.shape[1]), np.float32))
            )
        self.drift_at[entries] = np.arange(self.drifts, self.drifts + n)
        self.drifted[self.drifts : self.drifts + n] = then
        self.drifts += n


class Placement:
    """What only the writer knows of graphs and fresh buffer. Thread rule: under the write lock.

    home:  label -> NOWHERE (not live, or there is no graph), FRESH, or the number of the graph it stands in
    entry: label -> its entry there
    built: number of a graph -> what else is known of it
    """

    def __init__(self) -> None:
        """Nothing is anywhere."""
        self.home: Ints = np.full(CAPACITY_MIN, NOWHERE)
        self.entry: Ints = np.zeros(CAPACITY_MIN, np.int64)
        self.built: dict[int, Built] = {}
        self._next = FIRST_GRAPH

    def grow(self, labels: int) -> None:
        """Have room for so many labels, as `IndexVersion.row_of`; a batch that broke off may have made more."""
        kept, more = self.home[:labels], labels - min(labels, len(self.home))
        self.home = np.concatenate((kept, np.full(more, NOWHERE)))
        self.entry = np.concatenate((self.entry[:labels], np.zeros(more, np.int64)))

    def with_room(self, state: IndexVersion, more: int) -> IndexVersion:
        """The State with room for `more` fresh entries; a full buffer is replaced by a copy."""
        if not state.graphs or state.fresh.room_for(state.fresh_count, more):
            return state
        rows = state.fresh.rows[: state.fresh_count]
        kept = np.flatnonzero(state.table.died_at[rows] > state.seq)
        n = len(kept)
        fresh = FreshBuffer.of(
            max(CAPACITY_MIN, 2 * (n + more)), state.fresh.vectors[kept], rows[kept]
        )
        self.entry[state.table.labels[rows[kept]]] = np.arange(n)
        return state._replace(fresh=fresh, fresh_count=n)

    def renumbered(self, state: IndexVersion, new_row: Ints) -> IndexVersion:
        """The State with every entry's row renumbered. new_row: old row -> new row; behind the last, -1."""
        return state._replace(
            graphs=tuple(replace(graph, rows=new_row[graph.rows]) for graph in state.graphs),
            fresh=FreshBuffer(state.fresh.vectors, new_row[state.fresh.rows]),
        )

    def place(self, state: IndexVersion, labels: Ints, new: Vector, rows: Ints) -> int:
        """Stand each label for its new row, written already; returns the fresh buffer's new count."""
        home = self.home[labels]
        moving = np.ones(len(labels), bool)
        for graph in state.graphs:
            mine = (home == graph.number).nonzero()[0]
            if len(mine):
                built, entries, now = self.built[graph.number], self.entry[labels[mine]], new[mine]
                then = built.vectors(state, graph, entries)
                close = np.einsum("ij,ij->i", then, now) >= GATE_COSINE
                left = len(close) - int(np.count_nonzero(close))
                if left:
                    built.standing -= left
                    mine, entries, now, then = mine[close], entries[close], now[close], then[close]
                built.remember(entries, then, now)
                graph.rows[entries] = rows[mine]
                moving[mine] = False
        fresh, count = state.fresh, state.fresh_count
        in_fresh = (home == FRESH).nonzero()[0]
        if len(in_fresh):
            entries = self.entry[labels[in_fresh]]
            same = (fresh.vectors[entries] == new[in_fresh]).all(axis=1)
            fresh.rows[entries[same]] = rows[in_fresh[same]]
            moving[in_fresh[same]] = False
        at = moving.nonzero()[0]
        end = count + len(at)
        if len(at):
            fresh.vectors[count:end] = new[at]
            fresh.rows[count:end] = rows[at]
            self.home[labels[at]] = FRESH
            self.entry[labels[at]] = np.arange(count, end)
        return end

    def leave(self, labels: Ints) -> None:
        """Take retired labels out of wherever they stand."""
        home = self.home[labels]
        for number, built in self.built.items():
            built.standing -= int(np.count_nonzero(home == number))
        self.home[labels] = NOWHERE

    def standing(self, state: IndexVersion) -> tuple[int, ...]:
        """Of each graph, how many of its entries count."""
        return tuple(self.built[graph.number].standing for graph in state.graphs)

    def freeze(self, state: IndexVersion, replaced: Collection[int]) -> Frozen:
        """What a tier is built from: the fresh items, and those of the tiers that it replaces."""
        labels = np.flatnonzero(np.isin(self.home, [FRESH, *replaced]))
        rows = state.row_of[labels]
        return Frozen(labels, state.table.gather(rows), state.table.offsets[rows])

    def without_graphs(self, state: IndexVersion) -> IndexVersion:
        """The State with nothing but the table."""
        self.grow(len(state.row_of))
        self.home[:] = NOWHERE
        self.built.clear()
        empty = FreshBuffer.of(1, state.table.own[:0], state.row_of[:0])
        return state._replace(graphs=(), standing=(), fresh=empty, fresh_count=0)

    def adopt(
        self,
        state: IndexVersion,
        main: AnnIndex,
        frozen: Frozen,
        replaced: Collection[int],
        first: bool,
    ) -> IndexVersion:
        """The State with a new graph; what changed since it was frozen, and is in no other graph, is fresh.

        replaced: numbers of the graphs that go
        first:    it is the main index and takes every item it may stand for; a tier takes those of the fresh
                  buffer and of the graphs that go
        """
        number, labels = self._next, frozen.labels
        alive = state.table.died_at[state.row_of] > state.seq
        home = np.where(np.isin(self.home, list(replaced)), NOWHERE, self.home)
        rows = np.where(alive[labels] & (first | (home[labels] <= FRESH)), state.row_of[labels], -1)
        changed = np.flatnonzero((rows >= 0) & (state.table.offsets[rows] != frozen.versions))
        now, then = state.table.gather(rows[changed]), frozen.vectors[changed]
        close = np.einsum("ij,ij->i", now, then) >= GATE_COSINE
        rows[changed[~close]] = -1
        stands = np.flatnonzero(rows >= 0)
        new = Built(labels, len(stands), np.full(len(labels), -1), frozen.vectors[:0].copy())
        new.remember(changed[close], then[close], now[close])
        home[labels[stands]] = number
        old = [
            self._without_moved(graph, home)
            for graph in state.graphs
            if graph.number not in replaced
        ]
        kept = [(graph, built) for graph, built in old if built.standing or not first]
        at = 0 if first else len(kept)
        pairs = [*kept[:at], (Segment(number, main, rows), new), *kept[at:]]
        left = np.flatnonzero(alive & (home <= FRESH))
        home[~alive], home[left] = NOWHERE, FRESH
        entry = self.entry.copy()
        entry[labels[stands]], entry[left] = stands, np.arange(len(left))
        vectors = state.table.gather(state.row_of[left])
        fresh = FreshBuffer.of(max(CAPACITY_MIN, 2 * len(left)), vectors, state.row_of[left])
        # Nothing was changed so far, so an error above leaves all as it was.
        self._next, self.home, self.entry = number + 1, home, entry
        self.built = {graph.number: built for graph, built in pairs}
        state = state._replace(
            graphs=tuple(graph for graph, _ in pairs), fresh=fresh, fresh_count=len(left)
        )
        return state._replace(standing=self.standing(state))

    def _without_moved(self, graph: Segment, home: Ints) -> tuple[Segment, Built]:
        """A graph without the entries of labels that another one took."""
        built = self.built[graph.number]
        stays = home[built.labels] == graph.number
        standing = int(np.count_nonzero(stays))
        if standing == built.standing:
            return graph, built
        # A copy: readers of older States go on with theirs.
        graph = replace(graph, rows=np.where(stays, graph.rows, -1))
        return graph, replace(built, standing=standing)
