"""Where a batch is applied: small ones in the event loop if the thread is idle, else in it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import GroupAuthorizationFailedError

from eddyline.errors import FenceMoved, LogMismatch, StoreUnavailable
from eddyline.settings.loader import Settings
from eddyline.stores.memory import MemoryStore
from streams import app
from streams.app import AgentApp, IngestApp
from streams.consumer.buffer import Fetched, RecordBuffer
from streams.consumer.consumer import TURNS_MAX
from streams.dispatcher import BatchDispatcher, HandlerThread, TopicPipeline
from streams.ports import Handler, Outcome, RecordBatch


class Consumer:
    """What a dispatcher uses of the consumer."""

    def __init__(self) -> None:
        self.stale: set[int] = set()
        self.rewound: list[set[TopicPartition]] = []
        self.done: list[RecordBatch] = []

    def is_current(self, at: TopicPartition, epoch: int) -> bool:
        return epoch not in self.stale

    def applied(self, batch: RecordBatch) -> None:
        self.done.append(batch)

    async def rewind(self, partitions: set[TopicPartition]) -> None:
        self.rewound.append(set(partitions))


class Owner:
    """What a dispatcher uses of its process. errors: those that end the process"""

    def __init__(self) -> None:
        self.errors: list[Exception] = []
        self.waits: list[float] = []

    def report_wait(self, error: Exception, wait_s: float) -> None:
        self.waits.append(wait_s)

    def end(self, error: Exception) -> None:
        self.errors.append(error)


class Stream:
    """A stream of Faust's: an event for each list of fetches, which the buffer has by then."""

    def __init__(self, buffer: RecordBuffer, fetches: list[list[RecordBatch]]) -> None:
        self._buffer, self._fetches = buffer, fetches

    def noack(self) -> Stream:
        return self

    async def __aiter__(self) -> Any:
        for fetch in self._fetches:
            self._buffer.busy = True
            put(self._buffer, *fetch)
            yield True
        await asyncio.sleep(60)


def put(buffer: RecordBuffer, *batches: RecordBatch) -> None:
    """Put the records of batches into the buffer."""
    for one in batches:
        buffer.add(one.partition, Fetched(one.records, one.read_us, one.epoch))


def batch(partition: int, records: int, epoch: int = 0) -> RecordBatch:
    listed: Any = [SimpleNamespace(offset=n) for n in range(records)]
    return RecordBatch("clicks", partition, listed, 0, epoch)


class Busy(Handler):
    """A handler that notes in which thread it ran. results: of each call, where given"""

    def __init__(
        self, results: Callable[[Sequence[RecordBatch]], list[Outcome | Exception]] | None = None
    ) -> None:
        self.threads: list[str] = []
        self.fences: Any = SimpleNamespace(resumed=lambda partition, records: 0)
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
        return [Outcome(records=len(one.records)) for one in batches]


def pipeline_of(handler: Handler) -> TopicPipeline:
    return TopicPipeline("clicks", handler, HandlerThread("handler"))


class Dispatched:
    """A dispatcher with its consumer, owner and buffer; for batches of at most 10 records."""

    def __init__(self, handler: Handler, in_loop_max: int = 2) -> None:
        self.pipeline, self.owner = pipeline_of(handler), Owner()
        self.consumer: Any = Consumer()
        self.buffer = RecordBuffer("clicks", 10, handler.partition_max)
        owner: Any = self.owner
        self.dispatcher = BatchDispatcher(self.pipeline, self.buffer, owner, in_loop_max, 1.0)
        self.dispatcher.consumer = self.consumer


def test_small_batches_run_in_the_loop_itself_and_never_during_a_call_in_the_thread() -> None:
    async def run() -> None:
        here, handler = threading.current_thread().name, Busy()
        made = Dispatched(handler)
        pipeline, apply, owner = made.pipeline, made.dispatcher, Owner()
        never = BatchDispatcher(pipeline, made.buffer, owner, 0, 1.0)  # type: ignore[arg-type]
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
        handler = Awaiting()
        made = Dispatched(handler)
        pipeline, dispatcher = made.pipeline, made.dispatcher
        small, large = [batch(0, 2)], [batch(0, 3)]
        async with asyncio.timeout(5):
            first = asyncio.create_task(dispatcher.dispatch(small))
            await handler.begun.wait()
            assert dispatcher.applying and pipeline.thread.lock.locked()
            # A call in the thread, such as reading fences, has to wait; the loop goes on.
            other = asyncio.create_task(pipeline.thread.run(lambda: "had its turn"))
            await asyncio.sleep(0.02)
            assert not other.done()
            handler.go_on.set()
            await first
            assert made.consumer.done == small and await other == "had its turn"
            assert not dispatcher.applying
            [result] = await dispatcher.apply(large)
            assert result.records == 3  # type: ignore[union-attr]
            assert handler.threads[-1].startswith("handler")
            handler.go_on.clear(), handler.begun.clear()
            cancelled = asyncio.create_task(dispatcher.dispatch(small))
            await handler.begun.wait()
            cancelled.cancel()
            await asyncio.gather(cancelled, return_exceptions=True)
            assert cancelled.cancelled() and not pipeline.thread.lock.locked()
            assert not dispatcher.applying and made.consumer.done == small
        pipeline.thread.close()

    asyncio.run(run())


@pytest.mark.parametrize("inside", [True, False])
def test_work_that_is_cancelled_ends_the_process(inside: bool) -> None:
    """By a handler, or as Faust cancels an agent: the batch may be half applied."""

    async def run() -> None:
        class Cancels(Awaiting):
            async def apply_in_loop(self, batches: Sequence[RecordBatch]) -> list[Any]:
                self.begun.set()
                if inside:
                    raise asyncio.CancelledError
                return await super().apply_in_loop(batches)

        handler = Cancels()
        made = Dispatched(handler, 8)
        async with asyncio.timeout(5):
            stream = Stream(made.buffer, [[batch(0, 1)]])
            work = asyncio.create_task(made.dispatcher.run(stream))
            await handler.begun.wait()
            if not inside:
                work.cancel()
            await asyncio.gather(work, return_exceptions=True)
        assert [str(error) for error in made.owner.errors] == ["the work on batches was cancelled"]
        assert made.consumer.done == []
        made.pipeline.thread.close()

    asyncio.run(run())


def test_an_error_outside_of_a_batch_ends_the_process() -> None:
    async def run() -> None:
        made = Dispatched(Busy())
        made.consumer.is_current = None
        async with asyncio.timeout(5):
            await made.dispatcher.run(Stream(made.buffer, [[batch(0, 1)]]))
        assert [type(error) for error in made.owner.errors] == [TypeError]
        made.pipeline.thread.close()

    asyncio.run(run())


def test_the_consumer_makes_batches_of_the_size_that_a_handler_takes(tmp_path: Path) -> None:
    async def run() -> None:
        clicks, thread = Busy(), HandlerThread("handler")
        clicks.partition_max = 48
        pipelines = [
            TopicPipeline("clicks", clicks, thread),
            TopicPipeline("items", Busy(), thread),
        ]
        made = IngestApp(Settings(), pipelines, MemoryStore(), "member", tmp_path)
        for topic, most in (("clicks", 48), ("items", Settings().chunk_records_max)):
            put(made._buffers[topic], batch(0, 1_000))
            [first] = made._buffers[topic].take(lambda at, epoch: True)
            assert len(first.records) == most
        thread.close()

    asyncio.run(run())


def test_each_batch_of_several_ends_for_itself() -> None:
    async def run() -> None:
        results: list[Outcome | Exception] = [
            Outcome(records=1),
            FenceMoved("f", "a", "b"),
            StoreUnavailable("away"),
            Outcome(records=1),
        ]
        made = Dispatched(Busy(lambda batches: results))
        pipeline, batches = made.pipeline, [batch(p, 2) for p in range(4)]
        await asyncio.wait_for(made.dispatcher.dispatch(batches), 5)
        assert [done.partition for done in made.consumer.done] == [0, 3]
        back = {TopicPartition("clicks", 1), TopicPartition("clicks", 2)}
        assert made.consumer.rewound == [back]
        assert len(made.owner.waits) == 1
        assert pipeline.rewinds == 1 and pipeline.outcome.records == 2
        pipeline.thread.close()

    asyncio.run(run())


def test_buffered_records_of_one_partition_are_applied_as_one() -> None:
    async def run() -> None:
        applied: list[RecordBatch] = []

        def results(batches: Sequence[RecordBatch]) -> list[Outcome | Exception]:
            applied.extend(batches)
            return [Outcome(records=len(one.records)) for one in batches]

        made = Dispatched(Busy(results))
        batches = [batch(0, 2), batch(0, 3)]
        put(made.buffer, *batches)
        made.buffer.busy = True
        await asyncio.wait_for(made.dispatcher.drain(), 5)
        both = [*batches[0].records, *batches[1].records]
        assert [list(one.records) for one in applied] == [both]
        assert [list(done.records) for done in made.consumer.done] == [both]
        assert not made.buffer.busy
        made.pipeline.thread.close()

    asyncio.run(run())


def test_an_ack_of_a_batch_that_was_sought_meanwhile_does_not_count() -> None:
    async def run() -> None:
        made = Dispatched(Busy())
        made.consumer.stale = {7}
        await asyncio.wait_for(made.dispatcher.dispatch([batch(0, 1, epoch=7)]), 5)
        assert made.consumer.done == [] and made.pipeline.batches == 1
        made.pipeline.thread.close()

    asyncio.run(run())


def test_small_batches_are_applied_within_few_turns_of_the_loop() -> None:
    """The next fetch waits for `TURNS_MAX` turns at most: the way of a wake-up fits into them."""

    async def run() -> None:
        app = AgentApp("turns", broker="kafka://127.0.0.1:1", web_enabled=False)
        made, turns = Dispatched(Busy()), list[int]()
        channel = app.channel(maxsize=1)

        async def agent(stream: Any) -> None:
            await made.dispatcher.run(stream)

        app.agent(channel, name="agent", concurrency=1)(agent)
        async with asyncio.timeout(10):
            await app.start()
            app.flow_control.resume()
            for number in range(3):
                put(made.buffer, batch(0, 1), batch(1, 1))
                made.buffer.busy = True
                await channel.put(True)  # type: ignore[arg-type]
                waited = 0
                while made.buffer.busy:
                    await asyncio.sleep(0)
                    waited += 1
                turns.append(waited)
                assert len(made.consumer.done) == 2 * (number + 1)
            await app.stop()
            faust_consumer: Any = app.consumer  # a stream makes it; it is never started
            faust_consumer._thread.thread_loop.close()
        assert max(turns) < TURNS_MAX, turns
        assert [type(error) for error in made.owner.errors] in ([], [RuntimeError])
        made.pipeline.thread.close()

    asyncio.run(run())


def test_a_stop_waits_for_the_running_batch_then_flushes_within_the_limit(tmp_path: Path) -> None:
    async def run() -> None:
        handler, order, thread = Awaiting(), list[Any](), HandlerThread("handler")

        class Pending:
            def pending(self) -> bool:
                return True

        handler.write_behind = Pending()  # type: ignore[assignment]
        handler.flush = lambda: order.append("flush")  # type: ignore[method-assign]
        made = IngestApp(
            Settings(), [TopicPipeline("clicks", handler, thread)], MemoryStore(), "m", tmp_path
        )
        [dispatcher] = made._dispatchers
        dispatcher.consumer = Consumer()  # type: ignore[assignment]
        async with asyncio.timeout(5):
            work = asyncio.create_task(dispatcher.dispatch([batch(0, 2)]))
            await handler.begun.wait()
            finishing = asyncio.create_task(made.finish(5.0))
            await asyncio.sleep(0.02)
            assert order == [] and not finishing.done()
            handler.go_on.set()
            await asyncio.gather(work, finishing)
        assert order == ["flush"]
        # A batch that does not end is not waited for longer.
        handler.go_on.clear(), handler.begun.clear()
        async with asyncio.timeout(5):
            work = asyncio.create_task(dispatcher.dispatch([batch(0, 2)]))
            await handler.begun.wait()
            await made.finish(0.05)
            handler.go_on.set()
            await work
        thread.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (None, 1, "the stop takes too long"),
        (StoreUnavailable("Redis is away"), 1, "Redis is away"),
        (LogMismatch("another log"), 3, "another log"),
        (GroupAuthorizationFailedError("group"), 3, "lacks a right"),
        (TypeError("a bug"), 1, "a bug"),
    ],
)
def test_a_stop_that_hangs_ends_with_the_reason_of_the_stop(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception | None,
    code: int,
    line: str,
) -> None:
    async def run() -> None:
        thread = HandlerThread("handler")
        settings = Settings(kafka_bootstrap_servers="k:1", redis_url="redis://r")
        pipelines = [TopicPipeline("clicks", Busy(), thread)]
        made = IngestApp(settings, pipelines, MemoryStore(), "m", tmp_path)
        made.end(error)
        made._cut_short()
        thread.close()

    codes = list[int]()
    monkeypatch.setattr(app.os, "_exit", codes.append)
    asyncio.run(run())
    assert codes == [code] and line in caplog.text and "it is cut short" in caplog.text
