"""The ports of ingest: records and batches in, outcomes out, and the outputs to Kafka."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass, fields
from typing import Any, Protocol

from eddyline.errors import EddylineError, Rejected
from eddyline.schema.item_record import ItemRecord
from eddyline.schema.partial import Omitted
from eddyline.schema.records import Record
from streams.fences import PartitionFences
from streams.write_behind import WriteBehind, WriteBehindGroup


@dataclass(frozen=True, slots=True)
class RecordBatch:
    """Consecutive records of one partition, oldest first. Its effects on one slot are one fenced
    write.

    topic:   the topic's name in Kafka, prefix included
    records: at least one
    read_us: when the consumer fetched them, microseconds since 1970
    epoch:   the partition's seek count at the fetch; the next seek makes the batch stale
    """

    topic: str
    partition: int
    records: Sequence[Record]
    read_us: int
    epoch: int = 0

    @property
    def first(self) -> int:
        """The first record's offset."""
        return self.records[0].offset

    @property
    def last(self) -> int:
        """The last record's offset."""
        return self.records[-1].offset


@dataclass(slots=True)
class Outcome:
    """How the records of a batch ended, in numbers of records.

    records:    in the batch
    applied:    accepted and written (clicks, items or profiles)
    duplicates: re-sent events that were dropped
    rejected:   sent to dead-letters
    forwarded:  sent to their own partition: strays, and what a merge moves (one for each event
                moved)
    steps:      micro-steps taken
    forgotten:  dropped: events of a forgotten user from before that, see `schema.erasure`
    late:       applied, but too late for their user's list
    outdated:   forwarded items and profiles that are older than what their key has: dropped
    disputed:   forwarded items and profiles of keys that another producer sends to their own
                partition
    repeated:   at or below a fence: applied before, skipped for that slot
    ignored:    records of which the map of the topic makes no event
    """

    records: int = 0
    applied: int = 0
    duplicates: int = 0
    rejected: int = 0
    forwarded: int = 0
    steps: int = 0
    late: int = 0
    forgotten: int = 0
    repeated: int = 0
    outdated: int = 0
    disputed: int = 0
    ignored: int = 0

    def add(self, other: Outcome) -> None:
        """Add the counts of another batch."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def less(self, other: Outcome) -> Outcome:
        """The difference to an earlier total."""
        return Outcome(**{name: getattr(self, name) - getattr(other, name) for name in _COUNTS})

    def counts(self) -> dict[str, int]:
        """The counts by name."""
        return {name: getattr(self, name) for name in _COUNTS}


_COUNTS = tuple(f.name for f in fields(Outcome))


class PartitionLost(EddylineError):
    """Another process has taken over this partition's transactional id: do not retry."""


class Handler(Protocol):
    """Applies the batches of one topic to the store.

    fences:        the fences of the topic's partitions
    write_behind:  effects that are written together with those of later batches; None for none
    awaits_kafka:  whether `apply_in_loop` awaits Kafka; else it blocks until the batches are
                   applied
    partition_max: the most records of one partition in a batch; None: `chunk_records_max`
    omitted:       the bad optional parts that were left out of accepted records; a repeated batch
                   counts again
    Thread rule: one thread at a time.
    """

    fences: PartitionFences
    write_behind: WriteBehind[Any] | WriteBehindGroup | None = None
    awaits_kafka: bool = False
    partition_max: int | None = None
    omitted: Omitted

    def open(self, partition: int) -> None:
        """Discard what is kept of a partition: reading starts again after its lowest fence.

        Raises KafkaUnavailable, KafkaRefused where a publisher has to be opened.
        """

    def prepare(self, partitions: Collection[int]) -> None:
        """Do what the first batch of partitions needs, once their fences are open.

        A batch does it too where this was left out. Raises Unavailable, KafkaRefused.
        """
        return None

    def apply(self, batches: Sequence[RecordBatch]) -> list[Outcome | Exception]:
        """Apply one batch each of different partitions; no effect is written twice.

        Returns one result per batch, in their order. An error concerns its batch alone: FenceMoved
        (read the partition again from its lowest fence), StoreUnavailable or KafkaUnavailable (do
        so later), and PartitionLost (another process publishes for the partition).
        """

    async def apply_in_loop(self, batches: Sequence[RecordBatch]) -> list[Outcome | Exception]:
        """`apply` in the app's event loop, for small batches."""
        return self.apply(batches)

    def apply_one(self, batch: RecordBatch) -> Outcome:
        """Apply one batch. Raises what `apply` returns."""
        [result] = self.apply([batch])
        if isinstance(result, Exception):
            raise result
        return result

    def move_fences(self, partition: int, offset: int) -> None:
        """Move every fence of the partition to `offset`: there is no record up to there.

        Raises FenceMoved, Unavailable.
        """

    def skip_empty(self, partition: int, taken: int, last: int) -> bool:
        """Move the fences over offsets without a record; False where a fence is not ready for it.

        taken: offset of the last record before them; last: the last of them
        Raises FenceMoved, Unavailable: the partition has to be opened again.
        """
        if not self.fences.can_skip(partition, taken, last):
            return False
        self.move_fences(partition, last)
        return True

    def flush_due(self, owned: Set[int]) -> int | None:
        """See `WriteBehind.flush_due`."""
        return None if self.write_behind is None else self.write_behind.flush_due(owned)

    def flush(self) -> None:
        """See `WriteBehind.flush`."""
        if self.write_behind is not None:
            self.write_behind.flush()


class DeadLetterSink(Protocol):
    """The topic of refused records. Thread rule: one batch at a time."""

    def put(self, record: Record, rejected: Rejected) -> None:
        """Queue a refused record with its reason."""

    def flush(self) -> None:
        """Return once Kafka has stored every queued record.

        Raises KafkaUnavailable after a time-out.
        """


class Forwarder(Protocol):
    """Sends a record that lies in a wrong partition to its own.

    Thread rule: one batch at a time.
    """

    def forward(self, record: Record, key: bytes, value: bytes | None, partition: int) -> None:
        """Queue the record for `partition` of its own topic, with the header `origin`.

        Its other headers are left out where it would be too large with them. Raises Rejected
        (`too_large`) where it is so without them. Where the broker refuses the size later, the
        record goes to `dead-letters`.
        """

    def flush(self) -> None:
        """Return once Kafka has stored every queued record.

        Raises KafkaUnavailable after a time-out.
        """


class ForgetSink(Protocol):
    """Appends forgotten users to `clicks`. Thread rule: one batch at a time."""

    def forget(self, record: Record, user_id: str) -> None:
        """Queue an `events.Forget` for the user's partition. record: the null record of `users`."""

    def flush(self) -> None:
        """Return once Kafka has stored every queued record.

        Raises KafkaUnavailable after a time-out.
        """


class RecordPublisher(Protocol):
    """Publishes the item records of one generation to the topic that query workers follow."""

    def open(self, partition: int) -> None:
        """Become the only writer of this partition; Kafka refuses earlier ones from here on."""

    def publish(self, records: Mapping[int, Sequence[ItemRecord]]) -> Mapping[int, EddylineError]:
        """Publish the records of each partition, all or none of them.

        Returns errors by partition: KafkaUnavailable, KafkaRefused, or PartitionLost where another
        process is the writer.
        """

    async def publish_async(
        self, records: Mapping[int, Sequence[ItemRecord]]
    ) -> Mapping[int, EddylineError]:
        """`publish`, for tasks of the event loop that `attach` named."""
        return self.publish(records)

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Use this event loop from here on; call it before `open`."""
        return None

    async def detach(self) -> None:
        """Close all producers, in the event loop that `attach` named; later calls are refused."""
        return None

    def close(self) -> None:
        """Close all producers."""
        return None
