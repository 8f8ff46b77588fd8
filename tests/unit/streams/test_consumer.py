"""What the chunk lane leans on in Faust and aiokafka, and what it makes of it."""

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
from aiokafka.structs import ConsumerRecord
from faust.tables.manager import TableManager
from faust.tables.recovery import Recovery
from faust.transport.consumer import Consumer
from faust.transport.drivers import aiokafka as driver
from faust.types import TP

from eddyline.errors import StoreUnavailable
from streams.consumer import consumer as consumer_consumer
from streams.consumer.batching import Chunk, split_fetched
from streams.consumer.consumer import BatchApp, BatchConsumer, RawSchema
from streams.consumer.thread import ConsumerThread

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
        self.told: dict[TP, int] = {}
        self.mine = {AT, TP("clicks", 1)}

    async def getmany(self, active: set[TP], timeout: float) -> Any:
        return {at: (self.consumer.epochs[at], r) for at, r in self.fetched.items() if at in active}

    def assignment(self) -> set[TP]:
        return self.mine

    def owns(self, at: TP) -> bool:
        return at in self.mine

    async def seek_lane(self, offsets: dict[TP, int]) -> None:
        self.sought.append(dict(offsets))
        for at in offsets:
            self.consumer.sought(at)

    async def read_committed(self, partitions: set[TP]) -> dict[TP, int]:
        return {at: self.told[at] for at in partitions if at in self.told}

    async def earliest_offsets(self, *tps: TP) -> dict[TP, int]:
        return dict.fromkeys(tps, 0)

    async def highwaters(self, *tps: TP) -> dict[TP, int]:
        return dict.fromkeys(tps, 100)


async def no_positions(bounds: Any) -> Any:
    return {at: 7 for at in bounds}


async def given_up(limit_s: float) -> None:
    """Nothing waits."""


def make_consumer(
    positioner: Any = no_positions,
    told: list[Any] | None = None,
    part_max: Mapping[str, int] | None = None,
) -> BatchConsumer:
    app = BatchApp(
        "lane-test",
        positioner=positioner,
        chunk_records_max=3,
        part_max=part_max or {},
        backoff_s_max=0.01,
        small_max=2,
        waiting=lambda error, wait_s: told.append(wait_s) if told is not None else None,
        fail=lambda error: told.append(error) if told is not None else None,
        giving_up=given_up,
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
    """The chunks of all messages."""
    return [chunk async for _, message in consumer.getmany(0.1) for chunk in message.value]


def test_versions_are_the_ones_that_were_read() -> None:
    assert version("faust-streaming") == consumer_consumer.FAUST_VERSION
    assert version("aiokafka") == consumer_consumer.AIOKAFKA_VERSION


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


def test_faust_calls_what_the_lane_overrides() -> None:
    drain = inspect.getsource(Consumer._drain_messages)
    assert "getmany = self.getmany" in drain
    assert "self._read_offset.__getitem__" in drain
    assert "self.on_partitions_assigned" in inspect.getsource(driver.ThreadDelegateConsumer)
    assert "consumer.perform_seek()" in inspect.getsource(Recovery._resume_streams)
    assert "_new_offset(tp)" in inspect.getsource(Consumer._filter_committable_offsets)
    assert "self._consumer_wait_empty)(" in inspect.getsource(faust.App._on_partitions_revoked)
    assert "self._consumer_wait_empty(" in inspect.getsource(faust.App._stop_consumer)
    assert "stream_wait_empty" in inspect.getsource(Consumer.on_stop)


def test_aiokafka_takes_what_the_lane_sets() -> None:
    start = inspect.getsource(aiokafka.AIOKafkaConsumer.start)
    assert "fetch_max_wait_ms=self._fetch_max_wait_ms" in start
    assert "assignors=self._partition_assignment_strategy" in start
    assert "self._group_instance_id is None" in inspect.getsource(
        GroupCoordinator._maybe_leave_group
    )
    # Records are handed out in the step that takes them, so an epoch read right after is theirs.
    taken = inspect.getsource(Fetcher.fetched_records)
    assert "if drained or not timeout:\n                return drained" in taken
    assert "del self._records[tp]" in inspect.getsource(Fetcher.seek_to)


def test_the_thread_is_asked_for_records_where_the_lane_answers() -> None:
    assert "self._thread.getmany(" in inspect.getsource(driver.Consumer._getmany)
    original = inspect.getsource(driver.AIOKafkaConsumerThread.getmany)
    assert (
        "self._fetch_records,\n            _consumer,\n            active_partitions," in original
    )
    # A partition of ours is one of aiokafka's: equal, and with the same hash.
    assert driver.ensure_aiokafka_TP(AT) in {AT}


@in_a_loop
async def test_records_that_were_fetched_for_nobody_are_read_again() -> None:
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
    assert consumer._thread.sought == [{AT: 7}]  # type: ignore[attr-defined]  # the other was sought anew since


@in_a_loop
async def test_a_failed_fetch_is_told() -> None:
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
        for line in inspect.getsourcelines(ConsumerThread._seek_lane)[0]
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
def test_chunks_of_a_fetch_go_together_up_to_the_records_of_one(
    sizes: list[int], expected: list[list[tuple[int, int, int]]]
) -> None:
    """(partition, first offset, records) of each chunk of each haul; a chunk has 3 records at most."""
    consumer = make_consumer()
    consumer._thread.fetched = fetched({TP("clicks", p): size for p, size in enumerate(sizes)})  # type: ignore[attr-defined]

    async def messages() -> list[Any]:
        return [message.value async for _, message in consumer.getmany(0.1)]

    found = asyncio.run(messages())
    seen = [[(c.at.partition, c.records[0].offset, len(c.records)) for c in haul] for haul in found]
    assert seen == expected
    assert all(consumer.is_current(chunk) for haul in found for chunk in haul)


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
def test_a_topic_may_have_smaller_chunks_that_follow_each_other(
    records: int, most: int | None, cut: list[int]
) -> None:
    """Of at most 60 records without its own limit, and never of more."""
    limits = {} if most is None else {AT.topic: most}
    whole = [record(offset) for offset in range(records)]
    chunks = [chunk for haul in split_fetched({AT: (5, whole)}, 60, limits, 9) for chunk in haul]
    assert [len(chunk.records) for chunk in chunks] == cut
    assert [r for chunk in chunks for r in chunk.records] == whole
    assert all((chunk.at, chunk.epoch, chunk.read_us) == (AT, 5, 9) for chunk in chunks)


def test_the_consumer_hands_out_a_topic_in_its_own_chunks() -> None:
    consumer = make_consumer(part_max={"clicks": 1})
    consumer._thread.fetched = fetched({AT: 2, TP("clicks", 1): 2})  # type: ignore[attr-defined]
    chunks = asyncio.run(read(consumer))
    seen = [(chunk.at.partition, chunk.records[0].offset, len(chunk.records)) for chunk in chunks]
    assert seen == [(0, 0, 1), (1, 0, 1), (0, 1, 1), (1, 1, 1)]


def test_small_chunks_of_all_partitions_go_side_by_side() -> None:
    """As many of each partition as may be applied at once, so that a haul is one step of all of them."""
    fetch = {TP("clicks", p): (0, [record(offset) for offset in range(9)]) for p in range(3)}
    found = split_fetched(fetch, 12, {"clicks": 4}, 9)
    assert [[(c.at.partition, len(c.records)) for c in haul] for haul in found] == [
        [(0, 4), (1, 4), (2, 4)],
        [(0, 4), (1, 4), (2, 4)],
        [(0, 1), (1, 1), (2, 1)],
    ]


def test_topics_go_apart() -> None:
    found = split_fetched({AT: (0, [record(0)]), TP("items", 1): (4, [record(0)])}, 3, {}, 9)
    chunks = [[(chunk.at, chunk.epoch, chunk.read_us) for chunk in haul] for haul in found]
    assert chunks == [[(AT, 0, 9)], [(TP("items", 1), 4, 9)]]


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
async def test_chunks_from_before_a_seek_are_not_handed_out() -> None:
    consumer = make_consumer()
    consumer._thread.fetched = fetched({AT: 6})  # type: ignore[attr-defined]
    handed = consumer.getmany(0.1)
    _, message = await anext(handed)
    [first] = message.value
    assert consumer.is_current(first)
    await consumer.rewind({AT})
    assert not consumer.is_current(first)
    with pytest.raises(StopAsyncIteration):
        await anext(handed)
    assert consumer._thread.sought == [{AT: 7}]  # type: ignore[attr-defined]


@in_a_loop
async def test_nothing_is_handed_out_while_a_position_is_found_out() -> None:
    waiting = asyncio.Event()

    async def slow(bounds: Any) -> Any:
        await waiting.wait()
        return {at: 3 for at in bounds}

    consumer = make_consumer(slow)
    consumer._thread.fetched = {AT: [record(0)], TP("clicks", 1): [record(0, 1)]}  # type: ignore[attr-defined]
    rewinding = asyncio.create_task(consumer.rewind({AT}))
    await asyncio.sleep(0)
    assert [c.at.partition for c in await read(consumer)] == [1]
    waiting.set()
    await asyncio.wait_for(rewinding, 5)
    assert [c.at.partition for c in await read(consumer)] == [0, 1]


@in_a_loop
async def test_a_rewind_waits_for_the_store_and_gives_up_lost_partitions() -> None:
    told: list[Any] = []
    answers = [StoreUnavailable("away"), StoreUnavailable("away"), None]

    async def away(bounds: Any) -> Any:
        if (error := answers.pop(0)) is not None:
            raise error
        return {at: 1 for at in bounds}

    consumer = make_consumer(away, told)
    await asyncio.wait_for(consumer.rewind({AT, TP("clicks", 5)}), 5)
    assert consumer._thread.sought == [{AT: 1}]  # type: ignore[attr-defined]
    assert (len(told) == 2 and told[0] < told[1]) or told[1] == 0.01
    consumer._thread.mine = set()  # type: ignore[attr-defined]
    await asyncio.wait_for(consumer.rewind({AT}), 5)
    assert len(consumer._thread.sought) == 1  # type: ignore[attr-defined]


@in_a_loop
async def test_two_rewinds_of_a_partition_do_not_overlap() -> None:
    """What is read between one's look at the fences and its seek would not follow what it saw."""
    order: list[str] = []
    handed_out: list[Any] = []

    async def looks(bounds: Any) -> Any:
        order.append(f"look {len(order)}")
        for _ in range(5):
            await asyncio.sleep(0.01)
            handed_out.extend(await read(consumer))
        order.append(f"looked {len(order)}")
        return {at: 7 for at in bounds}

    consumer = make_consumer(looks)
    consumer._thread.fetched = {AT: [record(7)]}  # type: ignore[attr-defined]
    both = [asyncio.create_task(consumer.rewind({AT})), asyncio.create_task(consumer.rewind({AT}))]
    await asyncio.wait_for(asyncio.gather(*both), 5)
    assert order == ["look 0", "looked 1", "look 2", "looked 3"]
    assert handed_out == []
    assert [c.at for c in await read(consumer)] == [AT]


@in_a_loop
async def test_an_unexpected_error_while_positioning_ends_the_process() -> None:
    told: list[Any] = []

    async def wrong(bounds: Any) -> Any:
        raise LookupError("no")

    consumer = make_consumer(wrong, told)
    await asyncio.wait_for(consumer.rewind({AT}), 5)
    assert [type(t) for t in told] == [LookupError]


@in_a_loop
async def test_commits_follow_the_acks_and_start_anew_after_a_seek() -> None:
    consumer = make_consumer()
    for last in (4, 9):
        consumer.applied(Chunk(AT, [record(3), record(last)], 0, 0))
    assert list(consumer._filter_tps_with_pending_acks()) == [AT]
    assert consumer._new_offset(AT) == 10
    assert consumer._new_offset(AT) is None
    consumer.applied(Chunk(AT, [record(20)], 0, 0))
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
    haul = (Chunk(AT, [record(1)], 0, 0),)
    message: Any = SimpleNamespace(value=haul, key=None)
    assert RawSchema().loads_value(None, message) is haul
    assert RawSchema().loads_key(None, message) is None


@in_a_loop
async def test_a_stop_waits_for_the_chunk_in_work() -> None:
    app = make_consumer().app
    done: list[int] = []

    async def work() -> None:
        await asyncio.sleep(0.05)
        done.append(1)

    task = asyncio.create_task(app.work(work()))
    await asyncio.sleep(0)
    await app.settle(5)
    assert done == [1]
    await task


@in_a_loop
async def test_before_partitions_are_given_up_the_chunk_in_work_ends_and_then_what_waits_is_written() -> (
    None
):
    consumer, order = make_consumer(), list[Any]()
    app = consumer.app

    async def chunk() -> None:
        await asyncio.sleep(0.05)
        order.append("chunk")

    async def written(limit_s: float) -> None:
        order.append(limit_s)

    app.giving_up = written
    task = asyncio.create_task(app.work(chunk()))
    await asyncio.sleep(0)
    await app._consumer_wait_empty(consumer, app.log)
    await task
    limit_s = app.conf.broker_session_timeout / 2
    assert order[0] == "chunk" and limit_s - 1 < order[1] <= limit_s - 0.05


@in_a_loop
async def test_what_the_group_was_told_is_known_after_a_rewind_and_never_goes_back() -> None:
    consumer = make_consumer()
    consumer._thread.told = {AT: 7}  # type: ignore[attr-defined]
    await consumer.rewind({AT})
    assert consumer.committed_of(AT.topic) == {AT.partition: 7}
    consumer._thread.told = {AT: 3}  # type: ignore[attr-defined]
    await consumer.rewind({AT})
    assert (
        consumer.committed_of(AT.topic) == {AT.partition: 7}
        and consumer.committed_of("other") == {}
    )
