"""Items in: encode by the item tower, publish for the query workers, store metadata.

An item's version is the offset of its change in `items`. Of a batch, only the last change of an
item that its tower accepts is written. Records are published before their fence moves; metadata has
a fence of its own (`metadata`). Both may be repeated, because readers keep the highest version.
Every live generation encodes and publishes for itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from typing_extensions import override

from eddyline.errors import Rejected, Unavailable, VectorRejected
from eddyline.kafka.topics import ITEMS
from eddyline.schema import events, validation
from eddyline.schema.events import Item, ItemPatch
from eddyline.schema.item_record import ItemRecord, attributes_of
from eddyline.schema.partial import Omitted
from eddyline.schema.partitioning import partition_of
from eddyline.schema.records import Record
from eddyline.schema.validation import ItemEvent
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import StateStore
from embeddings.towers.base import ItemEncoder
from embeddings.towers.numerics import Floats
from streams.fences import PUBLISHED_SLOT, PartitionFences, published_source, sources
from streams.generation import Generation
from streams.items.batch import ItemBatch, Rules
from streams.items.metadata import METADATA_WAIT_S, ItemChange, ItemMetadataWriter
from streams.ports import DeadLetterSink, Forwarder, Handler, Outcome, RecordBatch
from streams.strays import Strays

# The item records to publish, by partition.
Records = dict[int, list[ItemRecord]]
# The vectors of changes, by (partition, position in the batch); an error where the tower gives no
# unit vector.
Encoded = dict[tuple[int, int], Floats | VectorRejected]

# The norm of a float32 unit vector is this close to 1; NaN is close to nothing.
NORM_SLACK = 1e-3


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
        patches = validation.carries_patches(settings)
        # A topic of patches is not compacted, and what is appended under a map has another key.
        self._rules = Rules(
            hide=settings.hide_refused_items,
            restore=self._map is None and not patches,
            emptied=settings.refuse_emptied_items and not patches,
        )

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
        try:
            self._look_up(alive)
        except Unavailable as error:
            _fail(alive, {one.batch.partition: error for one in alive})
            return []
        for one in alive:
            one.decide(self._rules)
        vectors = [self._encode(number, alive) for number in range(len(self._generations))]
        for one in alive:
            with one.guard():
                self._place(one, vectors)
                self._confirm(one, vectors)
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
        of_items = sources(self._settings, ITEMS, batch.partition)
        one.applied = min(
            self.fences.done(source, slot) for source, slots in of_items.items() for slot in slots
        )
        outcome = one.outcome = Outcome(records=len(batch.records))
        for record in batch.records:
            try:
                found = validation.item_changes(self._settings, record, self.omitted)
            except Rejected as rejected:
                self._reject(one, record, rejected)
                continue
            outcome.ignored += not found
            for item_id, item, own in found:
                if not own:
                    self._forward(one, record, item_id, item)
                    continue
                if isinstance(item, ItemPatch):
                    change = ItemChange(record, 0, None, item)
                elif item is None:
                    change = self._delete(record)
                else:
                    change = ItemChange(record, item.at_ms, item)
                one.decoded.append((item_id, change))

    def _delete(self, record: Record) -> ItemChange:
        at_ms, kept_ms = max(0, record.timestamp), 1_000 * self._settings.deleted_items_kept_s
        return ItemChange(record, at_ms, None, ends_ms=at_ms + kept_ms if at_ms and kept_ms else 0)

    def _reject(self, one: ItemBatch, record: Record, rejected: Rejected) -> None:
        """A dead letter; the items that the record names have a newer refused record now.

        A record in a wrong partition is refused in its own, where its item is.
        """
        named = validation.named_items(self._settings, record)
        strays = [item_id for item_id, own in named if not own]
        if strays and self._map is None:
            if record.offset > self._sent(one):
                partition = partition_of(strays[0], self._settings.items_partitions)
                self._strays.forward(record, strays[0], record.value, partition, one.outcome)
            return
        self._dead_letters.put(record, rejected)
        one.outcome.rejected += 1
        at_ms = max(0, record.timestamp)
        one.decoded += [
            (item_id, ItemChange(record, at_ms, None, rejected=rejected))
            for item_id, own in named
            if own
        ]

    def _look_up(self, items: Sequence[ItemBatch]) -> None:
        """Read what decides on the changes, in one round trip. Raises StoreUnavailable."""
        unknown = [[i for i in one.look_ups(self._rules) if i not in one.stored] for one in items]
        if not any(unknown):
            return
        wanted = [item_id for item_ids in unknown for item_id in item_ids]
        found = self._store.read_item_metadata(wanted, self._settings.item_slots)
        for one, item_ids in zip(items, unknown, strict=True):
            pending = self.metadata.changes(one.batch.partition)
            one.stored |= {i: found[i] for i in item_ids if i in found}
            one.stored |= {i: pending[i].metadata for i in item_ids if i in pending}

    def _forward(self, one: ItemBatch, record: Record, item_id: str, item: ItemEvent) -> None:
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

    def _encode(self, number: int, items: Sequence[ItemBatch]) -> Encoded:
        """Encode the available items of all changes, in one numpy call.

        Published ones too: whether a generation refuses them decides on the metadata.
        """
        tower = self._generations[number].towers.item_tower
        available = [
            ((one.batch.partition, position), change.item)
            for one in items
            for position, _, change in one.decided
            if change.item is not None and change.item.available
        ]
        vectors = encode_items(tower, [item for _, item in available])
        return {at: vector for (at, _), vector in zip(available, vectors, strict=True)}

    def _place(self, one: ItemBatch, vectors: Sequence[Encoded]) -> None:
        """Refuse changes for which no generation has a vector: then decide again.

        Later patches of the item make other items then, which are encoded one by one.
        """
        partition = one.batch.partition
        one.unplaced = {
            position
            for position, _, _ in one.decided
            if _error([encoded.get((partition, position)) for encoded in vectors])
        }
        if not one.unplaced:
            return
        known = {position: change.item for position, _, change in one.decided}

        def place(position: int, item: Item | None) -> Rejected | None:
            at = partition, position
            for generation, encoded in zip(self._generations, vectors, strict=True):
                if item is None or not item.available:
                    encoded.pop(at, None)
                elif item != known.get(position):
                    vector = _encode_one(generation.towers.item_tower, item)
                    encoded[at] = _checked(item.item_id, vector)
            return _error([encoded.get(at) for encoded in vectors])

        self._look_up([one])
        one.decide(self._rules, place)

    def _confirm(self, one: ItemBatch, vectors: Sequence[Encoded]) -> None:
        """Write dead letters and forwarded records; find out what is not published yet."""
        partition = one.batch.partition
        if one.refused:
            # By what the items have: a Redis that lost it since would make letters of good records.
            self.fences.check(partition)
        one.outcome.rejected += len(one.refused)
        for position, rejected in one.refused.items():
            self._dead_letters.put(one.decoded[position][1].record, rejected)
        accepted: list[dict[str, ItemChange]] = [{} for _ in vectors]
        for position, item_id, change in one.decided:
            if change.rejected is not None:
                if change.hidden:  # else the item is shown as before
                    for of_generation in accepted:
                        of_generation[item_id] = change
                continue
            errors = dict[int, VectorRejected]()
            for number, of_generation in enumerate(accepted):
                vector = vectors[number].get((partition, position))
                if isinstance(vector, VectorRejected):
                    errors[number] = vector
                else:
                    of_generation[item_id] = change
            if errors:
                self._dead_letters.put(change.record, _bad_vector(next(iter(errors.values()))))
        order = one.order
        restored, sent = order.restored(), self._sent(one)
        self._strays.restore(restored, self.fences, sent, order.disputed, one.outcome)
        self._dead_letters.flush()
        self._strays.flush()
        for generation, of_generation in zip(self._generations, accepted, strict=True):
            source = published_source(generation.name, partition)
            done = self.fences.done(source, PUBLISHED_SLOT)
            if (first := self.metadata.unconfirmed(source)) is not None:
                done = min(done, first - 1)
            one.unpublished.append({i: c for i, c in of_generation.items() if c.offset > done})

    def _records(self, one: ItemBatch, number: int, vectors: Encoded) -> list[ItemRecord]:
        partition, written_us = one.batch.partition, self._clock_us()
        positions = {id(change): position for position, _, change in one.decided}
        records = []
        for item_id, change in one.unpublished[number].items():
            vector, attributes = vectors.get((partition, positions[id(change)])), {}
            if change.hidden:
                vector = None
            elif change.item is not None:
                attributes = attributes_of(change.item)
            if isinstance(vector, VectorRejected):
                raise LookupError(f"item {item_id} was not refused")
            records.append(
                ItemRecord(
                    item_id, partition, change.offset, change.at_ms, written_us, vector, attributes
                )
            )
        return records


def _error(of_all: Sequence[Floats | VectorRejected | None]) -> Rejected | None:
    """Why every generation refuses an item; None if one has a vector, or none needs any."""
    errors = [error for error in of_all if isinstance(error, VectorRejected)]
    return _bad_vector(errors[0]) if errors and len(errors) == len(of_all) else None


def _bad_vector(error: VectorRejected) -> Rejected:
    return Rejected("bad_vector", "vector", str(error))


def encode_items(tower: ItemEncoder, items: Sequence[Item]) -> list[Floats | VectorRejected]:
    """The vector of each item, (d,) and of unit norm; an error where the tower gives none."""
    vectors: Sequence[Floats | VectorRejected]
    try:
        vectors = list(tower.encode(items)) if items else []
    except VectorRejected:
        vectors = [_encode_one(tower, item) for item in items]
    return [_checked(item.item_id, one) for item, one in zip(items, vectors, strict=True)]


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
