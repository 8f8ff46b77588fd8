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
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

import faust
from aiokafka.errors import KafkaError
from faust.types import TP
from typing_extensions import override

from eddyline.errors import FenceMoved, Unavailable
from eddyline.kafka import security
from eddyline.process import heartbeat
from eddyline.settings.kafka import uses_sasl
from eddyline.settings.loader import Settings
from eddyline.stores import layout
from eddyline.stores.state_store import StateStore
from streams.consumer.consumer import BatchApp, Bounds, ConsumerOwner, RawSchema
from streams.consumer.thread import EmptyTail
from streams.dispatcher import QUEUE_BATCHES, SESSION_S, BatchDispatcher, TopicPipeline

log = logging.getLogger(__name__)

# A member learns of a rebalance by its next heartbeat: this is most of the pause when a process
# leaves.
_HEARTBEAT_S = 0.5
_COMMIT_S = 1.0
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
# Waiting for a server that is away does not make this process a dead member; only a lost heartbeat
# does.
_POLL_INTERVAL_S = 86_400.0
# A stop that takes longer than this is cut short: the fences make a hard one harmless.
_STOP_S_MAX = 10.0


class IngestApp(ConsumerOwner):
    """The Faust app of one process. Everything here runs in one event loop, unless it says
    otherwise.

    pipelines: one for each topic
    store:     its layout is claimed whenever positions are read, for it may be another store by
               then
    member:    the group.instance.id
    folder:    where Faust may write
    """

    def __init__(
        self,
        settings: Settings,
        pipelines: Sequence[TopicPipeline],
        store: StateStore,
        member: str,
        folder: Path,
    ) -> None:
        self._settings = settings
        self._pipelines = {pipeline.topic: pipeline for pipeline in pipelines}
        self._store = store
        in_loop = settings.redis_timeout_ms <= _IN_LOOP_TIMEOUT_MS_MAX
        self._in_loop_max = IN_LOOP_MAX if in_loop else 0
        self._backoff_s_max = settings.backoff_ms_max / 1000
        self._ended: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self._wait_reported_s = 0.0
        self._ends: dict[TP, int] = {}
        self._tails: dict[TP, EmptyTail] = {}
        partition_max = {
            pipeline.topic: pipeline.handler.partition_max
            for pipeline in pipelines
            if pipeline.handler.partition_max is not None
        }
        self._app = BatchApp(
            settings.prefixed("eddyline-ingest"),
            owner=self,
            chunk_records_max=settings.chunk_records_max,
            partition_max=partition_max,
            backoff_s_max=self._backoff_s_max,
            small_max=self._in_loop_max,
            broker=[f"kafka://{server}" for server in settings.kafka_bootstrap_servers.split(",")],
            broker_credentials=broker_credentials(settings),
            datadir=str(folder),
            web_enabled=False,
            topic_disable_leader=True,
            topic_allow_declare=False,
            processing_guarantee="at_least_once",
            stream_wait_empty=False,
            stream_buffer_maxsize=QUEUE_BATCHES,
            consumer_auto_offset_reset="earliest",
            consumer_group_instance_id=member,
            broker_client_id=settings.prefixed("eddyline-ingest"),
            broker_session_timeout=SESSION_S,
            broker_heartbeat_interval=_HEARTBEAT_S,
            broker_rebalance_timeout=2 * SESSION_S,
            broker_request_timeout=max(settings.kafka_timeout_ms / 1000, SESSION_S),
            broker_commit_interval=_COMMIT_S,
            broker_max_poll_interval=_POLL_INTERVAL_S,
        )
        for pipeline in pipelines:
            self._add_agent(pipeline)

    @property
    def pipelines(self) -> list[TopicPipeline]:
        """The pipelines, with their counters."""
        return list(self._pipelines.values())

    def lag(self) -> dict[TP, int]:
        """Records of each assigned partition that are not applied yet. Any thread."""
        behind: dict[TP, int] = {}
        if not self._app.has_consumer:
            return behind
        for at in self._app.batches.assigned():
            ends = self._ends.get(at), self._app.batches.highwater_seen(at)
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
        if not self._app.has_consumer:
            return {}
        return {topic: self._app.batches.paused(topic) for topic in self._pipelines}

    async def check_group(self) -> None:
        """Raise the KafkaError that ended the work in the consumer group, if any."""
        if self._app.has_consumer:
            await self._app.batches.check_group()

    async def run(self) -> None:
        """Run until `end`, then finish and commit the running batches.

        Raises the error of `end`.
        """
        started = asyncio.create_task(self._app.start())
        started.add_done_callback(self._started)
        crashed = asyncio.create_task(self._app.wait_crashed())
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
            limit = threading.Timer(_STOP_S_MAX, os._exit, (1,))
            limit.daemon = True
            limit.start()
            for task in (crashed, *background):
                task.cancel()
            await self._app.stop()
            started.cancel()
            await asyncio.gather(started, crashed, *background, return_exceptions=True)
        error = self._ended.result()
        if error is not None:
            raise error

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
    async def position(self, bounds: Bounds) -> Mapping[TP, int]:
        by_topic: dict[str, dict[int, tuple[int, int]]] = {}
        for at, ends in bounds.items():
            by_topic.setdefault(at.topic, {})[at.partition] = ends
        begun = time.perf_counter()
        await self._check_eviction()
        claimed = layout.layout(self._settings)
        await asyncio.get_running_loop().run_in_executor(None, self._store.claim_layout, claimed)
        opened = await asyncio.gather(
            *(
                self._pipelines[topic].open(ends, self._app.batches.committed_of(topic))
                for topic, ends in by_topic.items()
            )
        )
        found = {
            TP(topic, partition): offset
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
    async def flush(self, limit_s: float) -> None:
        tasks = [
            asyncio.create_task(self._guarded(pipeline.thread.run(pipeline.handler.flush)))
            for pipeline in self.pipelines
            if (pending := pipeline.handler.write_behind) is not None and pending.pending()
        ]
        if tasks:
            await asyncio.wait(tasks, timeout=limit_s)

    # --- tasks

    def _add_agent(self, pipeline: TopicPipeline) -> None:
        if self._in_loop_max and not pipeline.handler.awaits_kafka:
            self._app.in_flight.topics.add(pipeline.topic)
        dispatcher = BatchDispatcher(self._app, pipeline, self._in_loop_max, self._backoff_s_max)

        async def agent(stream: Any) -> None:
            await dispatcher.run(stream)

        topic = self._app.topic(pipeline.topic, schema=RawSchema())
        self._app.agent(topic, name=f"ingest.{pipeline.topic}", concurrency=1)(agent)

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
            consumer = self._app.batches
            refused = await pipeline.thread.run(
                handler.flush_due, consumer.positioned(pipeline.topic)
            )
            if refused is None:
                continue
            # After a long pause we may have lost the partition unnoticed. Wait two heartbeats
            # before opening it again, or we would steal it from its new owner.
            at = TP(pipeline.topic, refused)
            epoch = consumer.epochs[at]
            await asyncio.sleep(2 * _HEARTBEAT_S)
            if consumer.epochs[at] == epoch and refused in consumer.positioned(pipeline.topic):
                pipeline.rewinds += 1
                await consumer.rewind({at})

    async def _check_eviction(self) -> None:
        """Raise StoreRefused if Redis may evict keys by now. If it is away, others report it."""
        with contextlib.suppress(Unavailable):
            await asyncio.get_running_loop().run_in_executor(None, self._store.check_eviction)

    async def _watch(self) -> None:
        """Check the fences of idle partitions; busy ones find a change by themselves."""
        async for _ in _every(_WATCH_S):
            consumer = self._app.batches
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
                    await consumer.rewind({TP(pipeline.topic, p) for p in diverged})

    async def _skip_empty(self, pipeline: TopicPipeline) -> None:
        """Move the fences of idle partitions over offsets without a record at their end.

        Only what two looks in a row found alike is skipped. Raises Unavailable.
        """
        consumer, topic = self._app.batches, pipeline.topic
        tails = await consumer.empty_tails(topic)
        before = {at.partition: tail for at, tail in self._tails.items() if at.topic == topic}
        self._tails |= {TP(topic, partition): tail for partition, tail in tails.items()}
        for partition in [p for p, tail in tails.items() if before.get(p) == tail]:
            tail = tails[partition]
            skip = pipeline.handler.skip_empty, partition, tail.taken, tail.position - 1
            try:
                skipped = await pipeline.thread.run(*skip)
            except FenceMoved:
                continue  # `find_diverged` opens the partition again
            if skipped:
                consumer.skipped(TP(topic, partition), tail)

    async def _read_ends(self) -> None:
        """Read where the logs end, for the lag: paused partitions are not fetched."""
        mine = {at for at in self._app.batches.assignment() if at.topic in self._pipelines}
        try:
            async with asyncio.timeout(_WATCH_S):
                ends = await self._app.batches.highwaters(*mine) if mine else {}
        except (KafkaError, TimeoutError):
            return
        self._ends = {at: end for at, end in ends.items() if end is not None}

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


def broker_credentials(settings: Settings) -> Any:
    """Faust's setting `broker_credentials`; None for a plain connection. Raises SettingsError."""
    context = security.tls_context(settings)
    if uses_sasl(settings):
        return faust.SASLCredentials(
            username=settings.kafka_sasl_username,
            password=settings.kafka_sasl_password,
            mechanism=settings.kafka_sasl_mechanism,
            ssl_context=context,
        )
    return context


async def _every(seconds: float) -> AsyncIterator[None]:
    while True:
        await asyncio.sleep(seconds)
        yield
