"""The way of records from a topic's buffer to their handler, and what the results lead to.

A handler runs in a thread of its own, so the app's loop stays free. Records that arrive while it
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
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from aiokafka import TopicPartition

from eddyline.errors import FenceMoved, LogMismatch, Unavailable
from eddyline.process.retry import Backoff
from streams.consumer.buffer import RecordBuffer, place_of
from streams.consumer.consumer import SESSION_S, ConsumerOwner, LogConsumer
from streams.ports import Handler, Outcome, PartitionLost, RecordBatch

log = logging.getLogger(__name__)
_R = TypeVar("_R")

BACKOFF_S = 0.05


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
    """One topic: its handler, the handler's thread, and its counters.

    topic:   the name in Kafka, prefix included
    batches, rewinds, seconds, outcome: see `Totals`
    waits:   how often a server was waited for; away: whether the last call found it away
    """

    topic: str
    handler: Handler
    thread: HandlerThread
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
        resume_at = self.handler.fences.resume_at
        return {partition: resume_at(partition, at) for partition, at in positions.items()}


class BatchDispatcher:
    """Applies the batches of one pipeline. Runs in the app's event loop.

    consumer:    has the records' partitions; set before the first batch
    in_loop_max: up to so many records are applied in the event loop itself; 0: none
    applying:    whether a batch is being applied
    """

    consumer: LogConsumer

    def __init__(
        self,
        pipeline: TopicPipeline,
        buffer: RecordBuffer,
        owner: ConsumerOwner,
        in_loop_max: int,
        backoff_s_max: float,
    ) -> None:
        self.applying = False
        self._pipeline = pipeline
        self._buffer = buffer
        self._owner = owner
        self._in_loop_max = in_loop_max
        self._backoff = Backoff(BACKOFF_S, backoff_s_max)

    async def run(self, stream: Any) -> None:
        """The Faust agent: an event for a buffer with records. An error ends the process."""
        try:
            async for _ in stream.noack():
                await self.drain()
        except Exception as error:
            log.exception("batches could not be applied")
            self._owner.end(error)
        except asyncio.CancelledError:
            # No error at an intended stop, as the first call counts. Otherwise records of the
            # buffer may be half applied.
            self._owner.end(RuntimeError("the work on batches was cancelled"))
            raise

    async def drain(self) -> None:
        """Apply the records of the buffer, until it is empty."""
        while batches := self._buffer.take(self.consumer.is_current):
            await self.dispatch(batches)
        self._buffer.busy = False

    async def dispatch(self, batches: Sequence[RecordBatch]) -> None:
        """Apply the batches, and acknowledge, wait or rewind by their results."""
        pipeline, consumer = self._pipeline, self.consumer
        begun = time.perf_counter()
        self.applying = True
        try:
            results = await self.apply(batches)
        except Exception as error:
            await self._give_up(batches[0], error)
            return
        finally:
            self.applying = False
        pipeline.seconds += time.perf_counter() - begun
        unavailable = [result for result in results if isinstance(result, Unavailable)]
        if unavailable:
            await self._wait(unavailable[0])
        else:
            pipeline.away = False
            self._backoff.reset()
        back: set[TopicPartition] = set()
        for batch, result in zip(batches, results, strict=True):
            if isinstance(result, Outcome):
                pipeline.batches += 1
                pipeline.outcome.add(result)
                if consumer.is_current(place_of(batch), batch.epoch):
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
        """Apply the batches, without the records that reading resumed at; see `resuming`."""
        resumed = [self._resumed(batch) for batch in batches]
        new = [one for one in resumed if isinstance(one, RecordBatch)]
        results = iter(await self._apply(new) if new else ())
        return [next(results) if isinstance(one, RecordBatch) else one for one in resumed]

    def _resumed(self, batch: RecordBatch) -> RecordBatch | Outcome | Exception:
        try:
            applied = self._pipeline.handler.fences.resumed(batch.partition, batch.records)
        except LogMismatch as error:
            return error
        if applied == len(batch.records):
            return Outcome()
        return replace(batch, records=batch.records[applied:]) if applied else batch

    async def _apply(self, batches: Sequence[RecordBatch]) -> list[Outcome | Exception]:
        """Apply in the handler's thread; small batches in this loop where the thread is idle.

        Not in this loop after an error: a call to a server that is away would block it.
        """
        handler, thread = self._pipeline.handler, self._pipeline.thread
        small = sum(len(batch.records) for batch in batches) <= self._in_loop_max
        if small and not self._pipeline.away and thread.lock.acquire(blocking=False):
            try:
                if handler.awaits_kafka:
                    return await handler.apply_in_loop(batches)
                return handler.apply(batches)
            finally:
                thread.lock.release()
        return await thread.run(handler.apply, batches)

    async def _give_up(self, batch: RecordBatch, error: Exception) -> None:
        """End the process; nothing more is acknowledged."""
        log.error("a batch could not be applied", extra=_where(batch, error), exc_info=error)
        self._owner.end(error)
        await asyncio.Event().wait()

    async def _await_loss(self, batch: RecordBatch) -> None:
        """Wait for the rebalance that takes the partition; open it again where none comes."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + 2 * SESSION_S
        while self.consumer.is_current(place_of(batch), batch.epoch):
            if clock() > deadline:
                await self.consumer.rewind({place_of(batch)})
                return
            await asyncio.sleep(0.1)

    async def _wait(self, error: Exception) -> None:
        pipeline = self._pipeline
        pipeline.waits += 1
        pipeline.away = True
        pause_s = self._backoff.next_s()
        self._owner.report_wait(error, pause_s)
        await asyncio.sleep(pause_s)


def _where(batch: RecordBatch, error: Exception) -> dict[str, Any]:
    return {
        "at": f"{batch.topic}:{batch.partition}",
        "offsets": f"{batch.first}–{batch.last}",
        "reason": str(error),
    }
