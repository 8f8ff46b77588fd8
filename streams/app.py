"""The ingest process around its pipelines: Faust app, positions, idle partitions, reports, stop.

`dispatcher` applies the batches.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

import faust
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError
from faust.app import BootStrategy
from mode import get_logger
from typing_extensions import override

from eddyline.errors import EddylineError, FenceMoved, Unavailable
from eddyline.kafka.skips import Skips
from eddyline.kafka.unreadable import UnreadableBatch
from eddyline.process import heartbeat, lifecycle
from eddyline.settings.loader import Settings
from eddyline.stores import layout
from eddyline.stores.state_store import StateStore
from streams.consumer import errors
from streams.consumer.buffer import RecordBuffer
from streams.consumer.consumer import (
    HEARTBEAT_S,
    Bounds,
    ConsumerOwner,
    LogConsumer,
    consumer_options,
    request_s,
)
from streams.consumer.thread import ConsumerThread, EmptyTail
from streams.dispatcher import BatchDispatcher, TopicPipeline

log = logging.getLogger(__name__)

_REPORT_S = 10.0
# How long a Redis that went back in time may stay unnoticed while no record comes in.
_WATCH_S = 2.0
# How often due effects of idle pipelines are looked for.
_FLUSH_CHECK_S = 0.1
# So few records, some milliseconds of work, are applied in the event loop itself: a thread has to
# wait for the interpreter's lock after every answer of Redis, which doubled the latency at 2,000
# events/s. Not where one call to Redis may block for longer than this, and not after one failed.
IN_LOOP_MAX = 64
_IN_LOOP_TIMEOUT_MS_MAX = 2_000
# A stop that takes longer than this is cut short: the fences make a hard one harmless.
_STOP_S_MAX = 10.0


class WithoutKafka(BootStrategy):
    """Faust starts the agents; `LogConsumer` reads from Kafka, and the handlers write to it."""

    enable_kafka = False


class AgentApp(faust.App):
    """A Faust app whose agents read from channels."""

    BootStrategy = WithoutKafka
    logger = get_logger("faust.batches")

    @override
    async def on_start(self) -> None:
        """As Faust's, which would also make its own consumer."""
        self.finalize()


class IngestApp(ConsumerOwner):
    """The Faust app of one process. Everything here runs in one event loop, unless it says
    otherwise.

    pipelines: one for each topic
    store:     its layout is claimed whenever positions are read, for it may be another store by
               then
    member:    the group.instance.id
    folder:    where Faust may write
    read_skips: see `LogConsumer`
    """

    def __init__(
        self,
        settings: Settings,
        pipelines: Sequence[TopicPipeline],
        store: StateStore,
        member: str,
        folder: Path,
        read_skips: Callable[[], Skips] = Skips,
    ) -> None:
        self._settings = settings
        self._pipelines = {pipeline.topic: pipeline for pipeline in pipelines}
        self._store = store
        in_loop = settings.redis_timeout_ms <= _IN_LOOP_TIMEOUT_MS_MAX
        self._in_loop_max = IN_LOOP_MAX if in_loop else 0
        self._backoff_s_max = settings.backoff_ms_max / 1000
        self._ended: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self._wait_reported_s = 0.0
        self._kafka_away = False
        self._ends: dict[TopicPartition, int] = {}
        self._tails: dict[TopicPartition, EmptyTail] = {}
        self._app = AgentApp(
            settings.prefixed("eddyline-ingest"), datadir=str(folder), web_enabled=False
        )
        self._buffers = {
            pipeline.topic: RecordBuffer(
                pipeline.topic, settings.chunk_records_max, pipeline.handler.partition_max
            )
            for pipeline in pipelines
        }
        # By topic, the channel that wakes its agent.
        self._channels = {topic: self._app.channel(maxsize=1) for topic in self._buffers}
        options = consumer_options(settings, member)
        self._consumer = LogConsumer(
            lambda owner: ConsumerThread(
                lambda: AIOKafkaConsumer(**options),
                list(self._buffers),
                owner,
                self._in_loop_max,
                request_s(settings),
            ),
            self._buffers,
            self._wake,
            self,
            read_skips=read_skips,
            in_loop=[
                pipeline.topic
                for pipeline in pipelines
                if in_loop and not pipeline.handler.awaits_kafka
            ],
            request_s=request_s(settings),
            backoff_s_max=self._backoff_s_max,
        )
        self._dispatchers = [self._add_agent(pipeline) for pipeline in pipelines]

    @property
    def pipelines(self) -> list[TopicPipeline]:
        """The pipelines, with their counters."""
        return list(self._pipelines.values())

    def lag(self) -> dict[TopicPartition, int]:
        """Records of each assigned partition that are not applied yet. Any thread."""
        behind: dict[TopicPartition, int] = {}
        for at in self._consumer.assignment():
            ends = self._ends.get(at), self._consumer.highwater_seen(at)
            known = [end for end in ends if end is not None]
            if at.topic not in self._pipelines or not known:
                continue  # its end is not known yet
            try:
                lowest = self._pipelines[at.topic].handler.fences.lowest(at.partition)
            except LookupError:
                continue  # not opened yet
            behind[at] = max(0, max(known) - 1 - lowest)
        return behind

    def paused(self) -> dict[str, int]:
        """By topic, the partitions that wait for a server, or for their position. Any thread."""
        return {topic: self._consumer.paused(topic) for topic in self._pipelines}

    def stopped(self) -> list[UnreadableBatch]:
        """The batches that cannot be read and hold up their partitions. Any thread."""
        return self._consumer.stopped()

    def queued(self) -> dict[str, int]:
        """By topic, the batches that were fetched and not applied. Any thread."""
        return {topic: buffer.batches() for topic, buffer in self._buffers.items()}

    async def check_group(self) -> None:
        """Raise the KafkaError that ended the work in the consumer group, if any."""
        await self._consumer.check_group()

    async def run(self) -> None:
        """Run until `end`, then finish and commit the running batches.

        Raises the error of `end`.
        """
        started = asyncio.create_task(self._start())
        started.add_done_callback(self._started)
        crashed = asyncio.create_task(self._wait_crashed())
        background = [
            asyncio.create_task(self._guarded(work))
            for work in (self._report(), self._watch(), *map(self._flush_due, self.pipelines))
        ]
        try:
            ends: set[asyncio.Future[Any]] = {self._ended, crashed}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if not self._ended.done():
                self.end(crashed.result())
        finally:
            limit = threading.Timer(_STOP_S_MAX, self._cut_short)
            limit.daemon = True
            limit.start()
            for task in (crashed, *background):
                task.cancel()
            await self._consumer.stop()
            await self._app.stop()
            started.cancel()
            await asyncio.gather(started, crashed, *background, return_exceptions=True)
        error = self._ended.result()
        if error is not None:
            raise error

    def _cut_short(self) -> None:
        """End the process within a stop that takes too long, with the reason of the stop."""
        error = self._ended.result() if self._ended.done() else None
        if error is not None:
            error = errors.translate_error(self._settings, error)
            log.error(str(error))
        log.error("the stop takes too long: it is cut short", extra={"after_s": _STOP_S_MAX})
        os._exit(lifecycle.exit_code(error) if isinstance(error, EddylineError) else 1)

    async def _start(self) -> None:
        """Start the agents, then the consumer, which wakes them. Raises KafkaError."""
        await self._app.start()
        self._app.flow_control.resume()  # Faust's consumer would do so
        await self._app.add_runtime_dependency(self._consumer)

    async def _wait_crashed(self) -> Exception:
        """Wait until a service of Faust's crashes. Returns the error."""
        await self._app.wait_first()
        reason = self._app.crash_reason
        return reason if isinstance(reason, Exception) else RuntimeError(f"Faust: {reason!r}")

    async def _wake(self, topic: str) -> None:
        await self._channels[topic].put(True)  # type: ignore[arg-type]  # any value

    # --- what the consumer and the dispatchers need

    @override
    def end(self, error: Exception | None) -> None:
        """End the process: None for an intended stop, else the error. The first call counts."""
        if not self._ended.done():
            self._ended.set_result(error)

    @override
    def report_wait(self, error: Exception, wait_s: float) -> None:
        """Log at most every ten seconds that a server is waited for."""
        if time.monotonic() - self._wait_reported_s >= _REPORT_S:
            self._wait_reported_s = time.monotonic()
            log.warning(
                "waiting for a server", extra={"reason": str(error), "wait_ms": int(wait_s * 1000)}
            )

    @override
    async def position(self, bounds: Bounds) -> Mapping[TopicPartition, int]:
        by_topic: dict[str, dict[int, tuple[int, int]]] = {}
        for at, ends in bounds.items():
            by_topic.setdefault(at.topic, {})[at.partition] = ends
        begun = time.perf_counter()
        await self._check_eviction()
        claimed = layout.layout(self._settings)
        await asyncio.get_running_loop().run_in_executor(None, self._store.claim_layout, claimed)
        opened = await asyncio.gather(
            *(
                self._pipelines[topic].open(ends, self._consumer.committed_of(topic))
                for topic, ends in by_topic.items()
            )
        )
        found = {
            TopicPartition(topic, partition): offset
            for topic, offsets in zip(by_topic, opened, strict=True)
            for partition, offset in offsets.items()
        }
        took_ms = int((time.perf_counter() - begun) * 1000)
        positions = " ".join(
            f"{at.topic}:{at.partition}@{offset}" for at, offset in sorted(found.items())
        )
        log.info("reading from", extra={"positions": positions, "ms": took_ms})
        return found

    @override
    async def finish(self, limit_s: float) -> None:
        clock = asyncio.get_running_loop().time
        deadline = clock() + limit_s
        while any(dispatcher.applying for dispatcher in self._dispatchers) and clock() < deadline:
            await asyncio.sleep(0.005)
        tasks = [
            asyncio.create_task(self._guarded(pipeline.thread.run(pipeline.handler.flush)))
            for pipeline in self.pipelines
            if (pending := pipeline.handler.write_behind) is not None and pending.pending()
        ]
        if tasks:
            await asyncio.wait(tasks, timeout=max(0.0, deadline - clock()))

    # --- tasks

    def _add_agent(self, pipeline: TopicPipeline) -> BatchDispatcher:
        topic = pipeline.topic
        dispatcher = BatchDispatcher(
            pipeline, self._buffers[topic], self, self._in_loop_max, self._backoff_s_max
        )
        dispatcher.consumer = self._consumer

        async def agent(stream: Any) -> None:
            await dispatcher.run(stream)

        self._app.agent(self._channels[topic], name=f"ingest.{topic}", concurrency=1)(agent)
        return dispatcher

    def _started(self, task: asyncio.Task[Any]) -> None:
        """A failed start ends the process; it is restarted, and waits for Kafka."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self.end(error if isinstance(error, Exception) else RuntimeError(repr(error)))

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        """End the process where this work ends unexpectedly."""
        try:
            await work
        except Exception as error:
            log.exception("background work failed")
            self.end(error)

    async def _flush_due(self, pipeline: TopicPipeline) -> None:
        """Write due effects when no batch comes that would."""
        handler = pipeline.handler
        if handler.write_behind is None:
            return
        async for _ in _every(_FLUSH_CHECK_S):
            if not handler.write_behind.due():
                continue
            consumer = self._consumer
            refused = await pipeline.thread.run(
                handler.flush_due, consumer.positioned(pipeline.topic)
            )
            if refused is None:
                continue
            # After a long pause we may have lost the partition unnoticed. Wait two heartbeats
            # before opening it again, or we would steal it from its new owner.
            at = TopicPartition(pipeline.topic, refused)
            epoch = consumer.epoch(at)
            await asyncio.sleep(2 * HEARTBEAT_S)
            if consumer.epoch(at) == epoch and refused in consumer.positioned(pipeline.topic):
                pipeline.rewinds += 1
                await consumer.rewind({at})

    async def _check_eviction(self) -> None:
        """Raise StoreRefused if Redis may evict keys by now. If it is away, others report it."""
        with contextlib.suppress(Unavailable):
            await asyncio.get_running_loop().run_in_executor(None, self._store.check_eviction)

    async def _watch(self) -> None:
        """Check the fences of idle partitions; busy ones find a change by themselves."""
        async for _ in _every(_WATCH_S):
            consumer = self._consumer
            if consumer.fetching_ended():
                raise RuntimeError("aiokafka's fetcher ended: nothing more would be read")
            heartbeat.beat(self._settings, "ingest")
            await self._read_ends()
            await self._check_eviction()
            for pipeline in self.pipelines:
                try:
                    await self._skip_empty(pipeline)
                    diverged = await pipeline.thread.run(
                        pipeline.handler.fences.find_diverged, consumer.positioned(pipeline.topic)
                    )
                except Unavailable as error:
                    self.report_wait(error, _WATCH_S)
                    continue
                if diverged:
                    pipeline.rewinds += len(diverged)
                    log.warning(
                        "fences moved under an idle process", extra={"partitions": str(diverged)}
                    )
                    await consumer.rewind({TopicPartition(pipeline.topic, p) for p in diverged})

    async def _skip_empty(self, pipeline: TopicPipeline) -> None:
        """Move the fences of idle partitions over offsets without a record at their end.

        Only what two looks in a row found alike is skipped. Raises Unavailable.
        """
        consumer, topic = self._consumer, pipeline.topic
        tails = await consumer.empty_tails(topic)
        before = {at.partition: tail for at, tail in self._tails.items() if at.topic == topic}
        self._tails |= {TopicPartition(topic, partition): tail for partition, tail in tails.items()}
        for partition in [p for p, tail in tails.items() if before.get(p) == tail]:
            tail = tails[partition]
            skip = pipeline.handler.skip_empty, partition, tail.taken, tail.position - 1
            try:
                skipped = await pipeline.thread.run(*skip)
            except FenceMoved:
                continue  # `find_diverged` opens the partition again
            if skipped:
                consumer.skipped(TopicPartition(topic, partition), tail)

    async def _read_ends(self) -> None:
        """Read where the logs end, for the lag: paused partitions are not fetched."""
        mine = {at for at in self._consumer.assignment() if at.topic in self._pipelines}
        try:
            async with asyncio.timeout(_WATCH_S):
                self._ends = await self._consumer.ends(mine) if mine else {}
        except (KafkaError, TimeoutError):
            if not self._kafka_away:
                # A log may have lost its end by the time Kafka is back, and have grown again. So
                # nothing is read until the partitions are opened again, which compares the logs.
                self._kafka_away = True
                self._consumer.add_future(self._consumer.rewind(mine))
            return
        self._kafka_away = False

    async def _report(self) -> None:
        """Log one line for each topic that had batches."""
        async for _ in _every(_REPORT_S):
            for pipeline in self.pipelines:
                done = pipeline.since_report()
                if done.batches or done.rewinds:
                    counts = {"batches": done.batches, **done.outcome.counts()}
                    mean_ms = 1000 * done.seconds / max(1, done.batches)
                    extra = {
                        "topic": pipeline.topic,
                        **counts,
                        "rewinds": done.rewinds,
                        "ms_a_batch": round(mean_ms, 2),
                    }
                    log.info("ingested", extra=extra)


async def _every(seconds: float) -> AsyncIterator[None]:
    while True:
        await asyncio.sleep(seconds)
        yield
