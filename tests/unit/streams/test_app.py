"""Where a batch is applied: small ones in the event loop if the thread is idle, else in it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from faust.types import TP

from eddyline.errors import FenceMoved, StoreUnavailable
from eddyline.settings.loader import Settings
from eddyline.stores.memory import MemoryStore
from streams.app import IngestApp
from streams.consumer.batching import place_of
from streams.consumer.in_flight import InFlightBatches
from streams.dispatcher import QUEUE_BATCHES, BatchDispatcher, HandlerThread, TopicPipeline
from streams.ports import Handler, Outcome, RecordBatch


class Consumer:
    """What a dispatcher uses of the consumer."""

    def __init__(self) -> None:
        self.stale: set[int] = set()
        self.rewound: list[set[TP]] = []
        self.done: list[RecordBatch] = []
        self.back: list[dict[TP, int]] = []

    def unread(self, taken: dict[TP, int]) -> None:
        self.back.append(dict(taken))

    def is_current(self, batch: RecordBatch) -> bool:
        return batch.epoch not in self.stale

    def applied(self, batch: RecordBatch) -> None:
        self.done.append(batch)

    async def rewind(self, partitions: set[TP]) -> None:
        self.rewound.append(set(partitions))


class Works:
    """What a dispatcher uses of the Faust app and of its owner.

    errors: those that end the process
    """

    chunk_records_max = 10

    def __init__(self) -> None:
        self.batches = Consumer()
        self.in_flight = InFlightBatches()
        self.owner = self
        self.errors: list[Exception] = []
        self.waits: list[float] = []
        self.working = 0

    async def track(self, work: Awaitable[Any]) -> Any:
        self.working += 1
        try:
            return await work
        finally:
            self.working -= 1

    def report_wait(self, error: Exception, wait_s: float) -> None:
        self.waits.append(wait_s)

    def end(self, error: Exception) -> None:
        self.errors.append(error)


def batch(partition: int, records: int, epoch: int = 0) -> RecordBatch:
    listed: Any = [SimpleNamespace(offset=n) for n in range(records)]
    return RecordBatch("clicks", partition, listed, 0, epoch)


class Busy(Handler):
    """A handler that notes in which thread it ran. results: of each call, where given"""

    def __init__(
        self, results: Callable[[Sequence[RecordBatch]], list[Outcome | Exception]] | None = None
    ) -> None:
        self.threads: list[str] = []
        self._results = results

    def open(self, partition: int) -> None:
        pass

    def apply(self, batches: Sequence[RecordBatch]) -> list[Outcome | Exception]:
        self.threads.append(threading.current_thread().name)
        if self._results is not None:
            return self._results(batches)
        return [Outcome(records=len(one.records)) for one in batches]


class Awaiting(Busy):
    """A handler that awaits `go_on` in the event loop."""

    awaits_kafka = True

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.go_on = asyncio.Event(), asyncio.Event()

    async def apply_in_loop(self, batches: Sequence[RecordBatch]) -> list[Any]:
        self.begun.set()
        await self.go_on.wait()
        return ["waited for"]


def pipeline_of(handler: Handler) -> TopicPipeline:
    return TopicPipeline("clicks", handler, HandlerThread("handler"))


def dispatcher_of(pipeline: TopicPipeline, app: Any, in_loop_max: int = 2) -> BatchDispatcher:
    return BatchDispatcher(app, pipeline, in_loop_max, 1.0)


def test_small_batches_run_in_the_loop_itself_and_never_during_a_call_in_the_thread() -> None:
    async def run() -> None:
        here, handler = threading.current_thread().name, Busy()
        pipeline = pipeline_of(handler)
        apply, never = (dispatcher_of(pipeline, Works(), most) for most in (2, 0))
        small, large = batch(0, 2), batch(0, 3)

        async def ran(one: RecordBatch, by: BatchDispatcher = apply) -> bool:
            await asyncio.wait_for(by.apply([one]), 5)
            return handler.threads[-1] == here

        assert await ran(small)
        assert not await ran(large)
        pipeline.away = True
        assert not await ran(small)
        pipeline.away = False
        assert not await ran(small, never)
        entered, hold = threading.Event(), threading.Event()
        held = asyncio.create_task(pipeline.thread.run(lambda: (entered.set(), hold.wait(5))))
        async with asyncio.timeout(5):
            while not entered.is_set():
                await asyncio.sleep(0.001)
        waiting = asyncio.create_task(ran(small))
        await asyncio.sleep(0.02)
        assert len(handler.threads) == 4
        hold.set()
        assert not await waiting
        await held
        pipeline.thread.close()

    asyncio.run(run())


def test_small_batches_await_kafka_in_the_loop_and_a_stop_waits_for_them() -> None:
    async def run() -> None:
        handler, app = Awaiting(), Works()
        pipeline = pipeline_of(handler)
        apply, small, large = dispatcher_of(pipeline, app), [batch(0, 2)], [batch(0, 3)]
        async with asyncio.timeout(5):
            first = asyncio.create_task(apply.apply(small))
            await handler.begun.wait()
            assert app.working == 1 and pipeline.thread.lock.locked()
            # A call in the thread, such as reading fences, has to wait; the loop goes on.
            other = asyncio.create_task(pipeline.thread.run(lambda: "had its turn"))
            await asyncio.sleep(0.02)
            assert not other.done()
            handler.go_on.set()
            assert await first == ["waited for"] and await other == "had its turn"
            [result] = await apply.apply(large)
            assert result.records == 3  # type: ignore[union-attr]
            assert handler.threads[-1].startswith("handler")
            handler.go_on.clear(), handler.begun.clear()
            cancelled = asyncio.create_task(apply.apply(small))
            await handler.begun.wait()
            cancelled.cancel()
            await asyncio.gather(cancelled, return_exceptions=True)
            assert cancelled.cancelled() and not pipeline.thread.lock.locked() and app.working == 0
        pipeline.thread.close()

    asyncio.run(run())


def test_after_a_cancelled_batch_nothing_is_applied_before_it_is_read_again() -> None:
    async def run() -> None:
        handler, app = Awaiting(), Works()
        pipeline = pipeline_of(handler)
        dispatcher = dispatcher_of(pipeline, app, 8)
        for one in (batch(0, 1), batch(1, 1)):
            pipeline.queue.put_nowait(one)
        async with asyncio.timeout(5):
            work = asyncio.create_task(dispatcher.work())
            await handler.begun.wait()
            for one in (batch(0, 1), batch(1, 1), batch(2, 1), batch(0, 1, epoch=1)):
                pipeline.queue.put_nowait(one)
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
        assert app.batches.back == [{TP("clicks", 0): 0, TP("clicks", 1): 0}] and not app.errors
        # Its successors go, too; what was read after a seek, and other partitions, do not.
        assert [(one.partition, one.epoch) for one in dispatcher.take()] == [(2, 0), (0, 1)]
        pipeline.thread.close()

    asyncio.run(run())


def test_work_that_is_cancelled_from_inside_ends_the_process() -> None:
    async def run() -> None:
        class Cancels(Awaiting):
            async def apply_in_loop(self, batches: Sequence[RecordBatch]) -> list[Any]:
                raise asyncio.CancelledError

        pipeline, app = pipeline_of(Cancels()), Works()
        pipeline.queue.put_nowait(batch(0, 1))
        async with asyncio.timeout(5):
            work = asyncio.create_task(dispatcher_of(pipeline, app, 8).work())
            await asyncio.gather(work, return_exceptions=True)
        assert len(app.errors) == 1 and "from inside" in str(app.errors[0])
        pipeline.thread.close()

    asyncio.run(run())


def taken(
    batches: list[RecordBatch], stale: int = -1, partition_max: int | None = None
) -> tuple[list[list[RecordBatch]], list[RecordBatch]]:
    """(what is applied now, by partition, as it was queued; what stays queued)."""

    async def run() -> tuple[list[list[RecordBatch]], list[RecordBatch]]:
        app, handler = Works(), Busy()
        app.batches.stale = {stale}
        handler.partition_max = partition_max
        pipeline = pipeline_of(handler)
        pipeline.held = list(batches)
        chosen = dispatcher_of(pipeline, app).take()
        pipeline.thread.close()
        origin = {id(record): one for one in batches for record in one.records}
        applied = [
            list({id(origin[id(r)]): origin[id(r)] for r in one.records}.values()) for one in chosen
        ]
        for one, parts in zip(chosen, applied, strict=True):
            assert list(one.records) == [record for part in parts for record in part.records]
            assert {place_of(part) for part in parts} == {place_of(one)}
            assert one.epoch == parts[-1].epoch
        return applied, pipeline.held

    return asyncio.run(run())


def test_batches_go_by_partition_and_in_their_order() -> None:
    batches = [batch(0, 1), batch(1, 1), batch(0, 2), batch(2, 1), batch(0, 3)]
    assert taken(batches) == (
        [[batches[0], batches[2], batches[4]], [batches[1]], [batches[3]]],
        [],
    )


@pytest.mark.parametrize(
    ("sizes", "number"), [([4, 5], 2), ([4, 6], 2), ([4, 7], 1), ([10, 1], 1), ([99, 1], 1)]
)
def test_together_they_have_no_more_records_than_allowed(sizes: list[int], number: int) -> None:
    assert len(taken([batch(p, size) for p, size in enumerate(sizes)])[0]) == number


def test_a_partition_whose_batch_has_no_room_waits_with_its_later_ones() -> None:
    batches = [batch(0, 6), batch(1, 6), batch(1, 1), batch(0, 1), batch(2, 1)]
    assert taken(batches) == ([[batches[0], batches[3]], [batches[4]]], [batches[1], batches[2]])


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
def test_no_more_of_one_partition_is_applied_than_its_handler_says(
    sizes: list[int], now: int, later: int
) -> None:
    """With a `partition_max` of 4: other partitions go on, and a larger batch goes alone."""
    mine, other = [batch(0, size) for size in sizes], batch(1, 1)
    assert taken([*mine, other], partition_max=4) == ([mine[:now], [other]], mine[now:])
    assert len(mine[now:]) == later


def test_the_consumer_makes_batches_of_the_size_that_a_handler_takes(tmp_path: Path) -> None:
    async def run() -> None:
        clicks, thread = Busy(), HandlerThread("handler")
        clicks.partition_max = 48
        pipelines = [
            TopicPipeline("clicks", clicks, thread),
            TopicPipeline("items", Busy(), thread),
        ]
        made = IngestApp(Settings(), pipelines, MemoryStore(), "member", tmp_path)
        assert made._app.partition_max == {"clicks": 48}
        thread.close()

    asyncio.run(run())


def test_what_was_read_before_a_seek_is_dropped() -> None:
    batches = [batch(0, 1, epoch=7), batch(0, 1, epoch=8)]
    assert taken(batches, stale=7) == ([[batches[1]]], [])


def test_what_follows_a_dropped_batch_is_dropped_though_the_partition_is_ours_again() -> None:
    async def run() -> None:
        app, pipeline = Works(), pipeline_of(Busy())
        dispatcher = dispatcher_of(pipeline, app)
        first, second, sought = batch(0, 1, epoch=7), batch(0, 2, epoch=7), batch(0, 1, epoch=8)
        app.batches.stale = {7}
        pipeline.held = [first]
        assert dispatcher.take() == []
        app.batches.stale = set()
        pipeline.held = [second, batch(1, 1, epoch=7), sought]
        assert [one.partition for one in dispatcher.take()] == [1, 0]
        assert pipeline.held == []
        pipeline.thread.close()

    asyncio.run(run())


def test_each_batch_of_several_ends_for_itself() -> None:
    async def run() -> None:
        results: list[Outcome | Exception] = [
            Outcome(records=1),
            FenceMoved("f", "a", "b"),
            StoreUnavailable("away"),
            Outcome(records=1),
        ]
        app, pipeline = Works(), pipeline_of(Busy(lambda batches: results))
        batches = [batch(p, 2) for p in range(4)]
        await asyncio.wait_for(dispatcher_of(pipeline, app).dispatch(batches), 5)
        assert [done.partition for done in app.batches.done] == [0, 3]
        assert app.batches.rewound == [{TP("clicks", 1), TP("clicks", 2)}]
        assert len(app.waits) == 1 and pipeline.rewinds == 1 and pipeline.outcome.records == 2
        pipeline.thread.close()

    asyncio.run(run())


def test_queued_batches_of_one_partition_are_applied_as_one() -> None:
    async def run() -> None:
        applied: list[RecordBatch] = []

        def results(batches: Sequence[RecordBatch]) -> list[Outcome | Exception]:
            applied.extend(batches)
            return [Outcome(records=len(one.records)) for one in batches]

        pipeline, app = pipeline_of(Busy(results)), Works()
        batches = [batch(0, 2), batch(0, 3)]
        pipeline.held = list(batches)
        dispatcher = dispatcher_of(pipeline, app)
        await asyncio.wait_for(dispatcher.dispatch(dispatcher.take()), 5)
        both = [*batches[0].records, *batches[1].records]
        assert [list(one.records) for one in applied] == [both]
        assert [list(done.records) for done in app.batches.done] == [both]
        pipeline.thread.close()

    asyncio.run(run())


def test_the_next_fetch_waits_for_a_small_batch_from_the_stream_on() -> None:
    async def run() -> None:
        app, done = Works(), list[int]()
        app.in_flight.topics = {"clicks"}

        def results(batches: Sequence[RecordBatch]) -> list[Outcome | Exception]:
            done.append(len(batches))
            return [Outcome(records=1) for _ in batches]

        class Stream:
            def noack(self) -> Stream:
                return self

            async def __aiter__(self) -> Any:
                for number in range(3):
                    app.in_flight.sent("clicks")
                    yield batch(0, 1), batch(1, 1)
                    await app.in_flight.wait()
                    assert len(done) == number + 1
                    # It was acknowledged; the wait did not just run out of turns.
                    assert not app.in_flight._in_flight
                await asyncio.sleep(60)

        pipeline = pipeline_of(Busy(results))
        agent = asyncio.create_task(dispatcher_of(pipeline, app).run(Stream()))
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
        pipeline.thread.close()

    asyncio.run(run())


def test_the_agent_holds_no_more_batches_than_it_says() -> None:
    async def run() -> None:
        entered, hold = threading.Event(), threading.Event()

        def results(batches: Sequence[RecordBatch]) -> list[Outcome | Exception]:
            entered.set()
            hold.wait(10)
            return [Outcome(records=1) for _ in batches]

        pipeline = pipeline_of(Busy(results))
        given: list[RecordBatch] = []

        class Stream:
            def noack(self) -> Stream:
                return self

            async def __aiter__(self) -> Any:
                for _ in range(100):
                    group = batch(0, 1), batch(0, 1)
                    given.extend(group)
                    yield group
                await asyncio.sleep(60)

        app = Works()
        agent = asyncio.create_task(dispatcher_of(pipeline, app, 0).run(Stream()))
        async with asyncio.timeout(5):
            while not entered.is_set():
                await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)
        assert len(given) <= 3 * QUEUE_BATCHES + 2
        hold.set()
        async with asyncio.timeout(5):
            while sum(len(done.records) for done in app.batches.done) < len(given):
                await asyncio.sleep(0.001)
        agent.cancel()
        await asyncio.gather(agent, return_exceptions=True)
        pipeline.thread.close()

    asyncio.run(run())
