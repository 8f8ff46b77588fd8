"""Where a chunk is applied: in the event loop where it is small and nothing is in work, else in a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from faust.types import TP

from streams.app import IngestApp, Lane
from streams.chunk import Outcome
from streams.lane import Chunk

AT = TP("clicks", 0)


class Works:
    """The part of the Faust app that a chunk meets."""

    async def work(self, chunk: Awaitable[Any]) -> Any:
        return await chunk


class Busy:
    """An ingest function that notes in which thread it ran."""

    def __init__(self) -> None:
        self.threads: list[str] = []

    def ingest(self, partition: int, records: Any, read_us: int) -> Outcome:
        self.threads.append(threading.current_thread().name)
        return Outcome(records=len(records))


def test_small_chunks_of_a_quick_lane_run_in_the_loop_itself_and_never_beside_its_thread() -> None:
    async def run() -> None:
        here, function, executor = threading.current_thread().name, Busy(), ThreadPoolExecutor(1, "lane")
        lane = Lane("clicks", function, executor, quick=True)  # type: ignore[arg-type]
        app: Any = IngestApp.__new__(IngestApp)
        app._turns, app._quick_max, app._app = {executor: threading.Lock()}, 2, Works()
        small, large = (Chunk(AT, [None for _ in range(n)], 0, 0) for n in (2, 3))

        async def ran(chunk: Chunk) -> bool:
            await asyncio.wait_for(app._ingest(lane, chunk), 5)
            return function.threads[-1] == here

        assert await ran(small)
        assert not await ran(large)
        lane.wait_s *= 2  # a server was away a moment ago
        assert not await ran(small)
        lane.wait_s /= 2
        lane.quick = False
        assert not await ran(small)
        lane.quick = True
        entered, hold = threading.Event(), threading.Event()
        held = asyncio.create_task(app._in_thread(lane, lambda: (entered.set(), hold.wait(5))))
        async with asyncio.timeout(5):
            while not entered.is_set():
                await asyncio.sleep(0.001)
        waiting = asyncio.create_task(ran(small))
        await asyncio.sleep(0.02)
        assert len(function.threads) == 4
        hold.set()
        assert not await waiting
        await held
        executor.shutdown()

    asyncio.run(run())
