"""Decayed clicks of the popular items, kept up to date bucket by bucket."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from eddyline.stores.popularity import PopularBucket
from serving.recall.item_sums import ItemNames, ItemSums

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
        self._names = ItemNames()
        self._reread_at = time.monotonic() + REREAD_S
        self._ranked: list[tuple[str, float]] | None = []
        # The newest bucket, and the sums of all before it: clicks go into the newest one.
        self._newest = 0
        self._before_newest: ItemSums | None = None

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
                rows = self._names.rows(items)
                self._held.pop((slot, bucket), None)
                self._shallow.discard((slot, bucket))
                self._held[slot, bucket] = _Counts(read.version, rows, np.array(counts, float))
        if len(self._names) > _UNUSED_MAX + sum(len(kept.rows) for kept in self._held.values()):
            self._drop_unused_names()

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
            pairs = self._names.top(sums, size)
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
        return self._names.by_place(self._sums(), self._limit, place_of)

    def _plain(self) -> list[tuple[str, float]]:
        if self._ranked is None:
            self._ranked = self._names.top(self._sums(), self._limit)
        return self._ranked

    def _sums(self) -> ItemSums:
        """The decayed clicks of every item."""
        newest = max((bucket for _, bucket in self._held), default=0)
        # In the order of the buckets: every worker adds in the same order and gets the same bits.
        # An item is in a bucket once, in its own slot.
        keys, before = sorted(self._held, key=lambda key: key[1]), self._before_newest
        first = bisect_left(keys, newest, key=lambda key: key[1])
        if before is None or newest != self._newest:
            before = ItemSums.zero(len(self._names))
            self._add(before, keys[:first], newest)
            self._newest, self._before_newest = newest, before
        sums = before.resized(len(self._names))
        self._add(sums, keys[first:], newest)
        return sums

    def _add(self, sums: ItemSums, keys: Sequence[tuple[str, int]], newest: int) -> None:
        """Add these buckets to the sums."""
        for slot, bucket in keys:
            kept = self._held[slot, bucket]
            weight = 0.5 ** ((newest - bucket) * self._bucket_s / self._half_life_s) / 1000
            sums.add(kept.rows, weight * kept.counts)

    def _drop_unused_names(self) -> None:
        self._before_newest = None
        used = self._names.keep([kept.rows for kept in self._held.values()])
        self._held = {
            key: kept._replace(rows=np.searchsorted(used, kept.rows))
            for key, kept in self._held.items()
        }


def _ids(pairs: Sequence[tuple[str, float]]) -> list[str]:
    return [item_id for item_id, _ in pairs]
