"""When to fetch: after small batches are applied, and ahead where there is much to read."""

from __future__ import annotations

import asyncio
import inspect
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.consumer.fetcher import Fetcher, FetchResult
from aiokafka.consumer.subscription_state import SubscriptionState
from aiokafka.structs import TopicPartition
from faust.transport.drivers import aiokafka as driver

from eddyline.kafka.aiokafka_internals import FetchGate
from streams.consumer.in_flight import TURNS_MAX, InFlightBatches
from streams.consumer.thread import ConsumerThread
from tests.unit.streams.test_consumer import AT, FakeThread, in_a_loop, make_consumer, read, record

RESETS, BACKOFF_S = {1: ["clicks/3"]}, 0.25


class TakesAtOnce:
    """What of aiokafka's fetcher hands out records: its own method, over records that are there."""

    fetched_records = Fetcher.fetched_records
    _notify = Fetcher._notify
    _closed = False

    def __init__(self, *sizes: int) -> None:
        self._wait_consume_future = asyncio.get_running_loop().create_future()
        self._subscriptions = SubscriptionState()
        self._subscriptions.assign_from_user({TopicPartition(*AT)})
        self._records: dict[Any, Any] = {}
        for partition, size in enumerate(sizes):
            self._records[AT._replace(partition=partition)] = taken(size)

    def _get_actions_per_node(self, assignment: Any) -> tuple[Any, ...]:
        return [("a", "fetch")], RESETS, BACKOFF_S, False, []


def taken(size: int) -> FetchResult:
    """The records of one partition, as aiokafka keeps them until they are taken."""

    class Records(list[Any]):
        next_fetch_offset = 0

        def __next__(self) -> Any:
            if not self:
                raise StopIteration
            return self.pop(0)

        def __iter__(self) -> Any:
            return self

    state = SimpleNamespace(paused=False, position=0, consumed_to=lambda offset: None)
    assignment = SimpleNamespace(active=True, state_value=lambda at: state)
    records = Records(record(offset) for offset in range(size))
    return FetchResult(AT, assignment=assignment, partition_records=records, backoff=0)


def thread_of(small_max: int) -> Any:
    """A consumer's thread that is not started."""
    thread: Any = ConsumerThread.__new__(ConsumerThread)
    epochs = {AT._replace(partition=n): 7 for n in range(4)}
    thread.consumer = SimpleNamespace(
        epochs=epochs, taken={}, small_max=small_max, flow_active=True
    )
    return thread


@in_a_loop
async def test_a_held_fetcher_sends_no_fetch_and_does_all_else() -> None:
    fetcher: Any = TakesAtOnce()
    gate = FetchGate(SimpleNamespace(_fetcher=fetcher))
    assert fetcher._get_actions_per_node(None)[0] == [("a", "fetch")]
    gate.open()
    assert not fetcher._wait_consume_future.done()  # it was never held: no task waits
    gate.hold()
    assert fetcher._get_actions_per_node(None) == ([], RESETS, BACKOFF_S, False, [])
    gate.open()
    assert fetcher._wait_consume_future.done()
    assert fetcher._get_actions_per_node(None)[0] == [("a", "fetch")]


@pytest.mark.parametrize(
    ("sizes", "held"),
    [((0,), False), ((1,), True), ((2, 1), True), ((2, 2), True), ((3, 2), False), ((999,), False)],
)
def test_the_next_fetch_waits_after_a_small_one(sizes: tuple[int, ...], held: bool) -> None:
    @in_a_loop
    async def run() -> None:
        thread, fetcher = thread_of(small_max=4), TakesAtOnce(*sizes)
        consumer: Any = SimpleNamespace(_fetcher=fetcher, _closed=False)
        sent: list[bool] = []

        async def goes_on() -> None:
            """As aiokafka's routine, which is woken in the step that takes records."""
            await fetcher._wait_consume_future
            sent.append(bool(fetcher._get_actions_per_node(None)[0]))

        routine = asyncio.create_task(goes_on())
        await asyncio.sleep(0)
        took = await thread._fetch_records(consumer, set(), 0, 4_096)
        assert {at.partition: len(records) for at, (_, records) in took.items()} == {
            n: size for n, size in enumerate(sizes) if size
        }
        await asyncio.wait_for(routine, 5)
        assert sent == [not held]
        fetcher._wait_consume_future = asyncio.get_running_loop().create_future()
        await thread._fetch_records(
            consumer, set(), 0, 4_096
        )  # the next call: from here on it may fetch
        assert fetcher._get_actions_per_node(None)[0]
        assert fetcher._wait_consume_future.done() is held

    run()


@in_a_loop
async def test_a_new_fetcher_gets_its_own_gate() -> None:
    thread = thread_of(small_max=4)
    for _ in range(2):
        fetcher = TakesAtOnce(1)
        await thread._fetch_records(SimpleNamespace(_fetcher=fetcher, _closed=False), set(), 0, 9)
        assert fetcher._get_actions_per_node(None)[0] == []


def test_what_is_used_of_aiokafka_is_there() -> None:
    routine = inspect.getsource(Fetcher._fetch_requests_routine)
    assert ") = self._get_actions_per_node(assignment)" in routine
    assert (
        "fetch_requests,\n                    reset_requests,\n                    timeout,"
        in routine
    )
    assert "self._wait_consume_future = create_future()\n" in routine
    assert "[self._wait_consume_future, assignment.unassign_future]" in routine
    # Records, and waking the routine for the next fetch, are one step.
    assert "self._notify(self._wait_consume_future)" in inspect.getsource(Fetcher.fetched_records)
    assert "await fetcher.fetched_records(" in inspect.getsource(
        driver.AIOKafkaConsumerThread._fetch_records
    )
    assert TopicPartition("clicks", 0) == AT


@pytest.mark.parametrize("turns", [0, 1, TURNS_MAX - 1, TURNS_MAX, TURNS_MAX + 1, 10 * TURNS_MAX])
def test_pipelines_get_their_turn_but_not_for_ever(turns: int) -> None:
    @in_a_loop
    async def run() -> None:
        in_flight, waited = InFlightBatches(), itertools.count()
        in_flight.topics = {"clicks"}
        in_flight.sent("clicks")
        in_flight.sent("items")  # applied elsewhere

        async def pipeline() -> None:
            for _ in range(turns):
                await asyncio.sleep(0)
                next(waited)
            in_flight.applied("clicks")

        working = asyncio.create_task(pipeline())
        await asyncio.sleep(0)
        async with asyncio.timeout(5):
            await in_flight.wait()
        assert next(waited) <= min(turns, TURNS_MAX)
        assert ("clicks" in in_flight._in_flight) is (turns > TURNS_MAX)
        await working
        before = asyncio.get_running_loop().time()
        await in_flight.wait()
        assert asyncio.get_running_loop().time() - before < 1

    run()


@in_a_loop
async def test_the_next_fetch_is_sent_once_small_batches_are_applied() -> None:
    consumer, order = make_consumer(), list[str]()
    consumer.app.in_flight.topics = {"clicks"}
    thread: Any = consumer._thread
    thread.fetched = {AT: [record(1), record(2)]}
    fetch = FakeThread.getmany

    async def getmany(active: Any, timeout: float) -> Any:
        order.append("fetch")
        return await fetch(thread, active, timeout)

    async def pipeline() -> None:
        for _ in range(3):
            await asyncio.sleep(0)
        order.append("apply")
        consumer.app.in_flight.applied("clicks")

    thread.getmany = getmany
    for _ in range(2):
        assert [len(batch.records) for batch in await read(consumer)] == [2]
        await asyncio.gather(pipeline(), read(consumer))
        consumer.app.in_flight.applied("clicks")
    assert order == ["fetch", "apply", "fetch"] * 2
