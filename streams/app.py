"""The ingest process: Faust agents around the plain ingest functions.

What the agents do with a chunk is in `applying`. Here is the app around them: positions, the watch over idle
partitions, reports, the end.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

from aiokafka.errors import KafkaError
from faust.types import TP

from eddyline.errors import Unavailable
from eddyline.process import heartbeat
from eddyline.settings.loader import Settings
from streams.consumer.consumer import BatchApp, Bounds, RawSchema
from streams.consumer.thread import ConsumerThread
from streams.credentials import broker_credentials
from streams.dispatcher import QUEUE_CHUNKS, SESSION_S, BatchDispatcher, TopicPipeline, in_thread

log = logging.getLogger(__name__)

# A member learns of a rebalance by its next heartbeat: this is most of the pause when a process leaves.
_HEARTBEAT_S = 0.5
_COMMIT_S = 1.0
_REPORT_S = 10.0
# How long a Redis that went back in time may stay unnoticed where no record comes in.
_WATCH_S = 2.0
# How often is looked whether what waits for more is to be written although no more came.
_SETTLE_S = 0.1
# So few records of a quick lane, some milliseconds, are applied in the event loop itself: a thread has to
# wait for the interpreter's lock after every answer of Redis, which doubled the latency at 2,000 events/s.
# Not where one call to Redis may block for longer than this, and not after one failed.
QUICK_RECORDS_MAX = 64
_QUICK_TIMEOUT_MS_MAX = 2_000
# Waiting for a server that is away does not make this process a dead member; only a lost heartbeat does.
_POLL_INTERVAL_S = 86_400.0


class IngestApp:
    """The agents of one process. Everything here runs in one event loop.

    lanes:  one for each topic
    member: the group.instance.id
    folder: where Faust may write
    stopping: told that the stop begins
    claim:  makes sure of the store's layout, whenever positions are looked up: it may be another store now
    """

    def __init__(
        self,
        settings: Settings,
        lanes: Sequence[TopicPipeline],
        member: str,
        folder: Path,
        stopping: Callable[[], None],
        claim: Callable[[], None] = lambda: None,
    ) -> None:
        self._settings = settings
        self._lanes = {lane.topic: lane for lane in lanes}
        self._turns = {lane.executor: threading.Lock() for lane in lanes}
        self._quick_max = (
            QUICK_RECORDS_MAX if settings.redis_timeout_ms <= _QUICK_TIMEOUT_MS_MAX else 0
        )
        self._backoff_s_max = settings.backoff_ms_max / 1000
        self._ended: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self._told = 0.0
        self._stopping = stopping
        self._claim = claim
        self._ends: dict[TP, int] = {}
        request_s = max(settings.kafka_timeout_ms / 1000, SESSION_S)
        self._app = BatchApp(
            settings.prefixed("eddyline-ingest"),
            positioner=self._position,
            chunk_records_max=settings.chunk_records_max,
            part_max={lane.topic: lane.part_max for lane in lanes if lane.part_max is not None},
            backoff_s_max=self._backoff_s_max,
            small_max=self._quick_max,
            waiting=self._waiting,
            fail=self.end,
            giving_up=self._flush,
            broker=[f"kafka://{server}" for server in settings.kafka_bootstrap_servers.split(",")],
            broker_credentials=broker_credentials(settings),
            datadir=str(folder),
            web_enabled=False,
            topic_disable_leader=True,
            topic_allow_declare=False,
            processing_guarantee="at_least_once",
            stream_wait_empty=False,
            stream_buffer_maxsize=QUEUE_CHUNKS,
            consumer_auto_offset_reset="earliest",
            consumer_group_instance_id=member,
            broker_client_id=settings.prefixed("eddyline-ingest"),
            broker_session_timeout=SESSION_S,
            broker_heartbeat_interval=_HEARTBEAT_S,
            broker_rebalance_timeout=2 * SESSION_S,
            broker_request_timeout=request_s,
            broker_commit_interval=_COMMIT_S,
            broker_max_poll_interval=_POLL_INTERVAL_S,
        )
        for lane in lanes:
            self._add_agent(lane)

    def end(self, error: Exception | None) -> None:
        """Stop the process: None for a wanted stop, else why. The first call counts."""
        if not self._ended.done():
            self._ended.set_result(error)

    @property
    def lanes(self) -> list[TopicPipeline]:
        """The lanes, with what they have done."""
        return list(self._lanes.values())

    def lag(self) -> dict[TP, int]:
        """Records of each partition of this process that are not applied yet. Any thread."""
        behind: dict[TP, int] = {}
        if self._app._consumer is None:
            return behind  # to ask for it would make it, in this thread
        for at in self._app.lane.assigned():
            ends = self._ends.get(at), self._app.lane.highwater_seen(at)
            known = [end for end in ends if end is not None]
            if at.topic not in self._lanes or not known:
                continue  # neither asked for its end nor fetched yet
            try:
                lowest = self._lanes[at.topic].ingest.positions.lowest(at.partition)
            except LookupError:
                continue  # not opened yet
            behind[at] = max(0, max(known) - 1 - lowest)
        return behind

    def paused(self) -> dict[str, int]:
        """Partitions by topic that stand still: a server is waited for, or a position. Any thread."""
        if self._app._consumer is None:
            return {}
        return {lane.topic: self._app.lane.paused(lane.topic) for lane in self._lanes.values()}

    @property
    def thread(self) -> ConsumerThread:
        """The thread that owns the Kafka consumer."""
        return self._app.lane._thread

    async def run(self) -> None:
        """Run until `end`. Raises what ended it; chunks in work are finished and committed before."""
        started = asyncio.create_task(self._app.start())
        started.add_done_callback(self._started)
        crashed = asyncio.create_task(self._app._crashed.wait())
        reports = asyncio.create_task(self._report())
        watch = asyncio.create_task(self._guarded(self._watch()))
        settling = [asyncio.create_task(self._guarded(self._settle(lane))) for lane in self.lanes]
        try:
            ends: set[asyncio.Future[Any]] = {self._ended, crashed}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if not self._ended.done():
                reason = self._app.crash_reason
                self.end(
                    reason if isinstance(reason, Exception) else RuntimeError(f"Faust: {reason!r}")
                )
        finally:
            self._stopping()
            for task in (reports, watch, *settling, crashed):
                task.cancel()
            await self._app.stop()
            started.cancel()
            await asyncio.gather(
                started, crashed, reports, watch, *settling, return_exceptions=True
            )
        error = self._ended.result()
        if error is not None:
            raise error

    def _started(self, task: asyncio.Task[Any]) -> None:
        """A start that failed ends the process; it is restarted, and waits for Kafka."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self.end(error if isinstance(error, Exception) else RuntimeError(repr(error)))

    def _add_agent(self, lane: TopicPipeline) -> None:
        if lane.quick and lane.in_loop is None and self._quick_max:
            self._app.handed.quick.add(lane.topic)
        applier = BatchDispatcher(
            self._app, lane, self._turns, self._quick_max, self._backoff_s_max, self.end
        )

        async def agent(stream: Any) -> None:
            await applier.run(stream)

        topic = self._app.topic(lane.topic, schema=RawSchema())
        self._app.agent(topic, name=f"ingest.{lane.topic}", concurrency=1)(agent)

    def _waiting(self, error: Exception, wait_s: float) -> None:
        """Say at most every ten seconds that a server is waited for."""
        if time.monotonic() - self._told >= _REPORT_S:
            self._told = time.monotonic()
            log.warning(
                "waiting for a server", extra={"reason": str(error), "wait_ms": int(wait_s * 1000)}
            )

    async def _position(self, bounds: Bounds) -> Mapping[TP, int]:
        by_topic: dict[str, dict[int, tuple[int, int]]] = {}
        for at, ends in bounds.items():
            by_topic.setdefault(at.topic, {})[at.partition] = ends
        begun = time.perf_counter()
        await asyncio.get_running_loop().run_in_executor(None, self._claim)
        opened = await asyncio.gather(
            *(self._open(topic, ends) for topic, ends in by_topic.items())
        )
        found = {
            TP(topic, partition): offset
            for topic, offsets in zip(by_topic, opened, strict=True)
            for partition, offset in offsets.items()
        }
        took_ms = int((time.perf_counter() - begun) * 1000)
        shown = " ".join(
            f"{at.topic}:{at.partition}@{offset}" for at, offset in sorted(found.items())
        )
        log.info("reading from", extra={"positions": shown, "ms": took_ms})
        return found

    async def _open(self, topic: str, ends: Mapping[int, tuple[int, int]]) -> dict[int, int]:
        lane, committed = self._lanes[topic], self._app.lane.committed_of(topic)
        return await in_thread(
            self._turns[lane.executor], lane.executor, lane.open, ends, committed
        )

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        """End the process where this work ends unexpectedly."""
        try:
            await work
        except Exception as error:
            log.exception("background work failed")
            self.end(error)

    async def _settle(self, lane: TopicPipeline) -> None:
        """Let waiting effects of a lane go through when no chunk comes that would."""
        async for _ in _every(_SETTLE_S):
            if lane.deferred is None or not lane.deferred.due():
                continue
            mine = self._app.lane.positioned(lane.topic)
            refused = await in_thread(self._turns[lane.executor], lane.executor, lane.settle, mine)
            if refused is None:
                continue
            # Whoever woke from a long sleep learns here first that others go on: then by a heartbeat that it
            # is theirs, and to open it anew would take it back.
            at, consumer = TP(lane.topic, refused), self._app.lane
            epoch = consumer.epochs[at]
            await asyncio.sleep(2 * _HEARTBEAT_S)
            if consumer.epochs[at] == epoch and refused in consumer.positioned(lane.topic):
                lane.rewinds += 1
                await consumer.rewind({at})

    async def _flush(self, limit_s: float) -> None:
        """Write what waits in every lane, as long as that takes no longer."""

        async def flush(lane: TopicPipeline) -> None:
            await in_thread(self._turns[lane.executor], lane.executor, lane.flush)

        waiting = [
            lane for lane in self.lanes if lane.deferred is not None and lane.deferred.waiting()
        ]
        if waiting:
            tasks = [asyncio.create_task(self._guarded(flush(lane))) for lane in waiting]
            await asyncio.wait(tasks, timeout=limit_s)

    async def _watch(self) -> None:
        """Look after the fences of idle partitions; busy ones notice by themselves."""
        async for _ in _every(_WATCH_S):
            if self.thread.fetching_ended():
                raise RuntimeError("aiokafka's fetcher ended: nothing more would be read")
            heartbeat.beat(self._settings, "ingest")
            await self._look_at_ends()
            for lane in self._lanes.values():
                mine = self._app.lane.positioned(lane.topic)
                try:
                    moved = await in_thread(
                        self._turns[lane.executor], lane.executor, lane.find_diverged, mine
                    )
                except Unavailable as error:
                    self._waiting(error, _WATCH_S)
                    continue
                if moved:
                    lane.rewinds += len(moved)
                    log.warning(
                        "fences moved under an idle process", extra={"partitions": str(moved)}
                    )
                    await self._app.lane.rewind({TP(lane.topic, partition) for partition in moved})

    async def _look_at_ends(self) -> None:
        """Where the logs end, for the lag: a partition that stands still is not fetched either."""
        mine = {at for at in self._app.lane.assignment() if at.topic in self._lanes}
        try:
            async with asyncio.timeout(_WATCH_S):
                ends = await self._app.lane.highwaters(*mine) if mine else {}
        except (KafkaError, TimeoutError):
            return
        self._ends = {at: end for at, end in ends.items() if end is not None}

    async def _report(self) -> None:
        """One line a topic, where something happened."""
        async for _ in _every(_REPORT_S):
            for lane in self._lanes.values():
                chunks, rewinds, seconds, outcome = lane.since_begin()
                if chunks or rewinds:
                    mean_ms = 1000 * seconds / max(1, chunks)
                    counts = {"chunks": chunks, **outcome.counts(), "rewinds": rewinds}
                    extra = {"topic": lane.topic, **counts, "ms_a_chunk": round(mean_ms, 2)}
                    log.info("ingested", extra=extra)
                    lane.begin()


async def _every(seconds: float) -> AsyncIterator[None]:
    while True:
        await asyncio.sleep(seconds)
        yield
