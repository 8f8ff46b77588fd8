"""What an agent does with its chunks: hand them to the ingest function, await it, acknowledge.

The function runs in a thread of its own, so that heartbeats go on. While it is at work more chunks come in;
then all of them go together, joined by partition, and share round trips and numpy work. A server that is
away is waited for; a refused write sends its partition back to the lowest fence; anything else ends the
process before the chunk is acknowledged.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, cast

from faust.types import TP

from eddyline.errors import FenceMoved, Unavailable
from streams.consumer.batching import Chunk
from streams.consumer.consumer import BatchApp
from streams.fences import PartitionFences
from streams.ports import Outcome, PartitionLost, Record, RecordBatch
from streams.write_behind import WriteBehind, flush, flush_due

log = logging.getLogger(__name__)
_R = TypeVar("_R")

# The shortest session that Kafka's default settings allow: a dead process's partitions move after it.
SESSION_S = 6.0
BACKOFF_S = 0.05
# Chunks that wait beside the one in work; and as many in Faust's own queue. Enough to keep the function busy.
QUEUE_CHUNKS = 16


class Ingest(Protocol):
    """An ingest function and the positions it works from."""

    positions: PartitionFences

    def ingest(self, partition: int, records: Sequence[Record], read_us: int) -> Outcome:
        """Apply a chunk."""


@dataclass
class TopicPipeline:
    """One topic: its function, the thread it runs in, and what it has done so far.

    before_open: called with each partition before its fences are read
    deferred:    effects that may wait for those of more chunks
    quick:       small chunks take some milliseconds, so they may run in the event loop itself
    many:        applies chunks of several partitions together; what `ingest` would raise is in its place
    in_loop:     `many` for small chunks in the event loop, where it has to wait for more than Redis
    part_max:    so many records of one partition are applied at once at most; None: as many as a chunk has
    seconds:     spent on applying; waits: how often a server was waited for, wait_s: how long next time
    queued:      chunks that wait for this lane's turn
    """

    topic: str
    ingest: Ingest
    executor: ThreadPoolExecutor
    before_open: Callable[[int], None] | None = None
    deferred: WriteBehind | None = None
    quick: bool = False
    many: Callable[[Sequence[RecordBatch]], list[Outcome | Exception]] | None = None
    in_loop: (
        Callable[[Sequence[RecordBatch]], Coroutine[Any, Any, list[Outcome | Exception]]] | None
    ) = None
    part_max: int | None = None
    outcome: Outcome = field(default_factory=Outcome)
    chunks: int = 0
    rewinds: int = 0
    seconds: float = 0.0
    waits: int = 0
    wait_s: float = BACKOFF_S
    queued: Callable[[], int] = lambda: 0
    _told: tuple[int, int, float, Outcome] = field(default_factory=lambda: (0, 0, 0.0, Outcome()))

    def begin(self) -> None:
        """From here on `since_begin` counts."""
        total = Outcome()
        total.add(self.outcome)
        self._told = self.chunks, self.rewinds, self.seconds, total

    def since_begin(self) -> tuple[int, int, float, Outcome]:
        """(chunks, rewinds, seconds, outcome) since `begin`."""
        chunks, rewinds, seconds, outcome = self._told
        more = self.outcome.less(outcome)
        return self.chunks - chunks, self.rewinds - rewinds, self.seconds - seconds, more

    def open(
        self, bounds: Mapping[int, tuple[int, int]], committed: Mapping[int, int]
    ) -> dict[int, int]:
        """Where to read on, by partition, see `PartitionFences.open`. Runs in the lane's thread."""
        if self.before_open is not None:
            for partition in bounds:
                self.before_open(partition)
        return self.ingest.positions.open(bounds, committed)

    def apply(self, parts: Sequence[RecordBatch]) -> list[Outcome | Exception]:
        """Apply one chunk each of different partitions."""
        if self.many is not None:
            return self.many(parts)
        ends: list[Outcome | Exception] = []
        for part in parts:
            try:
                ends.append(self.ingest.ingest(part.partition, part.records, part.read_us))
            except (FenceMoved, Unavailable, PartitionLost) as error:
                ends.append(error)
        return ends

    def settle(self, mine: set[int]) -> int | None:
        """See `deferred.settle`. Runs in the lane's thread."""
        return (
            None if self.deferred is None else flush_due(self.deferred, self.ingest.positions, mine)
        )

    def flush(self) -> None:
        """See `deferred.flush`. Runs in the lane's thread."""
        if self.deferred is not None:
            flush(self.deferred)

    def find_diverged(self, mine: set[int]) -> list[int]:
        """Which of these partitions have other fences than expected. Runs in the lane's thread."""
        return self.ingest.positions.find_diverged(mine)


async def in_thread(
    turn: threading.Lock, executor: ThreadPoolExecutor, call: Callable[..., _R], *arguments: Any
) -> _R:
    """Run in a lane's thread. Whoever applies a chunk or reads fences holds its executor's turn."""

    def run() -> _R:
        with turn:
            return call(*arguments)

    return await asyncio.get_running_loop().run_in_executor(executor, run)


class BatchDispatcher:
    """Applies the chunks of one lane. Runs in the app's event loop.

    turns:     one lock for each executor, held by whoever works in its place
    quick_max: so many records at most are applied in the event loop itself
    end:       told of an error that ends the process
    """

    def __init__(
        self,
        app: BatchApp,
        lane: TopicPipeline,
        turns: Mapping[ThreadPoolExecutor, threading.Lock],
        quick_max: int,
        backoff_s_max: float,
        end: Callable[[Exception], None],
    ) -> None:
        self._app = app
        self._lane = lane
        self._turn = turns[lane.executor]
        self._quick_max = quick_max
        self._backoff_s_max = backoff_s_max
        self._end = end
        self._queue: asyncio.Queue[Chunk] = asyncio.Queue(QUEUE_CHUNKS)
        self._held: list[Chunk] = []
        self._dropped: dict[
            TP, int
        ] = {}  # partition -> the epoch of the last chunk that was dropped
        lane.queued = lambda: self._queue.qsize() + len(self._held)

    async def run(self, stream: Any) -> None:
        """The agent: queue what comes; what is queued is applied beside it."""
        work = asyncio.create_task(self._work())
        try:
            async for haul in stream.noack():
                for chunk in haul:
                    await self._queue.put(chunk)
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    async def _work(self) -> None:
        try:
            while True:
                if not self._held:
                    self._held.append(await self._queue.get())
                taken = self.take()
                if taken:
                    await self._apply(taken)
                self._app.handed.applied(self._lane.topic)
        except Exception as error:
            log.exception("chunks could not be applied")
            self._end(error)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or not task.cancelling():  # nobody wanted this to end
                self._end(RuntimeError("the work on chunks was cancelled from inside"))
            raise

    def take(self) -> list[list[Chunk]]:
        """The chunks to apply now, by partition, in order; together no more records than one may have.

        Nor more of one partition than the lane's `part_max`.
        """
        while len(self._held) < 2 * QUEUE_CHUNKS and not self._queue.empty():
            self._held.append(self._queue.get_nowait())
        taken: dict[TP, list[Chunk]] = {}
        rest: list[Chunk] = []
        full: set[TP] = set()
        whole = room = self._app.chunk_records_max
        rooms: defaultdict[TP, int] = defaultdict(lambda: self._lane.part_max or whole)
        for chunk in self._held:
            # What comes after a dropped chunk goes with it, though the partition may be ours again by now.
            if chunk.epoch <= self._dropped.get(chunk.at, -1) or not self._app.lane.is_current(
                chunk
            ):
                self._drop(chunk)
                continue  # it is read again after a seek, or was lost
            size = len(chunk.records)
            if (
                chunk.at in full
                or (taken and size > room)
                or (chunk.at in taken and size > rooms[chunk.at])
            ):
                rest.append(chunk)
                full.add(chunk.at)
            else:
                taken.setdefault(chunk.at, []).append(chunk)
                room -= size
                rooms[chunk.at] -= size
        self._held = rest
        return list(taken.values())

    def _drop(self, chunk: Chunk) -> None:
        self._dropped[chunk.at] = max(chunk.epoch, self._dropped.get(chunk.at, -1))

    async def _apply(self, taken: Sequence[Sequence[Chunk]]) -> None:
        lane, chunks = self._lane, [_joined(parts) for parts in taken]
        begun = time.perf_counter()
        try:
            ends = await self._ingest(
                [RecordBatch(c.at.partition, c.records, c.read_us) for c in chunks]
            )
        except Exception as error:
            await self._give_up(chunks[0], error)
            return
        except BaseException:
            # Cancelled: what follows would leave a gap, until all is read again from the fence.
            for chunk in chunks:
                self._drop(chunk)
            self._app.lane.unread({chunk.at: chunk.epoch for chunk in chunks})
            raise
        lane.seconds += time.perf_counter() - begun
        waits = [end for end in ends if isinstance(end, Unavailable)]
        if waits:
            await self._wait(waits[0])
        else:
            lane.wait_s = BACKOFF_S
        back: set[TP] = set()
        for chunk, end in zip(chunks, ends, strict=True):
            if isinstance(end, Outcome):
                lane.chunks += 1
                lane.outcome.add(end)
                if self._app.lane.is_current(chunk):
                    self._app.lane.applied(chunk)
            elif isinstance(end, FenceMoved):
                lane.rewinds += 1
                log.info("write refused, going back to the fence", extra=_where(chunk, end))
                back.add(chunk.at)
            elif isinstance(end, Unavailable):
                back.add(chunk.at)
            elif isinstance(end, PartitionLost):
                log.warning(
                    "another process writes for this partition now", extra=_where(chunk, end)
                )
                await self._await_loss(chunk)
            else:
                await self._give_up(chunk, end)
        if back:
            await self._app.lane.rewind(back)

    async def _give_up(self, chunk: Chunk, error: Exception) -> None:
        """End the process; nothing more is acknowledged."""
        log.error("a chunk could not be applied", extra=_where(chunk, error), exc_info=error)
        self._end(error)
        await asyncio.Event().wait()

    async def _ingest(self, parts: Sequence[RecordBatch]) -> list[Outcome | Exception]:
        """Apply in the lane's thread; small chunks at once where that thread does nothing."""
        lane = self._lane
        small = lane.quick and sum(len(part.records) for part in parts) <= self._quick_max
        if small and lane.wait_s == BACKOFF_S and self._turn.acquire(blocking=False):
            try:
                if lane.in_loop is not None:
                    return cast(
                        list[Outcome | Exception], await self._app.work(lane.in_loop(parts))
                    )
                return lane.apply(parts)
            finally:
                self._turn.release()
        ends: list[Outcome | Exception] = await self._app.work(
            in_thread(self._turn, lane.executor, lane.apply, parts)
        )
        return ends

    async def _await_loss(self, chunk: Chunk) -> None:
        """Wait for the rebalance that takes the partition; claim it anew where none comes."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + 2 * SESSION_S
        while self._app.lane.is_current(chunk):
            if clock() > deadline:
                await self._app.lane.rewind({chunk.at})
                return
            await asyncio.sleep(0.1)

    async def _wait(self, error: Exception) -> None:
        self._lane.waits += 1
        self._app.waiting(error, self._lane.wait_s)
        await asyncio.sleep(self._lane.wait_s)
        self._lane.wait_s = min(2 * self._lane.wait_s, self._backoff_s_max)


def _joined(chunks: Sequence[Chunk]) -> Chunk:
    """Chunks of one partition that follow each other, as one; it was read when the last of them was."""
    if len(chunks) == 1:
        return chunks[0]
    records = [record for chunk in chunks for record in chunk.records]
    return Chunk(chunks[0].at, records, chunks[-1].epoch, chunks[-1].read_us)


def _where(chunk: Chunk, error: Exception) -> dict[str, Any]:
    first, last = chunk.records[0].offset, chunk.records[-1].offset
    at = f"{chunk.at.topic}:{chunk.at.partition}"
    return {"at": at, "offsets": f"{first}–{last}", "reason": str(error)}
