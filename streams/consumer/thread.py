"""The thread that owns aiokafka's consumer: it fetches, seeks, commits and follows the group.

It has an event loop of its own, so heartbeats continue whatever the app's loop does. aiokafka's
private members are used through `eddyline/kafka/aiokafka_internals.py` alone (ADR 18).

Whenever a partition is sought its *epoch* increases, in the same step; records carry the epoch of
the step that takes them from aiokafka. So the epoch of a batch shows whether its records come from
before or after the seek; older ones are dropped without an ack.
"""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import KafkaError, NoOffsetForPartitionError, OffsetOutOfRangeError
from aiokafka.structs import ConsumerRecord, OffsetAndMetadata
from mode import get_logger
from typing_extensions import override

from eddyline.kafka import aiokafka_decoding, aiokafka_internals
from eddyline.kafka.aiokafka_internals import FetchGate
from eddyline.kafka.skips import Skips, Stops

# Faust's services log under this name: quiet where everything of Faust is.
_logger = get_logger("faust.batches")
_T = TypeVar("_T")
aiokafka_decoding.install()


@dataclass(frozen=True, slots=True)
class EmptyTail:
    """Offsets without a record: transaction markers, or what compaction or an abort removed.

    epoch:    the partition's seek count
    taken:    offset of the last record that was taken since that seek; before the first one, the
              sought offset minus one
    position: the next offset to fetch; no record lies between `taken` and it
    """

    epoch: int
    taken: int
    position: int


@dataclass(frozen=True, slots=True)
class Fetch:
    """What one fetch returned.

    records: by partition, with the epoch of the records
    lost:    partitions, with their epoch, whose position is not in the log
    """

    records: Mapping[TopicPartition, tuple[int, list[ConsumerRecord]]]
    lost: Mapping[TopicPartition, int]


class ThreadOwner(Protocol):
    """What the thread reports to; `streams.consumer.consumer.LogConsumer` is one."""

    async def release(self) -> Mapping[TopicPartition, int]:
        """Partitions are about to be revoked: stop work. Returns the offsets to commit.

        In the app's loop; within the session time-out.
        """

    def assigned(self) -> None:
        """A rebalance has ended; no partition has a position. In the app's loop."""


class ConsumerThread(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka has no types
    """Runs one consumer in a thread. Methods are for the app's loop, unless they say otherwise.

    make:       makes the consumer, in the thread's loop
    small_max:  after a fetch of more records aiokafka reads ahead
    request_s:  the limit of a request to Kafka
    epochs:     by partition, the number of seeks; changes in the thread's loop only
    positioned: the partitions that were sought since the last rebalance, and not lost since
    committed:  by partition, the highest offset that the group has committed
    stops:      partitions that stand in front of a batch that cannot be read; they are paused
    """

    _loop: asyncio.AbstractEventLoop
    _app_loop: asyncio.AbstractEventLoop

    def __init__(
        self,
        make: Callable[[], AIOKafkaConsumer],
        topics: Collection[str],
        owner: ThreadOwner,
        small_max: int,
        request_s: float,
    ) -> None:
        self.epochs: defaultdict[TopicPartition, int] = defaultdict(int)
        self.positioned: set[TopicPartition] = set()
        self.committed: dict[TopicPartition, int] = {}
        self.stops = Stops()
        self._make = make
        self._topics = topics
        self._owner = owner
        self._small_max = small_max
        self._request_s = request_s
        self._taken: dict[TopicPartition, int] = {}
        self._consumer: AIOKafkaConsumer | None = None
        self._gate: FetchGate | None = None
        self._thread = threading.Thread(target=self._run, name="kafka_consumer", daemon=True)

    # --- start and stop

    async def start(self) -> None:
        """Start the consumer and join the group. Raises KafkaError where Kafka is away."""
        self._loop, self._app_loop = asyncio.new_event_loop(), asyncio.get_running_loop()
        self._thread.start()
        await self._call(self._start())

    async def stop(self) -> None:
        """Leave the group, so that others take over at once, and end the thread."""
        if not self._thread.is_alive():
            return
        if self._consumer is not None:
            await self._call(self._stop(self._consumer))
        self._loop.call_soon_threadsafe(self._loop.stop)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.close()

    async def _start(self) -> None:
        consumer = self._consumer = self._make()
        consumer.subscribe(self._topics, listener=self)
        try:
            await consumer.start()  # the first rebalance happens meanwhile
        except BaseException:
            self._consumer = None
            await consumer.stop()
            raise

    async def _stop(self, consumer: AIOKafkaConsumer) -> None:
        aiokafka_internals.leave_at_stop(consumer)
        await consumer.stop()

    async def _call(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine in the thread's loop."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    @property
    def _started(self) -> AIOKafkaConsumer:
        assert self._consumer is not None, "not started"
        return self._consumer

    # --- the group

    @override
    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        """Let the app end its work and commit it. In the thread's loop."""
        released = asyncio.run_coroutine_threadsafe(self._owner.release(), self._app_loop)
        try:
            async with asyncio.timeout(self._request_s):
                offsets = await asyncio.wrap_future(released)
                await self._commit(offsets)
        except TimeoutError:
            _logger.warning("a rebalance did not wait longer for the running batches")
        self.positioned.clear()

    @override
    def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        """No partition is read before its position is known. In the thread's loop."""
        self.positioned.clear()
        self.stops.clear(list(self.stops.stopped))
        self._app_loop.call_soon_threadsafe(self._owner.assigned)

    def assignment(self) -> set[TopicPartition]:
        """All assigned partitions; none before the start. Any thread."""
        return set() if self._consumer is None else set(self._consumer.assignment())

    async def check_group(self) -> None:
        """Raise the KafkaError that ended the work in the consumer group, if any."""
        if self._consumer is not None:
            await self._call(self._check_group(self._consumer))

    async def _check_group(self, consumer: AIOKafkaConsumer) -> None:
        aiokafka_internals.check_group(consumer)

    def fetching_ended(self) -> bool:
        """Whether aiokafka has stopped to fetch: an error of its own ends that silently.

        Any thread.
        """
        return self._consumer is not None and aiokafka_internals.fetching_ended(self._consumer)

    # --- fetching

    async def fetch(self, partitions: Collection[TopicPartition], wait_s: float) -> Fetch:
        """Take records of these partitions, one at least; wait for them at most so long.

        Raises KafkaError where the work in the group has ended.
        """
        return await self._call(self._fetch(partitions, wait_s))

    async def _fetch(self, partitions: Collection[TopicPartition], wait_s: float) -> Fetch:
        epochs = self.epochs
        gate = self._gate = self._gate or FetchGate(self._started)
        gate.open()
        try:
            records = await self._started.getmany(*partitions, timeout_ms=int(wait_s * 1000))
        except (OffsetOutOfRangeError, NoOffsetForPartitionError) as error:
            named = error.args[0]
            lost = map(TopicPartition._make, named if isinstance(named, dict) else [named])
            return Fetch({}, {at: epochs[at] for at in lost})
        readable = self.stops.readable
        records = {
            at: kept
            for at, taken in records.items()
            if (kept := list(readable(self._started, at, taken)))
        }
        for at, taken in records.items():
            self._taken[at] = taken[-1].offset
        if records and sum(map(len, records.values())) <= self._small_max:
            gate.hold()
        return Fetch({at: (epochs[at], taken) for at, taken in records.items()}, {})

    async def resume(self, skips: Skips) -> None:
        """Take new decisions; partitions whose batch was given up go on behind it."""
        await self._call(self._resume(skips))

    async def _resume(self, skips: Skips) -> None:
        mine = self.assignment()
        for place, offset in self.stops.resume(skips).items():
            at = TopicPartition(*place)
            if at in mine:
                self._started.seek(at, offset)
                self._unstop(at)

    def _unstop(self, at: TopicPartition) -> None:
        if at in self.stops.stopped:
            self.stops.clear([at])
            self._started.resume(at)

    def highwater_seen(self, at: TopicPartition) -> int | None:
        """The partition's end at the last fetch; None where it is not assigned or unknown.

        Any thread.
        """
        try:
            return None if self._consumer is None else self._consumer.highwater(at)
        except (AssertionError, AttributeError):  # not assigned, or no longer by now
            return None

    async def read_empty_tails(self) -> dict[TopicPartition, EmptyTail]:
        """The partitions whose position is more than one offset after the last record taken."""
        return {} if self._consumer is None else await self._call(self._read_empty_tails())

    async def _read_empty_tails(self) -> dict[TopicPartition, EmptyTail]:
        tails: dict[TopicPartition, EmptyTail] = {}
        for at, position in aiokafka_internals.positions(self._started).items():
            taken = self._taken.get(at)
            if taken is not None and position > taken + 1:
                tails[at] = EmptyTail(self.epochs[at], taken, position)
        return tails

    # --- positions

    async def seek_to(self, offsets: Mapping[TopicPartition, int]) -> None:
        """Read on at these offsets; partitions that were lost meanwhile are skipped."""
        await self._call(self._seek_to(offsets))

    async def _seek_to(self, offsets: Mapping[TopicPartition, int]) -> None:
        mine = self.assignment()
        for at, offset in offsets.items():
            if at in mine:
                self._started.seek(at, offset)
                self._unstop(at)
                self._taken[at] = offset - 1
                self.epochs[at] += 1
                self.positioned.add(at)

    async def ends(self, partitions: Collection[TopicPartition]) -> dict[TopicPartition, int]:
        """The offset after the last record of each partition. Raises KafkaError."""
        return await self._call(self._started.end_offsets(list(partitions)))

    async def begins(self, partitions: Collection[TopicPartition]) -> dict[TopicPartition, int]:
        """The first offset that each partition's log still has. Raises KafkaError."""
        return await self._call(self._started.beginning_offsets(list(partitions)))

    async def read_committed(
        self, partitions: Collection[TopicPartition]
    ) -> dict[TopicPartition, int]:
        """The offsets that the group has committed; partitions without one are absent."""
        found = await self._call(aiokafka_internals.committed(self._started, list(partitions)))
        for at, offset in found.items():
            self.committed[at] = max(offset, self.committed.get(at, 0))
        return found

    async def commit(self, offsets: Mapping[TopicPartition, int]) -> bool:
        """Commit, for those who observe the lag. False where Kafka did not: it is no error.

        An offset never goes back: records that are read again, as Redis was emptied, were forwarded
        before.
        """
        return self._consumer is None or await self._call(self._commit(offsets))

    async def _commit(self, offsets: Mapping[TopicPartition, int]) -> bool:
        mine, before = self.assignment(), self.committed
        higher = {
            at: offset
            for at, offset in offsets.items()
            if at in mine and offset > before.get(at, -1)
        }
        if not higher:
            return True
        commits = {at: OffsetAndMetadata(offset, "") for at, offset in higher.items()}
        try:
            await asyncio.wait_for(self._started.commit(commits), self._request_s)
        except (KafkaError, TimeoutError) as error:
            _logger.info("offsets not committed, the fences stand: %r", error)
            return False
        before.update(higher)
        return True
