"""Offsets that every reader leaves out, because an operator gave up a batch that cannot be read.

A decision is a record of the compacted topic `generations` under the key
`skip/<topic>/<partition>/<first offset>`; `eddyline dead-letters skip` writes it. All readers of a
topic leave out the same offsets, also where a later version could read them: histories, archive and
replays stay alike.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from eddyline.errors import BundleError
from eddyline.kafka.unreadable import BROKER, UnreadableBatch

log = logging.getLogger(__name__)

# No generation is called so: its name is part of a topic's name, which has no slash.
KEY_PREFIX = b"skip/"
# How often a reader with a stopped partition looks for a decision.
LOOK_S = 3.0

# (real topic name, partition)
Place = tuple[str, int]


class Skip(msgspec.Struct, frozen=True):
    """The value of a record. log: `str(LogId)`; last: the last offset that is left out."""

    log: str
    last: int
    reason: str


def key_of(topic: str, partition: int, first: int) -> bytes:
    """The key of a decision."""
    return KEY_PREFIX + f"{topic}/{partition}/{first}".encode()


def decode(records: Mapping[bytes, bytes]) -> list[tuple[str, int, int, Skip]]:
    """(topic, partition, first offset, decision) of each decision among key -> value of the topic.

    Raises BundleError for a record that cannot be decoded.
    """
    found = []
    for key, value in records.items():
        if not key.startswith(KEY_PREFIX):
            continue
        try:
            topic, partition, first = key.removeprefix(KEY_PREFIX).decode().rsplit("/", 2)
            found.append((topic, int(partition), int(first), msgspec.json.decode(value, type=Skip)))
        except ValueError as error:
            raise BundleError(f"topic generations, key {key!r}: {error}") from None
    return found


class Skips:
    """The offsets that are left out, by partition. Immutable."""

    def __init__(self, ranges: Iterable[tuple[str, int, int, int]] = ()) -> None:
        """ranges: (topic, partition, first offset, last offset)"""
        self._ranges: dict[Place, list[tuple[int, int]]] = {}
        for topic, partition, first, last in ranges:
            self._ranges.setdefault((topic, partition), []).append((first, last))

    def next_offset(self, place: Place, offset: int) -> int | None:
        """The offset after those that are left out with `offset`; None if it is not left out."""
        for first, last in self._ranges.get(place, ()):
            if first <= offset <= last:
                return last + 1
        return None

    def kept(self, place: Place, records: Sequence[Any]) -> Sequence[Any]:
        """The records without those that are left out."""
        if place not in self._ranges:
            return records
        return [r for r in records if self.next_offset(place, r.offset) is None]


@dataclass(slots=True)
class Stops:
    """Where a reader's partitions stand in front of batches that it cannot read.

    skips:   the decisions that it knows; replaced as a whole
    stopped: by partition, the batch
    Thread rule: the reader's thread writes; any thread may read.
    """

    skips: Skips = field(default_factory=Skips)
    stopped: dict[Place, UnreadableBatch] = field(default_factory=dict)
    _logged: dict[Place, int] = field(default_factory=dict)
    _look_s: float = 0.0

    def readable(self, consumer: Any, at: Place, records: Sequence[Any]) -> Sequence[Any]:
        """The fetched records that are not left out; none of a batch that cannot be read.

        Such a batch is passed where it was given up; otherwise its partition is paused.
        consumer: of kafka-python or aiokafka; at: its TopicPartition
        """
        batch = records[0]
        if not isinstance(batch, UnreadableBatch):
            return self.skips.kept(at, records)
        if (offset := self.pass_over(batch)) is None:
            consumer.pause(at)
        else:
            consumer.seek(at, offset)
        return ()

    def resume_skipped(self, consumer: Any, read: Callable[[], Skips]) -> None:
        """Every `LOOK_S`, have partitions go on whose batch was given up. read: the decisions"""
        if not self.stopped or time.monotonic() < self._look_s:
            return
        self._look_s = time.monotonic() + LOOK_S
        ahead = self.resume(read())
        for at in consumer.assignment():
            if at in ahead:
                self.clear([at])
                consumer.seek(at, ahead[at])
                consumer.resume(at)

    def pass_over(self, batch: UnreadableBatch) -> int | None:
        """Where the batch's partition goes on; None: it stops, which is logged once."""
        place = batch.topic, batch.partition
        if (offset := self.skips.next_offset(place, batch.first)) is not None:
            log.warning("offsets are left out", extra={"at": batch.at, "next": offset})
            return offset
        self.stopped[place] = batch
        if self._logged.get(place) != batch.first:
            self._logged[place] = batch.first
            log.error(str(batch))
        return None

    def resume(self, skips: Skips) -> dict[Place, int]:
        """Take new decisions. Returns the partitions that go on, and at which offset.

        An error of the broker may have passed, so such a partition tries the same offset again.
        """
        self.skips = skips
        ahead = {}
        for place, batch in self.stopped.items():
            offset = skips.next_offset(place, batch.first)
            if offset is not None or batch.reason == BROKER:
                ahead[place] = batch.first if offset is None else offset
        return ahead

    def clear(self, places: Collection[Place]) -> None:
        """These partitions are read from another position, or no longer read."""
        for place in places:
            self.stopped.pop(place, None)
