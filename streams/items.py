"""Items in: encode by the item tower, publish for the query workers, keep a card.

An item's version is the offset of its change in `items`. Within a chunk only the last change of an item is
worth writing. Records are published before their fence moves, cards have a fence of their own; both are
safe to repeat, because whoever reads them takes the highest version.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from eddyline import accept, events
from eddyline.errors import EddylineError, FenceMoved, Rejected, Unavailable, VectorRejected
from eddyline.events import Item
from eddyline.kafka import ITEMS
from eddyline.ports import Card, CardWrite, Source, StateStore
from eddyline.records import ItemRecord, attributes_of
from eddyline.settings import Settings
from eddyline.slots import item_slot
from streams.chunk import (
    DeadLetterSink,
    Outcome,
    Part,
    PartitionLost,
    Record,
    RecordPublisher,
    Towers,
    Vectors,
)
from streams.positions import Positions

# By partition: what is to be published, and why some was not.
Records = dict[int, list[ItemRecord]]
Publishing = Callable[[Mapping[int, Sequence[ItemRecord]]], Awaitable[dict[int, EddylineError]]]

# The fence of what has been published for a generation lies in this item slot, however many there are.
PUBLISHED_SLOT = "i0"
# A float32 vector of unit norm is this close to it; NaN is close to nothing.
NORM_SLACK = 1e-3


@dataclass(frozen=True, slots=True)
class _Change:
    """The last change of one item in a chunk. item: None where it is deleted."""

    record: Record
    at_ms: int
    item: Item | None

    @property
    def offset(self) -> int:
        """The item's version."""
        return self.record.offset


@dataclass(slots=True)
class _Work:
    """One chunk on its way.

    published: the source whose fence says what was published; last: the chunk's last offset
    changes:   item id -> its last change; fresh: those of them that were not published yet
    error:     what ended it; then `outcome` means nothing
    """

    part: Part
    published: Source
    last: int = -1
    changes: dict[str, _Change] = field(default_factory=dict)
    fresh: dict[str, _Change] = field(default_factory=dict)
    outcome: Outcome = field(default_factory=Outcome)
    error: Exception | None = None

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Of what waiting or reading again heals, this chunk ends and the others go on."""
        try:
            yield
        except (FenceMoved, Unavailable, PartitionLost) as error:
            self.error = error


class ItemIngest:
    """Applies chunks of item changes. Thread rule: one thread, the same as its `positions`.

    clock_us: this process's clock in microseconds, stamped into the published records
    """

    def __init__(
        self,
        settings: Settings,
        store: StateStore,
        positions: Positions,
        dead_letters: DeadLetterSink,
        publisher: RecordPublisher,
        towers: Towers,
        clock_us: Callable[[], int],
    ) -> None:
        self.positions = positions
        self._settings = settings
        self._store = store
        self._dead_letters = dead_letters
        self._publisher = publisher
        self._towers = towers
        self._clock_us = clock_us

    def ingest(self, partition: int, records: Sequence[Record], read_us: int) -> Outcome:
        """Apply consecutive records of one partition, oldest first.

        Raises FenceMoved, StoreUnavailable and KafkaUnavailable as `ClickIngest.ingest` does, and
        PartitionLost where another process publishes for this partition now.
        """
        [outcome] = self.ingest_many([Part(partition, records, read_us)])
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def ingest_many(self, parts: Sequence[Part]) -> list[Outcome | Exception]:
        """Apply one chunk each of different partitions. What `ingest` would raise is in the chunk's place."""
        works, records = self._encoded(parts)
        failed = self._publisher.publish(records) if records else {}
        return self._published(works, failed)

    async def ingest_in_loop(
        self, parts: Sequence[Part], publishing: Publishing
    ) -> list[Outcome | Exception]:
        """`ingest_many` in the event loop of the publisher, which goes on while Kafka has the records."""
        works, records = self._encoded(parts)
        failed = await publishing(records) if records else {}
        return self._published(works, failed)

    def _encoded(self, parts: Sequence[Part]) -> tuple[list[_Work], Records]:
        works = [_Work(part, Source(f"{ITEMS}@{self._towers.generation}", part.partition)) for part in parts]
        for work in works:
            with work.ending():
                self._decode(work)
        return works, self._to_publish([work for work in works if work.error is None])

    def _published(
        self, works: Sequence[_Work], failed: Mapping[int, EddylineError]
    ) -> list[Outcome | Exception]:
        for work in works:
            work.error = work.error or failed.get(work.part.partition)
        self._move_fences([work for work in works if work.error is None])
        return [work.outcome if work.error is None else work.error for work in works]

    def _decode(self, work: _Work) -> None:
        partition, records = work.part.partition, work.part.records
        self.positions.begin(partition, records[0].offset, records[-1].offset)
        outcome = work.outcome = Outcome(records=len(records))
        for record in records:
            try:
                item_id, item = accept.item(
                    self._settings, partition, record.key, record.value, record.timestamp
                )
            except Rejected as rejected:
                self._dead_letters.put(record, rejected)
                outcome.rejected += 1
                continue
            at_ms = record.timestamp if item is None else item.at_ms
            work.changes[item_id] = _Change(record, at_ms, item)
            outcome.applied += 1
        if outcome.rejected:
            self._dead_letters.flush()
        work.last = records[-1].offset
        expected = self.positions.expected(work.published, PUBLISHED_SLOT)
        done = -1 if expected is None else expected.offset
        work.fresh = {i: c for i, c in work.changes.items() if c.offset > done}

    def _to_publish(self, works: Sequence[_Work]) -> Records:
        """Encode the changes of all partitions together: numpy is asked once, and Kafka will be."""
        vectors = self._encode([change for work in works for change in work.fresh.values()])
        for work in works:
            with work.ending():
                self._refuse(work, vectors)
        return {
            work.part.partition: self._records(work, vectors)
            for work in works
            if work.error is None and work.fresh
        }

    def _refuse(self, work: _Work, vectors: Mapping[int, Vectors | VectorRejected]) -> None:
        """An item that cannot be placed is refused, never repaired: it stays as it was."""
        refused = False
        for item_id, change in list(work.fresh.items()):
            error = vectors.get(id(change))
            if isinstance(error, VectorRejected):
                self._dead_letters.put(change.record, Rejected("bad_vector", "vector", str(error)))
                del work.fresh[item_id], work.changes[item_id]
                work.outcome.rejected += 1
                work.outcome.applied -= 1
                refused = True
        if refused:
            self._dead_letters.flush()

    def _move_fences(self, works: Sequence[_Work]) -> None:
        """What is published is published: the fence of that first, then the cards with theirs."""
        asked = [(work, write) for work in works for write in self._writes(work)]
        try:
            ends = self._store.write_cards_many([write for _, write in asked])
        except Unavailable as error:
            for work in works:
                work.error = error
            return
        for (work, write), end in zip(asked, ends, strict=True):
            if end is None:
                self.positions.moved(write.source, write.slot, write.new)
            else:
                work.error = work.error or end

    def _writes(self, work: _Work) -> Iterator[CardWrite]:
        """What is to be written for a chunk: nothing where it was written before."""
        new, slots = self.positions.fence(work.last), self._settings.item_slots
        for source, named in sources(self._settings, self._towers.generation, work.part.partition).items():
            for slot in named:
                expected = self.positions.expected(source, slot)
                done = -1 if expected is None else expected.offset
                if done >= work.last:
                    continue
                cards = {
                    item_id: Card(source.partition, c.offset, events.encode(c.item) if c.item else b"")
                    for item_id, c in work.changes.items()
                    if source.name == ITEMS and c.offset > done and item_slot(item_id, slots) == slot
                }
                yield CardWrite(slot, source, expected, new, cards)

    def _encode(self, changes: Sequence[_Change]) -> dict[int, Vectors | VectorRejected]:
        """id() of each change that has a vector -> it; an error where the tower gives no unit vector."""
        live = [(change, change.item) for change in changes if change.item and change.item.available]
        items = [item for _, item in live]
        encoded: Sequence[Vectors | VectorRejected]
        try:
            encoded = list(self._towers.item_tower.encode(items)) if items else []
        except VectorRejected:
            encoded = [self._encode_one(item) for item in items]
        return {
            id(change): self._checked(item.item_id, vector)
            for (change, item), vector in zip(live, encoded, strict=True)
        }

    def _encode_one(self, item: Item) -> Vectors | VectorRejected:
        try:
            vector: Vectors = self._towers.item_tower.encode([item])[0]
            return vector
        except VectorRejected as error:
            return error

    @staticmethod
    def _checked(item_id: str, vector: Vectors | VectorRejected) -> Vectors | VectorRejected:
        if isinstance(vector, VectorRejected) or abs(float(np.dot(vector, vector)) - 1) < NORM_SLACK:
            return vector
        return VectorRejected(f"the item tower gives item {item_id!r} no vector of unit norm")

    def _records(self, work: _Work, vectors: Mapping[int, Any]) -> list[ItemRecord]:
        partition, written_us = work.part.partition, self._clock_us()
        return [
            ItemRecord(
                item_id, partition, change.offset, change.at_ms, written_us, vectors.get(id(change)),
                {} if change.item is None else attributes_of(change.item),
            )
            for item_id, change in work.fresh.items()
        ]  # fmt: skip


def sources(settings: Settings, generation: str, partition: int) -> dict[Source, list[str]]:
    """The sources of an items partition, each with the slots that have a fence of it."""
    return {
        Source(f"{ITEMS}@{generation}", partition): [PUBLISHED_SLOT],
        Source(ITEMS, partition): [f"i{shard}" for shard in range(settings.item_slots)],
    }
