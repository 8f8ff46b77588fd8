"""Items in: encode by the item tower, publish for the query workers, keep a card.

An item's version is the offset of its change in `items`. Within a chunk only the last change of an item is
worth writing. Records are published before their fence moves, cards have a fence of their own; both are
safe to repeat, because whoever reads them takes the highest version.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eddyline import accept, events
from eddyline.errors import Rejected, VectorRejected
from eddyline.events import Item
from eddyline.kafka import ITEMS
from eddyline.ports import Card, Source, StateStore
from eddyline.records import ItemRecord
from eddyline.settings import Settings
from eddyline.slots import item_slot
from streams.chunk import DeadLetterSink, Outcome, Record, RecordPublisher, Towers, Vectors
from streams.positions import Positions

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
        self.positions.begin(partition, records[0].offset, records[-1].offset)
        changes, outcome = self._decode(partition, records)
        if outcome.rejected:
            self._dead_letters.flush()
        last = self.positions.fence(records[-1].offset)
        self._publish(Source(f"{ITEMS}@{self._towers.generation}", partition), last.offset, changes, outcome)
        for shard in range(self._settings.item_slots):
            self._keep_cards(Source(ITEMS, partition), f"i{shard}", last.offset, changes)
        return outcome

    def _decode(self, partition: int, records: Sequence[Record]) -> tuple[dict[str, _Change], Outcome]:
        changes: dict[str, _Change] = {}
        outcome = Outcome(records=len(records))
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
            changes[item_id] = _Change(record, at_ms, item)
            outcome.applied += 1
        return changes, outcome

    def _publish(self, source: Source, last: int, changes: dict[str, _Change], outcome: Outcome) -> None:
        expected = self.positions.expected(source, PUBLISHED_SLOT)
        done = -1 if expected is None else expected.offset
        if done >= last:
            return
        fresh = {i: c for i, c in changes.items() if c.offset > done}
        if fresh:
            vectors = self._encode(fresh)
            for item_id, error in [(i, v) for i, v in vectors.items() if isinstance(v, VectorRejected)]:
                # It stays as it was: an item that cannot be placed is refused, never repaired.
                refused = Rejected("bad_vector", "vector", str(error))
                self._dead_letters.put(fresh.pop(item_id).record, refused)
                del changes[item_id], vectors[item_id]
                outcome.rejected += 1
                outcome.applied -= 1
            self._dead_letters.flush()
            self._publisher.publish(source.partition, self._records(source.partition, fresh, vectors))
        new = self.positions.fence(last)
        self._store.write_cards(PUBLISHED_SLOT, source, expected, new, {})
        self.positions.moved(source, PUBLISHED_SLOT, new)

    def _encode(self, changes: Mapping[str, _Change]) -> dict[str, Vectors | VectorRejected]:
        """The vectors of the items that have one; an error instead where the tower gives no unit vector."""
        live = {i: c.item for i, c in changes.items() if c.item is not None and c.item.available}
        encoded: Sequence[Vectors | VectorRejected]
        try:
            encoded = list(self._towers.item_tower.encode(list(live.values()))) if live else []
        except VectorRejected:
            encoded = [self._encode_one(item) for item in live.values()]
        return {i: self._checked(i, vector) for i, vector in zip(live, encoded, strict=True)}

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

    def _records(
        self, partition: int, changes: Mapping[str, _Change], vectors: Mapping[str, Any]
    ) -> list[ItemRecord]:
        records, written_us = [], self._clock_us()
        for item_id, change in changes.items():
            item, vector = change.item, vectors.get(item_id)
            attributes = {} if item is None else _attributes(item)
            records.append(
                ItemRecord(item_id, partition, change.offset, change.at_ms, written_us, vector, attributes)
            )
        return records

    def _keep_cards(self, source: Source, slot: str, last: int, changes: Mapping[str, _Change]) -> None:
        expected = self.positions.expected(source, slot)
        done = -1 if expected is None else expected.offset
        if done >= last:
            return
        slots = self._settings.item_slots
        cards = {
            item_id: Card(source.partition, c.offset, events.encode(c.item) if c.item else b"")
            for item_id, c in changes.items()
            if c.offset > done and item_slot(item_id, slots) == slot
        }
        new = self.positions.fence(last)
        self._store.write_cards(slot, source, expected, new, cards)
        self.positions.moved(source, slot, new)


def sources(settings: Settings, generation: str, partition: int) -> dict[Source, list[str]]:
    """The sources of an items partition, each with the slots that have a fence of it."""
    return {
        Source(f"{ITEMS}@{generation}", partition): [PUBLISHED_SLOT],
        Source(ITEMS, partition): [f"i{shard}" for shard in range(settings.item_slots)],
    }


def _attributes(item: Item) -> dict[str, Any]:
    """What filters need of an item; empty parts are left out."""
    parts = {"categories": item.categories, "tags": item.tags, "attributes": item.attributes}
    return {name: part for name, part in parts.items() if part}
