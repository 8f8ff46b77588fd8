"""Popularity of `stores.memory`: buckets whose order is kept, and sums that decay by events."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import nlargest

from eddyline.schema.event_decay import EventDecay
from eddyline.stores.popularity import EventSums, PopularBucket, SlotTrend

# Buckets of popularity counts whose order is kept up to date, those that were read last.
SORTED_MAX = 16
Buckets = dict[int, dict[str, int]]


class BucketOrders:
    """Versions and orders of the buckets of all slots. Thread rule: one thread at a time."""

    def __init__(self) -> None:
        # (slot, bucket) -> number of its last write, and the number of the last write of all.
        self._bucket_writes: dict[tuple[str, int], int] = {}
        self._writes = 0
        # (slot, bucket) -> its (count, item id in UTF-8, of the same order), least first.
        self.sorted: OrderedDict[tuple[str, int], list[tuple[int, bytes]]] = OrderedDict()

    def clear(self) -> None:
        """Forget the orders; versions go on."""
        self.sorted.clear()

    def note(self, slot: str, buckets: Iterable[int]) -> None:
        """These buckets have changed."""
        self._writes += 1
        self._bucket_writes |= {(slot, bucket): self._writes for bucket in buckets}

    def count(
        self,
        slot: str,
        buckets: Buckets,
        counts: Mapping[int, Mapping[str, int]],
        kept: int,
        items_max: int,
    ) -> None:
        """Add counts to the buckets of a slot; see `StateStore.count_clicks`."""
        for bucket, items in counts.items():
            counted = buckets.setdefault(bucket, {})
            ranked = self.sorted.get((slot, bucket))
            for item_id, milli_counts in items.items():
                before = counted.get(item_id, 0)
                counted[item_id] = before + milli_counts
                if ranked is not None:
                    encoded = item_id.encode()
                    if before:
                        del ranked[bisect_left(ranked, (before, encoded))]
                    insort(ranked, (before + milli_counts, encoded))
            if len(counted) > items_max:
                self.sorted.pop((slot, bucket), None)
                least = sorted(counted, key=lambda i: (counted[i], i))
                for item_id in least[: len(counted) - items_max]:
                    del counted[item_id]
        for bucket in [b for b in buckets if b <= max(buckets) - kept]:
            del buckets[bucket]
            self.sorted.pop((slot, bucket), None)
        self.note(slot, counts)

    def read(
        self, slot: str, buckets: Buckets, limit: int, known: Mapping[int, bytes]
    ) -> dict[int, PopularBucket]:
        """See `StateStore.popular_buckets`."""
        found = {}
        for bucket, counts in buckets.items():
            version = b"%d" % self._bucket_writes.get((slot, bucket), 0)
            if known.get(bucket) == version:
                found[bucket] = PopularBucket(version)
                continue
            pairs = self._ranked(slot, bucket, counts)[: -limit - 1 : -1]
            items = [item for _, item in pairs]
            found[bucket] = PopularBucket(version, (items, [n for n, _ in pairs]))
        return found

    def _ranked(self, slot: str, bucket: int, counts: Mapping[str, int]) -> list[tuple[int, bytes]]:
        """(count, item id) of a bucket, least first. Sorted once; later counts find their place."""
        key = slot, bucket
        if key not in self.sorted:
            self.sorted[key] = sorted((n, item.encode()) for item, n in counts.items())
        self.sorted.move_to_end(key)
        if len(self.sorted) > SORTED_MAX:
            self.sorted.popitem(last=False)
        return self.sorted[key]


@dataclass
class MemoryTrend:
    """Sums of one slot that decay by events.

    events:  that were counted; written: half-life -> that number at its last write
    sums:    "half-life:0 or 1" -> UTF-8 of item id -> sum, of epochs with an even or odd number
    """

    events: int = 0
    written: dict[int, int] = field(default_factory=dict)
    sums: dict[str, dict[bytes, float]] = field(default_factory=dict)

    def count(self, clicked: Sequence[str], decays: Sequence[EventDecay], items_max: int) -> None:
        """Add one event for each item; see `StateStore.count_clicks`. Neither may be empty."""
        items, after = [item.encode() for item in clicked], self.events + len(clicked)
        for decay in dict.fromkeys(decays):
            name = decay.half_life_events
            last = self.written.get(name)
            epoch = None if last is None else decay.epoch(last - 1)
            for number, item in enumerate(items, self.events):
                now = decay.epoch(number)
                if now != epoch:
                    self.sums[f"{name}:{now % 2}"] = {}
                    if epoch != now - 1:
                        self.sums[f"{name}:{(now + 1) % 2}"] = {}
                    epoch = now
                sums = self.sums[f"{name}:{now % 2}"]
                sums[item] = sums.get(item, 0.0) + decay.weight(number)
            for parity in (0, 1):
                sums = self.sums[f"{name}:{parity}"]
                if len(sums) > items_max:
                    least = sorted(sums, key=lambda i: (sums[i], i))
                    for item in least[: len(sums) - items_max]:
                        del sums[item]
            self.written[name] = after
        slowest = max(decay.epoch_events for decay in decays)
        slots, ours = decays[0].item_slots, {decay.half_life_events for decay in decays}
        for name in self.written.keys() - ours:
            end = min(slowest, EventDecay(name, slots).epoch_events)
            if after - self.written[name] >= end:
                del self.written[name], self.sums[f"{name}:0"], self.sums[f"{name}:1"]
        self.events = after

    def read(self, decays: Sequence[EventDecay], limit: int, known: SlotTrend) -> SlotTrend:
        """See `StateStore.popular_trend`."""
        if self.events == known.events:
            return known
        parts = []
        for decay in dict.fromkeys(decays):
            if last := self.written.get(decay.half_life_events):
                epoch = decay.epoch(last - 1)
                for one in (epoch, epoch - 1) if epoch else (epoch,):
                    sums = self.sums[f"{decay.half_life_events}:{one % 2}"]
                    parts.append(EventSums(decay, one, *_top(sums, limit)))
        return SlotTrend(self.events, tuple(parts))


def _top(sums: Mapping[bytes, float], limit: int) -> tuple[list[bytes], list[float]]:
    """(items, sums) of the largest sums."""
    if len(sums) <= limit:
        return [*sums], [*sums.values()]
    pairs = nlargest(limit, ((total, item) for item, total in sums.items()))
    return [item for _, item in pairs], [total for total, _ in pairs]
