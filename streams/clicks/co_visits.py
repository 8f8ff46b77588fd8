"""Co-visits: the items before a click in its user's list, added to the rows of both a moment later.

The older items of a click depend on the list just before it, so they cannot be computed again after
a crash. The write of the users keeps them in an outbox of the same slot (`stores.outbox`). The
visits of many batches are then appended together, one write to each item slot, behind a fence of
their own. When a partition is opened, visits of the outbox above the fence of an item slot are
pending again.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from typing_extensions import override

from eddyline.schema.co_visits import Visit
from eddyline.settings.loader import Settings
from eddyline.stores.fence import CO_VISITS
from eddyline.stores.state_store import Fence, Source, StateStore
from streams.clicks.co_visit_rows import NO_ROWS, SlotRows, rows_of
from streams.clicks.item_slot_writes import ItemSlotWrites
from streams.fences import PartitionFences

log = logging.getLogger(__name__)

# From so many pending visits of a partition on they are written before its next batch.
VISITS_MAX = 256
# A row is renewed no more often than this part of the time after which it ends.
RENEWED_PART = 16
# When each of so many rows was renewed is known; then all are forgotten.
RENEWED_MAX = 200_000


@dataclass(slots=True)
class _Visits:
    """The pending visits of one partition.

    last:   all visits up to this fence are in here
    done:   item slot -> the offset up to which its rows have them already
    visits: by offset; rows: of all slots, once the first of them is written
    """

    since_s: float
    last: Fence
    done: dict[str, int]
    visits: list[Visit] = field(default_factory=list)
    rows: dict[str, SlotRows] | None = None


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
        self._items = settings.kept_co_visit_items
        self._clock_s = clock_s
        # ("after" or "before", item id) of a row -> when it was renewed.
        self._renewed: dict[tuple[str, str], float] = {}

    @property
    def enabled(self) -> bool:
        """Whether rows are kept."""
        return self._items > 0

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
        if pending is not None and (len(pending.visits) >= VISITS_MAX or self._has_waited(pending)):
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
        if pending.rows is None:
            pending.rows = rows_of(pending.visits, pending.done, self._items)
        rows = pending.rows.get(slot, NO_ROWS)
        renewed = self._to_renew(rows)
        self._store.append_co_visits(
            slot,
            source,
            expected,
            pending.last,
            rows.after,
            rows.before,
            self._row_max,
            # So that a row which was renewed less than a part ago is not too early at its end.
            self._idle_ms + self._idle_ms // RENEWED_PART,
            renewed,
        )
        now_s = self._clock_s()
        if len(self._renewed) + len(renewed) > RENEWED_MAX:
            self._renewed.clear()
        self._renewed.update(dict.fromkeys(renewed, now_s))

    def _to_renew(self, rows: SlotRows) -> list[tuple[str, str]]:
        """The rows that were not renewed for long, or not by this process."""
        if not self._idle_ms:
            return []
        due_s = self._clock_s() - self._idle_ms / RENEWED_PART / 1_000
        every = [("after", item) for item in rows.after]
        every += [("before", item) for item in rows.before]
        renewed = self._renewed.get
        return [row for row in every if renewed(row, -math.inf) <= due_s]

    def _add(self, partition: int, last: Fence, visits: Sequence[Visit]) -> None:
        pending = self._pending.get(partition)
        if pending is None:
            pending = _Visits(self._clock_s(), last, self._done(partition))
            self._pending[partition] = pending
        lowest = min(pending.done.values())
        pending.visits += (visit for visit in visits if visit[0] > lowest)
        pending.rows = None
        pending.last = last
