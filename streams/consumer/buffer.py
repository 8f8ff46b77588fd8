"""The records of one topic between their fetch and their handler; batches are made here, once.

Pure data: nothing here knows a consumer. See `streams/consumer/consumer.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from aiokafka import TopicPartition

from eddyline.schema.records import Record
from streams.ports import RecordBatch

# A topic is not fetched while its buffer holds this many batches of the largest size: enough to
# keep a handler busy.
FULL_BATCHES = 8


def place_of(batch: RecordBatch) -> TopicPartition:
    """The batch's partition."""
    return TopicPartition(batch.topic, batch.partition)


@dataclass(frozen=True, slots=True)
class Fetched:
    """Consecutive records of one partition, from one fetch.

    records: at least one
    read_us: when they were fetched, microseconds since 1970
    epoch:   the partition's seek count at the fetch
    """

    records: Sequence[Record]
    read_us: int
    epoch: int


class RecordBuffer:
    """Fetched records that are not applied yet, by partition. Thread rule: the app's loop.

    topic:         the name in Kafka, prefix included
    records_max:   the most records that are applied together
    partition_max: the same for one partition; None: `records_max`
    busy:          a dispatcher takes batches, or was woken to do so
    """

    def __init__(self, topic: str, records_max: int, partition_max: int | None = None) -> None:
        self.topic = topic
        self.busy = False
        self._records_max = records_max
        self._partition_max = min(partition_max or records_max, records_max)
        self._fetched: dict[int, deque[Fetched]] = {}
        self._records = 0

    def batches(self) -> int:
        """The batches of the largest size that would hold the records. Any thread."""
        return -(-self._records // self._records_max)

    def full(self) -> bool:
        """Whether no more is to be fetched for now."""
        return self._records >= FULL_BATCHES * self._records_max

    def add(self, partition: int, fetched: Fetched) -> None:
        """Append records that follow those of the same partition and epoch."""
        self._fetched.setdefault(partition, deque()).append(fetched)
        self._records += len(fetched.records)

    def clear(self) -> None:
        """Drop everything: it is read again."""
        self._fetched.clear()
        self._records = 0

    def take(self, is_current: Callable[[TopicPartition, int], bool]) -> list[RecordBatch]:
        """Make the next batches, one of each partition, `records_max` records at most in all.

        Records of one partition from several fetches become one batch. The partitions take turns;
        one whose batch has no room waits, as a smaller batch would cost as much.
        is_current: whether records of a partition and epoch still count; others are dropped
        """
        batches: list[RecordBatch] = []
        room = self._records_max
        for partition in list(self._fetched):
            most = min(self._partition_max, self._drop_stale(partition, is_current))
            if 0 < most <= room:
                batches.append(self._take(partition, most))
                room -= most
        return batches

    def _drop_stale(self, partition: int, is_current: Callable[[TopicPartition, int], bool]) -> int:
        """Drop what is not current; how many records of the partition there are then."""
        fetched, at = self._fetched[partition], TopicPartition(self.topic, partition)
        while fetched and not is_current(at, fetched[0].epoch):
            self._records -= len(fetched.popleft().records)
        if not fetched:
            del self._fetched[partition]
        return sum(len(one.records) for one in fetched)

    def _take(self, partition: int, count: int) -> RecordBatch:
        """A batch of the partition's next records; then it is the last in turn."""
        fetched = self._fetched.pop(partition)
        taken: list[Record] = []
        while len(taken) < count:
            first = fetched.popleft()
            room = count - len(taken)
            taken += first.records[:room]
            if len(first.records) > room:
                fetched.appendleft(Fetched(first.records[room:], first.read_us, first.epoch))
        self._records -= count
        if fetched:
            self._fetched[partition] = fetched
        return RecordBatch(self.topic, partition, taken, first.read_us, first.epoch)
