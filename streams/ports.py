"""What the ingest functions take and give: records, outcomes, and the ports to Kafka.

A chunk is a run of consecutive records of one partition. Its effects on one slot are one fenced write.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from eddyline.errors import EddylineError, Rejected
from eddyline.schema.events import Item
from eddyline.schema.item_record import ItemRecord

# Kafka allows a header without a value.
Headers = Sequence[tuple[str, bytes | None]]
Vectors = npt.NDArray[np.float32]


class Record(Protocol):
    """One record of a log, as aiokafka hands it over. timestamp: the broker's clock, milliseconds."""

    @property
    def topic(self) -> str:
        """The real name of its topic."""

    @property
    def partition(self) -> int:
        """Its partition."""

    @property
    def offset(self) -> int:
        """Its offset."""

    @property
    def timestamp(self) -> int:
        """The broker's clock when it was appended, milliseconds."""

    @property
    def key(self) -> bytes | None:
        """Its key as sent."""

    @property
    def value(self) -> bytes | None:
        """Its value as sent; null is None."""

    @property
    def headers(self) -> Headers:
        """Names and bytes; None is allowed for a value."""


@dataclass(frozen=True, slots=True)
class RecordBatch:
    """One chunk, as an ingest function takes it. read_us: when it was read, microseconds since 1970."""

    partition: int
    records: Sequence[Record]
    read_us: int


class PartitionLost(EddylineError):
    """Another process has taken over this partition's transactional id: stop writing, do not retry."""


class DeadLetterSink(Protocol):
    """Where refused records go. Thread rule: one chunk at a time."""

    def put(self, record: Record, rejected: Rejected) -> None:
        """Queue a refused record with its reason."""

    def flush(self) -> None:
        """Return once everything queued is stored; raise KafkaUnavailable where that takes too long."""


class Forwarder(Protocol):
    """Sends a record that lies in the wrong partition to its own. Thread rule: one chunk at a time."""

    def forward(self, record: Record, key: bytes, value: bytes, partition: int) -> None:
        """Queue the record for `partition` of its own topic, with the header `origin`."""

    def flush(self) -> None:
        """Return once everything queued is stored; raise KafkaUnavailable where that takes too long."""


class ForgetSink(Protocol):
    """Tells `clicks` of forgotten users. Thread rule: one chunk at a time."""

    def forget(self, record: Record, user_id: str) -> None:
        """Queue an `events.Forget` for the user's partition. record: the null record of `users`."""

    def flush(self) -> None:
        """Return once everything queued is stored; raise KafkaUnavailable where that takes too long."""


class RecordPublisher(Protocol):
    """Publishes item records to the topic that query workers follow."""

    def open(self, partition: int) -> None:
        """Become the one writer of this partition; an older one is refused from here on."""

    def publish(self, records: Mapping[int, Sequence[ItemRecord]]) -> Mapping[int, EddylineError]:
        """Publish those of each partition, all or none of them.

        Returns why not, by partition, where they were not: KafkaUnavailable, KafkaRefused, or PartitionLost
        where another one is the writer.
        """


class ItemEncoder(Protocol):
    """The item tower. known or cold, an item gets a unit vector."""

    def encode(self, items: Sequence[Item]) -> Vectors:
        """float32 (n, d), unit norm."""


class UserEncoder(Protocol):
    """The user tower: what a user did, and who he is, as a vector."""

    @property
    def history_max(self) -> int:
        """How many of the newest items it looks at."""

    def encode(
        self,
        table: Vectors,
        histories: Sequence[Sequence[int]],
        profiles: Sequence[Mapping[str, object]],
    ) -> Vectors:
        """float32 (n, d) of n histories, each of rows of the table, newest first."""


class Stepper(Protocol):
    """The micro-step of user-ID embeddings."""

    @property
    def min_steps_before(self) -> int:
        """A user's first so many events only count."""

    def step(
        self,
        forward: Vectors,
        embedding: Vectors,
        targets: Sequence[int],
        event_keys: Sequence[str],
    ) -> Vectors:
        """The new embeddings, float32 (n, d), of n different users; targets are rows of the catalogue."""


class Towers(Protocol):
    """What ingest needs of a generation bundle; `embeddings.bundle.bundle.Bundle` has it."""

    @property
    def generation(self) -> str:
        """The generation's id."""

    @property
    def dimension(self) -> int:
        """d, the length of every vector."""

    @property
    def item_tower(self) -> ItemEncoder:
        """Items to vectors."""

    @property
    def user_tower(self) -> UserEncoder:
        """Users to vectors."""

    @property
    def micro(self) -> Stepper:
        """The micro-step."""

    @property
    def item_vectors(self) -> Vectors:
        """float32 (n, d), unit norm: the catalogue."""

    @property
    def rows(self) -> Mapping[str, int]:
        """Item id -> the item's row in `item_vectors`."""


@dataclass(slots=True)
class Outcome:
    """What became of a chunk. Counts are of records.

    records:    handed in
    applied:    accepted and written (clicks, items or profiles)
    duplicates: re-sent events that were dropped
    rejected:   gone to dead-letters
    forwarded:  sent on to their own partition: strays, and what a merge moves (one for each event moved)
    steps:      micro-steps taken
    late:       applied, but too late for their user's list
    repeated:   at or below a fence: applied before, skipped for that slot
    """

    records: int = 0
    applied: int = 0
    duplicates: int = 0
    rejected: int = 0
    forwarded: int = 0
    steps: int = 0
    late: int = 0
    repeated: int = 0

    def add(self, other: Outcome) -> None:
        """Add another chunk's counts to these."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def less(self, other: Outcome) -> Outcome:
        """What has come since these were `other`."""
        return Outcome(**{name: getattr(self, name) - getattr(other, name) for name in _COUNTS})

    def counts(self) -> dict[str, Any]:
        """The counts by name, for a log line."""
        return {name: getattr(self, name) for name in _COUNTS}


_COUNTS = tuple(f.name for f in fields(Outcome))
