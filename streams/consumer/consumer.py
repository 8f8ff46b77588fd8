"""The consumer service: records from Kafka into buffers, and the fence as the position.

It is a service beside Faust's agents: the app starts, supervises and stops it. Faust's own consumer
is off, as it pays some 100 µs of asyncio work for each record. This one pays once per fetch:
records go into one buffer for each topic (`streams/consumer/buffer.py`), and an agent is woken to
take batches.

Committed offsets show the lag, and up to where records were forwarded; no position is read from
them. `streams/consumer/thread.py` explains epochs.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import AsyncExitStack
from typing import Any, Protocol

from aiokafka import TopicPartition
from aiokafka.coordinator.assignors.range import RangePartitionAssignor
from aiokafka.errors import ConsumerStoppedError, KafkaError
from mode import Service, get_logger
from typing_extensions import override

from eddyline.errors import LogMismatch, Unavailable
from eddyline.kafka import security
from eddyline.kafka.skips import LOOK_S, Skips
from eddyline.kafka.unreadable import UnreadableBatch
from eddyline.process.retry import Backoff
from eddyline.settings.loader import Settings
from streams.consumer.buffer import Fetched, RecordBuffer, place_of
from streams.consumer.thread import ConsumerThread, EmptyTail, ThreadOwner
from streams.ports import RecordBatch

# The shortest session that Kafka's default settings allow: a dead process's partitions move after
# it.
SESSION_S = 6.0
# A member learns of a rebalance by its next heartbeat: this is most of the pause when a process
# leaves.
HEARTBEAT_S = 0.5
_COMMIT_S = 1.0
# Waiting for a server that is away does not make this process a dead member; only a lost heartbeat
# does.
_POLL_INTERVAL_S = 86_400.0
# How long one fetch waits for the first record, at the broker and here. A seek waits for the
# running fetch, so it is short.
_FETCH_WAIT_S = 0.25
# The same while a buffer is full: it may have room again before another topic has records.
_FULL_FETCH_WAIT_S = 0.01
# How soon partitions are looked at again while none can be fetched.
_NONE_WAIT_S = 0.02
# The first pause before a position is looked up again; it doubles up to the setting
# `backoff_ms_max`.
_BACKOFF_S = 0.05
# More turns of the loop than a small batch needs from its fetch to its handler. A pipeline that
# stands still (Redis is away, its thread is busy) does not hold up the fetches of the others.
TURNS_MAX = 20

Bounds = Mapping[TopicPartition, tuple[int, int]]


class ConsumerOwner(Protocol):
    """What the consumer needs of its process; `streams.app.IngestApp` is one. In the app's loop."""

    async def position(self, bounds: Bounds) -> Mapping[TopicPartition, int]:
        """Where to read on.

        bounds: (begin, end) of partitions. May raise Unavailable, LogMismatch.
        """

    def report_wait(self, error: Exception, wait_s: float) -> None:
        """The consumer or a dispatcher waits for a server."""

    def end(self, error: Exception | None) -> None:
        """End the process: None for an intended stop, else the error."""

    async def finish(self, limit_s: float) -> None:
        """Finish the running batches and write all pending effects, within the limit.

        Partitions are about to be revoked; nothing new is in the buffers.
        """


def request_s(settings: Settings) -> float:
    """The limit of a request to Kafka, in seconds."""
    return max(settings.kafka_timeout_ms / 1000, SESSION_S)


def consumer_options(settings: Settings, member: str) -> dict[str, Any]:
    """Options of the `AIOKafkaConsumer`. member: the group.instance.id. Raises SettingsError.

    They hold the password: keep them out of log lines.
    """
    name = settings.prefixed("eddyline-ingest")
    return security.client_options(settings) | {
        "bootstrap_servers": settings.kafka_bootstrap_servers.split(","),
        "client_id": name,
        "group_id": name,
        "group_instance_id": member,
        # Range gives partition p of clicks and of users to one process: one writer of the slot
        # `u{p}`.
        "partition_assignment_strategy": [RangePartitionAssignor],
        "enable_auto_commit": False,
        # Retention that overtakes us, or a log that lost its end: the fences decide what that
        # means.
        "auto_offset_reset": "none",
        # Records of an aborted transaction do not exist (a dead letter's replay that was killed).
        "isolation_level": "read_committed",
        "fetch_max_wait_ms": int(_FETCH_WAIT_S * 1000),
        "max_poll_interval_ms": int(_POLL_INTERVAL_S * 1000),
        "request_timeout_ms": int(request_s(settings) * 1000),
        "session_timeout_ms": int(SESSION_S * 1000),
        "rebalance_timeout_ms": int(2 * SESSION_S * 1000),
        "heartbeat_interval_ms": int(HEARTBEAT_S * 1000),
    }


class LogConsumer(Service, ThreadOwner):
    """Fills the buffers; seeks to the owner's positions. Everything here runs in the app's loop.

    make_thread:   makes the thread that reports to this service
    buffers:       by topic
    wake:          wakes the topic's agent, once its buffer is marked as busy
    read_skips:    reads the offsets that are left out, in a thread of its own
    in_loop:       topics whose handlers block the loop until their small batches are applied
    request_s:     the limit of a request to Kafka
    backoff_s_max: the longest pause before a retry
    """

    logger = get_logger("faust.batches")

    def __init__(
        self,
        make_thread: Callable[[ThreadOwner], ConsumerThread],
        buffers: Mapping[str, RecordBuffer],
        wake: Callable[[str], Awaitable[None]],
        owner: ConsumerOwner,
        *,
        read_skips: Callable[[], Skips],
        in_loop: Collection[str],
        request_s: float,
        backoff_s_max: float,
    ) -> None:
        super().__init__()
        self._buffers = buffers
        self._wake = wake
        self._owner = owner
        self._read_skips = read_skips
        self._skips_of = -1  # the rebalance after which they were read
        self._skips_lock = asyncio.Lock()
        self._in_loop = [buffers[topic] for topic in in_loop]
        self._request_s = request_s
        self._backoff_s_max = backoff_s_max
        self._acked: dict[TopicPartition, int] = {}  # the offset to commit
        self._rebalances = 0
        self._rebalancing = True
        self._rewinding: defaultdict[TopicPartition, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._thread = make_thread(self)
        # Read-only views for the owner; see `ConsumerThread`.
        self.assignment = self._thread.assignment
        self.highwater_seen = self._thread.highwater_seen
        self.fetching_ended = self._thread.fetching_ended
        self.check_group = self._thread.check_group
        self.ends = self._thread.ends

    @override
    async def on_start(self) -> None:
        """Join the group. Raises KafkaError where Kafka is away."""
        await self._thread.start()

    @override
    async def on_stop(self) -> None:
        """Finish the running batches, commit them, and leave the group."""
        await self._thread.commit(await self.release())
        await self._thread.stop()

    # --- what is owned, and where it stands

    def is_current(self, at: TopicPartition, epoch: int) -> bool:
        """Whether the partition is assigned and was not sought since the epoch began."""
        return at in self._thread.positioned and self._thread.epochs[at] == epoch

    def epoch(self, at: TopicPartition) -> int:
        """The partition's seek count."""
        return self._thread.epochs[at]

    def positioned(self, topic: str) -> set[int]:
        """The partitions of a topic that are assigned to this process and have a position."""
        return {at.partition for at in list(self._thread.positioned) if at.topic == topic}

    def paused(self, topic: str) -> int:
        """How many partitions of this topic wait for their position. Any thread."""
        mine = {at.partition for at in self.assignment() if at.topic == topic}
        return len(mine - self.positioned(topic))

    def stopped(self) -> list[UnreadableBatch]:
        """The batches that partitions of this process stand in front of. Any thread."""
        return list(self._thread.stops.stopped.values())

    def committed_of(self, topic: str) -> dict[int, int]:
        """By partition, the offset that the group has committed."""
        committed = self._thread.committed
        return {at.partition: offset for at, offset in committed.items() if at.topic == topic}

    async def empty_tails(self, topic: str) -> dict[int, EmptyTail]:
        """By partition of a topic that has a position: the offsets at its end without a record."""
        return {
            at.partition: tail
            for at, tail in (await self._thread.read_empty_tails()).items()
            if at.topic == topic and self.is_current(at, tail.epoch)
        }

    # --- fetching

    @Service.task
    async def _read(self) -> None:
        """Fetch, fill the buffers, wake the agents."""
        while not self.should_stop:
            full = {topic for topic, buffer in self._buffers.items() if buffer.full()}
            wanted = [at for at in list(self._thread.positioned) if at.topic not in full]
            if not wanted:
                await self.sleep(_NONE_WAIT_S)
                continue
            await self._let_small_batches_go_first()
            wait_s = _FULL_FETCH_WAIT_S if full else _FETCH_WAIT_S
            try:
                fetch = await self._thread.fetch(wanted, wait_s)
            except ConsumerStoppedError:
                return
            read_us = time.time_ns() // 1_000
            topics = set()
            for at, (epoch, records) in fetch.records.items():
                if not self._rebalancing and self.is_current(at, epoch):
                    self._buffers[at.topic].add(at.partition, Fetched(records, read_us, epoch))
                    topics.add(at.topic)
            for topic in topics:
                if not self._buffers[topic].busy:
                    self._buffers[topic].busy = True
                    await self._wake(topic)
            if lost := {at for at, epoch in fetch.lost.items() if self.is_current(at, epoch)}:
                self._begin_rewind(lost)

    async def _let_small_batches_go_first(self) -> None:
        """Let the pipelines in this loop apply their batches, for at most `TURNS_MAX` turns.

        aiokafka sends its next fetch as soon as records are taken from it. Under a steady trickle
        that fetch returns the one or two records that came in this very moment; they would be a
        batch of their own, at the full cost of one, and what came meanwhile would wait at the
        broker for the fetch after it. So after a small fetch `FetchGate` holds the next one back
        until `fetch` is called, once the small batches are applied. After a larger fetch aiokafka
        reads ahead.
        """
        for _ in range(TURNS_MAX):
            if not any(buffer.busy for buffer in self._in_loop):
                return
            await asyncio.sleep(0)

    @Service.task
    async def _resume_skipped(self) -> None:
        """Look for decisions on batches that partitions stand in front of."""
        while not self.should_stop:
            await self.sleep(LOOK_S)
            if not self._thread.stops.stopped:
                continue
            try:
                await self._thread.resume(await asyncio.to_thread(self._read_skips))
            except Unavailable as error:
                self._owner.report_wait(error, LOOK_S)

    # --- acknowledging

    def applied(self, batch: RecordBatch) -> None:
        """All effects of the batch are written: its end may be committed."""
        self._acked[place_of(batch)] = batch.last + 1

    def skipped(self, at: TopicPartition, tail: EmptyTail) -> None:
        """The fences have passed the empty tail: its end may be committed."""
        if self.is_current(at, tail.epoch):
            self._acked[at] = tail.position

    @Service.task
    async def _commit(self) -> None:
        """Commit what was acknowledged, once a second."""
        while not self.should_stop:
            await self.sleep(_COMMIT_S)
            acked, self._acked = self._acked, {}
            if acked and not await self._thread.commit(acked):
                self._acked = acked | self._acked

    # --- rebalances and positions

    @override
    async def release(self) -> Mapping[TopicPartition, int]:
        self._rebalancing = True
        for buffer in self._buffers.values():
            buffer.clear()
        await self._owner.finish(SESSION_S / 2)
        acked, self._acked = self._acked, {}
        return acked

    @override
    def assigned(self) -> None:
        """Find every position, in the background, as Redis may be away.

        Topic by topic, so that clicks do not wait for the transactional producers of items.
        """
        self._rebalances += 1
        self._rebalancing = False
        self._acked.clear()
        for buffer in self._buffers.values():
            buffer.clear()
        mine = self.assignment()
        for topic in sorted({at.topic for at in mine}):
            self._begin_rewind({at for at in mine if at.topic == topic})

    def _begin_rewind(self, partitions: set[TopicPartition]) -> None:
        if not self.should_stop:
            self.add_future(self.rewind(partitions))

    async def rewind(self, partitions: set[TopicPartition]) -> None:
        """Read on at the lowest fence + 1. Waits for Redis and Kafka; returns where partitions are
        lost.

        One at a time for each partition. Otherwise the seek of one would open the partition between
        another's reading of the fences and its seek. The batches read there do not follow those
        fences: their effects on one slot would be written over a gap.
        """
        self._thread.positioned -= partitions
        async with AsyncExitStack() as locks:
            for at in sorted(partitions):
                await locks.enter_async_context(self._rewinding[at])
            self._thread.positioned -= partitions
            await self._rewind(partitions)

    async def _rewind(self, partitions: set[TopicPartition]) -> None:
        rebalances, mismatches = self._rebalances, 0
        backoff = Backoff(_BACKOFF_S, self._backoff_s_max)
        while not self.should_stop and self._rebalances == rebalances:
            mine = partitions & self.assignment()
            if not mine:
                return
            wait_s = backoff.next_s()
            try:
                await self._thread.seek_to(await self._positions(mine))
                return
            except (Unavailable, KafkaError, TimeoutError) as error:
                self._owner.report_wait(error, wait_s)
            except LogMismatch as error:
                # The previous owner may have moved a fence beyond the end that was read before it.
                mismatches += 1
                if mismatches > 1:
                    self._owner.end(error)
                    return
            except Exception as error:
                self._owner.end(error)
                return
            await self.sleep(wait_s)

    async def _take_skips(self) -> None:
        """Read the offsets that are left out, once after each rebalance. Raises Unavailable.

        Those that are decided on later concern a partition that stands still until then.
        """
        async with self._skips_lock:
            if self._skips_of != self._rebalances:
                rebalances = self._rebalances
                self._thread.stops.skips = await asyncio.to_thread(self._read_skips)
                self._skips_of = rebalances

    async def _positions(self, partitions: set[TopicPartition]) -> Mapping[TopicPartition, int]:
        await self._take_skips()
        async with asyncio.timeout(self._request_s):
            await self._thread.read_committed(partitions)
        async with asyncio.timeout(self._request_s):
            begins = await self._thread.begins(partitions)
        async with asyncio.timeout(self._request_s):
            ends = await self._thread.ends(partitions)
        return await self._owner.position({at: (begins[at], ends[at]) for at in partitions})
