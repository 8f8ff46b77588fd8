"""Decayed clicks of the popular items, kept up to date bucket by bucket."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from heapq import nsmallest
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from eddyline.stores.state_store import PopularBucket

# After so long one bucket is read again whatever its version: an ingest process of an older version
# changes counts and no version.
REREAD_S = 10.0
# Buckets are read so many times deeper than the list is long, where dead items lead them.
DEPTH_SHARE_MAX = 16
# Names of items that left every bucket are dropped once so many of them are kept.
_UNUSED_MAX = 10_000


class _Counts(NamedTuple):
    """One bucket of one slot: row of each item in the table of names, thousandths of a click."""

    version: bytes
    rows: NDArray[np.int64]
    counts: NDArray[np.float64]


class _Totals(NamedTuple):
    """Sums by row of the table of names: decayed clicks, and whether a bucket has the item."""

    clicks: NDArray[np.float64]
    counted: NDArray[np.bool_]

    def resized(self, names: int) -> _Totals:
        """A copy with room for further names."""
        more = names - len(self.clicks)
        return _Totals(
            np.concatenate((self.clicks, np.zeros(more))),
            np.concatenate((self.counted, np.zeros(more, bool))),
        )


class ClickTotals:
    """The buckets of all slots as they were last read. Thread rule: one thread."""

    def __init__(self, *, bucket_s: int, half_life_s: int, limit: int) -> None:
        """A click loses half its weight every `half_life_s`, measured against the newest bucket,
        never against the local clock. limit: items of the list.
        """
        self._limit = limit
        # Items that are read of each bucket, most clicks first.
        self.depth = limit
        # Whether the last list has live items in the places of dead ones.
        self.replaces = False
        # Buckets that were read less deep.
        self._shallow: set[tuple[str, int]] = set()
        self._bucket_s = bucket_s
        self._half_life_s = half_life_s
        # (slot, bucket) -> its counts; the one that was read longest ago is first.
        self._held: dict[tuple[str, int], _Counts] = {}
        self._names: list[str] = []
        self._row_of: dict[bytes, int] = {}
        self._reread_at = time.monotonic() + REREAD_S
        self._ranked: list[tuple[str, float]] | None = []
        # The newest bucket, and the sums of all before it: clicks go into the newest one.
        self._newest = 0
        self._before_newest: _Totals | None = None
        # Of the last `scores`: its argument, and the place of each name in it, -1 for none.
        self._place_of: Mapping[str, int] = {}
        self._places: NDArray[np.int64] = np.zeros(0, np.int64)

    def known(self, slot: str) -> dict[int, bytes]:
        """Bucket -> version that is held; a bucket that is due to be read again is absent."""
        held = {
            bucket: kept.version
            for (of, bucket), kept in self._held.items()
            if of == slot and (of, bucket) not in self._shallow
        }
        oldest = next(iter(self._held), None)
        if oldest is not None and oldest[0] == slot and time.monotonic() >= self._reread_at:
            self._reread_at = time.monotonic() + REREAD_S
            held.pop(oldest[1], None)
        return held

    def update(self, slot: str, found: Mapping[int, PopularBucket]) -> None:
        """Take over what was read of one slot; buckets that are not in `found` are dropped."""
        for key in [k for k in self._held if k[0] == slot and k[1] not in found]:
            del self._held[key]
            self._shallow.discard(key)
            self._ranked = self._before_newest = None
        for bucket, read in found.items():
            if read.counted is not None:
                self._ranked = None
                if bucket < self._newest:
                    self._before_newest = None
                items, counts = read.counted
                rows = np.array(self._rows(items), np.int64)
                self._held.pop((slot, bucket), None)
                self._shallow.discard((slot, bucket))
                self._held[slot, bucket] = _Counts(read.version, rows, np.array(counts, float))
        if len(self._names) > _UNUSED_MAX + sum(len(kept.rows) for kept in self._held.values()):
            self._drop_unused_names()

    def _rows(self, items: Sequence[bytes]) -> list[int]:
        """The row of each of these distinct items; one that has none gets the next."""
        rows = [*map(self._row_of.get, items)]
        if None in rows:
            for at in [at for at, row in enumerate(rows) if row is None]:
                rows[at] = self._row_of[items[at]] = len(self._names)
                self._names.append(items[at].decode())
        return cast("list[int]", rows)

    def ranked(self) -> list[tuple[str, float]]:
        """(item id, decayed clicks), most first, equal ones by id; at most `limit`.

        Further reads are as deep as that.
        """
        self.depth, self.replaces = self._limit, False
        self._shallow.clear()
        return self._plain()

    def ranked_live(
        self, live_of: Callable[[Sequence[str]], Sequence[bool]], need: int
    ) -> list[tuple[str, float]]:
        """As `ranked`, but where fewer than `need` of those are live, further live items follow.

        They take the places of the last dead ones. A list with every clicked item stays the same,
        so a worker gives the answers of a coordinator, which does not call this.
        With too few in all buckets, further reads are deeper, up to `DEPTH_SHARE_MAX` times.
        live_of: which of these items are live
        """
        ranked, size = self._plain(), self._limit
        found = [pair for pair, live in zip(ranked, live_of(_ids(ranked)), strict=True) if live]
        if len(found) >= need:
            return self.ranked()
        self.replaces, sums = True, self._sums()
        counted = int(np.count_nonzero(sums.counted))
        while len(found) < need and size < counted:
            size *= 2
            pairs = self._top(sums, size)
            found = [pair for pair, live in zip(pairs, live_of(_ids(pairs)), strict=True) if live]
        cut = any(len(kept.rows) >= self.depth for kept in self._held.values())
        if len(found) < need and cut and self.depth < DEPTH_SHARE_MAX * self._limit:
            self.depth *= 2
            self._shallow = set(self._held)
        found = found[: self._limit]
        kept = set(found)
        dead = [pair for pair in ranked if pair not in kept]
        found += dead[: self._limit - len(found)]
        return sorted(found, key=lambda pair: (-pair[1], pair[0]))

    def scores(self, place_of: Mapping[str, int]) -> NDArray[np.float64]:
        """Decayed clicks of the items that `ranked` lists, by place; -inf for others.

        place_of: item id -> place, 0 … n − 1; must not change, as its places are kept
        """
        if place_of is not self._place_of:
            self._place_of, self._places = place_of, np.zeros(0, np.int64)
        if (known := len(self._places)) < len(self._names):
            more = [place_of.get(name, -1) for name in self._names[known:]]
            self._places = np.concatenate((self._places, np.array(more, np.int64)))
        sums = self._sums()
        rows = self._first_rows(sums, self._limit)
        # The last place collects the items that are not in `place_of`.
        found = np.full(len(place_of) + 1, -np.inf)
        found[self._places[rows]] = sums.clicks[rows]
        return found[:-1]

    def _first_rows(self, sums: _Totals, size: int) -> NDArray[np.int64]:
        """Rows of the `size` items with most clicks, equal ones by id; in any order."""
        rows = np.flatnonzero(sums.counted)
        if len(rows) <= size:
            return rows
        clicks, at = sums.clicks[rows], len(rows) - size
        cut = np.partition(clicks, at)[at]
        above, equal = rows[clicks > cut], rows[clicks == cut]
        if len(above) + len(equal) > size:
            names = self._names
            first = nsmallest(size - len(above), equal.tolist(), key=names.__getitem__)
            equal = np.array(first, np.int64)
        return np.concatenate((above, equal))

    def _plain(self) -> list[tuple[str, float]]:
        if self._ranked is None:
            self._ranked = self._top(self._sums(), self._limit)
        return self._ranked

    def _sums(self) -> _Totals:
        """The decayed clicks of every item."""
        newest = max((bucket for _, bucket in self._held), default=0)
        # In the order of the buckets: every worker adds in the same order and gets the same bits.
        # An item is in a bucket once, in its own slot.
        keys, before = sorted(self._held, key=lambda key: key[1]), self._before_newest
        first = bisect_left(keys, newest, key=lambda key: key[1])
        if before is None or newest != self._newest:
            before = _Totals(np.zeros(0), np.zeros(0, bool)).resized(len(self._names))
            self._add(before, keys[:first], newest)
            self._newest, self._before_newest = newest, before
        sums = before.resized(len(self._names))
        self._add(sums, keys[first:], newest)
        return sums

    def _top(self, sums: _Totals, size: int) -> list[tuple[str, float]]:
        """(item id, decayed clicks) of the first `size` items."""
        rows = self._first_rows(sums, size)
        rows = rows[np.argsort(-sums.clicks[rows])]
        clicks = sums.clicks[rows]
        pairs = [*zip(map(self._names.__getitem__, rows.tolist()), clicks.tolist(), strict=True)]
        for start, end in _equal_runs(clicks):
            pairs[start:end] = sorted(pairs[start:end])
        return pairs

    def _add(self, sums: _Totals, keys: Sequence[tuple[str, int]], newest: int) -> None:
        """Add these buckets to the sums."""
        for slot, bucket in keys:
            kept = self._held[slot, bucket]
            weight = 0.5 ** ((newest - bucket) * self._bucket_s / self._half_life_s) / 1000
            sums.clicks[kept.rows] += weight * kept.counts
            sums.counted[kept.rows] = True

    def _drop_unused_names(self) -> None:
        self._before_newest = None
        every = [kept.rows for kept in self._held.values()]
        used = np.unique(np.concatenate(every)) if every else np.zeros(0, np.int64)
        self._names = [self._names[row] for row in used.tolist()]
        self._row_of = {name.encode(): row for row, name in enumerate(self._names)}
        self._places = np.zeros(0, np.int64)
        self._held = {
            key: kept._replace(rows=np.searchsorted(used, kept.rows))
            for key, kept in self._held.items()
        }


def _ids(pairs: Sequence[tuple[str, float]]) -> list[str]:
    return [item_id for item_id, _ in pairs]


def _equal_runs(values: NDArray[np.float64]) -> Iterator[tuple[int, int]]:
    """(start, end) of each run of two or more equal values."""
    starts = np.flatnonzero(np.diff(values, prepend=np.nan))
    ends = np.append(starts[1:], len(values))
    longer = ends - starts > 1
    return zip(starts[longer].tolist(), ends[longer].tolist(), strict=True)
