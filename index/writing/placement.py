"""The writer's record of where each item's entry is: in a segment or in the fresh buffer.

An item moves to the fresh buffer if it is new, or if it has turned further than the gate since its
segment was built; after a smaller turn its entry stays in the segment. A retired item has no entry,
and is fresh when it comes back.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from index.arrays import Ints, Vector
from index.backends.base import AnnIndex
from index.storage.index_version import IndexVersion
from index.storage.segments import FreshBuffer, Segment
from index.storage.vector_table import CAPACITY_MIN

# An item that turned by less since its segment was built is still found through its old position:
# measured recall never fell below that of a fresh build.
GATE_COSINE = math.cos(math.radians(8.0))

# Values of `Placement.home`; segment numbers start at the last one.
NOWHERE, FRESH, FIRST_SEGMENT = 0, 1, 2


class BuildInput(NamedTuple):
    """What a segment is built from.

    labels (n,), ascending; vectors (n, d) and offsets (n,) of these items at that moment
    """

    labels: Ints
    vectors: Vector
    offsets: Ints


@dataclass(slots=True)
class SegmentEntries:
    """What only the writer knows of one segment.

    labels:   entry -> label; live: number of live entries
    drift_at: entry -> its place in `drifted`, the vectors that entries were built with and no
              longer have; -1 if the entry's row still has it. drifts: places of `drifted` in use
    """

    labels: Ints
    live: int
    drift_at: Ints
    drifted: Vector
    drifts: int = 0

    def built_vectors(self, version: IndexVersion, segment: Segment, entries: Ints) -> Vector:
        """float32 (n, d): the vectors that these live entries were built with."""
        at = self.drift_at[entries]
        drifted = at >= 0
        if not drifted.any():
            return version.table.gather(segment.rows[entries])
        vectors = self.drifted[at]
        vectors[~drifted] = version.table.gather(segment.rows[entries[~drifted]])
        return vectors

    def keep_built(self, entries: Ints, built: Vector, current: Vector) -> None:
        """Keep the built vectors of those entries that turn for the first time."""
        first = (self.drift_at[entries] < 0).nonzero()[0]
        if not len(first):
            return
        built = built[first]
        turned = (built != current[first]).any(axis=1)
        entries, built = entries[first[turned]], built[turned]
        n = len(entries)
        if not n:
            return
        end = self.drifts + n
        if end > len(self.drifted):
            room = np.empty((max(CAPACITY_MIN, end), self.drifted.shape[1]), np.float32)
            self.drifted = np.concatenate((self.drifted, room))
        self.drift_at[entries] = np.arange(self.drifts, end)
        self.drifted[self.drifts : end] = built
        self.drifts = end


class Placement:
    """Where the entry of each item is. Thread rule: under the write lock.

    home:     label -> NOWHERE (not live, or no segment exists), FRESH, or a segment number
    entry:    label -> its entry there
    segments: segment number -> its entries
    """

    def __init__(self) -> None:
        self.home: Ints = np.full(CAPACITY_MIN, NOWHERE)
        self.entry: Ints = np.zeros(CAPACITY_MIN, np.int64)
        self.segments: dict[int, SegmentEntries] = {}
        self._next_number = FIRST_SEGMENT

    def grow(self, labels: int) -> None:
        """Resize to this many labels, as `row_of`; a failed batch may have left more."""
        kept, more = self.home[:labels], labels - min(labels, len(self.home))
        self.home = np.concatenate((kept, np.full(more, NOWHERE)))
        self.entry = np.concatenate((self.entry[:labels], np.zeros(more, np.int64)))

    def reserve(self, version: IndexVersion, more: int) -> IndexVersion:
        """The version with room for `more` fresh entries; a full buffer becomes a copy."""
        fresh = version.fresh
        if not version.segments or fresh.has_room(version.fresh_count, more):
            return version
        rows = fresh.rows[: version.fresh_count]
        kept = np.flatnonzero(version.table.died_at[rows] > version.seq)
        n = len(kept)
        rows = rows[kept]
        self.entry[version.table.labels[rows]] = np.arange(n)
        copy = FreshBuffer.of(max(CAPACITY_MIN, 2 * (n + more)), fresh.vectors[kept], rows)
        return version._replace(fresh=copy, fresh_count=n)

    def renumber_rows(self, version: IndexVersion, new_row: Ints) -> IndexVersion:
        """The version with renumbered rows of all entries. new_row: old row -> new row, or -1."""
        return version._replace(
            segments=tuple(replace(s, rows=new_row[s.rows]) for s in version.segments),
            fresh=FreshBuffer(version.fresh.vectors, new_row[version.fresh.rows]),
        )

    def place(self, version: IndexVersion, labels: Ints, vectors: Vector, rows: Ints) -> int:
        """Point the entries of these labels to new rows, written already.

        vectors (n, d), rows (n,): of the labels. Returns the new count of the fresh buffer.
        """
        home = self.home[labels]
        moving = np.ones(len(labels), bool)
        for segment in version.segments:
            here = (home == segment.number).nonzero()[0]
            if len(here):
                mine, entries = self.segments[segment.number], self.entry[labels[here]]
                built, current = mine.built_vectors(version, segment, entries), vectors[here]
                close = np.einsum("ij,ij->i", built, current) >= GATE_COSINE
                left = len(close) - int(np.count_nonzero(close))
                if left:
                    mine.live -= left
                    here, entries = here[close], entries[close]
                    built, current = built[close], current[close]
                mine.keep_built(entries, built, current)
                segment.rows[entries] = rows[here]
                moving[here] = False
        fresh, count = version.fresh, version.fresh_count
        in_fresh = (home == FRESH).nonzero()[0]
        if len(in_fresh):
            entries = self.entry[labels[in_fresh]]
            same = (fresh.vectors[entries] == vectors[in_fresh]).all(axis=1)
            fresh.rows[entries[same]] = rows[in_fresh[same]]
            moving[in_fresh[same]] = False
        at = moving.nonzero()[0]
        end = count + len(at)
        if len(at):
            fresh.vectors[count:end] = vectors[at]
            fresh.rows[count:end] = rows[at]
            self.home[labels[at]] = FRESH
            self.entry[labels[at]] = np.arange(count, end)
        return end

    def remove(self, labels: Ints) -> None:
        """Drop the entries of retired labels."""
        home = self.home[labels]
        for number, entries in self.segments.items():
            entries.live -= int(np.count_nonzero(home == number))
        self.home[labels] = NOWHERE

    def live_entries(self, version: IndexVersion) -> tuple[int, ...]:
        """Number of live entries of each segment."""
        return tuple(self.segments[segment.number].live for segment in version.segments)

    def flush_input(self, version: IndexVersion, merged: Collection[int]) -> BuildInput:
        """Input of a small segment: the fresh items and those of the segments that it takes in."""
        labels = np.flatnonzero(np.isin(self.home, [FRESH, *merged]))
        rows = version.row_of[labels]
        return BuildInput(labels, version.table.gather(rows), version.table.offsets[rows])

    def without_segments(self, version: IndexVersion) -> IndexVersion:
        """The version with the table alone, so every query is an exact scan."""
        self.grow(len(version.row_of))
        self.home[:] = NOWHERE
        self.segments.clear()
        fresh = FreshBuffer.of(1, version.table.own[:0], version.row_of[:0])
        return version._replace(segments=(), live_entries=(), fresh=fresh, fresh_count=0)

    def adopt(
        self,
        version: IndexVersion,
        index: AnnIndex,
        built: BuildInput,
        replaced: Collection[int],
        *,
        main: bool,
    ) -> IndexVersion:
        """The version with a new segment; items that no segment holds afterwards are fresh.

        replaced: numbers of the segments that go
        main:     a main segment takes every item of its input that has turned little since; a small
                  one takes only those of the fresh buffer and of the replaced segments
        """
        number, labels = self._next_number, built.labels
        alive = version.table.died_at[version.row_of] > version.seq
        home = np.where(np.isin(self.home, list(replaced)), NOWHERE, self.home)
        takes = alive[labels] & (main | (home[labels] <= FRESH))
        rows = np.where(takes, version.row_of[labels], -1)
        changed = np.flatnonzero((rows >= 0) & (version.table.offsets[rows] != built.offsets))
        current, before = version.table.gather(rows[changed]), built.vectors[changed]
        close = np.einsum("ij,ij->i", current, before) >= GATE_COSINE
        rows[changed[~close]] = -1
        taken = np.flatnonzero(rows >= 0)
        new = SegmentEntries(
            labels, len(taken), np.full(len(labels), -1), np.empty_like(built.vectors[:0])
        )
        new.keep_built(changed[close], before[close], current[close])
        home[labels[taken]] = number
        kept = [
            self._without_moved(segment, home)
            for segment in version.segments
            if segment.number not in replaced
        ]
        if main:
            kept = [(segment, entries) for segment, entries in kept if entries.live]
        at = 0 if main else len(kept)
        kept.insert(at, (Segment(number, index, rows), new))
        left = np.flatnonzero(alive & (home <= FRESH))
        home[~alive], home[left] = NOWHERE, FRESH
        entry = self.entry.copy()
        entry[labels[taken]], entry[left] = taken, np.arange(len(left))
        left_rows = version.row_of[left]
        vectors = version.table.gather(left_rows)
        fresh = FreshBuffer.of(max(CAPACITY_MIN, 2 * len(left)), vectors, left_rows)
        # Nothing has changed so far, so an error above leaves everything as it was.
        self._next_number, self.home, self.entry = number + 1, home, entry
        self.segments = {segment.number: entries for segment, entries in kept}
        segments = tuple(segment for segment, _ in kept)
        version = version._replace(segments=segments, fresh=fresh, fresh_count=len(left))
        return version._replace(live_entries=self.live_entries(version))

    def _without_moved(self, segment: Segment, home: Ints) -> tuple[Segment, SegmentEntries]:
        """The segment without the entries of labels that the new one took."""
        entries = self.segments[segment.number]
        stays = home[entries.labels] == segment.number
        live = int(np.count_nonzero(stays))
        if live == entries.live:
            return segment, entries
        # A copy: readers of older versions keep the original.
        rows = np.where(stays, segment.rows, -1)
        return replace(segment, rows=rows), replace(entries, live=live)
