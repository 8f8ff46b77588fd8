"""The live index: an immutable main graph, an exact fresh buffer beside it, one reference that readers read.

Everything a query needs hangs on one immutable `State`, read once per query; a write publishes a new State by
one assignment. The main graph is never mutated once published: an item that is new, or turned further than
the gate since the graph was built, goes to the fresh buffer, which every query scans exactly; one that
turned less stays where the graph has it. All candidates are rescored from the vector table, so every answer
is by current vectors. A rebuild makes a new graph on its own thread and publishes it with whatever came
meanwhile as fresh rows.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from eddyline.errors import VectorRejected
from eddyline.records import ItemRecord
from index import filtered, restore
from index.columns import Columns
from index.filters import Filter
from index.placement import Placement
from index.port import (
    Hit,
    IndexStats,
    Vector,
    Watermark,
    check_kinds,
    check_query,
    stack_vectors,
    watermarks_after,
)
from index.rebuild import Rebuilder
from index.rows import CAPACITY_MIN, NEVER, Ints, Rows
from index.snapshot import Contents
from index.state import Main, State
from index.versions import Versions

if TYPE_CHECKING:
    from index.guard import RecallGuard

# So many of the newest items are kept in order until the next write; a call that needs more sorts anew.
NEWEST_KEPT = 512
# Items are looked up again where a batch was written meanwhile; so many batches in a row do not come.
DESCRIBE_TRIES = 50

Build = Callable[[Ints, Vector, threading.Event], Main | None]


class LiveIndex:
    """The live index over any `Main`; see `index.port.Index` for the contract of every method.

    Thread rule: any thread. Writers take one lock; readers take none.
    """

    def __init__(
        self, dimension: int, build: Build, *, breadth: int, exact_below: int, fresh_max: int
    ) -> None:
        """An empty index.

        build:       makes a Main of (labels (n,), vectors (n, d), stop); None where it was stopped
        breadth:     how many candidates a search of the graph asks for at least
        exact_below: up to so many live items every query is an exact scan and no graph is built
        fresh_max:   more fresh rows, or more stale entries of the graph, start a rebuild
        """
        if dimension < 1 or breadth < 1 or exact_below < 0 or fresh_max < 1:
            least = f"dimension {dimension}, breadth {breadth} and fresh_max {fresh_max} must be at least 1"
            raise ValueError(f"{least}, exact_below {exact_below} at least 0")
        self._dimension = dimension
        self._build = build
        # The recall guard's: it may ask for more candidates, or for exact answers only.
        self.breadth = breadth
        self.exact_only = False
        self.guard: RecallGuard | None = None
        self._exact_below = exact_below
        self._fresh_max = fresh_max
        self._lock = threading.Lock()
        self._rebuilder = Rebuilder(self._due, self._rebuild)
        # The writer's own: the version of each label, tombstones too, and where each stands.
        self._placement = Placement(dimension)
        self._applied = self._ignored = self._rejected = self._refused = 0
        self._state = State(
            ids=[], label_of={}, table=Rows(CAPACITY_MIN, dimension), count=0, seq=0, live=0,
            row_of=np.full(CAPACITY_MIN, -1), fresh_since=np.full(CAPACITY_MIN, NEVER),
            main=None, fresh=Rows(1, dimension), fresh_count=0, stale=0, watermarks={}, columns=Columns(),
        )  # fmt: skip
        self._versions = Versions(self._state.ids, self._state.label_of, [])
        # Odd while a batch is being written: who searched the graph meanwhile may have seen half of it.
        self._writing = 0
        # The State that this order belongs to, and the order; replaced as one.
        self._newest: tuple[State | None, list[Hit]] = (None, [])

    # ------------------------------------------------------------------ reading

    @property
    def dimension(self) -> int:
        """The length of every vector."""
        return self._dimension

    def query(
        self, vector: Vector, k: int, exclude: Collection[str] = (), asked: Filter | None = None
    ) -> list[Hit]:
        """See `Index.query`. Up to `exact_below` items, or with much fresh, the scan is exact."""
        check_query(vector, self._dimension)
        writing, state = self._writing, self._state  # in this order: a write in between must be noticed
        wanted = min(k, state.live)
        if wanted <= 0:
            return []
        vector = np.ascontiguousarray(vector, np.float32)
        left_out = exclude if isinstance(exclude, (set, frozenset)) else frozenset(exclude)
        breadth, guard = self.breadth, self.guard
        if asked is not None:
            graph = state.live > self._exact_below and not self.exact_only
            return filtered.query(state, vector, wanted, left_out, asked, breadth if graph else 0)
        if state.live > self._exact_below and state.searchable(wanted + len(left_out), breadth):
            exact = self.exact_only
            hits = None if exact else state.search(vector, wanted, left_out, breadth)
            if writing % 2 or writing != self._writing:
                hits = None  # a batch came in between: the rows themselves never change, so they are scanned
            self._refused += hits is None and not exact
            if hits is None:
                hits = state.scan(vector, wanted, left_out)
            if guard is not None:
                guard.offer(state, vector, wanted, left_out, hits)
            return hits
        return state.scan(vector, wanted, left_out)

    def vectors_of(self, item_ids: Sequence[str]) -> Vector:
        """See `Index.vectors_of`."""
        state = self._state
        rows = [row for row in state.rows(item_ids) if row >= 0]
        return state.table.vectors[np.array(rows, np.int64)]

    def describe(self, item_ids: Sequence[str], asked: Filter | None = None) -> list[Hit | None]:
        """See `Index.describe`."""
        for _ in range(DESCRIBE_TRIES):
            writing, state = self._writing, self._state
            table, rows = state.table, state.rows(item_ids)
            if writing == self._writing and not writing % 2:
                break
            time.sleep(0)  # lets the writer go on; a batch takes less than a millisecond
        if asked is not None:
            rows = filtered.passing(state, rows, asked)
        return [
            None
            if row < 0
            else Hit(item_id, 0.0, int(table.at_ms[row]), int(table.written_us[row]), int(table.offsets[row]))
            for item_id, row in zip(item_ids, rows, strict=True)
        ]

    def newest(self, k: int, exclude: Collection[str] = (), asked: Filter | None = None) -> list[Hit]:
        """See `Index.newest`. O(n) after a write, then kept until the next one; with a filter always O(n)."""
        if k <= 0:
            return []
        state, left_out = self._state, frozenset(exclude)
        if asked is not None:
            return state.newest(k, left_out | asked.deny, filtered.kept(state, asked))
        known_of, known = self._newest
        if known_of is not state:
            known = state.newest(NEWEST_KEPT, frozenset())
            self._newest = (state, known)
        found = [hit for hit in known if hit.item_id not in left_out][:k]
        return found if len(found) == k or len(known) == state.live else state.newest(k, left_out)

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
            rows=state.count,
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

    def apply(self, records: Sequence[ItemRecord]) -> int:
        """See `Index.apply`. Takes the write lock."""
        with self._lock:
            try:
                vectors = stack_vectors([r for r in records if r.vector is not None], self._dimension)
            except VectorRejected:
                self._rejected += 1
                raise
            chosen = self._versions.newer(records)
            upserts = [(label, at, record) for label, (record, at) in chosen.items() if at >= 0]
            retired = [label for label, (_, at) in chosen.items() if at < 0]
            state = replace(self._state, watermarks=watermarks_after(self._state.watermarks, records))
            self._writing += 1
            try:
                if chosen:
                    state = self._write(self._with_room(state, len(upserts)), upserts, retired, vectors)
                self._state = state
            except BaseException:
                self._versions.undo()
                raise
            finally:
                self._writing += 1
            self._applied += len(chosen)
            self._ignored += len(records) - len(chosen)
            if self._due():
                self._rebuilder.wake()
            return len(chosen)

    def _with_room(self, state: State, more: int) -> State:
        """The State with room for `more` rows and for every label; what is full is replaced by a copy."""
        known = len(state.row_of)
        if len(state.ids) > known:
            room = max(CAPACITY_MIN, 2 * len(state.ids)) - known
            self._placement.grow(room)
            state = replace(
                state,
                row_of=np.concatenate((state.row_of, np.full(room, -1))),
                fresh_since=np.concatenate((state.fresh_since, np.full(room, NEVER))),
            )
        if not state.table.room_for(state.count, more):
            table, kept = state.table.compacted(state.count, state.seq, more)
            row_of = np.full(len(state.row_of), -1)
            row_of[table.labels[: state.live]] = np.arange(state.live)
            columns = state.columns.compacted(kept, state.count)
            state = replace(state, table=table, count=state.live, row_of=row_of, columns=columns)
        return self._placement.with_room(state, more)

    def _write(
        self, state: State, upserts: list[tuple[int, int, ItemRecord]], retired: list[int], vectors: Vector
    ) -> State:
        """Rows first, then who stands where, then the State that counts them."""
        table, start, n, seq = state.table, state.count, len(upserts), state.seq + 1
        place = self._placement
        out = np.array(retired, np.int64)
        labels = np.array([label for label, _, _ in upserts], np.int64)
        new = vectors[[at for _, at, _ in upserts]] if n != len(vectors) else vectors
        if n:
            table.vectors[start : start + n] = new
            table.labels[start : start + n] = labels
            table.at_ms[start : start + n] = [record.at_ms for _, _, record in upserts]
            table.written_us[start : start + n] = [record.written_us for _, _, record in upserts]
            table.offsets[start : start + n] = [record.offset for _, _, record in upserts]
            state.columns.append(start, [record.attributes for _, _, record in upserts])
        touched = np.concatenate((labels, out))
        before = state.row_of[touched]
        stale_before = place.stale(state, touched)
        table.died_at[before[before >= 0]] = seq
        fresh_count = state.fresh_count
        if state.main is not None:
            fresh_count = place.freshen(state, labels, new, before[:n], seq)
            place.leave(state.fresh, out, seq)
        state.row_of[labels] = np.arange(start, start + n)
        state.row_of[out] = -1
        return replace(
            state,
            count=start + n,
            seq=seq,
            live=state.live + n - int(np.count_nonzero(before >= 0)),
            fresh_count=fresh_count,
            stale=state.stale + place.stale(state, touched) - stale_before,
        )

    def contents(self) -> Contents:
        """All that it holds now, for a snapshot. Takes the write lock for a moment."""
        with self._lock:
            state, versions = self._state, self._versions.offsets.copy()
        return restore.taken(state, versions)

    def restore(self, contents: Contents) -> None:
        """Become what a snapshot holds; queries are exact until the graph is built.

        Raises ValueError where the index is not empty or has another dimension.
        """
        with self._lock:
            if self._state.ids or contents.vectors.shape[1] != self._dimension:
                raise ValueError("only an empty index of the same dimension can be restored")
            self._state, offsets = restore.given(self._state, contents)
            self._versions = Versions(self._state.ids, self._state.label_of, offsets)
            self._placement.grow(len(self._state.row_of) - CAPACITY_MIN)
            if self._due():
                self._rebuilder.wake()

    def rebuild(self) -> bool:
        """Rebuild the graph now, on the calling thread, due or not; False where it failed (see `stats`)."""
        return self._rebuilder.now()

    def rebuild_soon(self) -> None:
        """Have the graph rebuilt in the background, due or not. Returns at once."""
        with self._lock:
            self._rebuilder.ask()

    def close(self) -> None:
        """Stop the rebuild thread. Queries and writes go on, on what is there."""
        if self.guard is not None:
            self.guard.close()
        self._rebuilder.close()

    def _due(self) -> bool:
        state = self._state
        if state.live <= self._exact_below:
            # A graph far too large for what lives is let go; near the limit it is kept, not made each time.
            return state.main is not None and state.live < 0.8 * self._exact_below
        return state.main is None or max(state.fresh_count, state.stale) > self._fresh_max

    def _rebuild(self, stop: threading.Event) -> None:
        with self._lock:
            state = self._state
            labels = np.flatnonzero(state.row_of >= 0)
            rows = state.row_of[labels]
            wanted = state.live > self._exact_below
        # Rows never change, so they can be copied while the writer goes on.
        vectors, offsets = state.table.vectors[rows], state.table.offsets[rows]
        main = self._build(labels, vectors, stop) if wanted else None
        if wanted and main is None:
            return
        with self._lock:
            self._state = self._placement.adopt(self._state, main, labels, vectors, offsets)
