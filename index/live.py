"""The live index: immutable segments plus a fresh buffer behind one reference that readers read.

A query reads one immutable `IndexVersion`; a write publishes the next one by one assignment.
A published segment is never mutated. An item that is new, or has turned further than the gate since
its segment was built, goes to the fresh buffer, which every query scans exactly; after a smaller
turn it stays in its segment. Every candidate is rescored from the vector table, so answers use
current vectors. A rebuild builds a new main segment on its own thread; items that change meanwhile
are fresh. If a rebuild runs long, the fresh buffer becomes a small segment
(`index.writing.merge_policy`). A delete marks its row as dead in `index.writing.batch`; no later
version shows a dead row.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import numpy as np
from typing_extensions import override

from eddyline.errors import VectorRejected
from eddyline.schema.item_record import ItemRecord
from index.arrays import Floats, Ints, Keys, Mask, Vector
from index.backends.base import AnnBackend, AnnIndex
from index.filters import Filter
from index.hits import HitColumns
from index.port import (
    Hit,
    Index,
    IndexStats,
    LiveItems,
    RecallEstimate,
    SearchResult,
    Term,
    Watermark,
)
from index.ranked import RankedItems
from index.records import check_query, stack_vectors, stamps_of, watermarks_after
from index.search import filtered, look_up
from index.search.nearest import NearestSearch
from index.search.newest import NewestItems
from index.snapshot import restore
from index.snapshot.format import Contents
from index.storage.index_version import IndexVersion
from index.storage.item_offsets import ItemOffsets
from index.storage.tombstones import LABEL, OFFSET, Tombstones
from index.writing import batch, merge_policy
from index.writing.batch import Changes
from index.writing.placement import BuildInput, Placement
from index.writing.rebuilder import Rebuilder, run_niced

# A label of an ended delete is free after this time: no query runs as long, so none has a version
# in which the item lives.
READERS_S = 60.0
# Segments are dropped below this share of `exact_below`, so that they do not come and go near it.
DROP_SHARE = 0.8


class RecallMonitor(Protocol):
    """Watches the answers of a live index, as `index.recall_guard` does."""

    def offer(self, search: NearestSearch, result: SearchResult) -> None:
        """A query and its answer, from the query's thread; returns at once."""

    def recall(self) -> RecallEstimate:
        """The estimate now."""

    def close(self) -> None:
        """Stop watching."""


class LiveIndex(Index):
    """The live index over any ANN backend.

    Thread rule: any thread. Writers take one lock; readers take none.
    breadth, exact_only: the recall guard raises the breadth, or has every query scanned exactly
    turn: a rebuild runs within this context, which may wait its turn; gets the event that ends
        the wait
    background: while False no thread starts, so that the process can fork; see `begin`
    guard: watches the answers of segment searches; closed with the index
    """

    def __init__(
        self,
        dimension: int,
        backend: AnnBackend,
        *,
        breadth: int,
        exact_below: int,
        fresh_max: int,
        flush_above: int = 0,
        text_names: frozenset[str] = frozenset(),
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """An empty index.

        backend:     builds the segments
        breadth:     fewest candidates that a segment search requests
        exact_below: up to this many live items every query is an exact scan, without segments
        fresh_max:   more fresh entries, or more dead ones of the main segment, start a rebuild
        flush_above: while that runs, more fresh entries become a small segment; 0: never
        text_names:  attributes whose texts filters may name
        """
        if dimension < 1 or breadth < 1 or exact_below < 0 or fresh_max < 1 or flush_above < 0:
            raise ValueError(
                f"dimension {dimension}, breadth {breadth} and fresh_max {fresh_max} must be at "
                f"least 1, exact_below {exact_below} and flush_above {flush_above} at least 0"
            )
        self.dimension = dimension
        self._backend = backend
        self.breadth = breadth
        self.exact_only = False
        self.background = True
        self.turn: Callable[[threading.Event], AbstractContextManager[object]] = nullcontext
        self.guard: RecallMonitor | None = None
        self._exact_below = exact_below
        self._fresh_max = fresh_max
        self._flush_above = flush_above
        self._lock = threading.Lock()
        self._rebuilder = Rebuilder(self._due, self._rebuild_in_turn)
        self._flusher = Rebuilder(self._flush_due, self._flush, "index-flush")
        self._applied = self._ignored = self._rejected = self._refused = 0
        self._version = IndexVersion.empty(dimension, text_names)
        # Of the writers alone.
        self._placement = Placement()
        self._offsets = ItemOffsets(
            self._version.ids, self._version.label_of, np.empty(0, np.int64)
        )
        self._tombstones = Tombstones()
        # Ended deletes, with the time when they ended.
        self._leaving: deque[tuple[float, Ints]] = deque()
        self._clock_s = clock_s
        self._newest = NewestItems(lambda: self._version)

    # ------------------------------------------------------------------ reading

    @override
    def query(
        self, vector: Vector, k: int, exclude: Collection[str] = (), filters: Filter | None = None
    ) -> Sequence[Hit]:
        found = self.find(vector, k, exclude, filters)
        if found.names is None or found.labels is None:
            return found.hits()
        return HitColumns(found.names, found.labels, found.facts, found.scores)

    @override
    def find(
        self, vector: Vector, k: int, exclude: Collection[str] = (), filters: Filter | None = None
    ) -> SearchResult:
        """As `Index.find`. Exact up to `exact_below` items, and while much is fresh."""
        check_query(vector, self.dimension)
        version = self._version
        k = min(k, version.live)
        if k <= 0:
            return SearchResult.of(())
        vector = np.ascontiguousarray(vector, np.float32)
        excluded = exclude if isinstance(exclude, (set, frozenset)) else frozenset(exclude)
        if filters is None:
            search = NearestSearch(version, vector, k, excluded)
        else:
            search = filtered.FilteredSearch(version, vector, k, excluded, filters)
            if search.k == 0:
                return SearchResult.of(())
        narrow = search.narrowed()
        if narrow is not None and len(result := self._search(narrow, filters)) == narrow.k:
            return result
        return self._search(search, filters)

    def _search(self, search: NearestSearch, filters: Filter | None) -> SearchResult:
        breadth, guard = self.breadth, self.guard
        if search.version.live <= self._exact_below or not search.segments_pay(breadth):
            return search.scan()
        exact = self.exact_only
        result = None if exact else search.by_segments(breadth)
        if search.is_narrow:
            return result or SearchResult.of(())
        self._refused += result is None and not exact and filters is None
        if result is None:
            result = search.scan()
        if guard is not None:
            guard.offer(search, result)
        return result

    @override
    def vectors_of(self, item_ids: Sequence[str]) -> Vector:
        version = self._version
        rows = version.rows_of(item_ids)
        return version.table.gather(rows[rows >= 0])

    @override
    def describe(self, item_ids: Sequence[str], filters: Filter | None = None) -> list[Hit | None]:
        return look_up.describe(self._version, item_ids, filters)

    @override
    def terms_of(self, item_ids: Sequence[str], names: Collection[str]) -> list[frozenset[Term]]:
        return look_up.terms_of(self._version, item_ids, names)

    @override
    def find_keys(self, keys: Keys, filters: Filter | None = None) -> list[Hit | None]:
        return look_up.find_keys(self._version, keys, filters)

    @override
    def first_listed(
        self,
        ranked: RankedItems,
        k: int,
        exclude: Collection[str] = (),
        filters: Filter | None = None,
    ) -> Sequence[Hit]:
        return look_up.first_listed(self._version, ranked, k, exclude, filters)

    @override
    def first_by_key(
        self, keys: Keys, scores: Floats, k: int, filters: Filter | None = None
    ) -> Sequence[Hit]:
        return look_up.first_by_key(self._version, keys, scores, k, filters)

    @override
    def vectors_of_hits(self, hits: Sequence[Hit]) -> Vector:
        if not isinstance(hits, HitColumns):
            return super().vectors_of_hits(hits)
        version = self._version
        rows = version.rows_at(hits.labels)
        return version.table.gather(rows[rows >= 0])

    @override
    def keys_of_hits(self, hits: Sequence[Hit]) -> Keys:
        if not isinstance(hits, HitColumns):
            return super().keys_of_hits(hits)
        return self._version.keys.keys_at(hits.labels)

    @override
    def live_ids(self, keys: Keys) -> list[str]:
        return look_up.live_ids(self._version, keys)

    @override
    def newest(
        self, k: int, exclude: Collection[str] = (), filters: Filter | None = None
    ) -> Sequence[Hit]:
        """As `Index.newest`. Costs the rows written since the last call, not all rows."""
        return self._newest.find(k, frozenset(exclude), filters)

    @override
    def text_names(self) -> Collection[str]:
        return self._version.columns.text_names

    @override
    def number_names(self) -> Collection[str] | None:
        version = self._version
        return version.columns.number_names() if version.live else None

    @override
    def watermarks(self) -> Mapping[int, Watermark]:
        return self._version.watermarks

    @override
    def stats(self) -> IndexStats:
        version, main, rebuilder = self._version, self._version.main, self._rebuilder
        return IndexStats(
            live=version.live,
            tombstones=len(version.ids) - version.live - self._offsets.free_count,
            main=main.size if main else 0,
            fresh=version.fresh_count,
            stale=version.stale,
            rows=version.used,
            applied=self._applied,
            ignored=self._ignored,
            rejected=self._rejected,
            refused=self._refused,
            rebuilding=rebuilder.running,
            rebuilds=rebuilder.done,
            rebuilds_failed=rebuilder.failed,
            rebuild_s=rebuilder.last_s,
            rebuild_error=rebuilder.last_error,
            main_name=main.name if main else "",
            main_bytes=main.memory_bytes if main else 0,
            breadth=self.breadth,
            recall=self.guard.recall() if self.guard else None,
            small_segments=max(0, len(version.segments) - 1),
            small_segment_items=sum(version.live_entries[1:]),
        )

    # ------------------------------------------------------------------ writing

    @override
    def apply(self, records: Sequence[ItemRecord], others: Sequence[ItemRecord] = ()) -> int:
        with self._lock:
            try:
                vectors = stack_vectors(records, self.dimension)
            except VectorRejected:
                self._rejected += 1
                raise
            batch.yield_gil(len(records))
            stamps = stamps_of(records)
            after = watermarks_after(self._version.watermarks, stamps)
            if others:
                after = watermarks_after(after, stamps_of(others))
            version = self._version._replace(watermarks=after)
            if below := self._below_floors(records):
                self._ignored += len(below)
                records = [record for at, record in enumerate(records) if at not in below]
                stamps = np.delete(stamps, sorted(below), axis=0)
                vectors = stack_vectors(records, self.dimension)
            item_ids = [record.item_id for record in records]
            try:

                def brings_time(labels: Ints, positions: Ints) -> Mask:
                    has_vector = np.array([records[p].vector is not None for p in positions], bool)
                    lacks_time = self._version.lack_time(labels)
                    found: Mask = has_vector & (stamps[positions, 1] != 0) & lacks_time
                    return found

                labels, positions = self._offsets.advance(item_ids, stamps[:, 3], brings_time)
                batch.yield_gil(len(records))
                if len(labels):
                    changes = batch.select_changes(records, vectors, stamps, labels, positions)
                    version = batch.apply_changes(version, self._placement, changes)
                    self._tombstones.add(_tombstones_of(changes))
                self._version = version
            except BaseException:
                self._version.keys.remove(np.array(self._offsets.undo(), np.int64))
                # The placement may be half written: answer exactly until the rebuild, now due.
                restored = batch.rollback_on_error(self._version)
                self._version = self._placement.without_segments(restored)
                raise
            self._applied += len(labels)
            self._ignored += len(records) - len(labels)
            self._wake()
            return len(labels)

    @override
    def live_items(self) -> LiveItems:
        version, table = self._version, self._version.table
        rows = table.live_rows(version.used, version.seq)
        facts = table.facts.take(rows, axis=0)
        ids = version.names[facts[:, 0]].tolist()
        return LiveItems.of(ids, table.gather(rows), facts[:, 1])

    @override
    def end_tombstones(self, kept_us: int, limit: int = 4_096) -> int:
        """As `Index.end_tombstones`. An ended delete leaves by a call `READERS_S` later."""
        with self._lock:
            now_s, ended = self._clock_s(), 0
            while self._leaving and self._leaving[0][0] <= now_s - READERS_S:
                ended += self._free(self._leaving.popleft()[1])
            marks = self._version.watermarks.values()
            before_us = max((mark.written_us for mark in marks), default=0) - kept_us
            due = self._tombstones.take(before_us, limit)
            if len(due):
                self._leaving.append((now_s, due))
            return ended

    def _free(self, rows: Ints) -> int:
        """Free the labels of those deletes that are still their item's newest record."""
        labels = rows[:, LABEL]
        rows = rows[self._offsets.offsets[labels] == rows[:, OFFSET]]
        labels = rows[:, LABEL]
        self._tombstones.end(rows)
        self._offsets.free(labels.tolist())
        version = self._version
        inside = labels[labels < len(version.row_of)]
        version.row_of[inside], version.names[inside] = -1, None
        version.keys.remove(inside)
        return len(labels)

    def _below_floors(self, records: Sequence[ItemRecord]) -> set[int]:
        """Positions of records of unknown items that are older than an ended delete."""
        if not self._tombstones.floors:
            return set()
        known, is_below = self._version.label_of, self._tombstones.is_below
        return {
            at
            for at, record in enumerate(records)
            if record.item_id not in known and is_below(record.partition, record.offset)
        }

    def contents(self) -> Contents:
        """All that the index holds now, for a snapshot. Takes the write lock briefly."""
        with self._lock:
            version, offsets = self._version, self._offsets.offsets.copy()
            kept = [*self._tombstones.rows(), *(rows for _, rows in self._leaving)]
            floors = dict(self._tombstones.floors)
        return restore.export_state(version, offsets, kept, floors)

    def restore(self, contents: Contents) -> None:
        """Load the contents of a snapshot; queries are exact until the main segment is built.

        Raises ValueError if the index is not empty or has another dimension.
        """
        with self._lock:
            if self._version.ids or contents.vectors.shape[1] != self.dimension:
                raise ValueError("only an empty index of the same dimension can be restored")
            self._version, offsets, tombstones = restore.import_state(self._version, contents)
            self._offsets = ItemOffsets(self._version.ids, self._version.label_of, offsets)
            self._tombstones.add(tombstones)
            self._tombstones.floors = dict(contents.floors)
            self._placement.grow(len(self._version.row_of))
            self._wake()

    # ------------------------------------------------------------------ building

    def rebuild(self) -> bool:
        """Rebuild the main segment on the calling thread, due or not; False on failure."""
        return self._rebuilder.run_now()

    def flush(self) -> bool:
        """Build a small segment of the fresh items on the calling thread; False on failure."""
        return self._flusher.run_now()

    def request_rebuild(self) -> None:
        """Have the main segment rebuilt in the background, due or not. Returns at once."""
        with self._lock:
            self._rebuilder.request()

    def begin(self) -> None:
        """Build in the background from now on, after `background` was False."""
        with self._lock:
            self.background = True
            self._wake()

    @override
    def close(self) -> None:
        """Stop guard and builds. Queries and writes continue."""
        if self.guard is not None:
            self.guard.close()
        self._rebuilder.close()
        self._flusher.close()

    def _wake(self) -> None:
        if self.background and self._due():
            self._rebuilder.wake()
            if self._flush_due():
                self._flusher.wake()

    def _due(self) -> bool:
        version = self._version
        if version.live <= self._exact_below:
            return bool(version.segments) and version.live < DROP_SHARE * self._exact_below
        changed = max(version.outside_main, version.stale)
        return not version.segments or changed > self._fresh_max

    def _flush_due(self) -> bool:
        version = self._version
        enabled = self._flush_above > 0 and bool(version.segments)
        return enabled and version.fresh_count > self._flush_above

    def _rebuild_in_turn(self, stop: threading.Event) -> None:
        with self.turn(stop):
            if not stop.is_set():
                self._rebuild(stop)

    def _rebuild(self, stop: threading.Event) -> None:
        with self._lock:
            version = self._version
            if version.live <= self._exact_below:
                self._version = self._placement.without_segments(version)
                return
            labels = np.flatnonzero(version.table.died_at[version.row_of] > version.seq)
            rows = version.row_of[labels]
        # Rows never change, so this copy needs no lock.
        table = version.table
        built = BuildInput(labels, table.gather(rows), table.offsets[rows])
        index = self._build(built, stop)
        if index is None:
            return
        with self._lock:
            version = self._version
            replaced = [segment.number for segment in version.segments[:1]]
            self._version = self._placement.adopt(version, index, built, replaced, main=True)

    def _build(self, built: BuildInput, stop: threading.Event) -> AnnIndex | None:
        numbers = np.arange(len(built.labels))
        return run_niced(lambda: self._backend.build(numbers, built.vectors, stop))

    def _flush(self, stop: threading.Event) -> None:
        with self._lock:
            version = self._version
            if not version.segments:
                return
            merged = merge_policy.segments_to_merge(version, self._placement)
            built = self._placement.flush_input(version, merged)
        if not len(built.labels):
            return
        index = self._build(built, stop)
        if index is None:
            return
        with self._lock:
            version = self._version
            if version.segments:  # they may have been dropped meanwhile
                self._version = self._placement.adopt(version, index, built, merged, main=False)


def _tombstones_of(changes: Changes) -> Ints:
    """Rows for `Tombstones` of the deletes of a batch."""
    stamps = changes.retired_stamps
    return np.column_stack((changes.retired, stamps[:, 3], stamps[:, 0], stamps[:, 2]))
