"""Effects of clicks on item slots, written a moment after the clicks are applied to the users."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar, Protocol, TypeVar

from typing_extensions import override

from eddyline.schema.partitioning import item_slots
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import Fence, Source, StateStore
from streams.fences import PartitionFences
from streams.write_behind import WriteBehind

# Item slots may lag by this much; query workers read the popular list less often than this.
WAIT_S = 0.25


class _Pending(Protocol):
    """Effects of one partition.

    last: all effects up to this fence are in here
    done: item slot -> the offset up to which it has its effects already
    """

    since_s: float
    last: Fence
    done: dict[str, int]


_P = TypeVar("_P", bound=_Pending)


class ItemSlotWrites(WriteBehind[_P]):
    """Pending effects by partition: one write to each item slot, behind a fence of its own.

    source_name: of the fences
    """

    source_name: ClassVar[str]

    def __init__(
        self,
        settings: Settings,
        store: StateStore,
        fences: PartitionFences,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(fences, WAIT_S, clock_s)
        self._settings = settings
        self._store = store
        self._item_slots = item_slots(settings.item_slots)

    @override
    def write(self, partition: int) -> None:
        pending = self._pending.get(partition)
        if pending is None:
            return
        source = self._source(partition)
        for slot in self._item_slots:
            if pending.done[slot] < pending.last.offset:
                self._write_slot(slot, source, self._fences.expected(source, slot), pending)
                self._fences.moved(source, slot, pending.last)
                pending.done[slot] = pending.last.offset
        del self._pending[partition]

    @abstractmethod
    def _write_slot(self, slot: str, source: Source, expected: Fence | None, pending: _P) -> None:
        """Write the effects on one slot, and its fence."""

    def _source(self, partition: int) -> Source:
        return Source(self.source_name, partition)

    def _done(self, partition: int) -> dict[str, int]:
        """Item slot -> the offset up to which it has its effects."""
        source = self._source(partition)
        return {slot: self._fences.done(source, slot) for slot in self._item_slots}
