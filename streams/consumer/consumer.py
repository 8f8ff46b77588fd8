"""The chunk lane: Faust with one event for the chunks of a fetch, and the fence as the position.

Faust keeps membership, rebalance and commits; what it costs per message (some 100 µs of asyncio work) is
paid once a fetch and topic, whose runs of records by partition, the chunks, go together as a *haul*. What
leans on Faust's and aiokafka's insides is in this file and in `lane_thread.py`; both are pinned, and
`tests/unit/test_lane.py` names what is leaned on.

How a chunk stays true: whenever a partition is sought anew, in the consumer's thread, its *epoch* goes up in
the same step; records are marked with the epoch in the step that takes them from the fetcher. So whoever
holds a chunk knows whether its records come from before or after the seek, and drops an older one unacked.
Committed offsets are for watching lag, and say what was sent on before; no position is read from them.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from typing import Any, cast

import faust
from aiokafka.errors import KafkaError
from faust.tables.manager import TableManager
from faust.transport.consumer import ensure_TPset
from faust.transport.drivers import aiokafka as driver
from faust.types import TP, ConsumerMessage
from mode import get_logger

from eddyline.errors import LogMismatch, Unavailable
from streams.consumer.batching import Chunk, Fetched, Haul, split_fetched
from streams.consumer.fetch_control import InFlightBatches
from streams.consumer.thread import ConsumerThread

# Faust's services log under this name: quiet where everything of Faust is.
_logger = get_logger("faust.lane")
FAUST_VERSION, AIOKAFKA_VERSION = "0.15.3", "0.14.0"
_POLL_S = 0.25
# The same while a topic stands still because its queue is full: it may go on before another one has records.
_FULL_POLL_S = 0.01
# The first wait before a position is asked for again; it doubles up to the setting `backoff_ms_max`.
_BACKOFF_S = 0.05

Bounds = Mapping[TP, tuple[int, int]]
Positioner = Callable[[Bounds], Awaitable[Mapping[TP, int]]]


class RawSchema(faust.Schema[Any, Any]):
    """Hands a haul through as it is: decoding is the ingest functions' business."""

    def loads_key(self, app: Any, message: Any, **_: Any) -> Any:
        """No key: a haul has many."""
        return None

    def loads_value(self, app: Any, message: Any, **_: Any) -> Any:
        """The `Haul`."""
        return message.value


class _NotKept(dict[TP, int | None]):
    """Faust's read offsets, switched off: they would drop what is read again after a seek back."""

    def __getitem__(self, key: TP) -> int | None:
        return None

    def __setitem__(self, key: TP, value: int | None) -> None:
        pass

    def pop(self, key: TP, default: Any = None) -> Any:
        return default


class BatchConsumer(driver.Consumer):
    """Yields chunks; seeks to where the app's positioner says."""

    logger = _logger
    app: BatchApp
    _thread: ConsumerThread

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.epochs: defaultdict[TP, int] = defaultdict(int)
        self._shut: set[TP] = set()  # partitions whose position is being found out
        self._rewinding: defaultdict[TP, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.committed: dict[TP, int] = {}  # the highest offset that the group was told
        super().__init__(*args, **kwargs)
        self._read_offset = _NotKept()

    def _new_consumer_thread(self) -> ConsumerThread:
        return ConsumerThread(self, loop=self.loop, beacon=self.beacon)

    def is_current(self, chunk: Chunk) -> bool:
        """Whether the partition is still ours and was not sought anew since the chunk was read."""
        at = chunk.at
        fresh = at not in self._shut and self.epochs[at] == chunk.epoch
        return fresh and self._thread.owns(at)

    def unread(self, taken: Mapping[TP, int]) -> None:
        """Records of these partitions and epochs were fetched for nobody: go back to the fence."""
        lost = {at for at, epoch in taken.items() if self.epochs[at] == epoch}
        if lost and not self.should_stop:
            self.add_future(self.rewind(lost))

    def positioned(self, topic: str) -> set[int]:
        """The partitions of a topic that are ours and whose position is known."""
        if self.app.rebalancing or self._thread._consumer is None:
            return set()
        return {at.partition for at in self.assignment() - self._shut if at.topic == topic}

    def assigned(self) -> set[TP]:
        """All partitions that are ours; any thread. None before the consumer's thread has started."""
        return set() if self._thread._consumer is None else self.assignment()

    def paused(self, topic: str) -> int:
        """How many of this topic's partitions stand still until their position is known."""
        return sum(1 for at in list(self._shut) if at.topic == topic)

    def highwater_seen(self, at: TP) -> int | None:
        """The offset that the partition's next record had at the last fetch; None before the first one."""
        return self._thread.highwater_seen(at)

    def sought(self, at: TP) -> None:
        """Called by the thread in the step that seeks."""
        self.epochs[at] += 1
        self._acked.pop(at, None)
        self._committed_offset[at] = None
        self._shut.discard(at)

    async def getmany(self, timeout: float) -> AsyncIterator[tuple[TP, Any]]:
        """Fetch, and yield a message for as many chunks as have the records of one chunk together."""
        if not self.flow_active:
            await self.wait(self.can_resume_flow.wait())
        active = self._get_active_partitions() - self._shut
        if not active or self.should_stop:
            await self.sleep(0.02)
            return
        await self.app.handed.all_applied()
        limit_s = _FULL_POLL_S if self._buffered_partitions else _POLL_S
        fetched = await self._getmany(active_partitions=active, timeout=min(timeout, limit_s))
        generation, read_us = self.app.consumer_generation_id, time.time_ns() // 1_000
        for chunks in split_fetched(
            cast(Fetched, fetched), self.app.chunk_records_max, self.app.part_max, read_us
        ):
            if not self.flow_active or self.should_stop:
                return
            if self.app.consumer_generation_id != generation:
                return
            if current := tuple(chunk for chunk in chunks if self.is_current(chunk)):
                message = self._message(current)
                self.app.handed.over(message.topic)
                yield message.tp, message

    def _message(self, haul: Haul) -> ConsumerMessage:
        """A message for the whole haul. Its coordinates say nothing: chunks are acknowledged by `applied`.

        All messages of a topic are of the same partition: Faust stops what fills its queue by partition.
        """
        topic = haul[0].at.topic
        at = min(self._of_topic(topic), default=haul[0].at)
        return ConsumerMessage(
            at.topic,
            at.partition,
            0,
            haul[0].read_us / 1e6,
            1,
            [],
            None,
            cast(bytes, haul),
            None,
            None,
            None,
            at,
            generation_id=self.app.consumer_generation_id,
        )

    def applied(self, chunk: Chunk) -> None:
        """All effects of the chunk are written: what is up to its end may be committed. In the app's loop."""
        self._acked[chunk.at] = [chunk.records[-1].offset]

    def on_buffer_full(self, tp: TP) -> None:
        """Faust's queue for the topic is full: fetch no partition of it."""
        for at in self._of_topic(tp.topic):
            super().on_buffer_full(at)

    def on_buffer_drop(self, tp: TP) -> None:
        """There is room again."""
        for at in self._of_topic(tp.topic):
            super().on_buffer_drop(at)

    def _of_topic(self, topic: str) -> list[TP]:
        return [at for at in ensure_TPset(self.assignment()) if at.topic == topic]

    async def _add_gap(self, tp: TP, offset_from: int, offset_to: int) -> None:
        """No gaps: chunks of a partition are acked in order, and a chunk stands for all its offsets."""

    def _new_offset(self, tp: TP) -> int | None:
        """What may be committed: one after the last ack, for acks come in order."""
        acked = self._acked[tp]
        if not acked:
            return None
        last = acked[-1]
        acked.clear()
        return last + 1

    def verify_event_path(self, now: float, tp: TP) -> None:
        """Faust's watchdog takes an idle topic for a hanging one; the ingest log line tells more."""

    async def on_partitions_assigned(self, assigned: set[TP], generation_id: int = 0) -> None:
        """Nothing is handed out before each partition's position is known."""
        self._shut = set(assigned)
        self._buffered_partitions.clear()  # queues are cleared as well
        await super().on_partitions_assigned(assigned, generation_id)

    async def perform_seek(self) -> None:
        """After a rebalance: find out every position; in the background, so that Redis may be away.

        Topic by topic, so that clicks do not wait for the transactional producers of items.
        """
        mine = self.assignment()
        for topic in sorted({at.topic for at in mine}):
            self.add_future(self.rewind({at for at in mine if at.topic == topic}))

    async def rewind(self, partitions: set[TP]) -> None:
        """Read on at the lowest fence + 1. Waits for Redis and Kafka; ends where partitions are lost.

        One at a time for each partition. The seek of one would else open the partition between another's look
        at the fences and its seek, and what is read there does not follow the fences that were looked at: its
        effects on one slot would be written over a gap.
        """
        self._shut |= partitions
        async with AsyncExitStack() as turns:
            for at in sorted(partitions):
                await turns.enter_async_context(self._rewinding[at])
            self._shut |= partitions
            await self._rewind(partitions)

    async def _rewind(self, partitions: set[TP]) -> None:
        generation, wait_s, doubted = self.app.consumer_generation_id, _BACKOFF_S, False
        while not self.should_stop and self.app.consumer_generation_id == generation:
            mine = {at for at in partitions if at in self.assignment()}
            if not mine:
                return
            try:
                await self._thread.seek_lane(await self._positions(mine))
                return
            except (Unavailable, KafkaError, TimeoutError) as error:
                self.app.waiting(error, wait_s)
            except LogMismatch as error:
                # The owner before us may have moved a fence beyond the end that was asked for before it.
                if doubted:
                    self.app.fail(error)
                    return
                doubted = True
            except Exception as error:
                self.app.fail(error)
                return
            await self.sleep(wait_s)
            wait_s = min(2 * wait_s, self.app.backoff_s_max)

    def committed_of(self, topic: str) -> dict[int, int]:
        """By partition, below which offset the group has told that everything is applied."""
        return {at.partition: offset for at, offset in self.committed.items() if at.topic == topic}

    async def _positions(self, partitions: set[TP]) -> Mapping[TP, int]:
        limit_s = self.app.conf.broker_request_timeout
        found = await asyncio.wait_for(self._thread.read_committed(partitions), limit_s)
        for at, offset in found.items():
            self.committed[at] = max(offset, self.committed.get(at, 0))
        begins = await asyncio.wait_for(self.earliest_offsets(*partitions), limit_s)
        ends = await asyncio.wait_for(self.highwaters(*partitions), limit_s)
        positioner: Positioner = self.app.positioner
        return await positioner({at: (begins[at], ends[at]) for at in partitions})


class BatchTransport(driver.Transport):
    """Names the consumer."""

    Consumer = BatchConsumer


class NoTables(TableManager):
    """Faust's tables, of which there are none: without the second that it waits for them at every start."""

    logger = _logger

    async def on_start(self) -> None:
        """Go on at once."""
        await self._update_channels()
        await self.recovery.start()


class BatchApp(faust.App):
    """A Faust app on the chunk lane.

    positioner:        (begin, end) of partitions -> where to read on; may raise Unavailable
    chunk_records_max: the most records of a chunk
    part_max:          topic -> the same for its chunks, where it is less
    backoff_s_max:     the longest wait for a server that is away
    small_max:         after a fetch of more records the next one is sent at once
    handed:            what is fetched next waits for it
    waiting:           told of every wait: the error and the seconds
    fail:              told of an error that ends the process
    giving_up:         called after the last chunk in work, before partitions are given up; takes a limit in s
    """

    logger = _logger

    def __init__(
        self,
        *args: Any,
        positioner: Positioner,
        chunk_records_max: int,
        part_max: Mapping[str, int],
        backoff_s_max: float,
        small_max: int,
        waiting: Callable[[Exception, float], None],
        fail: Callable[[Exception], None],
        giving_up: Callable[[float], Awaitable[None]],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, TableManager=NoTables, **kwargs)
        self.positioner = positioner
        self.chunk_records_max = chunk_records_max
        self.part_max = part_max
        self.backoff_s_max = backoff_s_max
        self.small_max = small_max
        self.handed = InFlightBatches()
        self.waiting = waiting
        self.fail = fail
        self.giving_up = giving_up
        self._chunks_in_work = 0

    @property
    def lane(self) -> BatchConsumer:
        """The consumer."""
        return cast(BatchConsumer, self.consumer)

    def _new_transport(self) -> BatchTransport:
        return BatchTransport(self.conf.broker_consumer, self)

    async def work(self, chunk: Awaitable[Any]) -> Any:
        """Await a chunk's work so that a stop or a rebalance waits for it."""
        self._chunks_in_work += 1
        try:
            return await chunk
        finally:
            self._chunks_in_work -= 1

    async def settle(self, limit_s: float) -> None:
        """Wait until no chunk is in work, at most so long. Queued chunks have to be cleared before."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + limit_s
        while self._chunks_in_work and clock() < deadline:
            await asyncio.sleep(0.005)

    async def _consumer_wait_empty(self, consumer: Any, logger: Any) -> None:
        """Called with queues cleared, before partitions are given up: the chunk in work ends first."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + self.conf.broker_session_timeout / 2
        await self.settle(deadline - clock())
        await self.giving_up(max(0.0, deadline - clock()))
