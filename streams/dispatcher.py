"""The way of batches from a Faust agent to their handler, and what their results lead to.

A handler runs in a thread of its own, so the app's loop stays free. Batches that arrive while it
is busy are applied together afterwards and share round trips and numpy work. Where a server is
away, the dispatcher waits; a refused write sends its partition back to the lowest fence; any other
error ends the process, and the batch is not acknowledged.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from faust.types import TP

from eddyline.errors import FenceMoved, Unavailable
from eddyline.process.retry import Backoff
from streams.consumer.batching import choose, place_of
from streams.consumer.consumer import BatchApp
from streams.ports import Handler, Outcome, PartitionLost, RecordBatch

log = logging.getLogger(__name__)
_R = TypeVar("_R")

# The shortest session that Kafka's default settings allow: a dead process's partitions move after
# it.
SESSION_S = 6.0
BACKOFF_S = 0.05
# Back-pressure: a topic is paused while its pipeline's queue holds this many batches, or Faust's
# own queue as many groups of batches. Enough to keep a handler busy.
QUEUE_BATCHES = 16


class HandlerThread:
    """The thread of one or more handlers, and the lock that every use of them holds.

    Small batches run in the event loop, under the same lock.
    """

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(1, name)
        self.lock = threading.Lock()

    async def run(self, call: Callable[..., _R], *arguments: Any) -> _R:
        """Call in the thread, holding the lock."""

        def locked() -> _R:
            with self.lock:
                return call(*arguments)

        return await asyncio.get_running_loop().run_in_executor(self._executor, locked)

    def close(self) -> None:
        """Drop waiting calls; a running one ends with the process."""
        self._executor.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True, slots=True)
class Totals:
    """What a pipeline has done.

    seconds: spent on applying; rewinds: partitions sent back to their fence.
    """

    batches: int = 0
    rewinds: int = 0
    seconds: float = 0.0
    outcome: Outcome = field(default_factory=Outcome)


@dataclass
class TopicPipeline:
    """One topic: its handler, the handler's thread, its queue, and its counters.

    topic:   the name in Kafka, prefix included
    queue:   fetched batches; held: batches from the queue that were not applied yet
    batches, rewinds, seconds, outcome: see `Totals`
    waits:   how often a server was waited for; away: whether the last call found it away
    """

    topic: str
    handler: Handler
    thread: HandlerThread
    queue: asyncio.Queue[RecordBatch] = field(
        default_factory=lambda: asyncio.Queue(QUEUE_BATCHES), repr=False
    )
    held: list[RecordBatch] = field(default_factory=list, repr=False)
    outcome: Outcome = field(default_factory=Outcome)
    batches: int = 0
    rewinds: int = 0
    seconds: float = 0.0
    waits: int = 0
    away: bool = False
    _reported: Totals = field(default_factory=Totals, repr=False)

    def since_report(self) -> Totals:
        """What was done since the last call."""
        total = Outcome()
        total.add(self.outcome)
        before, self._reported = (
            self._reported,
            Totals(self.batches, self.rewinds, self.seconds, total),
        )
        return Totals(
            self.batches - before.batches,
            self.rewinds - before.rewinds,
            self.seconds - before.seconds,
            total.less(before.outcome),
        )

    def queued(self) -> int:
        """Batches that were fetched and not applied. Any thread."""
        return self.queue.qsize() + len(self.held)

    async def open(
        self, bounds: Mapping[int, tuple[int, int]], committed: Mapping[int, int]
    ) -> dict[int, int]:
        """Open partitions; where to read on. Arguments and errors as of `PartitionFences.open`."""
        return await self.thread.run(self._open, bounds, committed)

    def _open(
        self, bounds: Mapping[int, tuple[int, int]], committed: Mapping[int, int]
    ) -> dict[int, int]:
        for partition in bounds:
            self.handler.open(partition)
        positions = self.handler.fences.open(bounds, committed)
        self.handler.prepare(bounds)
        return positions


class BatchDispatcher:
    """Applies the batches of one pipeline. Runs in the app's event loop.

    in_loop_max: up to so many records are applied in the event loop itself; 0: none
    """

    def __init__(
        self, app: BatchApp, pipeline: TopicPipeline, in_loop_max: int, backoff_s_max: float
    ) -> None:
        self._app = app
        self._pipeline = pipeline
        self._in_loop_max = in_loop_max
        self._backoff = Backoff(BACKOFF_S, backoff_s_max)
        # By partition: the epoch of the last batch that was dropped.
        self._dropped: dict[TP, int] = {}

    async def run(self, stream: Any) -> None:
        """The Faust agent: queue the batches of each event; another task applies them."""
        work = asyncio.create_task(self.work())
        try:
            async for batches in stream.noack():
                for batch in batches:
                    await self._pipeline.queue.put(batch)
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    async def work(self) -> None:
        """Apply queued batches, until cancelled; an error ends the process."""
        pipeline = self._pipeline
        try:
            while True:
                if not pipeline.held:
                    pipeline.held.append(await pipeline.queue.get())
                batches = self.take()
                if batches:
                    await self.dispatch(batches)
                self._app.in_flight.applied(pipeline.topic)
        except Exception as error:
            log.exception("batches could not be applied")
            self._app.owner.end(error)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or not task.cancelling():  # not cancelled by us
                self._app.owner.end(RuntimeError("the work on batches was cancelled from inside"))
            raise

    def take(self) -> list[RecordBatch]:
        """The batches to apply now, one of each partition; stale ones are dropped."""
        pipeline, current = self._pipeline, []
        while len(pipeline.held) < 2 * QUEUE_BATCHES and not pipeline.queue.empty():
            pipeline.held.append(pipeline.queue.get_nowait())
        for batch in pipeline.held:
            # What follows a dropped batch is dropped too, though the partition may be ours again by
            # now.
            dropped = batch.epoch <= self._dropped.get(place_of(batch), -1)
            if dropped or not self._app.batches.is_current(batch):
                self._drop(batch)  # it is read again after a seek, or was lost
            else:
                current.append(batch)
        partition_max = pipeline.handler.partition_max
        batches, pipeline.held = choose(current, self._app.chunk_records_max, partition_max)
        return batches

    def _drop(self, batch: RecordBatch) -> None:
        at = place_of(batch)
        self._dropped[at] = max(batch.epoch, self._dropped.get(at, -1))

    async def dispatch(self, batches: Sequence[RecordBatch]) -> None:
        """Apply the batches, and acknowledge, wait or rewind by their results."""
        pipeline, consumer = self._pipeline, self._app.batches
        begun = time.perf_counter()
        try:
            results = await self.apply(batches)
        except Exception as error:
            await self._give_up(batches[0], error)
            return
        except BaseException:
            # Cancelled. What follows would leave a gap, until all is read again from the fence.
            for batch in batches:
                self._drop(batch)
            consumer.unread({place_of(batch): batch.epoch for batch in batches})
            raise
        pipeline.seconds += time.perf_counter() - begun
        unavailable = [result for result in results if isinstance(result, Unavailable)]
        if unavailable:
            await self._wait(unavailable[0])
        else:
            pipeline.away = False
            self._backoff.reset()
        back: set[TP] = set()
        for batch, result in zip(batches, results, strict=True):
            if isinstance(result, Outcome):
                pipeline.batches += 1
                pipeline.outcome.add(result)
                if consumer.is_current(batch):
                    consumer.applied(batch)
            elif isinstance(result, FenceMoved):
                pipeline.rewinds += 1
                log.info("write refused, going back to the fence", extra=_where(batch, result))
                back.add(place_of(batch))
            elif isinstance(result, Unavailable):
                back.add(place_of(batch))
            elif isinstance(result, PartitionLost):
                log.warning(
                    "another process writes for this partition now", extra=_where(batch, result)
                )
                await self._await_loss(batch)
            else:
                await self._give_up(batch, result)
        if back:
            await consumer.rewind(back)

    async def apply(self, batches: Sequence[RecordBatch]) -> list[Outcome | Exception]:
        """Apply in the handler's thread; small batches in this loop where the thread is idle.

        Not in this loop after an error: a call to a server that is away would block it.
        """
        handler, thread = self._pipeline.handler, self._pipeline.thread
        small = sum(len(batch.records) for batch in batches) <= self._in_loop_max
        if small and not self._pipeline.away and thread.lock.acquire(blocking=False):
            try:
                if handler.awaits_kafka:
                    return await self._app.track(handler.apply_in_loop(batches))
                return handler.apply(batches)
            finally:
                thread.lock.release()
        return await self._app.track(thread.run(handler.apply, batches))

    async def _give_up(self, batch: RecordBatch, error: Exception) -> None:
        """End the process; nothing more is acknowledged."""
        log.error("a batch could not be applied", extra=_where(batch, error), exc_info=error)
        self._app.owner.end(error)
        await asyncio.Event().wait()

    async def _await_loss(self, batch: RecordBatch) -> None:
        """Wait for the rebalance that takes the partition; open it again where none comes."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + 2 * SESSION_S
        while self._app.batches.is_current(batch):
            if clock() > deadline:
                await self._app.batches.rewind({place_of(batch)})
                return
            await asyncio.sleep(0.1)

    async def _wait(self, error: Exception) -> None:
        pipeline = self._pipeline
        pipeline.waits += 1
        pipeline.away = True
        pause_s = self._backoff.next_s()
        self._app.owner.report_wait(error, pause_s)
        await asyncio.sleep(pause_s)


def _where(batch: RecordBatch, error: Exception) -> dict[str, Any]:
    return {
        "at": f"{batch.topic}:{batch.partition}",
        "offsets": f"{batch.first}–{batch.last}",
        "reason": str(error),
    }
