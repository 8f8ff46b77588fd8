"""The live index: an immutable main graph, an exact fresh buffer beside it, one reference that readers read.

Everything a query needs hangs on one immutable `IndexVersion`, read once per query; a write publishes a new State by
one assignment. The main graph is never mutated once published: an item that is new, or turned further than
the gate since the graph was built, goes to the fresh buffer, which every query scans exactly; one that
turned less stays where the graph has it. All candidates are rescored from the vector table, so every answer
is by current vectors. A rebuild makes a new graph on its own thread and publishes it with whatever came
meanwhile as fresh rows; where that takes long the fresh buffer becomes a small graph, too (`index.writing.merge_policy`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from eddyline.errors import VectorRejected
from eddyline.schema.item_record import ItemRecord
from index.arrays import Ints, Vector
from index.filters import Filter
from index.port import (
    AnnIndex,
    Hit,
    IndexStats,
    SearchResult,
    Watermark,
    check_kinds,
    check_query,
    stack_vectors,
    stamps_of,
    watermarks_after,
)
from index.search import filtered
from index.snapshot import restore
from index.snapshot.format import Contents
from index.storage.columns import Columns
from index.storage.segments import FreshBuffer
from index.storage.state import IndexVersion
from index.storage.vector_table import CAPACITY_MIN, VectorTable
from index.storage.versions import Versions
from index.writing import batch, merge_policy
from index.writing.placement import Frozen, Placement
from index.writing.rebuilder import Rebuilder

if TYPE_CHECKING:
    from index.recall_guard import RecallGuard

# So many of the newest items are kept in order until the next write; a call that needs more sorts anew.
NEWEST_KEPT = 512


Build = Callable[[Ints, Vector, threading.Event], AnnIndex | None]


def _none(dimension: int) -> tuple[Vector, Ints]:
    return np.empty((0, dimension), np.float32), np.empty(0, np.int64)


class LiveIndex:
    """The live index over any `AnnIndex`; see `index.port.Index` for the contract of every method.

    Thread rule: any thread. Writers take one lock; readers take none.
    """

    def __init__(
        self,
        dimension: int,
        build: Build,
        *,
        breadth: int,
        exact_below: int,
        fresh_max: int,
        tier_above: int = 0,
    ) -> None:
        """An empty index.

        build:       makes a Main of (labels (n,), vectors (n, d), stop); None where it was stopped
        breadth:     how many candidates a search of the graph asks for at least
        exact_below: up to so many live items every query is an exact scan and no graph is built
        fresh_max:   more fresh rows, or more stale entries of the graph, start a rebuild
        tier_above:  while that runs, more fresh rows than this become a tier; 0 is never
        """
        if dimension < 1 or breadth < 1 or exact_below < 0 or fresh_max < 1 or tier_above < 0:
            least = f"dimension {dimension}, breadth {breadth} and fresh_max {fresh_max} must be at least 1"
            raise ValueError(
                f"{least}, exact_below {exact_below} and tier_above {tier_above} at least 0"
            )
        self._dimension = dimension
        self._build = build
        # The recall guard's: it may ask for more candidates, or for exact answers only.
        self.breadth = breadth
        self.exact_only = False
        # While it is off no thread is started, so that the process can be forked; `rebuild` builds by hand.
        self.background = True
        self.guard: RecallGuard | None = None
        self._exact_below = exact_below
        self._fresh_max = fresh_max
        self._tier_above = tier_above
        self._lock = threading.Lock()
        self._rebuilder = Rebuilder(self._due, self._rebuild)
        self._tier_builder = Rebuilder(self._tier_due, self._build_tier, "index-tier")
        # The writer's own: the version of each label, tombstones too, and where each stands.
        self._placement = Placement()
        self._applied = self._ignored = self._rejected = self._refused = 0
        self._state = IndexVersion(
            ids=[],
            label_of={},
            table=VectorTable(CAPACITY_MIN, dimension),
            used=0,
            seq=0,
            live=0,
            row_of=np.full(CAPACITY_MIN, -1),
            names=np.full(CAPACITY_MIN, None),
            graphs=(),
            standing=(),
            fresh=FreshBuffer.of(1, *_none(dimension)),
            fresh_count=0,
            watermarks={},
            columns=Columns(),
        )
        self._versions = Versions(self._state.ids, self._state.label_of, np.empty(0, np.int64))
        # The State that this order belongs to, and the order; replaced as one.
        self._newest: tuple[IndexVersion | None, list[Hit]] = (None, [])

    # ------------------------------------------------------------------ reading

    @property
    def dimension(self) -> int:
        """The length of every vector."""
        return self._dimension

    def query(
        self, vector: Vector, k: int, exclude: Collection[str] = (), filters: Filter | None = None
    ) -> list[Hit]:
        """See `Index.query`."""
        return self.find(vector, k, exclude, filters).hits()

    def find(
        self, vector: Vector, k: int, exclude: Collection[str] = (), filters: Filter | None = None
    ) -> SearchResult:
        """See `Index.find`. Up to `exact_below` items, or with much fresh, the scan is exact."""
        check_query(vector, self._dimension)
        state = self._state
        wanted = min(k, state.live)
        if wanted <= 0:
            return SearchResult.of(())
        vector = np.ascontiguousarray(vector, np.float32)
        excluded = exclude if isinstance(exclude, (set, frozenset)) else frozenset(exclude)
        breadth, guard = self.breadth, self.guard
        if filters is not None:
            graph = state.live > self._exact_below and not self.exact_only
            return filtered.query(state, vector, wanted, excluded, filters, breadth if graph else 0)
        if state.live > self._exact_below and state.searchable(wanted + len(excluded), breadth):
            exact = self.exact_only
            found = None if exact else state.search(vector, wanted, excluded, breadth)
            self._refused += found is None and not exact
            if found is None:
                found = state.scan(vector, wanted, excluded)
            if guard is not None:
                guard.offer(state, vector, wanted, excluded, found)
            return found
        return state.scan(vector, wanted, excluded)

    def vectors_of(self, item_ids: Sequence[str]) -> Vector:
        """See `Index.vectors_of`."""
        state = self._state
        rows = state.rows(item_ids)
        return state.table.gather(rows[rows >= 0])

    def describe(self, item_ids: Sequence[str], filters: Filter | None = None) -> list[Hit | None]:
        """See `Index.describe`."""
        state = self._state
        rows = state.rows(item_ids)
        if filters is not None:
            rows = filtered.passing(state, rows, filters)
        facts = state.table.facts[rows, 1:].tolist()
        return [
            None if row < 0 else Hit(item_id, 0.0, *of_item)
            for item_id, row, of_item in zip(item_ids, rows.tolist(), facts, strict=True)
        ]

    def newest(
        self, k: int, exclude: Collection[str] = (), filters: Filter | None = None
    ) -> list[Hit]:
        """See `Index.newest`. O(n) after a write, then kept until the next one; with a filter always O(n)."""
        if k <= 0:
            return []
        state, excluded = self._state, frozenset(exclude)
        if filters is not None:
            return state.newest(k, excluded | filters.deny, filtered.kept(state, filters))
        known_of, known = self._newest
        if known_of is not state:
            known = state.newest(NEWEST_KEPT, frozenset())
            self._newest = (state, known)
        found = [hit for hit in known if hit.item_id not in excluded][:k]
        return found if len(found) == k or len(known) == state.live else state.newest(k, excluded)

    def watermarks(self) -> Mapping[int, Watermark]:
        """See `Index.watermarks`."""
        return self._state.watermarks

    def stats(self) -> IndexStats:
        """See `Index.stats`."""
        state = self._state
        rebuilder = self._rebuilder
        return IndexStats(
            live=state.live,
            tombstones=len(state.ids) - state.live,
            main=state.main.size if state.main else 0,
            fresh=state.fresh_count,
            stale=state.stale,
            rows=state.used,
            applied=self._applied,
            ignored=self._ignored,
            rejected=self._rejected,
            refused=self._refused,
            rebuilding=rebuilder.running,
            rebuilds=rebuilder.done,
            rebuilds_failed=rebuilder.failed,
            rebuild_s=rebuilder.last_s,
            rebuild_error=rebuilder.last_error,
            main_name=state.main.name if state.main else "",
            main_bytes=state.main.memory_bytes if state.main else 0,
            breadth=self.breadth,
            recall=self.guard.recall() if self.guard else None,
            tiers=max(0, len(state.graphs) - 1),
            tiered=sum(state.standing[1:]),
        )

    # ------------------------------------------------------------------ writing

    def upsert(self, records: Sequence[ItemRecord]) -> int:
        """See `Index.upsert`."""
        check_kinds(records, retired=False)
        return self.apply(records)

    def retire(self, records: Sequence[ItemRecord]) -> int:
        """See `Index.retire`."""
        check_kinds(records, retired=True)
        return self.apply(records)

    def apply(self, records: Sequence[ItemRecord], others: Sequence[ItemRecord] = ()) -> int:
        """See `Index.apply`. Takes the write lock."""
        with self._lock:
            try:
                vectors = stack_vectors(records, self._dimension)
            except VectorRejected:
                self._rejected += 1
                raise
            yield_gil = batch.yield_gil if len(records) > batch.AT_ONCE else batch.without_yielding
            yield_gil()
            stamps = stamps_of(records)
            after = watermarks_after(self._state.watermarks, stamps)
            if others:
                after = watermarks_after(after, stamps_of(others))
            state = self._state._replace(watermarks=after)
            labels, places = self._versions.newer(
                [record.item_id for record in records], stamps[:, 3]
            )
            try:
                yield_gil()
                if len(labels):
                    changes = batch.chosen(records, vectors, stamps, labels, places)
                    state = batch.apply_changes(state, self._placement, changes, yield_gil)
                self._state = state
            except BaseException:
                self._versions.undo()
                # Who stands where is not known any more: exact until the next rebuild, which is due now.
                self._state = self._placement.without_graphs(batch.rollback_on_error(self._state))
                raise
            self._applied += len(labels)
            self._ignored += len(records) - len(labels)
            self._wake()
            return len(labels)

    def contents(self) -> Contents:
        """All that it holds now, for a snapshot. Takes the write lock for a moment."""
        with self._lock:
            state, versions = self._state, self._versions.offsets.copy()
        return restore.export_state(state, versions)

    def restore(self, contents: Contents) -> None:
        """Become what a snapshot holds; queries are exact until the graph is built.

        Raises ValueError where the index is not empty or has another dimension.
        """
        with self._lock:
            if self._state.ids or contents.vectors.shape[1] != self._dimension:
                raise ValueError("only an empty index of the same dimension can be restored")
            self._state, offsets = restore.import_state(self._state, contents)
            self._versions = Versions(self._state.ids, self._state.label_of, offsets)
            self._placement.grow(len(self._state.row_of))
            self._wake()

    # ------------------------------------------------------------------ building

    def rebuild(self) -> bool:
        """Rebuild the graph now, on the calling thread, due or not; False where it failed (see `stats`)."""
        return self._rebuilder.now()

    def build_tier(self) -> bool:
        """Make a tier of the fresh items now, on the calling thread; False where it failed."""
        return self._tier_builder.now()

    def rebuild_soon(self) -> None:
        """Have the graph rebuilt in the background, due or not. Returns at once."""
        with self._lock:
            self._rebuilder.ask()

    def begin(self) -> None:
        """Build in the background from now on; needed only where `background` was off."""
        with self._lock:
            self.background = True
            self._wake()

    def close(self) -> None:
        """Stop the rebuild thread. Queries and writes go on, on what is there."""
        if self.guard is not None:
            self.guard.close()
        self._rebuilder.close()
        self._tier_builder.close()

    def _wake(self) -> None:
        if self.background and self._due():
            self._rebuilder.wake()
            if self._tier_due():
                self._tier_builder.wake()

    def _due(self) -> bool:
        state = self._state
        if state.live <= self._exact_below:
            # A graph far too large for what lives is let go; near the limit it is kept, not made each time.
            return bool(state.graphs) and state.live < 0.8 * self._exact_below
        return not state.graphs or max(state.outside, state.stale) > self._fresh_max

    def _tier_due(self) -> bool:
        state = self._state
        return bool(self._tier_above and state.graphs) and state.fresh_count > self._tier_above

    def _rebuild(self, stop: threading.Event) -> None:
        with self._lock:
            state = self._state
            labels = np.flatnonzero(state.table.died_at[state.row_of] > state.seq)
            rows = state.row_of[labels]
            wanted = state.live > self._exact_below
        if not wanted:
            with self._lock:
                self._state = self._placement.without_graphs(self._state)
            return
        # Rows never change, so they can be copied while the writer goes on.
        frozen = Frozen(labels, state.table.gather(rows), state.table.offsets[rows])
        main = self._build(np.arange(len(labels)), frozen.vectors, stop)
        if main is None:
            return
        with self._lock:
            state = self._state
            replaced = [graph.number for graph in state.graphs[:1]]
            self._state = self._placement.adopt(state, main, frozen, replaced, first=True)

    def _build_tier(self, stop: threading.Event) -> None:
        with self._lock:
            state = self._state
            if not state.graphs:
                return
            replaced = merge_policy.segments_to_merge(state, self._placement)
            frozen = self._placement.freeze(state, replaced)
        if not len(frozen.labels):
            return
        main = self._build(np.arange(len(frozen.labels)), frozen.vectors, stop)
        if main is None:
            return
        with self._lock:
            if self._state.graphs:  # the graphs may have been let go meanwhile
                self._state = self._placement.adopt(
                    self._state, main, frozen, replaced, first=False
                )
