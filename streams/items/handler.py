"""Items in: encode by the item tower, publish for the query workers, store metadata.

An item's version is the offset of its change in `items`. Of a batch, only the last change of an
item that its tower accepts is written. Records are published before their fence moves; metadata has
a fence of its own (`metadata`). Both may be repeated, because readers keep the highest version.
Every live generation encodes and publishes for itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from typing_extensions import override

from eddyline.errors import FenceMoved, Rejected, Unavailable, VectorRejected
from eddyline.kafka.topics import ITEMS
from eddyline.schema import events, validation
from eddyline.schema.events import Item
from eddyline.schema.item_record import ItemRecord, attributes_of
from eddyline.schema.partial import Omitted
from eddyline.schema.partitioning import partition_of
from eddyline.schema.records import Record
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import ItemMetadata, StateStore
from embeddings.towers.base import ItemEncoder
from embeddings.towers.numerics import Floats
from streams.fences import PUBLISHED_SLOT, PartitionFences, published_source
from streams.generation import Generation
from streams.items.metadata import METADATA_WAIT_S, ItemChange, ItemMetadataWriter
from streams.items.order import KeyOrder
from streams.ports import DeadLetterSink, Forwarder, Handler, Outcome, PartitionLost, RecordBatch
from streams.strays import Strays

# The item records to publish, by partition.
Records = dict[int, list[ItemRecord]]
# The vectors of changes, by id() of the change; an error where the tower gives no unit vector.
Encoded = dict[int, Floats | VectorRejected]

# The norm of a float32 unit vector is this close to 1; NaN is close to nothing.
NORM_SLACK = 1e-3


@dataclass(slots=True)
class ItemBatch:
    """One batch while it is applied.

    decoded:     all changes, in the order of the log, each with its item id
    order:       which forwarded changes count
    changes:     item id -> its last change that some generation accepts
    unpublished: by generation: item id -> its last accepted change, if not published yet
    error:       the error that ended the batch; `outcome` is meaningless then
    """

    batch: RecordBatch
    decoded: list[tuple[str, ItemChange]] = field(default_factory=list)
    order: KeyOrder = field(default_factory=KeyOrder)
    changes: dict[str, ItemChange] = field(default_factory=dict)
    unpublished: list[dict[str, ItemChange]] = field(default_factory=list)
    outcome: Outcome = field(default_factory=Outcome)
    error: Exception | None = None

    @contextmanager
    def guard(self) -> Iterator[None]:
        """An error that a retry or a second reading resolves ends this batch only."""
        try:
            yield
        except (FenceMoved, Unavailable, PartitionLost) as error:
            self.error = error


class ItemHandler(Handler):
    """Applies batches of item changes. Thread rule: one thread.

    generations: the live ones, each with its item tower and publisher
    clock_us:    this process's clock, microseconds since 1970, stamped into the published records
    forwarder:   sends changes in a wrong partition to their own; None leaves them
    wait_s:      how long metadata and fences wait for those of more batches
    """

    awaits_kafka = True

    def __init__(
        self,
        settings: Settings,
        store: StateStore,
        fences: PartitionFences,
        dead_letters: DeadLetterSink,
        generations: Sequence[Generation],
        wait_s: float = METADATA_WAIT_S,
        clock_us: Callable[[], int] = lambda: time.time_ns() // 1_000,
        forwarder: Forwarder | None = None,
    ) -> None:
        self.fences = fences
        self.omitted = Omitted()
        names = [generation.name for generation in generations]
        self.write_behind = self.metadata = ItemMetadataWriter(
            settings, names, store, fences, wait_s
        )
        self._settings = settings
        self._store = store
        self._dead_letters = dead_letters
        self._generations = generations
        self._clock_us = clock_us
        self._map = validation.map_of(settings, ITEMS)
        # Where the producer's key decides on the partition, no record lies in a wrong one.
        by_key = self._map is not None and self._map.by_key
        self._strays = Strays(None if by_key else forwarder, dead_letters, "item")

    @override
    def open(self, partition: int) -> None:
        """Reading also starts no later than the first unconfirmed record of this process."""
        self.metadata.reset(partition)
        for generation in self._generations:
            first = self.metadata.unconfirmed(published_source(generation.name, partition))
            if first is not None:
                self.fences.replay_from(partition, first)
            generation.publisher.open(partition)

    @override
    def move_fences(self, partition: int, offset: int) -> None:
        for error in self.metadata.add({partition: (offset, {})}).values():
            raise error
        self.metadata.write(partition)

    @override
    def apply(self, batches: Sequence[RecordBatch]) -> list[Outcome | Exception]:
        items = [ItemBatch(batch) for batch in batches]
        for generation, records in self._prepare(items):
            _fail(items, generation.publisher.publish(records))
        return self._finish(items)

    @override
    async def apply_in_loop(self, batches: Sequence[RecordBatch]) -> list[Outcome | Exception]:
        """`apply` in the publishers' event loop, which goes on while Kafka stores the records."""
        items = [ItemBatch(batch) for batch in batches]
        for generation, records in self._prepare(items):
            _fail(items, await generation.publisher.publish_async(records))
        return self._finish(items)

    def _prepare(self, items: Sequence[ItemBatch]) -> list[tuple[Generation, Records]]:
        """Decode and encode all batches. Returns the records that each generation publishes."""
        for one in items:
            with one.guard():
                self._decode(one)
        alive = [one for one in items if one.error is None]
        vectors = [self._encode(number, alive) for number in range(len(self._generations))]
        for one in alive:
            with one.guard():
                self._refuse(one, vectors)
        prepared = []
        for number, generation in enumerate(self._generations):
            records: Records = {}
            for one in alive:
                if one.error is None and one.unpublished[number]:
                    partition = one.batch.partition
                    records[partition] = self._records(one, number, vectors[number])
                    source = published_source(generation.name, partition)
                    self.metadata.publishing(source, one.batch.first)
            if records:
                prepared.append((generation, records))
        return prepared

    def _finish(self, items: Sequence[ItemBatch]) -> list[Outcome | Exception]:
        """Store the metadata of what was published."""
        published = {
            one.batch.partition: (one.batch.last, one.changes) for one in items if one.error is None
        }
        _fail(items, self.metadata.add(published))
        return [one.error or one.outcome for one in items]

    def _decode(self, one: ItemBatch) -> None:
        batch = one.batch
        self.fences.begin(batch.partition, batch.records)
        outcome = one.outcome = Outcome(records=len(batch.records))
        for record in batch.records:
            try:
                found = validation.item_changes(self._settings, record, self.omitted)
            except Rejected as rejected:
                self._dead_letters.put(record, rejected)
                outcome.rejected += 1
                continue
            outcome.ignored += not found
            for item_id, item, own in found:
                if not own:
                    self._forward(one, record, item_id, item)
                    continue
                at_ms = max(0, record.timestamp) if item is None else item.at_ms
                one.decoded.append((item_id, ItemChange(record, at_ms, item)))
                outcome.applied += 1
        one.order.stored = self._stored(one)

    def _forward(self, one: ItemBatch, record: Record, item_id: str, item: Item | None) -> None:
        """Send a change in a wrong partition to its own, once."""
        if record.offset <= self._sent(one):
            return
        value = record.value
        if self._map is not None:
            value = None if item is None else events.encode(item)
        partition = partition_of(item_id, self._settings.items_partitions)
        self._strays.forward(record, item_id, value, partition, one.outcome)

    def _sent(self, one: ItemBatch) -> int:
        """The offset up to which everything was forwarded before."""
        partition = one.batch.partition
        return max(self.fences.highest(partition), self.fences.forwarded_up_to(partition))

    def _stored(self, one: ItemBatch) -> dict[str, ItemMetadata]:
        """What the items of forwarded changes have. Raises StoreUnavailable."""
        forwarded = [i for i, change in one.decoded if change.forwarded]
        if not forwarded:
            return {}
        found = self._store.read_item_metadata(forwarded, self._settings.item_slots)
        pending = self.metadata.changes(one.batch.partition)
        return found | {i: pending[i].metadata for i in forwarded if i in pending}

    def _encode(self, number: int, items: Sequence[ItemBatch]) -> Encoded:
        """Encode the available items of all changes, in one numpy call.

        Published ones too: whether a generation refuses them decides on the metadata.
        """
        tower = self._generations[number].towers.item_tower
        available = [
            (change, change.item)
            for one in items
            for _, change in one.decoded
            if change.item is not None and change.item.available
        ]
        vectors: Sequence[Floats | VectorRejected]
        try:
            vectors = list(tower.encode([item for _, item in available])) if available else []
        except VectorRejected:
            vectors = [_encode_one(tower, item) for _, item in available]
        return {
            id(change): _checked(item.item_id, vector)
            for (change, item), vector in zip(available, vectors, strict=True)
        }

    def _refuse(self, one: ItemBatch, vectors: Sequence[Encoded]) -> None:
        """Refuse changes without a vector; what no generation can place changes nothing."""
        accepted: list[dict[str, ItemChange]] = [{} for _ in vectors]
        for item_id, change in one.decoded:
            if not one.order.counts(item_id, change):
                one.outcome.applied -= 1
                one.outcome.outdated += 1
                continue
            errors = {
                number: error
                for number, encoded in enumerate(vectors)
                if isinstance(error := encoded.get(id(change)), VectorRejected)
            }
            for number, of_generation in enumerate(accepted):
                if number not in errors:
                    of_generation[item_id] = change
            if len(errors) < len(vectors) or not vectors:
                one.changes[item_id] = change
                one.order.accepted(item_id, change)
            else:
                one.outcome.applied -= 1
                one.outcome.rejected += 1
            if errors:
                detail = str(next(iter(errors.values())))
                self._dead_letters.put(change.record, Rejected("bad_vector", "vector", detail))
        order = one.order
        self._strays.restore(order.restored(), self._sent(one), order.disputed, one.outcome)
        self._dead_letters.flush()
        self._strays.flush()
        for generation, of_generation in zip(self._generations, accepted, strict=True):
            source = published_source(generation.name, one.batch.partition)
            done = self.fences.done(source, PUBLISHED_SLOT)
            if (first := self.metadata.unconfirmed(source)) is not None:
                done = min(done, first - 1)
            one.unpublished.append({i: c for i, c in of_generation.items() if c.offset > done})

    def _records(self, one: ItemBatch, number: int, vectors: Encoded) -> list[ItemRecord]:
        partition, written_us = one.batch.partition, self._clock_us()
        records = []
        for item_id, change in one.unpublished[number].items():
            vector = vectors.get(id(change))
            if isinstance(vector, VectorRejected):
                raise LookupError(f"item {item_id} was not refused")
            attributes = {} if change.item is None else attributes_of(change.item)
            records.append(
                ItemRecord(
                    item_id, partition, change.offset, change.at_ms, written_us, vector, attributes
                )
            )
        return records


def _encode_one(tower: ItemEncoder, item: Item) -> Floats | VectorRejected:
    try:
        vector: Floats = tower.encode([item])[0]
        return vector
    except VectorRejected as error:
        return error


def _checked(item_id: str, vector: Floats | VectorRejected) -> Floats | VectorRejected:
    if isinstance(vector, VectorRejected) or abs(float(np.dot(vector, vector)) - 1) < NORM_SLACK:
        return vector
    return VectorRejected(f"the item tower gives item {item_id!r} no vector of unit norm")


def _fail(items: Sequence[ItemBatch], errors: Mapping[int, Exception]) -> None:
    """End the batches of the partitions that have an error."""
    for one in items:
        one.error = one.error or errors.get(one.batch.partition)
