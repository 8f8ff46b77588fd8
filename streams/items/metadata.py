"""Metadata of published items and the fences of publishing, written a moment after the records.

A batch of changes has a record or two, and its two scripts in Redis cost as much as publishing it.
So metadata and fences are written together with those of later batches. Until then both fences stay
behind: nothing is lost with the process, and publishing the same records again is harmless.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from typing_extensions import override

from eddyline.errors import FenceMoved, Rejected, Unavailable
from eddyline.kafka.topics import ITEMS
from eddyline.schema import events
from eddyline.schema.events import Item, ItemPatch
from eddyline.schema.partitioning import item_slot
from eddyline.schema.records import Record
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import (
    Fence,
    ItemMetadata,
    ItemMetadataWrite,
    RefusedRecord,
    Source,
    StateStore,
)
from streams.fences import PartitionFences, sources
from streams.records import appended_after, is_forwarded
from streams.write_behind import WriteBehind

# Fences may stay behind by this much; after a crash so much is published again.
METADATA_WAIT_S = 0.1
# Above so many pending changes of a partition the metadata is written.
METADATA_BATCH_MAX = 256


@dataclass(frozen=True, slots=True)
class ItemChange:
    """A change of one item.

    item:     None where it is deleted, and of a refused record and an undecided patch
    patch:    what the item is made of, with what it was
    rejected: why the record is refused; None for an accepted one
    before:   of a refused record: what the item had, and keeps
    refused:  what the metadata says of the last refused record
    born_ms, ends_ms: see `ItemMetadata`
    """

    record: Record
    at_ms: int
    item: Item | None
    patch: ItemPatch | None = None
    rejected: Rejected | None = None
    before: ItemMetadata | None = None
    refused: RefusedRecord | None = None
    born_ms: int = 0
    ends_ms: int = 0

    @property
    def offset(self) -> int:
        """The item's version."""
        return self.record.offset

    @property
    def first_ms(self) -> int:
        """The broker's time stamp of the first append of the record."""
        return events.first_append_ms(self.record)

    @property
    def forwarded(self) -> bool:
        """Whether the record was appended before, perhaps elsewhere: forwarded or replayed."""
        return events.origin_ms(self.record.headers) is not None

    @property
    def stray(self) -> bool:
        """Whether the record was forwarded from another partition."""
        return is_forwarded(self.record)

    @property
    def metadata(self) -> ItemMetadata:
        """What is stored of the item after this change."""
        if self.before is not None:
            return replace(self.before, refused=self.refused)
        body = events.encode(self.item) if self.item else b""
        return ItemMetadata(
            partition=self.record.partition,
            offset=self.offset,
            body=body,
            first_ms=self.first_ms,
            stray=self.stray,
            refused=self.refused,
            born_ms=self.born_ms,
            ends_ms=self.ends_ms,
        )

    def is_older(self, stored: ItemMetadata) -> bool:
        """Whether a forwarded change is older than what the item has: the first append decides.

        In one millisecond, a state that was appended again after a record is that of its place: a
        change between the two is newer. A change from here on was stored by an earlier reading.
        """
        after, place = appended_after(self.record), self.record
        if self.first_ms != stored.first_ms or after is None:
            return self.first_ms < stored.first_ms
        return stored.partition == place.partition and after < stored.offset < place.offset

    def born(self, before: ItemMetadata | None) -> ItemChange:
        """The change with the time of the item's first record, if the item says no time itself.

        before: what the item has
        """
        if self.item is None or self.item.at_ms:
            return self
        known = 0 if before is None or before.deleted else before.born_ms
        born_ms = known or max(0, self.first_ms)
        return replace(self, at_ms=born_ms, born_ms=born_ms)

    @property
    def hidden(self) -> bool:
        """Whether the item is in no answer because of a refused record."""
        return self.refused is not None and self.refused.hidden

    def refuse(self, rejected: Rejected, before: ItemMetadata, hide: bool) -> ItemChange:
        """The change as a refused one. hide: whether the item is hidden from here on"""
        place = self.record.partition, self.offset
        refused = RefusedRecord(*place, self.first_ms, rejected.reason, hide)
        return replace(self, item=None, rejected=rejected, before=before, refused=refused)

    def keep_refused(self, refused: RefusedRecord) -> ItemChange:
        """The change, with the refused record if that is newer: a delete ends it in any case."""
        place = self.record.partition, appended_after(self.record)
        older = self.first_ms < refused.first_ms or place == (refused.partition, refused.offset)
        return replace(self, refused=refused) if older and self.item is not None else self


@dataclass(slots=True)
class _Changes:
    """Pending changes of one partition, up to the fence `last`; none that its slot has already."""

    since_s: float
    last: Fence
    changes: dict[str, ItemChange] = field(default_factory=dict)


class ItemMetadataWriter(WriteBehind[_Changes]):
    """The pending metadata and fences of all partitions.

    generations: those that publish items
    """

    def __init__(
        self,
        settings: Settings,
        generations: Sequence[str],
        store: StateStore,
        fences: PartitionFences,
        wait_s: float,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(fences, wait_s, clock_s)
        self._settings = settings
        self._generations = generations
        self._store = store
        self._unconfirmed: dict[Source, int] = {}

    def publishing(self, source: Source, first: int) -> None:
        """Changes from the offset `first` on are about to be published for a generation."""
        self._unconfirmed[source] = min(first, self._unconfirmed.get(source, first))

    def unconfirmed(self, source: Source) -> int | None:
        """The first offset published since this process last wrote the fence of publishing; None
        for none.

        Until the next write, another process may have moved the fence over them: it published
        before us, and froze. Then its records, newer ones too, lie in front of ours, and ours have
        to be published again.
        """
        return self._unconfirmed.get(source)

    @override
    def write(self, partition: int) -> None:
        for error in self._write([partition]).values():
            raise error

    def changes(self, partition: int) -> Mapping[str, ItemChange]:
        """The changes of a partition that are not written yet, by item."""
        pending = self._pending.get(partition)
        return {} if pending is None else pending.changes

    def add(
        self, changed: Mapping[int, tuple[int, Mapping[str, ItemChange]]]
    ) -> dict[int, Exception]:
        """Add published changes; write those of the partitions that have enough of them, or are
        due.

        changed: partition -> (the last offset of its batch, item id -> change)
        Returns FenceMoved or Unavailable by partition, where the write failed: read the partition
        again.
        """
        enough = []
        for partition, (last, changes) in changed.items():
            fence, pending = self._fences.fence(partition, last), self._pending.get(partition)
            if pending is None:
                pending = self._pending[partition] = _Changes(self._clock_s(), fence)
            pending.last = fence
            pending.changes.update(self._without_stored(partition, changes))
            if len(pending.changes) >= METADATA_BATCH_MAX or self._has_waited(pending):
                enough.append(partition)
        return self._write(enough)

    def _without_stored(
        self, partition: int, changes: Mapping[str, ItemChange]
    ) -> Iterator[tuple[str, ItemChange]]:
        """The changes beyond the fence of their slot.

        A generation that reads `items` again publishes older ones too. The stored item is newer
        than these, and the next batch has to be decided by it.
        """
        slots = self._settings.item_slots
        done = {
            slot: self._fences.done(source, slot)
            for source, named in sources(self._settings, ITEMS, partition).items()
            for slot in named
        }
        for item_id, change in changes.items():
            if change.offset > done[item_slot(item_id, slots)]:
                yield item_id, change

    def _write(self, partitions: Sequence[int]) -> dict[int, Exception]:
        """Write the fences of publishing, then metadata with its fences.

        Returns errors by partition.
        """
        pending = {p: self._pending.pop(p) for p in partitions if p in self._pending}
        writes = [(p, write) for p, one in pending.items() for write in self._writes(p, one)]
        if not writes:
            return {}
        try:
            results = self._store.write_item_metadata_many([write for _, write in writes])
        except Unavailable as error:
            return dict.fromkeys(pending, error)
        failed: dict[int, Exception] = {}
        for (partition, write), result in zip(writes, results, strict=True):
            if result is None:
                self._fences.moved(write.source, write.slot, write.new)
                if write.source.name != ITEMS:
                    self._unconfirmed.pop(write.source, None)
            elif isinstance(result, FenceMoved | Unavailable):
                failed.setdefault(partition, result)
            else:
                raise result
        return failed

    def _writes(self, partition: int, pending: _Changes) -> Iterator[ItemMetadataWrite]:
        """The writes of a partition's changes, without those that were made before."""
        slots = self._settings.item_slots
        for source, named in sources(self._settings, ITEMS, partition, self._generations).items():
            for slot in named:
                done = self._fences.done(source, slot)
                if done >= pending.last.offset:
                    continue
                metadata = {
                    item_id: c.metadata
                    for item_id, c in pending.changes.items()
                    if source.name == ITEMS and item_slot(item_id, slots) == slot
                }
                expected = self._fences.expected(source, slot)
                yield ItemMetadataWrite(slot, source, expected, pending.last, metadata)
