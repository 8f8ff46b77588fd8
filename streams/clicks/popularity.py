"""How popular clicks make their items: counted in Redis, a moment after the clicks were applied.

Counts of small chunks wait a moment and go in one write to each item slot, behind a fence of their own: it
stays behind until then, so nothing is lost with the process, and nothing is counted twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from eddyline.kafka.topics import CLICKS
from eddyline.schema import user_history
from eddyline.schema.events import Click, Forget, Merge
from eddyline.schema.partitioning import item_slot
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import Fence, Source, StateStore
from streams.clicks.user_updates import is_moved
from streams.fences import PartitionFences
from streams.ports import Record

# Popularity may lag by this much; query workers read the popular list less often than this.
COUNT_S = 0.25
# So many events of a partition are not left waiting: their script takes 0.8 ms, where that of 1,024 took 2.
COUNTED_MAX = 256
Event = tuple[Record, Click | Merge | Forget]


@dataclass(slots=True)
class _Tally:
    """Events of one partition that wait to be counted.

    since_s: when the first of them came
    last:    all up to this fence are in here
    done:    item slot -> the offset up to which it has been counted already
    """

    since_s: float
    last: Fence | None = None
    done: dict[str, int] = field(default_factory=dict)
    counts: dict[str, dict[int, dict[str, int]]] = field(default_factory=dict)


class PopularityCounts:
    """The counts of all partitions. Thread rule: one thread, but for `due`.

    clock_s: only says when waiting counts are due; no effect depends on it
    """

    def __init__(
        self,
        settings: Settings,
        store: StateStore,
        positions: PartitionFences,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._store = store
        self._positions = positions
        self._clock_s = clock_s
        self._tallies: dict[int, _Tally] = {}
        # Far less than the window: the decisions of all that is still to be counted must be in it.
        self._behind_max = min(COUNTED_MAX, settings.dedupe_window_events // 2)
        self._item_slots = [f"i{shard}" for shard in range(settings.item_slots)]
        self._weights = settings.kind_weights
        self._dwell_ms_full = settings.dwell_ms_full

    def opened(self, partition: int) -> None:
        """Forget what was not counted yet: the partition is read again from its lowest fence."""
        self._tallies.pop(partition, None)

    def due(self) -> list[int]:
        """The partitions whose events have waited long enough to be counted. Any thread may ask."""
        now = self._clock_s()
        return [p for p, tally in list(self._tallies.items()) if now - tally.since_s >= COUNT_S]

    def waiting(self) -> list[int]:
        """The partitions that have events to be counted."""
        return list(self._tallies)

    def write(self, partition: int) -> None:
        """Count now what waits. Raises FenceMoved, StoreUnavailable."""
        if partition in self._tallies:
            self._write(Source(CLICKS, partition), self._tallies[partition])

    def add(self, source: Source, last: Fence, accepted: Sequence[Event]) -> None:
        """Add the events up to `last`; count once there is enough of it, or time to. Raises as `write`."""
        tally = self._tallies.get(source.partition)
        if tally is None:
            tally = self._tallies[source.partition] = _Tally(self._clock_s())
            for slot in self._item_slots:
                fence = self._positions.expected(source, slot)
                tally.done[slot] = -1 if fence is None else fence.offset
        shards, bucket_ms = self._settings.item_slots, self._settings.popular_bucket_s * 1_000
        for record, click in accepted:
            if not isinstance(click, Click):
                continue
            item_id = click.item_id
            slot = item_slot(item_id, shards) if shards > 1 else "i0"
            if record.offset > tally.done[slot] and (more := self._thousandths(click)):
                of_slot = tally.counts.setdefault(slot, {})
                bucket = click.at_ms // bucket_ms
                counted = of_slot.get(bucket)
                if counted is None:
                    counted = of_slot[bucket] = {}
                counted[item_id] = counted.get(item_id, 0) + more
        tally.last = last
        behind = last.offset - min(tally.done.values())
        if behind >= self._behind_max or self._clock_s() - tally.since_s >= COUNT_S:
            self._write(source, tally)

    def _thousandths(self, click: Click) -> int:
        """How much the event makes its item popular; nothing for a dislike, or where it counted before."""
        if is_moved(click):
            return 0
        return round(
            1_000 * user_history.strength(click, self._dwell_ms_full) * self._weights[click.kind]
        )

    def _write(self, source: Source, tally: _Tally) -> None:
        """One write to each item slot that has not got these events."""
        for slot in self._item_slots:
            if tally.last is None or tally.done[slot] >= tally.last.offset:
                continue
            expected, counts = self._positions.expected(source, slot), tally.counts.get(slot, {})
            limits = self._settings.popular_buckets, self._settings.popular_items_max
            self._store.count_clicks(slot, source, expected, tally.last, counts, *limits)
            self._positions.moved(source, slot, tally.last)
            tally.done[slot] = tally.last.offset
        del self._tallies[source.partition]
