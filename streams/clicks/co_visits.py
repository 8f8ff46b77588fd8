"""Co-visits: the items before a click in its user's list, added to the rows of both a moment later.

The older items of a click depend on the list just before it, so they cannot be computed again after
a crash. The write of the users keeps them in an outbox of the same slot (`stores.outbox`). The
visits of many batches are then appended together, one write to each item slot, behind a fence of
their own. When a partition is opened, visits of the outbox above the fence of an item slot are
pending again.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from typing_extensions import override

from eddyline.schema import co_visits
from eddyline.schema.co_visits import Visit
from eddyline.schema.item_key import key_bytes
from eddyline.schema.partitioning import item_slot
from eddyline.settings.loader import Settings
from eddyline.stores.fence import CO_VISITS
from eddyline.stores.state_store import Fence, Source, StateStore
from streams.clicks.item_slot_writes import ItemSlotWrites
from streams.fences import PartitionFences

log = logging.getLogger(__name__)

# From so many pending visits of a partition on they are written before its next batch.
VISITS_MAX = 128


@dataclass(slots=True)
class _Rows:
    """What is appended to the rows of one item slot: item id -> entries."""

    after: defaultdict[str, list[bytes]] = field(default_factory=lambda: defaultdict(list))
    before: defaultdict[str, list[bytes]] = field(default_factory=lambda: defaultdict(list))


@dataclass(slots=True)
class _Visits:
    """The pending visits of one partition.

    last:  all visits up to this fence are in here
    done:  item slot -> the offset up to which its rows have them already
    count: visits in here
    rows:  by item slot
    """

    since_s: float
    last: Fence
    done: dict[str, int]
    count: int = 0
    rows: defaultdict[str, _Rows] = field(default_factory=lambda: defaultdict(_Rows))


class CoVisitWriter(ItemSlotWrites[_Visits]):
    """The pending visits of all partitions.

    lost: offsets of clicks whose visits were lost: an item slot went back further than the outbox
    """

    source_name = CO_VISITS

    def __init__(
        self,
        settings: Settings,
        store: StateStore,
        fences: PartitionFences,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(settings, store, fences, clock_s)
        self.lost = 0
        self._floors: dict[int, int] = {}
        self._row_max = settings.co_visit_row_max
        self._idle_ms = 1_000 * settings.co_visit_idle_s_max
        # What follows the key in an entry, by distance from 1 on.
        self._tails = [
            co_visits.entries([(0, round(1_000 / distance), int(distance == 1))])[-8:]
            for distance in range(1, settings.kept_co_visit_items + 1)
        ]

    @property
    def enabled(self) -> bool:
        """Whether rows are kept."""
        return bool(self._tails)

    def floor(self, partition: int) -> int:
        """Visits below this offset may leave the outbox.

        They are in every item slot, and stay there where the store loses its last writes: the write
        after them has found their fence. If the last write alone is lost, the fence of the user
        slot does not show it.
        """
        return self._floors.get(partition, 0)

    def restore(
        self, partition: int, fence: Fence | None, visits: Sequence[Visit], floor: int
    ) -> None:
        """Start again from the outbox. fence: of the user slot; visits, floor: see `SlotRead`."""
        before = self._pending.pop(partition, None)
        self._floors[partition] = floor
        if not self.enabled or fence is None:
            return
        done = self._done(partition)
        for slot, offset in done.items():
            if floor > offset + 1:
                self.lost += floor - 1 - offset
                log.warning(
                    "co-visits are lost: the item slot went back further than the outbox reaches",
                    extra={
                        "partition": partition,
                        "slot": slot,
                        "from": offset + 1,
                        "to": floor - 1,
                    },
                )
        if min(done.values()) < fence.offset:
            self._add(partition, fence, visits)
            if before is not None:
                self._pending[partition].since_s = before.since_s

    def add(self, partition: int, last: Fence, visits: Sequence[Visit]) -> None:
        """Add the visits up to `last`, which the outbox has."""
        if self.enabled:
            self._add(partition, last, visits)

    def write_due(self, partition: int) -> None:
        """Write where many visits are pending, or have been for long. Raises as `write`.

        Called before the users are written, so the outbox is limited, whatever becomes of the item
        slots.
        """
        pending = self._pending.get(partition)
        if pending is not None and (pending.count >= VISITS_MAX or self._has_waited(pending)):
            self.write(partition)

    @override
    def write(self, partition: int) -> None:
        pending = self._pending.get(partition)
        if pending is not None:
            floor = min(pending.done.values()) + 1
            super().write(partition)
            self._floors[partition] = max(self.floor(partition), floor)

    @override
    def _write_slot(
        self, slot: str, source: Source, expected: Fence | None, pending: _Visits
    ) -> None:
        rows = pending.rows[slot]
        self._store.append_co_visits(
            slot,
            source,
            expected,
            pending.last,
            {item: b"".join(parts) for item, parts in rows.after.items()},
            {item: b"".join(parts) for item, parts in rows.before.items()},
            self._row_max,
            self._idle_ms,
        )
        del pending.rows[slot]

    def _add(self, partition: int, last: Fence, visits: Sequence[Visit]) -> None:
        pending = self._pending.get(partition)
        if pending is None:
            pending = _Visits(self._clock_s(), last, self._done(partition))
            self._pending[partition] = pending
        lowest = min(pending.done.values())
        for visit in visits:
            if visit[0] > lowest:
                pending.count += 1
                self._add_visit(pending, visit)
        pending.last = last

    def _add_visit(self, pending: _Visits, visit: Visit) -> None:
        offset, item_id, older = visit
        key, slots, done = key_bytes(item_id), self._item_slots, pending.done
        one = pending.rows[slots[0]] if len(slots) == 1 else None
        before = list[bytes]()
        for other, tail in zip(older, self._tails, strict=False):
            if other == item_id:
                continue
            before.append(key_bytes(other) + tail)
            if one is not None:
                one.after[other].append(key + tail)
            elif offset > done[slot := item_slot(other, len(slots))]:
                pending.rows[slot].after[other].append(key + tail)
        slot = item_slot(item_id, len(slots))
        if before and offset > done[slot]:
            pending.rows[slot].before[item_id] += before
