"""Faust with one event for the batches of a fetch, and the fence as the position.

Faust keeps membership, rebalance and commits. Its cost per message (some 100 µs of asyncio work) is
paid once per fetch and topic: one message carries a group of batches. Faust's private
members are used in this file and, of its consumer thread, in `thread.py`. Faust is pinned, and
`tests/unit/streams/test_consumer.py` names what is used.

Whenever a partition is sought, in the consumer's thread, its *epoch* increases in the same step;
records carry the epoch of the step that takes them from the fetcher. So the epoch of a batch shows
whether its records come from before or after the seek; older ones are dropped without an ack.
Committed offsets show the lag, and up to where records were forwarded; no position is read from
them.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any, Protocol, TypeVar, cast

import faust
from aiokafka.errors import KafkaError
from faust.tables.manager import TableManager
from faust.transport.consumer import ensure_TPset
from faust.transport.drivers import aiokafka as driver
from faust.types import TP, ConsumerMessage
from mode import get_logger
from typing_extensions import override

from eddyline.errors import LogMismatch, Unavailable
from eddyline.process.retry import Backoff
from streams.consumer.batching import Fetched, place_of, split_fetched
from streams.consumer.in_flight import InFlightBatches
from streams.consumer.thread import ConsumerThread, EmptyTail
from streams.ports import RecordBatch

# Faust's services log under this name: quiet where everything of Faust is.
_logger = get_logger("faust.batches")
FAUST_VERSION = "0.15.3"
_POLL_S = 0.25
# The same while a topic's queue is full: it may have room again before another topic has records.
_FULL_POLL_S = 0.01
# The first pause before a position is looked up again; it doubles up to the setting
# `backoff_ms_max`.
_BACKOFF_S = 0.05

Bounds = Mapping[TP, tuple[int, int]]
_T = TypeVar("_T")


class ConsumerOwner(Protocol):
    """What the consumer needs of its process; `streams.app.IngestApp` is one. In the app's loop."""

    async def position(self, bounds: Bounds) -> Mapping[TP, int]:
        """Where to read on.

        bounds: (begin, end) of partitions. May raise Unavailable, LogMismatch.
        """

    def report_wait(self, error: Exception, wait_s: float) -> None:
        """The consumer or a dispatcher waits for a server."""

    def end(self, error: Exception | None) -> None:
        """End the process: None for an intended stop, else the error."""

    async def flush(self, limit_s: float) -> None:
        """Write all pending effects within the limit: partitions are about to be revoked."""


class RawSchema(faust.Schema[Any, Any]):
    """Passes the batches through unchanged: the handlers decode."""

    @override
    def loads_key(self, app: Any, message: Any, **_: Any) -> Any:
        return None

    @override
    def loads_value(self, app: Any, message: Any, **_: Any) -> Any:
        return message.value


class _NotKept(dict[TP, int | None]):
    """Faust's read offsets, switched off: Faust would drop records that are read again."""

    @override
    def __getitem__(self, key: TP) -> int | None:
        return None

    @override
    def __setitem__(self, key: TP, value: int | None) -> None:
        pass

    @override
    def pop(self, key: TP, default: Any = None) -> Any:
        return default


class BatchConsumer(driver.Consumer):
    """Yields groups of batches; seeks to the owner's positions."""

    logger = _logger
    app: BatchApp
    _thread: ConsumerThread

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.epochs: defaultdict[TP, int] = defaultdict(int)
        self.taken: dict[TP, int] = {}
        self.committed: dict[TP, int] = {}  # the highest offset that the group has committed
        self._unpositioned: set[TP] = set()
        self._rewinding: defaultdict[TP, asyncio.Lock] = defaultdict(asyncio.Lock)
        super().__init__(*args, **kwargs)
        self.small_max = self.app.small_max
        self._read_offset = _NotKept()

    @override
    def _new_consumer_thread(self) -> ConsumerThread:
        return ConsumerThread(self, loop=self.loop, beacon=self.beacon)

    # --- what is owned, and where it stands

    def is_current(self, batch: RecordBatch) -> bool:
        """Whether the partition is still assigned and was not sought since the batch was read."""
        at = place_of(batch)
        positioned = at not in self._unpositioned and self.epochs[at] == batch.epoch
        return positioned and self._thread.owns(at)

    def positioned(self, topic: str) -> set[int]:
        """The partitions of a topic that are assigned to this process and have a position."""
        if self.app.rebalancing or not self._thread.has_consumer():
            return set()
        return {at.partition for at in self.assignment() - self._unpositioned if at.topic == topic}

    def assigned(self) -> set[TP]:
        """All assigned partitions; none before the thread has started. Any thread."""
        return self.assignment() if self._thread.has_consumer() else set()

    def paused(self, topic: str) -> int:
        """How many partitions of this topic stand still until their position is known."""
        return sum(1 for at in list(self._unpositioned) if at.topic == topic)

    def highwater_seen(self, at: TP) -> int | None:
        """See `ConsumerThread.highwater_seen`."""
        return self._thread.highwater_seen(at)

    def committed_of(self, topic: str) -> dict[int, int]:
        """By partition, the offset that the group has committed."""
        return {at.partition: offset for at, offset in self.committed.items() if at.topic == topic}

    def fetching_ended(self) -> bool:
        """See `ConsumerThread.fetching_ended`."""
        return self._thread.fetching_ended()

    async def empty_tails(self, topic: str) -> dict[int, EmptyTail]:
        """By partition of a topic that has a position: the offsets at its end without a record."""
        mine, tails = self.positioned(topic), await self._thread.read_empty_tails()
        return {
            at.partition: tail
            for at, tail in tails.items()
            if at.topic == topic and at.partition in mine and tail.epoch == self.epochs[at]
        }

    async def check_group(self) -> None:
        """See `ConsumerThread.check_group`."""
        await self._thread.check_group()

    # --- fetching

    @override
    async def getmany(self, timeout: float) -> AsyncIterator[tuple[TP, Any]]:
        """Fetch, and yield one message for each group of batches."""
        if not self.flow_active:
            await self.wait(self.can_resume_flow.wait())
        active = self._get_active_partitions() - self._unpositioned
        if not active or self.should_stop:
            await self.sleep(0.02)
            return
        await self.app.in_flight.wait()
        limit_s = _FULL_POLL_S if self._buffered_partitions else _POLL_S
        fetched = await self._getmany(active_partitions=active, timeout=min(timeout, limit_s))
        generation, read_us = self.app.consumer_generation_id, time.time_ns() // 1_000
        for batches in split_fetched(
            cast(Fetched, fetched), self.app.chunk_records_max, self.app.partition_max, read_us
        ):
            if not self.flow_active or self.should_stop:
                return
            if self.app.consumer_generation_id != generation:
                return
            if current := [batch for batch in batches if self.is_current(batch)]:
                message = self._message(current)
                self.app.in_flight.sent(message.topic)
                yield message.tp, message

    def _message(self, batches: Sequence[RecordBatch]) -> ConsumerMessage:
        """A message with all batches. Its coordinates mean nothing: `applied` acknowledges batches.

        All messages of a topic name the same partition: Faust limits its queue by partition.
        """
        topic, partition = batches[0].topic, batches[0].partition
        at = min(self._of_topic(topic), default=TP(topic, partition))
        return ConsumerMessage(
            at.topic,
            at.partition,
            0,
            batches[0].read_us / 1e6,
            1,
            [],
            None,
            cast(bytes, batches),
            None,
            None,
            None,
            at,
            generation_id=self.app.consumer_generation_id,
        )

    @override
    def on_buffer_full(self, tp: TP) -> None:
        """Faust's queue for the topic is full: fetch no partition of it."""
        for at in self._of_topic(tp.topic):
            super().on_buffer_full(at)

    @override
    def on_buffer_drop(self, tp: TP) -> None:
        """The queue has room again."""
        for at in self._of_topic(tp.topic):
            super().on_buffer_drop(at)

    def _of_topic(self, topic: str) -> list[TP]:
        return [at for at in ensure_TPset(self.assignment()) if at.topic == topic]

    # --- acknowledging

    def applied(self, batch: RecordBatch) -> None:
        """All effects of the batch are written: its end may be committed. In the app's loop."""
        self._acked[place_of(batch)] = [batch.last]

    def skipped(self, at: TP, tail: EmptyTail) -> None:
        """The fences have passed the empty tail: its end may be committed. In the app's loop."""
        if self.epochs[at] == tail.epoch:
            self._acked[at] = [tail.position - 1]

    @override
    async def _add_gap(self, tp: TP, offset_from: int, offset_to: int) -> None:
        """No gaps: batches of a partition are acknowledged in order, each with all its offsets."""

    @override
    def _new_offset(self, tp: TP) -> int | None:
        """The offset to commit: one after the last ack, as acks come in order."""
        acked = self._acked[tp]
        if not acked:
            return None
        last = acked[-1]
        acked.clear()
        return last + 1

    @override
    def verify_event_path(self, now: float, tp: TP) -> None:
        """Faust's watchdog takes an idle topic for a hanging one; the ingest log line says more."""

    # --- positions

    @override
    async def on_partitions_assigned(self, assigned: set[TP], generation_id: int = 0) -> None:
        """No partition is read before its position is known."""
        self._unpositioned = set(assigned)
        self._buffered_partitions.clear()  # queues are cleared as well
        await super().on_partitions_assigned(assigned, generation_id)

    @override
    async def perform_seek(self) -> None:
        """After a rebalance: find every position; in the background, as Redis may be away.

        Topic by topic, so that clicks do not wait for the transactional producers of items.
        """
        mine = self.assignment()
        for topic in sorted({at.topic for at in mine}):
            self.add_future(self.rewind({at for at in mine if at.topic == topic}))

    async def rewind(self, partitions: set[TP]) -> None:
        """Read on at the lowest fence + 1. Waits for Redis and Kafka; returns where partitions are
        lost.

        One at a time for each partition. Otherwise the seek of one would open the partition between
        another's reading of the fences and its seek. The batches read there do not follow those
        fences: their effects on one slot would be written over a gap.
        """
        self._unpositioned |= partitions
        async with AsyncExitStack() as locks:
            for at in sorted(partitions):
                await locks.enter_async_context(self._rewinding[at])
            self._unpositioned |= partitions
            await self._rewind(partitions)

    async def _rewind(self, partitions: set[TP]) -> None:
        generation, mismatches = self.app.consumer_generation_id, 0
        backoff = Backoff(_BACKOFF_S, self.app.backoff_s_max)
        while not self.should_stop and self.app.consumer_generation_id == generation:
            mine = {at for at in partitions if at in self.assignment()}
            if not mine:
                return
            wait_s = backoff.next_s()
            try:
                await self._thread.seek_to(await self._positions(mine))
                return
            except (Unavailable, KafkaError, TimeoutError) as error:
                self.app.owner.report_wait(error, wait_s)
            except LogMismatch as error:
                # The previous owner may have moved a fence beyond the end that was read before it.
                mismatches += 1
                if mismatches > 1:
                    self.app.owner.end(error)
                    return
            except Exception as error:
                self.app.owner.end(error)
                return
            await self.sleep(wait_s)

    async def _positions(self, partitions: set[TP]) -> Mapping[TP, int]:
        limit_s = self.app.conf.broker_request_timeout
        found = await asyncio.wait_for(self._thread.read_committed(partitions), limit_s)
        for at, offset in found.items():
            self.committed[at] = max(offset, self.committed.get(at, 0))
        begins = await asyncio.wait_for(self.earliest_offsets(*partitions), limit_s)
        ends = await asyncio.wait_for(self.highwaters(*partitions), limit_s)
        return await self.app.owner.position({at: (begins[at], ends[at]) for at in partitions})

    def sought(self, at: TP) -> None:
        """See `ThreadOwner.sought`."""
        self.epochs[at] += 1
        self._acked.pop(at, None)
        self._committed_offset[at] = None
        self._unpositioned.discard(at)

    def unread(self, taken: Mapping[TP, int]) -> None:
        """See `ThreadOwner.unread`: go back to the fence."""
        lost = {at for at, epoch in taken.items() if self.epochs[at] == epoch}
        if lost and not self.should_stop:
            self.add_future(self.rewind(lost))


class BatchTransport(driver.Transport):
    """Names the consumer."""

    Consumer = BatchConsumer


class NoTables(TableManager):
    """No tables: without the second that Faust waits for them at every start."""

    logger = _logger

    @override
    async def on_start(self) -> None:
        await self._update_channels()
        await self.recovery.start()


class BatchApp(faust.App):
    """A Faust app whose events are groups of batches.

    chunk_records_max: the most records that are applied together
    partition_max:     topic -> the same for one partition, where it is less
    backoff_s_max:     the longest pause before a retry
    small_max:         after a fetch of more records aiokafka reads ahead
    in_flight:         small batches that the next fetch waits for
    """

    logger = _logger

    def __init__(
        self,
        *args: Any,
        owner: ConsumerOwner,
        chunk_records_max: int,
        partition_max: Mapping[str, int],
        backoff_s_max: float,
        small_max: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, TableManager=NoTables, **kwargs)
        self.owner = owner
        self.chunk_records_max = chunk_records_max
        self.partition_max = partition_max
        self.backoff_s_max = backoff_s_max
        self.small_max = small_max
        self.in_flight = InFlightBatches()
        self._tracked = 0

    @property
    def batches(self) -> BatchConsumer:
        """The consumer."""
        return cast(BatchConsumer, self.consumer)

    @property
    def has_consumer(self) -> bool:
        """Whether the consumer was made; `batches` would make it, in the calling thread."""
        return self._consumer is not None

    async def wait_crashed(self) -> Exception:
        """Wait until a service of Faust's crashes. Returns the error."""
        await self._crashed.wait()
        reason = self.crash_reason
        return reason if isinstance(reason, Exception) else RuntimeError(f"Faust: {reason!r}")

    async def track(self, work: Awaitable[_T]) -> _T:
        """Await the application of batches; a stop and a rebalance wait for it."""
        self._tracked += 1
        try:
            return await work
        finally:
            self._tracked -= 1

    async def wait_idle(self, limit_s: float) -> None:
        """Wait until no batch is being applied, at most so long.

        Queued batches are cleared before.
        """
        clock = asyncio.get_running_loop().time
        deadline = clock() + limit_s
        while self._tracked and clock() < deadline:
            await asyncio.sleep(0.005)

    @override
    def _new_transport(self) -> BatchTransport:
        return BatchTransport(self.conf.broker_consumer, self)

    @override
    async def _consumer_wait_empty(self, consumer: Any, logger: Any) -> None:
        """Finish the running batches, then flush, before partitions are revoked."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + self.conf.broker_session_timeout / 2
        await self.wait_idle(deadline - clock())
        await self.owner.flush(max(0.0, deadline - clock()))
