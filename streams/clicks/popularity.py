"""Popularity: clicks are counted for their items, a moment after they are applied to the users.

An event counts twice: by its weight in a bucket of event time, and as one event in the sums that
decay by events (ADR 36). A dislike, an event moved by a merge and one that weighs 0 count in
neither.
The counts of small batches are written together, one write to each item slot, behind a fence of
their own. It stays behind until then, so no count is lost with the process, and none is written
twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from typing_extensions import override

from eddyline.kafka.topics import CLICKS
from eddyline.schema import events, user_history
from eddyline.schema.event_decay import decays
from eddyline.schema.events import Click, Forget, Merge
from eddyline.schema.partitioning import item_slot
from eddyline.schema.records import Record
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import Fence, Source, StateStore
from streams.clicks.item_slot_writes import ItemSlotWrites
from streams.fences import PartitionFences

# Above so many pending events of a partition the counts are written: their script takes 1.2 ms.
COUNTED_MAX = 256
Event = tuple[Record, Click | Merge | Forget]


@dataclass(slots=True)
class _Counts:
    """The pending counts of one partition.

    last: all events up to this fence are counted in here
    done: item slot -> the offset up to which its counts are written already
    milli_counts: item slot -> bucket -> item id -> thousandths of a click
    clicked: item slot -> the item of each event that counts there, by offset
    """

    since_s: float
    last: Fence
    done: dict[str, int]
    milli_counts: dict[str, dict[int, dict[str, int]]] = field(default_factory=dict)
    clicked: dict[str, list[str]] = field(default_factory=dict)


class PopularityCounts(ItemSlotWrites[_Counts]):
    """The pending counts of all partitions."""

    source_name = CLICKS

    def __init__(
        self,
        settings: Settings,
        store: StateStore,
        fences: PartitionFences,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(settings, store, fences, clock_s)
        # Far less than the window, which must hold the decisions of all events that are not counted
        # yet.
        self._behind_max = min(COUNTED_MAX, settings.dedupe_window_events // 2)
        self._weights = settings.kind_weights
        self._dwell_ms_full = settings.dwell_ms_full
        self._decays = decays(settings) if settings.keeps_event_sums else ()

    def write_below(self, partition: int, floor: int) -> None:
        """Write the pending counts of events below this offset, before their ids leave the window.

        Without its id, an event that is read again after a crash would not be counted. Raises as
        `write`.
        """
        pending = self._pending.get(partition)
        if pending is not None and min(pending.done.values()) + 1 < floor:
            self.write(partition)

    def add(self, partition: int, last: Fence, accepted: Sequence[Event]) -> None:
        """Add the events up to `last`; write once there are enough, or they are due.

        Raises as `write`.
        """
        pending = self._pending.get(partition)
        if pending is None:
            pending = _Counts(self._clock_s(), last, self._done(partition))
            self._pending[partition] = pending
        shards, bucket_ms = self._settings.item_slots, self._settings.popular_bucket_s * 1_000
        for record, click in accepted:
            if not isinstance(click, Click):
                continue
            item_id = click.item_id
            slot = item_slot(item_id, shards) if shards > 1 else "i0"
            if record.offset > pending.done[slot] and (more := self._milli_count(click)):
                of_slot = pending.milli_counts.setdefault(slot, {})
                bucket = click.at_ms // bucket_ms
                counts = of_slot.get(bucket)
                if counts is None:
                    counts = of_slot[bucket] = {}
                counts[item_id] = counts.get(item_id, 0) + more
                pending.clicked.setdefault(slot, []).append(item_id)
        pending.last = last
        behind = last.offset - min(pending.done.values())
        if behind >= self._behind_max or self._has_waited(pending):
            self.write(partition)

    def _milli_count(self, click: Click) -> int:
        """The event's weight in thousandths; 0 for a dislike and for a moved event."""
        if events.is_moved(click):
            return 0
        return round(
            1_000 * user_history.strength(click, self._dwell_ms_full) * self._weights[click.kind]
        )

    @override
    def _write_slot(
        self, slot: str, source: Source, expected: Fence | None, pending: _Counts
    ) -> None:
        self._store.count_clicks(
            slot,
            source,
            expected,
            pending.last,
            pending.milli_counts.get(slot, {}),
            self._settings.popular_buckets,
            self._settings.popular_items_max,
            pending.clicked.get(slot, ()),
            self._decays,
        )
