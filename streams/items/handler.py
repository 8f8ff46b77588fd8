"""Items in: encode by the item tower, publish for the query workers, keep a card.

An item's version is the offset of its change in `items`. Within a chunk only the last change of an item is
worth writing. Records are published before their fence moves, cards have a fence of their own (`item_cards`);
both are safe to repeat, because whoever reads them takes the highest version.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from eddyline.errors import EddylineError, FenceMoved, Rejected, Unavailable, VectorRejected
from eddyline.kafka.topics import ITEMS
from eddyline.schema import validation
from eddyline.schema.events import Item
from eddyline.schema.item_record import ItemRecord, attributes_of
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import Source, StateStore
from streams.fences import PartitionFences
from streams.items.metadata import PUBLISHED_SLOT, ItemChange, ItemMetadataWriter
from streams.ports import (
    DeadLetterSink,
    Outcome,
    PartitionLost,
    Record,
    RecordBatch,
    RecordPublisher,
    Towers,
    Vectors,
)

# By partition: what is to be published, and why some was not.
Records = dict[int, list[ItemRecord]]
Publishing = Callable[[Mapping[int, Sequence[ItemRecord]]], Awaitable[dict[int, EddylineError]]]

# A float32 vector of unit norm is this close to it; NaN is close to nothing.
NORM_SLACK = 1e-3


@dataclass(slots=True)
class _ItemBatch:
    """One chunk on its way.

    published: the source whose fence says what was published; last: the chunk's last offset
    changes:   item id -> its last change; fresh: those of them that were not published yet
    error:     what ended it; then `outcome` means nothing
    """

    part: RecordBatch
    published: Source
    last: int = -1
    changes: dict[str, ItemChange] = field(default_factory=dict)
    fresh: dict[str, ItemChange] = field(default_factory=dict)
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
    cards_s:  how long cards and fences wait for those of more chunks
    """

    def __init__(
        self,
        settings: Settings,
        store: StateStore,
        positions: PartitionFences,
        dead_letters: DeadLetterSink,
        publisher: RecordPublisher,
        towers: Towers,
        clock_us: Callable[[], int],
        cards_s: float = 0.0,
    ) -> None:
        self.positions = positions
        self.cards = ItemMetadataWriter(settings, towers.generation, store, positions, cards_s)
        self._settings = settings
        self._dead_letters = dead_letters
        self._publisher = publisher
        self._towers = towers
        self._clock_us = clock_us

    def ingest(self, partition: int, records: Sequence[Record], read_us: int) -> Outcome:
        """Apply consecutive records of one partition, oldest first.

        Raises FenceMoved, StoreUnavailable and KafkaUnavailable as `ClickIngest.ingest` does, and
        PartitionLost where another process publishes for this partition now.
        """
        [outcome] = self.ingest_many([RecordBatch(partition, records, read_us)])
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def ingest_many(self, parts: Sequence[RecordBatch]) -> list[Outcome | Exception]:
        """Apply one chunk each of different partitions. What `ingest` would raise is in the chunk's place."""
        works, records = self._encoded(parts)
        failed = self._publisher.publish(records) if records else {}
        return self._published(works, failed)

    def opened(self, partition: int) -> None:
        """Forget what is known of a partition: it is read again from its lowest fence.

        Or from what was published by this process and no fence of its own has proven in order.
        """
        self.cards.opened(partition)
        if (first := self.cards.unconfirmed(partition)) is not None:
            self.positions.replay_from(partition, first)

    def count(self, partition: int) -> None:
        """Write the cards that wait. Raises as `ingest` does."""
        self.cards.write(partition)

    async def ingest_in_loop(
        self, parts: Sequence[RecordBatch], publishing: Publishing
    ) -> list[Outcome | Exception]:
        """`ingest_many` in the event loop of the publisher, which goes on while Kafka has the records."""
        works, records = self._encoded(parts)
        failed = await publishing(records) if records else {}
        return self._published(works, failed)

    def _encoded(self, parts: Sequence[RecordBatch]) -> tuple[list[_ItemBatch], Records]:
        works = [
            _ItemBatch(part, Source(f"{ITEMS}@{self._towers.generation}", part.partition))
            for part in parts
        ]
        for work in works:
            with work.ending():
                self._decode(work)
        records = self._to_publish([work for work in works if work.error is None])
        for work in works:
            if work.part.partition in records:
                self.cards.publishing(work.part.partition, work.part.records[0].offset)
        return works, records

    def _published(
        self, works: Sequence[_ItemBatch], failed: Mapping[int, EddylineError]
    ) -> list[Outcome | Exception]:
        for work in works:
            work.error = work.error or failed.get(work.part.partition)
        done = [work for work in works if work.error is None]
        refused = self.cards.add({work.part.partition: (work.last, work.changes) for work in done})
        for work in done:
            work.error = refused.get(work.part.partition)
        return [work.outcome if work.error is None else work.error for work in works]

    def _decode(self, work: _ItemBatch) -> None:
        partition, records = work.part.partition, work.part.records
        self.positions.begin(partition, records[0].offset, records[-1].offset)
        outcome = work.outcome = Outcome(records=len(records))
        for record in records:
            try:
                item_id, item = validation.item(
                    self._settings, partition, record.key, record.value, record.timestamp
                )
            except Rejected as rejected:
                self._dead_letters.put(record, rejected)
                outcome.rejected += 1
                continue
            at_ms = record.timestamp if item is None else item.at_ms
            work.changes[item_id] = ItemChange(record, at_ms, item)
            outcome.applied += 1
        if outcome.rejected:
            self._dead_letters.flush()
        work.last = records[-1].offset
        expected = self.positions.expected(work.published, PUBLISHED_SLOT)
        done = -1 if expected is None else expected.offset
        if (first := self.cards.unconfirmed(partition)) is not None:
            done = min(done, first - 1)
        work.fresh = {i: c for i, c in work.changes.items() if c.offset > done}

    def _to_publish(self, works: Sequence[_ItemBatch]) -> Records:
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

    def _refuse(self, work: _ItemBatch, vectors: Mapping[int, Vectors | VectorRejected]) -> None:
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

    def _encode(self, changes: Sequence[ItemChange]) -> dict[int, Vectors | VectorRejected]:
        """id() of each change that has a vector -> it; an error where the tower gives no unit vector."""
        live = [
            (change, change.item) for change in changes if change.item and change.item.available
        ]
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
        if (
            isinstance(vector, VectorRejected)
            or abs(float(np.dot(vector, vector)) - 1) < NORM_SLACK
        ):
            return vector
        return VectorRejected(f"the item tower gives item {item_id!r} no vector of unit norm")

    def _records(self, work: _ItemBatch, vectors: Mapping[int, Any]) -> list[ItemRecord]:
        partition, written_us = work.part.partition, self._clock_us()
        return [
            ItemRecord(
                item_id,
                partition,
                change.offset,
                change.at_ms,
                written_us,
                vectors.get(id(change)),
                {} if change.item is None else attributes_of(change.item),
            )
            for item_id, change in work.fresh.items()
        ]
