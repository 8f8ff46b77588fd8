"""Cards of published items, and the fences that say so: written a moment after the records were published.

Chunks of changes come with a record or two, and their two scripts in Redis cost as much as publishing them.
So cards and fences wait for those of more chunks. Until then both fences stay behind: nothing is lost with
the process, and what is published again by the next one does no harm.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from eddyline.errors import FenceMoved, Unavailable
from eddyline.kafka.topics import ITEMS
from eddyline.schema import events
from eddyline.schema.events import Item
from eddyline.schema.partitioning import item_slot
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import Fence, ItemMetadata, ItemMetadataWrite, Source, StateStore
from streams.fences import PartitionFences
from streams.ports import Record

# Fences may stay behind by this much: so much is published once more after a crash.
METADATA_WAIT_S = 0.1
# So many changed items of a partition are not left waiting.
METADATA_BATCH_MAX = 256
# The fence of what has been published for a generation lies in this item slot, however many there are.
PUBLISHED_SLOT = "i0"


@dataclass(frozen=True, slots=True)
class ItemChange:
    """The last change of one item in a chunk. item: None where it is deleted."""

    record: Record
    at_ms: int
    item: Item | None

    @property
    def offset(self) -> int:
        """The item's version."""
        return self.record.offset


@dataclass(slots=True)
class _Tally:
    """Changes of one partition, up to the fence `last`, that wait to be written. since_s: the first did."""

    since_s: float
    last: Fence
    changes: dict[str, ItemChange] = field(default_factory=dict)


class ItemMetadataWriter:
    """The cards and fences of all partitions. Thread rule: one thread, but for `due`.

    wait_s:  how long they wait for more, 0 for not at all
    clock_s: only says when they are due; no effect depends on it
    """

    def __init__(
        self,
        settings: Settings,
        generation: str,
        store: StateStore,
        positions: PartitionFences,
        wait_s: float,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._generation = generation
        self._store = store
        self._positions = positions
        self._wait_s = wait_s
        self._clock_s = clock_s
        self._tallies: dict[int, _Tally] = {}
        self._unproven: dict[int, int] = {}

    def opened(self, partition: int) -> None:
        """Forget what was not written yet: the partition is read again from its lowest fence."""
        self._tallies.pop(partition, None)

    def publishing(self, partition: int, first: int) -> None:
        """Records of changes from the offset `first` on are about to be published."""
        self._unproven[partition] = min(first, self._unproven.get(partition, first))

    def unconfirmed(self, partition: int) -> int | None:
        """From which offset on records were published since a fence of this process was last written.

        Until the next one is, another process may have moved the fence over them: it published before us, and
        froze. Then its records lie in front of ours, newer in front of older, and all of ours are due again.
        """
        return self._unproven.get(partition)

    def due(self) -> list[int]:
        """The partitions whose cards have waited long enough. Any thread may ask."""
        now = self._clock_s()
        return [
            p for p, tally in list(self._tallies.items()) if now - tally.since_s >= self._wait_s
        ]

    def waiting(self) -> list[int]:
        """The partitions that have cards to be written."""
        return list(self._tallies)

    def write(self, partition: int) -> None:
        """Write now what waits. Raises FenceMoved, StoreUnavailable."""
        for error in self._write([partition]).values():
            raise error

    def add(
        self, changed: Mapping[int, tuple[int, Mapping[str, ItemChange]]]
    ) -> dict[int, Exception]:
        """Add published changes; write those of the partitions that have enough of them, or have waited.

        changed: partition -> (the last offset of its chunk, item id -> change)
        Returns FenceMoved or Unavailable by partition, where that failed; then all of it is to be read again.
        """
        now, enough = self._clock_s(), []
        for partition, (last, changes) in changed.items():
            fence, tally = self._positions.fence(last), self._tallies.get(partition)
            if tally is None:
                tally = self._tallies[partition] = _Tally(now, fence)
            tally.last = fence
            tally.changes.update(changes)
            if now - tally.since_s >= self._wait_s or len(tally.changes) >= METADATA_BATCH_MAX:
                enough.append(partition)
        return self._write(enough)

    def _write(self, partitions: Sequence[int]) -> dict[int, Exception]:
        """The fence of what is published first, then the cards with theirs."""
        tallies = {p: self._tallies.pop(p) for p in partitions if p in self._tallies}
        asked = [(p, write) for p, tally in tallies.items() for write in self._writes(p, tally)]
        if not asked:
            return {}
        try:
            ends = self._store.write_item_metadata_many([write for _, write in asked])
        except Unavailable as error:
            return dict.fromkeys(tallies, error)
        failed: dict[int, Exception] = {}
        for (partition, write), end in zip(asked, ends, strict=True):
            if end is None:
                self._positions.moved(write.source, write.slot, write.new)
                if write.source.name != ITEMS:
                    self._unproven.pop(partition, None)
            elif isinstance(end, FenceMoved | Unavailable):
                failed.setdefault(partition, end)
            else:
                raise end
        return failed

    def _writes(self, partition: int, tally: _Tally) -> Iterator[ItemMetadataWrite]:
        """What is to be written for a partition: nothing where it was written before."""
        slots = self._settings.item_slots
        for source, named in sources(self._settings, self._generation, partition).items():
            for slot in named:
                expected = self._positions.expected(source, slot)
                done = -1 if expected is None else expected.offset
                if done >= tally.last.offset:
                    continue
                cards = {
                    item_id: ItemMetadata(
                        partition, c.offset, events.encode(c.item) if c.item else b""
                    )
                    for item_id, c in tally.changes.items()
                    if source.name == ITEMS
                    and c.offset > done
                    and item_slot(item_id, slots) == slot
                }
                yield ItemMetadataWrite(slot, source, expected, tally.last, cards)


def sources(settings: Settings, generation: str, partition: int) -> dict[Source, list[str]]:
    """The sources of an items partition, each with the slots that have a fence of it."""
    return {
        Source(f"{ITEMS}@{generation}", partition): [PUBLISHED_SLOT],
        Source(ITEMS, partition): [f"i{shard}" for shard in range(settings.item_slots)],
    }
