"""The ingest process: Faust agents around the plain ingest functions.

An agent does three things: it hands a chunk to its function, in a thread of its own so that heartbeats go
on; awaits it; acknowledges. A server that is away is waited for; a refused write sends the partition back to
its lowest fence; anything else ends the process before the chunk is acknowledged.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from faust.types import TP

from eddyline import alive
from eddyline.errors import FenceMoved, Unavailable
from eddyline.settings import Settings
from streams.chunk import Outcome, PartitionLost, Record
from streams.clicks import COUNT_S, ClickIngest
from streams.lane import Bounds, Chunk, LaneApp, LaneSchema
from streams.positions import Positions

log = logging.getLogger(__name__)
_R = TypeVar("_R")

# The shortest session that Kafka's default settings allow: a dead process's partitions move after it.
SESSION_S = 6.0
# A member learns of a rebalance by its next heartbeat: this is most of the pause when a process leaves.
_HEARTBEAT_S = 0.5
# Chunks that wait for an agent; enough to keep it busy, few enough to be dropped without regret.
_QUEUE_CHUNKS = 16
_COMMIT_S = 1.0
_REPORT_S = 10.0
# How long a Redis that went back in time may stay unnoticed where no record comes in.
_WATCH_S = 2.0
_BACKOFF_S = 0.05
# So small a chunk of a quick lane, 2 ms, is applied in the event loop itself; a thread and back costs more.
# Not where one call to Redis may block for longer than this, and not after one failed.
QUICK_RECORDS_MAX = 8
_QUICK_TIMEOUT_MS_MAX = 2_000
# Waiting for a server that is away does not make this process a dead member; only a lost heartbeat does.
_POLL_INTERVAL_S = 86_400.0


class Ingest(Protocol):
    """An ingest function and the positions it works from."""

    positions: Positions

    def ingest(self, partition: int, records: Sequence[Record], read_us: int) -> Outcome:
        """Apply a chunk."""


@dataclass
class Lane:
    """One topic: its function, the thread it runs in, and what was done since the last report.

    before_open: called with each partition before its fences are read
    counts:      the click function, where effects of it may wait for more
    quick:       small chunks take a millisecond or two, so they may run in the event loop itself
    """

    topic: str
    ingest: Ingest
    executor: ThreadPoolExecutor
    before_open: Callable[[int], None] | None = None
    counts: ClickIngest | None = None
    quick: bool = False
    outcome: Outcome = field(default_factory=Outcome)
    chunks: int = 0
    rewinds: int = 0
    seconds: float = 0.0
    wait_s: float = _BACKOFF_S

    def open(self, bounds: Mapping[int, tuple[int, int]]) -> dict[int, int]:
        """Where to read on, by partition. Runs in the lane's thread, so after the chunk in work."""
        if self.before_open is not None:
            for partition in bounds:
                self.before_open(partition)
        return self.ingest.positions.open(bounds)

    def settle(self) -> int | None:
        """Write what has waited long enough. A partition where that was refused, to be read again."""
        if self.counts is not None:
            for partition in self.counts.due():
                try:
                    self.counts.count(partition)
                except (FenceMoved, Unavailable) as error:
                    log.info("counts not written", extra={"partition": partition, "reason": str(error)})
                    self.counts.opened(partition)
                    return partition
        return None

    def moved_elsewhere(self, mine: set[int]) -> list[int]:
        """Which of these partitions have other fences than expected. Runs in the lane's thread."""
        return self.ingest.positions.moved_elsewhere(mine)


class IngestApp:
    """The agents of one process. Everything here runs in one event loop.

    lanes:  one for each topic
    member: the group.instance.id
    folder: where Faust may write
    stopping: told that the stop begins
    """

    def __init__(
        self, settings: Settings, lanes: Sequence[Lane], member: str, folder: Path,
        stopping: Callable[[], None],
    ) -> None:  # fmt: skip
        self._settings = settings
        self._lanes = {lane.topic: lane for lane in lanes}
        self._turns = {lane.executor: threading.Lock() for lane in lanes}
        self._quick_max = QUICK_RECORDS_MAX if settings.redis_timeout_ms <= _QUICK_TIMEOUT_MS_MAX else 0
        self._backoff_s_max = settings.backoff_ms_max / 1000
        self._ended: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self._told = 0.0
        self._stopping = stopping
        request_s = max(settings.kafka_timeout_ms / 1000, SESSION_S)
        self._app = LaneApp(
            settings.prefixed("eddyline-ingest"),
            positioner=self._position,
            chunk_records_max=settings.chunk_records_max,
            backoff_s_max=self._backoff_s_max,
            waiting=self._waiting,
            fail=self.end,
            broker=[f"kafka://{server}" for server in settings.kafka_bootstrap_servers.split(",")],
            datadir=str(folder),
            web_enabled=False,
            topic_disable_leader=True,
            topic_allow_declare=False,
            processing_guarantee="at_least_once",
            stream_wait_empty=False,
            stream_buffer_maxsize=_QUEUE_CHUNKS,
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

    async def run(self) -> None:
        """Run until `end`. Raises what ended it; chunks in work are finished and committed before."""
        started = asyncio.create_task(self._app.start())
        started.add_done_callback(self._started)
        crashed = asyncio.create_task(self._app._crashed.wait())
        reports = asyncio.create_task(self._report())
        watch = asyncio.create_task(self._guarded(self._watch()))
        settle = asyncio.create_task(self._guarded(self._settle()))
        try:
            ends: set[asyncio.Future[Any]] = {self._ended, crashed}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if not self._ended.done():
                reason = self._app.crash_reason
                self.end(reason if isinstance(reason, Exception) else RuntimeError(f"Faust: {reason!r}"))
        finally:
            self._stopping()
            for task in (reports, watch, settle, crashed):
                task.cancel()
            await self._app.stop()
            started.cancel()
            await asyncio.gather(started, crashed, reports, watch, settle, return_exceptions=True)
        error = self._ended.result()
        if error is not None:
            raise error

    def _started(self, task: asyncio.Task[Any]) -> None:
        """A start that failed ends the process; it is restarted, and waits for Kafka."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self.end(error if isinstance(error, Exception) else RuntimeError(repr(error)))

    def _add_agent(self, lane: Lane) -> None:
        async def agent(stream: Any) -> None:
            async for event in stream.noack().events():
                if await self._apply(lane, event.value):
                    event.ack()

        topic = self._app.topic(lane.topic, schema=LaneSchema())
        self._app.agent(topic, name=f"ingest.{lane.topic}", concurrency=1)(agent)

    async def _apply(self, lane: Lane, chunk: Chunk) -> bool:
        """Whether the chunk is done and may be acknowledged."""
        consumer = self._app.lane
        if not consumer.is_current(chunk):
            return False
        begun = time.perf_counter()
        try:
            outcome = await self._ingest(lane, chunk)
        except FenceMoved as error:
            lane.rewinds += 1
            log.info("write refused, going back to the fence", extra=_where(chunk, error))
            await consumer.rewind({chunk.at})
        except Unavailable as error:
            await self._wait(lane, error)
            await consumer.rewind({chunk.at})
        except PartitionLost as error:
            log.warning("another process writes for this partition now", extra=_where(chunk, error))
            await self._await_loss(chunk)
        except Exception as error:
            log.exception("a chunk could not be applied", extra=_where(chunk, error))
            self.end(error)
            await asyncio.Event().wait()  # nothing more is acknowledged; `run` stops the agents
        else:
            lane.wait_s = _BACKOFF_S
            lane.chunks += 1
            lane.seconds += time.perf_counter() - begun
            lane.outcome.add(outcome)
            return bool(consumer.is_current(chunk))
        return False

    async def _ingest(self, lane: Lane, chunk: Chunk) -> Outcome:
        """Apply in the lane's thread; a small chunk at once where that thread does nothing."""
        arguments = (chunk.at.partition, chunk.records, chunk.read_us)
        turn = self._turns[lane.executor]
        small = lane.quick and len(chunk.records) <= self._quick_max and lane.wait_s == _BACKOFF_S
        if small and turn.acquire(blocking=False):
            try:
                return lane.ingest.ingest(*arguments)
            finally:
                turn.release()
        outcome: Outcome = await self._app.work(self._in_thread(lane, lane.ingest.ingest, *arguments))
        return outcome

    async def _in_thread(self, lane: Lane, call: Callable[..., _R], *arguments: Any) -> _R:
        """Run in the lane's thread. Whoever applies a chunk or reads fences holds its executor's turn."""

        def run() -> _R:
            with self._turns[lane.executor]:
                return call(*arguments)

        return await asyncio.get_running_loop().run_in_executor(lane.executor, run)

    async def _await_loss(self, chunk: Chunk) -> None:
        """Wait for the rebalance that takes the partition; claim it anew where none comes."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + 2 * SESSION_S
        while self._app.lane.is_current(chunk):
            if clock() > deadline:
                await self._app.lane.rewind({chunk.at})
                return
            await asyncio.sleep(0.1)

    async def _wait(self, lane: Lane, error: Exception) -> None:
        self._waiting(error, lane.wait_s)
        await asyncio.sleep(lane.wait_s)
        lane.wait_s = min(2 * lane.wait_s, self._backoff_s_max)

    def _waiting(self, error: Exception, wait_s: float) -> None:
        """Say at most every ten seconds that a server is waited for."""
        if time.monotonic() - self._told >= _REPORT_S:
            self._told = time.monotonic()
            log.warning("waiting for a server", extra={"reason": str(error), "wait_ms": int(wait_s * 1000)})

    async def _position(self, bounds: Bounds) -> Mapping[TP, int]:
        by_topic: dict[str, dict[int, tuple[int, int]]] = {}
        for at, ends in bounds.items():
            by_topic.setdefault(at.topic, {})[at.partition] = ends
        begun = time.perf_counter()
        opened = await asyncio.gather(
            *(
                self._in_thread(self._lanes[topic], self._lanes[topic].open, ends)
                for topic, ends in by_topic.items()
            )
        )
        found = {
            TP(topic, partition): offset
            for topic, offsets in zip(by_topic, opened, strict=True)
            for partition, offset in offsets.items()
        }
        took_ms = int((time.perf_counter() - begun) * 1000)
        shown = " ".join(f"{at.topic}:{at.partition}@{offset}" for at, offset in sorted(found.items()))
        log.info("reading from", extra={"positions": shown, "ms": took_ms})
        return found

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        """End the process where this work ends unexpectedly."""
        try:
            await work
        except Exception as error:
            log.exception("background work failed")
            self.end(error)

    async def _settle(self) -> None:
        """Let waiting effects go through when no chunk comes that would."""
        async for _ in _every(COUNT_S):
            for lane in self._lanes.values():
                if lane.counts is None or not lane.counts.due():
                    continue
                refused = await self._in_thread(lane, lane.settle)
                if refused is not None:
                    lane.rewinds += 1
                    await self._app.lane.rewind({TP(lane.topic, refused)})

    async def _watch(self) -> None:
        """Look after the fences of idle partitions; busy ones notice by themselves."""
        async for _ in _every(_WATCH_S):
            alive.beat(self._settings, "ingest")
            for lane in self._lanes.values():
                mine = self._app.lane.positioned(lane.topic)
                try:
                    moved = await self._in_thread(lane, lane.moved_elsewhere, mine)
                except Unavailable as error:
                    self._waiting(error, _WATCH_S)
                    continue
                if moved:
                    lane.rewinds += len(moved)
                    log.warning("fences moved under an idle process", extra={"partitions": str(moved)})
                    await self._app.lane.rewind({TP(lane.topic, partition) for partition in moved})

    async def _report(self) -> None:
        """One line a topic, where something happened."""
        async for _ in _every(_REPORT_S):
            for lane in self._lanes.values():
                if lane.chunks or lane.rewinds:
                    mean_ms = 1000 * lane.seconds / max(1, lane.chunks)
                    counts = {"chunks": lane.chunks, **lane.outcome.counts(), "rewinds": lane.rewinds}
                    extra = {"topic": lane.topic, **counts, "ms_a_chunk": round(mean_ms, 2)}
                    log.info("ingested", extra=extra)
                    lane.outcome, lane.chunks, lane.rewinds, lane.seconds = Outcome(), 0, 0, 0.0


async def _every(seconds: float) -> AsyncIterator[None]:
    while True:
        await asyncio.sleep(seconds)
        yield


def _where(chunk: Chunk, error: Exception) -> dict[str, Any]:
    first, last = chunk.records[0].offset, chunk.records[-1].offset
    at = f"{chunk.at.topic}:{chunk.at.partition}"
    return {"at": at, "offsets": f"{first}–{last}", "reason": str(error)}
