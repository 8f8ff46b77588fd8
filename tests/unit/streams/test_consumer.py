"""The consumer of batches, and the private members of Faust and aiokafka that it uses."""

from __future__ import annotations

import asyncio
import functools
import inspect
import tempfile
from collections.abc import Callable, Coroutine, Mapping
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import aiokafka
import faust
import pytest
from aiokafka.consumer.fetcher import Fetcher
from aiokafka.consumer.group_coordinator import GroupCoordinator
from aiokafka.coordinator.assignors.range import RangePartitionAssignor
from aiokafka.structs import ConsumerRecord
from faust.tables.manager import TableManager
from faust.tables.recovery import Recovery
from faust.transport.consumer import Consumer
from faust.transport.drivers import aiokafka as driver
from faust.types import TP

from eddyline.errors import StoreUnavailable
from streams.consumer import consumer as consumer_consumer
from streams.consumer.batching import split_fetched
from streams.consumer.consumer import BatchApp, BatchConsumer, RawSchema
from streams.consumer.thread import ConsumerThread
from streams.ports import RecordBatch
from tests.applying import batch_of

AT = TP("clicks", 0)


def in_a_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    @functools.wraps(test)
    def run() -> None:
        asyncio.run(test())

    del run.__wrapped__  # type: ignore[attr-defined]  # pytest would see a coroutine function
    return run


def record(offset: int, partition: int = 0) -> ConsumerRecord:
    return ConsumerRecord("clicks", partition, offset, 1_000, 1, b"k", b"v", None, 1, 1, ())


class FakeThread:
    """A consumer's thread: what was fetched, and where it was sought."""

    def __init__(self, consumer: BatchConsumer) -> None:
        self.consumer = consumer
        self.fetched: dict[TP, list[ConsumerRecord]] = {}
        self.sought: list[dict[TP, int]] = []
        self.committed: dict[TP, int] = {}
        self.mine = {AT, TP("clicks", 1)}

    async def getmany(self, active: set[TP], timeout: float) -> Any:
        return {at: (self.consumer.epochs[at], r) for at, r in self.fetched.items() if at in active}

    def has_consumer(self) -> bool:
        return True

    def assignment(self) -> set[TP]:
        return self.mine

    def owns(self, at: TP) -> bool:
        return at in self.mine

    async def seek_to(self, offsets: dict[TP, int]) -> None:
        self.sought.append(dict(offsets))
        for at in offsets:
            self.consumer.sought(at)

    async def read_committed(self, partitions: set[TP]) -> dict[TP, int]:
        return {at: self.committed[at] for at in partitions if at in self.committed}

    async def earliest_offsets(self, *tps: TP) -> dict[TP, int]:
        return dict.fromkeys(tps, 0)

    async def highwaters(self, *tps: TP) -> dict[TP, int]:
        return dict.fromkeys(tps, 100)


async def no_positions(bounds: Any) -> Any:
    return {at: 7 for at in bounds}


class Owner:
    """The process of the consumer. reported: waits in seconds, and errors"""

    def __init__(self, position: Any, reported: list[Any] | None) -> None:
        self.position = position
        self.reported = [] if reported is None else reported
        self.limits_s: list[float] = []

    def report_wait(self, error: Exception, wait_s: float) -> None:
        self.reported.append(wait_s)

    def end(self, error: Exception | None) -> None:
        self.reported.append(error)

    async def flush(self, limit_s: float) -> None:
        self.limits_s.append(limit_s)


def make_consumer(
    position: Any = no_positions,
    reported: list[Any] | None = None,
    partition_max: Mapping[str, int] | None = None,
) -> BatchConsumer:
    app = BatchApp(
        "consumer-test",
        owner=Owner(position, reported),
        chunk_records_max=3,
        partition_max=partition_max or {},
        backoff_s_max=0.01,
        small_max=2,
        broker="kafka://127.0.0.1:1",
        web_enabled=False,
        datadir=tempfile.gettempdir(),
    )
    consumer: BatchConsumer = app.transport.create_consumer(
        callback=lambda m: None, on_partitions_revoked=None, on_partitions_assigned=None
    )
    consumer._thread.thread_loop.close()  # the real thread is never started
    consumer._thread = FakeThread(consumer)  # type: ignore[assignment]
    consumer._set_active_tps({AT, TP("clicks", 1)})
    return consumer


async def read(consumer: BatchConsumer) -> list[Any]:
    """The batches of all messages."""
    return [batch async for _, message in consumer.getmany(0.1) for batch in message.value]


def test_the_version_is_the_one_that_was_read() -> None:
    assert version("faust-streaming") == consumer_consumer.FAUST_VERSION


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (driver.AIOKafkaConsumerThread, "_create_worker_consumer"),
        (driver.AIOKafkaConsumerThread, "_fetch_records"),
        (driver.AIOKafkaConsumerThread, "getmany"),
        (driver.AIOKafkaConsumerThread, "_ensure_consumer"),
        (driver.AIOKafkaConsumerThread, "_commit"),
        (driver.AIOKafkaConsumerThread, "on_thread_stop"),
        (driver.AIOKafkaConsumerThread, "call_thread"),
        (driver.Consumer, "_new_consumer_thread"),
        (driver.Transport, "Consumer"),
        (Consumer, "getmany"),
        (Consumer, "_getmany"),
        (Consumer, "_get_active_partitions"),
        (Consumer, "_add_gap"),
        (Consumer, "_new_offset"),
        (Consumer, "on_buffer_full"),
        (Consumer, "on_buffer_drop"),
        (Consumer, "verify_event_path"),
        (Consumer, "on_partitions_assigned"),
        (Consumer, "perform_seek"),
        (faust.App, "_new_transport"),
        (faust.App, "_consumer_wait_empty"),
        (TableManager, "_update_channels"),
    ],
)
def test_what_is_overridden_or_called_is_there(owner: type, name: str) -> None:
    assert hasattr(owner, name)


def test_faust_calls_what_is_overridden() -> None:
    drain = inspect.getsource(Consumer._drain_messages)
    assert "getmany = self.getmany" in drain
    assert "self._read_offset.__getitem__" in drain
    assert "self.on_partitions_assigned" in inspect.getsource(driver.ThreadDelegateConsumer)
    assert "consumer.perform_seek()" in inspect.getsource(Recovery._resume_streams)
    assert "_new_offset(tp)" in inspect.getsource(Consumer._filter_committable_offsets)
    assert "self._consumer_wait_empty)(" in inspect.getsource(faust.App._on_partitions_revoked)
    assert "self._consumer_wait_empty(" in inspect.getsource(faust.App._stop_consumer)
    assert "stream_wait_empty" in inspect.getsource(Consumer.on_stop)


def test_aiokafka_takes_what_is_set() -> None:
    start = inspect.getsource(aiokafka.AIOKafkaConsumer.start)
    assert "fetch_max_wait_ms=self._fetch_max_wait_ms" in start
    assert "assignors=self._partition_assignment_strategy" in start
    made = asyncio.run(made_consumer())
    assert made._partition_assignment_strategy == [RangePartitionAssignor]
    assert (made._fetch_max_wait_ms, made._isolation_level) == (250, "read_committed")
    assert (made._auto_offset_reset, made._enable_auto_commit) == ("none", False)
    assert "self._group_instance_id is None" in inspect.getsource(
        GroupCoordinator._maybe_leave_group
    )
    # Records are handed out in the step that takes them, so an epoch read right after is theirs.
    taken = inspect.getsource(Fetcher.fetched_records)
    assert "if drained or not timeout:\n                return drained" in taken
    assert "del self._records[tp]" in inspect.getsource(Fetcher.seek_to)


async def made_consumer() -> Any:
    """aiokafka's consumer as the thread makes it; never started."""
    app = make_consumer().app
    thread: Any = ConsumerThread.__new__(ConsumerThread)
    thread.consumer = SimpleNamespace(app=app)
    thread.app = app
    made = thread._create_worker_consumer(app.transport)
    # The same options as Faust's own consumer, but for those that are set on purpose.
    thread.consumer.in_transaction = False
    ours = {"_partition_assignment_strategy", "_fetch_max_wait_ms", "_isolation_level"}
    ours |= {"_auto_offset_reset", "_client", "_subscription", "_loop", "_source_traceback"}
    theirs = driver.AIOKafkaConsumerThread._create_worker_consumer(thread, app.transport)
    for name, value in vars(theirs).items():
        if name not in ours:
            assert vars(made)[name] == value, name
    made._closed = theirs._closed = True  # there is nothing to close
    assert vars(made._client).keys() == vars(theirs._client).keys()
    for name in ("_bootstrap_servers", "_client_id", "_request_timeout_ms", "_metadata_max_age_ms"):
        assert getattr(made._client, name) == getattr(theirs._client, name), name
    return made


def test_the_thread_is_asked_for_records_where_ours_answers() -> None:
    assert "self._thread.getmany(" in inspect.getsource(driver.Consumer._getmany)
    original = inspect.getsource(driver.AIOKafkaConsumerThread.getmany)
    assert (
        "self._fetch_records,\n            _consumer,\n            active_partitions," in original
    )
    # A partition of ours is one of aiokafka's: equal, and with the same hash.
    assert driver.ensure_aiokafka_TP(AT) in {AT}


@in_a_loop
async def test_records_whose_fetch_was_cancelled_are_read_again() -> None:
    consumer = make_consumer()
    thread: Any = ConsumerThread.__new__(ConsumerThread)
    thread.consumer = consumer

    async def fetched() -> Any:
        return {AT: (0, [record(5)]), TP("clicks", 1): (7, [record(6, 1)])}

    task = asyncio.ensure_future(fetched())
    await task
    answer = asyncio.get_running_loop().create_future()
    thread._answer(answer, task)
    assert await answer == task.result()
    gone = asyncio.get_running_loop().create_future()
    gone.cancel()
    thread._answer(gone, task)
    async with asyncio.timeout(5):
        while not consumer._thread.sought:  # type: ignore[attr-defined]
            await asyncio.sleep(0)
    # The other partition was sought since.
    assert consumer._thread.sought == [{AT: 7}]  # type: ignore[attr-defined]


@in_a_loop
async def test_a_failed_fetch_is_raised() -> None:
    thread: Any = ConsumerThread.__new__(ConsumerThread)

    async def failing() -> None:
        raise LookupError("no")

    task = asyncio.ensure_future(failing())
    await asyncio.wait([task])
    answer = asyncio.get_running_loop().create_future()
    thread._answer(answer, task)
    with pytest.raises(LookupError):
        await answer


def test_seeks_and_epochs_change_together_in_the_threads_loop() -> None:
    assert not any(
        line.strip().startswith("await")
        for line in inspect.getsourcelines(ConsumerThread._seek_to)[0]
    )


def fetched(sizes: dict[TP, int]) -> dict[TP, list[ConsumerRecord]]:
    return {at: [record(n, at.partition) for n in range(size)] for at, size in sizes.items()}


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([1, 1], [[(0, 0, 1), (1, 0, 1)]]),
        ([2, 1], [[(0, 0, 2), (1, 0, 1)]]),
        ([2, 2], [[(0, 0, 2)], [(1, 0, 2)]]),
        ([3, 1], [[(0, 0, 3)], [(1, 0, 1)]]),
        ([5, 1], [[(0, 0, 3)], [(1, 0, 1), (0, 3, 2)]]),
        ([7, 7], [[(0, 0, 3)], [(1, 0, 3)], [(0, 3, 3)], [(1, 3, 3)], [(0, 6, 1), (1, 6, 1)]]),
    ],
)
def test_batches_of_a_fetch_go_together_up_to_the_records_of_one(
    sizes: list[int], expected: list[list[tuple[int, int, int]]]
) -> None:
    """(partition, first offset, records) of each batch of each group of at most 3 records."""
    consumer = make_consumer()
    thread: Any = consumer._thread
    thread.fetched = fetched({TP("clicks", p): size for p, size in enumerate(sizes)})

    async def messages() -> list[Any]:
        return [message.value async for _, message in consumer.getmany(0.1)]

    found = asyncio.run(messages())
    seen = [[(b.partition, b.first, len(b.records)) for b in group] for group in found]
    assert seen == expected
    assert all(consumer.is_current(batch) for group in found for batch in group)


@pytest.mark.parametrize(
    ("records", "most", "cut"),
    [
        (3, 4, [3]),
        (4, 4, [4]),
        (5, 4, [4, 1]),
        (17, 4, [4, 4, 4, 4, 1]),
        (9, None, [9]),
        (99, 200, [60, 39]),
    ],
)
def test_a_topic_may_have_smaller_batches_that_follow_each_other(
    records: int, most: int | None, cut: list[int]
) -> None:
    """Of at most 60 records without its own limit, and never of more."""
    limits = {} if most is None else {AT.topic: most}
    whole = [record(offset) for offset in range(records)]
    groups = split_fetched({AT: (5, whole)}, 60, limits, 9)
    batches = [batch for group in groups for batch in group]
    assert [len(batch.records) for batch in batches] == cut
    assert [r for batch in batches for r in batch.records] == whole
    assert all((b.topic, b.partition, b.epoch, b.read_us) == (*AT, 5, 9) for b in batches)


def test_the_consumer_yields_a_topic_in_its_own_batches() -> None:
    consumer = make_consumer(partition_max={"clicks": 1})
    consumer._thread.fetched = fetched({AT: 2, TP("clicks", 1): 2})  # type: ignore[attr-defined]
    batches = asyncio.run(read(consumer))
    seen = [(batch.partition, batch.first, len(batch.records)) for batch in batches]
    assert seen == [(0, 0, 1), (1, 0, 1), (0, 1, 1), (1, 1, 1)]


def test_small_batches_of_all_partitions_go_together() -> None:
    """As many of each partition as may be applied at once, so that a group is one step of all."""
    fetch = {TP("clicks", p): (0, [record(offset) for offset in range(9)]) for p in range(3)}
    found = split_fetched(fetch, 12, {"clicks": 4}, 9)
    assert [[(b.partition, len(b.records)) for b in group] for group in found] == [
        [(0, 4), (1, 4), (2, 4)],
        [(0, 4), (1, 4), (2, 4)],
        [(0, 1), (1, 1), (2, 1)],
    ]


def test_topics_go_apart() -> None:
    found = split_fetched({AT: (0, [record(0)]), TP("items", 1): (4, [record(0)])}, 3, {}, 9)
    seen = [[(b.topic, b.partition, b.epoch, b.read_us) for b in group] for group in found]
    assert seen == [[(*AT, 0, 9)], [("items", 1, 4, 9)]]


@in_a_loop
async def test_a_full_queue_stops_its_whole_topic() -> None:
    consumer = make_consumer()
    items = TP("items", 0)
    consumer._thread.mine = {AT, TP("clicks", 1), items}  # type: ignore[attr-defined]
    consumer._set_active_tps(set(consumer._thread.mine))  # type: ignore[attr-defined]
    consumer._thread.fetched = fetched({TP("clicks", 1): 1})  # type: ignore[attr-defined]
    [message] = [message async for _, message in consumer.getmany(0.1)]
    assert (
        message.tp == AT
    )  # whichever partition it came from: Faust counts a queue's pressure by partition
    consumer.on_buffer_full(message.tp)
    assert consumer._get_active_partitions() == {items}
    consumer.on_buffer_drop(message.tp)
    assert consumer._get_active_partitions() == consumer._thread.mine  # type: ignore[attr-defined]


@in_a_loop
async def test_batches_from_before_a_seek_are_not_yielded() -> None:
    consumer = make_consumer()
    consumer._thread.fetched = fetched({AT: 6})  # type: ignore[attr-defined]
    yielded = consumer.getmany(0.1)
    _, message = await anext(yielded)
    [first] = message.value
    assert consumer.is_current(first)
    await consumer.rewind({AT})
    assert not consumer.is_current(first)
    with pytest.raises(StopAsyncIteration):
        await anext(yielded)
    assert consumer._thread.sought == [{AT: 7}]  # type: ignore[attr-defined]


@in_a_loop
async def test_nothing_is_yielded_while_a_position_is_looked_up() -> None:
    waiting = asyncio.Event()

    async def slow(bounds: Any) -> Any:
        await waiting.wait()
        return {at: 3 for at in bounds}

    consumer = make_consumer(slow)
    thread: Any = consumer._thread
    thread.fetched = {AT: [record(0)], TP("clicks", 1): [record(0, 1)]}
    rewinding = asyncio.create_task(consumer.rewind({AT}))
    await asyncio.sleep(0)
    assert [b.partition for b in await read(consumer)] == [1]
    waiting.set()
    await asyncio.wait_for(rewinding, 5)
    assert [b.partition for b in await read(consumer)] == [0, 1]


@in_a_loop
async def test_a_rewind_waits_for_the_store_and_gives_up_lost_partitions() -> None:
    reported: list[Any] = []
    answers = [StoreUnavailable("away"), StoreUnavailable("away"), None]

    async def away(bounds: Any) -> Any:
        if (error := answers.pop(0)) is not None:
            raise error
        return {at: 1 for at in bounds}

    consumer = make_consumer(away, reported)
    await asyncio.wait_for(consumer.rewind({AT, TP("clicks", 5)}), 5)
    assert consumer._thread.sought == [{AT: 1}]  # type: ignore[attr-defined]
    assert (len(reported) == 2 and reported[0] < reported[1]) or reported[1] == 0.01
    consumer._thread.mine = set()  # type: ignore[attr-defined]
    await asyncio.wait_for(consumer.rewind({AT}), 5)
    assert len(consumer._thread.sought) == 1  # type: ignore[attr-defined]


@in_a_loop
async def test_two_rewinds_of_a_partition_do_not_overlap() -> None:
    """What is read between one's look at the fences and its seek would not follow what it saw."""
    order: list[str] = []
    yielded: list[Any] = []

    async def looks(bounds: Any) -> Any:
        order.append(f"look {len(order)}")
        for _ in range(5):
            await asyncio.sleep(0.01)
            yielded.extend(await read(consumer))
        order.append(f"looked {len(order)}")
        return {at: 7 for at in bounds}

    consumer = make_consumer(looks)
    consumer._thread.fetched = {AT: [record(7)]}  # type: ignore[attr-defined]
    both = [asyncio.create_task(consumer.rewind({AT})), asyncio.create_task(consumer.rewind({AT}))]
    await asyncio.wait_for(asyncio.gather(*both), 5)
    assert order == ["look 0", "looked 1", "look 2", "looked 3"]
    assert yielded == []
    assert [(b.topic, b.partition) for b in await read(consumer)] == [AT]


@in_a_loop
async def test_an_unexpected_error_while_positioning_ends_the_process() -> None:
    reported: list[Any] = []

    async def wrong(bounds: Any) -> Any:
        raise LookupError("no")

    consumer = make_consumer(wrong, reported)
    await asyncio.wait_for(consumer.rewind({AT}), 5)
    assert [type(error) for error in reported] == [LookupError]


@in_a_loop
async def test_commits_follow_the_acks_and_restart_after_a_seek() -> None:
    consumer = make_consumer()
    for last in (4, 9):
        consumer.applied(batch_of([record(3), record(last)]))
    assert list(consumer._filter_tps_with_pending_acks()) == [AT]
    assert consumer._new_offset(AT) == 10
    assert consumer._new_offset(AT) is None
    consumer.applied(batch_of([record(20)]))
    consumer._committed_offset[AT] = 10
    consumer.sought(AT)
    assert consumer._new_offset(AT) is None
    assert consumer._committed_offset[AT] is None
    await consumer._add_gap(AT, 0, 100)
    assert not consumer._gap[AT]


@in_a_loop
async def test_faust_does_not_drop_what_is_read_again() -> None:
    consumer = make_consumer()
    consumer._read_offset[AT] = 50
    assert consumer._read_offset[AT] is None


def test_values_go_through_raw() -> None:
    group: list[RecordBatch] = [batch_of([record(1)])]
    message: Any = SimpleNamespace(value=group, key=None)
    assert RawSchema().loads_value(None, message) is group
    assert RawSchema().loads_key(None, message) is None


@in_a_loop
async def test_a_stop_waits_for_the_running_batch() -> None:
    app = make_consumer().app
    done: list[int] = []

    async def work() -> None:
        await asyncio.sleep(0.05)
        done.append(1)

    task = asyncio.create_task(app.track(work()))
    await asyncio.sleep(0)
    await app.wait_idle(5)
    assert done == [1]
    await task


@in_a_loop
async def test_before_a_revocation_the_running_batch_ends_then_pending_effects_are_flushed() -> (
    None
):
    consumer, order = make_consumer(), list[Any]()
    app = consumer.app

    async def batch() -> None:
        await asyncio.sleep(0.05)
        order.append("batch")

    async def flush(limit_s: float) -> None:
        order.append(limit_s)

    app.owner.flush = flush  # type: ignore[method-assign]
    task = asyncio.create_task(app.track(batch()))
    await asyncio.sleep(0)
    await app._consumer_wait_empty(consumer, app.log)
    await task
    limit_s = app.conf.broker_session_timeout / 2
    assert order[0] == "batch" and limit_s - 1 < order[1] <= limit_s - 0.05


@in_a_loop
async def test_committed_offsets_are_known_after_a_rewind_and_never_go_back() -> None:
    consumer = make_consumer()
    consumer._thread.committed = {AT: 7}  # type: ignore[attr-defined]
    await consumer.rewind({AT})
    assert consumer.committed_of(AT.topic) == {AT.partition: 7}
    consumer._thread.committed = {AT: 3}  # type: ignore[attr-defined]
    await consumer.rewind({AT})
    assert (
        consumer.committed_of(AT.topic) == {AT.partition: 7}
        and consumer.committed_of("other") == {}
    )
