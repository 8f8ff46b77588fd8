"""Where a chunk is applied: in the event loop where it is small and nothing is in work, else in a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from faust.types import TP

from eddyline.errors import FenceMoved, StoreUnavailable
from eddyline.settings.loader import Settings
from streams.app import IngestApp
from streams.consumer.batching import Chunk
from streams.consumer.fetch_control import InFlightBatches
from streams.dispatcher import QUEUE_CHUNKS, BatchDispatcher, TopicPipeline, in_thread
from streams.ports import Outcome, RecordBatch


class Consumer:
    """The part of the lane's consumer that a chunk meets."""

    def __init__(self) -> None:
        self.stale: set[int] = set()
        self.rewound: list[set[TP]] = []
        self.done: list[Chunk] = []
        self.back: list[dict[TP, int]] = []

    def unread(self, taken: dict[TP, int]) -> None:
        self.back.append(dict(taken))

    def is_current(self, chunk: Chunk) -> bool:
        return chunk.epoch not in self.stale

    def applied(self, chunk: Chunk) -> None:
        self.done.append(chunk)

    async def rewind(self, partitions: set[TP]) -> None:
        self.rewound.append(set(partitions))


class Works:
    """The part of the Faust app that a chunk meets."""

    chunk_records_max = 10

    def __init__(self) -> None:
        self.lane = Consumer()
        self.handed = InFlightBatches()
        self.waits: list[float] = []
        self.working = 0

    async def work(self, chunk: Awaitable[Any]) -> Any:
        self.working += 1
        try:
            return await chunk
        finally:
            self.working -= 1

    def waiting(self, error: Exception, wait_s: float) -> None:
        self.waits.append(wait_s)


def chunk(partition: int, records: int, epoch: int = 0) -> Chunk:
    listed: Any = [SimpleNamespace(offset=n) for n in range(records)]
    return Chunk(TP("clicks", partition), listed, epoch, 0)


class Busy:
    """An ingest function that notes in which thread it ran."""

    def __init__(self) -> None:
        self.threads: list[str] = []

    def ingest(self, partition: int, records: Any, read_us: int) -> Outcome:
        self.threads.append(threading.current_thread().name)
        return Outcome(records=len(records))


def applier(lane: TopicPipeline, app: Any, quick_max: int = 2) -> BatchDispatcher:
    return BatchDispatcher(
        app, lane, {lane.executor: threading.Lock()}, quick_max, 1.0, lambda _: None
    )


def test_small_chunks_of_a_quick_lane_run_in_the_loop_itself_and_never_beside_its_thread() -> None:
    async def run() -> None:
        here, function, executor = (
            threading.current_thread().name,
            Busy(),
            ThreadPoolExecutor(1, "lane"),
        )
        lane = TopicPipeline("clicks", function, executor, quick=True)  # type: ignore[arg-type]
        apply = applier(lane, Works())
        small, large = (RecordBatch(0, [None for _ in range(n)], 0) for n in (2, 3))  # type: ignore[list-item]

        async def ran(part: RecordBatch) -> bool:
            await asyncio.wait_for(apply._ingest([part]), 5)
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
        held = asyncio.create_task(
            in_thread(apply._turn, executor, lambda: (entered.set(), hold.wait(5)))
        )
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


def test_small_chunks_that_wait_for_kafka_do_so_in_the_loop_and_a_stop_waits_for_them() -> None:
    async def run() -> None:
        executor, app, go_on, begun = (
            ThreadPoolExecutor(1, "lane"),
            Works(),
            asyncio.Event(),
            asyncio.Event(),
        )
        function, small, large = (
            Busy(),
            [RecordBatch(0, [None, None], 0)],
            [RecordBatch(0, [None] * 3, 0)],
        )  # type: ignore[list-item]

        async def in_loop(parts: Any) -> Any:
            begun.set()
            await go_on.wait()
            return ["waited for"]

        lane = TopicPipeline("items", function, executor, quick=True, in_loop=in_loop)  # type: ignore[arg-type]
        apply = applier(lane, app)
        async with asyncio.timeout(5):
            first = asyncio.create_task(apply._ingest(small))
            await begun.wait()
            assert app.working == 1 and apply._turn.locked()
            # Whoever reads fences meanwhile has to wait for his turn, and the loop goes on.
            other = asyncio.create_task(in_thread(apply._turn, executor, lambda: "had its turn"))
            await asyncio.sleep(0.02)
            assert not other.done()
            go_on.set()
            assert await first == ["waited for"] and await other == "had its turn"
            assert (await apply._ingest(large))[0].records == 3 and function.threads[-1].startswith(
                "lane"
            )  # type: ignore[union-attr]
            go_on.clear(), begun.clear()
            cancelled = asyncio.create_task(apply._ingest(small))
            await begun.wait()
            cancelled.cancel()
            await asyncio.gather(cancelled, return_exceptions=True)
            assert cancelled.cancelled() and not apply._turn.locked() and app.working == 0
        executor.shutdown()

    asyncio.run(run())


def test_after_a_chunk_that_was_cancelled_nothing_is_applied_before_it_is_read_again() -> None:
    async def run() -> None:
        executor, app, begun, ends = (
            ThreadPoolExecutor(1),
            Works(),
            asyncio.Event(),
            list[Exception](),
        )

        async def in_loop(parts: Any) -> Any:
            begun.set()
            await asyncio.Event().wait()

        lane = TopicPipeline("clicks", Busy(), executor, quick=True, in_loop=in_loop)  # type: ignore[arg-type]
        apply = BatchDispatcher(app, lane, {executor: threading.Lock()}, 8, 1.0, ends.append)  # type: ignore[arg-type]
        for one in (chunk(0, 1), chunk(1, 1)):
            apply._queue.put_nowait(one)
        async with asyncio.timeout(5):
            work = asyncio.create_task(apply._work())
            await begun.wait()
            for one in (chunk(0, 1), chunk(1, 1), chunk(2, 1), chunk(0, 1, epoch=1)):
                apply._queue.put_nowait(one)
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
        assert app.lane.back == [{chunk(0, 1).at: 0, chunk(1, 1).at: 0}] and not ends
        # Its successors go, too; what was read after a seek, and other partitions, do not.
        assert [(c.at.partition, c.epoch) for some in apply.take() for c in some] == [
            (2, 0),
            (0, 1),
        ]
        executor.shutdown()

    asyncio.run(run())


def test_work_that_is_cancelled_from_inside_ends_the_process() -> None:
    async def run() -> None:
        executor, ends = ThreadPoolExecutor(1), list[Exception]()

        async def in_loop(parts: Any) -> Any:
            raise asyncio.CancelledError

        lane = TopicPipeline("clicks", Busy(), executor, quick=True, in_loop=in_loop)  # type: ignore[arg-type]
        apply = BatchDispatcher(Works(), lane, {executor: threading.Lock()}, 8, 1.0, ends.append)  # type: ignore[arg-type]
        apply._queue.put_nowait(chunk(0, 1))
        async with asyncio.timeout(5):
            await asyncio.gather(asyncio.create_task(apply._work()), return_exceptions=True)
        assert len(ends) == 1 and "from inside" in str(ends[0])
        executor.shutdown()

    asyncio.run(run())


def taken(
    chunks: list[Chunk], stale: int = -1, part_max: int | None = None
) -> tuple[list[list[Chunk]], list[Chunk]]:
    """(what is applied now, what waits for the next time)."""

    async def run() -> tuple[list[list[Chunk]], list[Chunk]]:
        app = Works()
        app.lane.stale = {stale}
        lane = TopicPipeline("clicks", Busy(), ThreadPoolExecutor(1), part_max=part_max)  # type: ignore[arg-type]
        apply = applier(lane, app)
        apply._held = list(chunks)
        return apply.take(), apply._held

    return asyncio.run(run())


def test_chunks_go_by_partition_and_in_their_order() -> None:
    chunks = [chunk(0, 1), chunk(1, 1), chunk(0, 2), chunk(2, 1), chunk(0, 3)]
    assert taken(chunks) == ([[chunks[0], chunks[2], chunks[4]], [chunks[1]], [chunks[3]]], [])


@pytest.mark.parametrize(
    ("sizes", "number"), [([4, 5], 2), ([4, 6], 2), ([4, 7], 1), ([10, 1], 1), ([99, 1], 1)]
)
def test_together_they_have_no_more_records_than_one_chunk_may_have(
    sizes: list[int], number: int
) -> None:
    assert len(taken([chunk(p, size) for p, size in enumerate(sizes)])[0]) == number


def test_a_partition_whose_chunk_has_no_room_waits_with_its_later_ones() -> None:
    chunks = [chunk(0, 6), chunk(1, 6), chunk(1, 1), chunk(0, 1), chunk(2, 1)]
    assert taken(chunks) == ([[chunks[0], chunks[3]], [chunks[4]]], [chunks[1], chunks[2]])


@pytest.mark.parametrize(
    ("sizes", "now", "later"),
    [
        ([3], 1, 0),
        ([4], 1, 0),
        ([5], 1, 0),
        ([2, 1], 2, 0),
        ([2, 2], 2, 0),
        ([2, 3], 1, 1),
        ([4, 1, 1], 1, 2),
    ],
)
def test_a_lane_applies_no_more_of_one_partition_than_it_says(
    sizes: list[int], now: int, later: int
) -> None:
    """With a `part_max` of 4; another partition is not held up, and a larger chunk goes alone."""
    mine, other = [chunk(0, size) for size in sizes], chunk(1, 1)
    assert taken([*mine, other], part_max=4) == ([mine[:now], [other]], mine[now:])
    assert len(mine[now:]) == later


def test_a_lane_is_handed_chunks_that_it_may_apply_at_once(tmp_path: Path) -> None:
    async def run() -> None:
        executor = ThreadPoolExecutor(1)
        lanes = [
            TopicPipeline("clicks", Busy(), executor, part_max=48),
            TopicPipeline("items", Busy(), executor),
        ]  # type: ignore[arg-type]
        made = IngestApp(Settings(), lanes, "member", tmp_path, stopping=lambda: None)
        assert made._app.part_max == {"clicks": 48}

    asyncio.run(run())


def test_what_was_read_before_a_seek_is_dropped() -> None:
    chunks = [chunk(0, 1, epoch=7), chunk(0, 1, epoch=8)]
    assert taken(chunks, stale=7) == ([[chunks[1]]], [])


def test_what_follows_a_dropped_chunk_is_dropped_though_the_partition_is_ours_again() -> None:
    async def run() -> None:
        app, executor = Works(), ThreadPoolExecutor(1)
        apply = applier(TopicPipeline("clicks", Busy(), executor), app)  # type: ignore[arg-type]
        first, second, sought = chunk(0, 1, epoch=7), chunk(0, 2, epoch=7), chunk(0, 1, epoch=8)
        app.lane.stale = {7}
        apply._held = [first]
        assert apply.take() == []
        app.lane.stale = set()
        apply._held = [second, chunk(1, 1, epoch=7), sought]
        assert [chunks[0].at.partition for chunks in apply.take()] == [1, 0]
        assert apply._held == []
        executor.shutdown()

    asyncio.run(run())


def test_each_chunk_of_several_ends_for_itself() -> None:
    async def run() -> None:
        ends = [
            Outcome(records=1),
            FenceMoved("f", "a", "b"),
            StoreUnavailable("away"),
            Outcome(records=1),
        ]
        app, executor = Works(), ThreadPoolExecutor(1)
        lane = TopicPipeline("clicks", Busy(), executor, many=lambda parts: ends)  # type: ignore[arg-type]
        groups = [[chunk(p, 1), chunk(p, 1)] for p in range(4)]
        await asyncio.wait_for(applier(lane, app)._apply(groups), 5)
        assert [done.at.partition for done in app.lane.done] == [0, 3]
        assert app.lane.rewound == [{TP("clicks", 1), TP("clicks", 2)}]
        assert len(app.waits) == 1 and lane.rewinds == 1 and lane.outcome.records == 2
        executor.shutdown()

    asyncio.run(run())


def test_chunks_of_one_partition_are_applied_as_one() -> None:
    async def run() -> None:
        handed: list[RecordBatch] = []

        def many(parts: Any) -> list[Outcome | Exception]:
            handed.extend(parts)
            return [Outcome(records=len(part.records)) for part in parts]

        executor = ThreadPoolExecutor(1)
        lane = TopicPipeline("clicks", Busy(), executor, many=many)  # type: ignore[arg-type]
        chunks, app = [chunk(0, 2), chunk(0, 3)], Works()
        await asyncio.wait_for(applier(lane, app)._apply([chunks]), 5)
        both = [*chunks[0].records, *chunks[1].records]
        assert [list(part.records) for part in handed] == [both]
        assert [list(done.records) for done in app.lane.done] == [both]
        executor.shutdown()

    asyncio.run(run())


def test_the_next_fetch_waits_for_a_small_chunk_from_the_stream_on() -> None:
    async def run() -> None:
        executor, app, done = ThreadPoolExecutor(1), Works(), list[int]()
        app.handed.quick = {"clicks"}

        def many(parts: Any) -> list[Outcome | Exception]:
            done.append(len(parts))
            return [Outcome(records=1) for _ in parts]

        class Stream:
            def noack(self) -> Stream:
                return self

            async def __aiter__(self) -> Any:
                for number in range(3):
                    app.handed.over("clicks")
                    yield chunk(0, 1), chunk(1, 1)
                    await app.handed.all_applied()
                    assert len(done) == number + 1
                    assert (
                        not app.handed._waiting
                    )  # it was told, and did not just wait its turns out
                await asyncio.sleep(60)

        lane = TopicPipeline("clicks", Busy(), executor, quick=True, many=many)  # type: ignore[arg-type]
        agent = asyncio.create_task(applier(lane, app).run(Stream()))
        async with asyncio.timeout(5):
            while len(done) < 3:
                assert not agent.done()
                await asyncio.sleep(0.001)
        await asyncio.sleep(0)
        agent.cancel()
        assert [type(end) for end in await asyncio.gather(agent, return_exceptions=True)] in (
            [asyncio.CancelledError],
            [type(None)],
        )
        assert done == [2, 2, 2]
        executor.shutdown()

    asyncio.run(run())


def test_the_agent_holds_no_more_chunks_than_it_says() -> None:
    async def run() -> None:
        entered, hold = threading.Event(), threading.Event()

        def many(parts: Any) -> list[Outcome | Exception]:
            entered.set()
            hold.wait(10)
            return [Outcome(records=1) for _ in parts]

        executor = ThreadPoolExecutor(1)
        lane = TopicPipeline("clicks", Busy(), executor, many=many)  # type: ignore[arg-type]
        given: list[Chunk] = []

        class Stream:
            def noack(self) -> Stream:
                return self

            async def __aiter__(self) -> Any:
                for _ in range(100):
                    haul = chunk(0, 1), chunk(0, 1)
                    given.extend(haul)
                    yield haul
                await asyncio.sleep(60)

        app = Works()
        agent = asyncio.create_task(applier(lane, app).run(Stream()))
        async with asyncio.timeout(5):
            while not entered.is_set():
                await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        assert len(given) <= 3 * QUEUE_CHUNKS + 2
        hold.set()
        async with asyncio.timeout(5):
            while sum(len(done.records) for done in app.lane.done) < len(given):
                await asyncio.sleep(0.001)
        agent.cancel()
        await asyncio.gather(agent, return_exceptions=True)
        executor.shutdown()

    asyncio.run(run())
