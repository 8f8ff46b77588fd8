"""The consumer's thread: its loop, rebalances, commits, and when the next fetch is sent."""

from __future__ import annotations

import asyncio
import inspect
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.consumer.fetcher import Fetcher, FetchResult
from aiokafka.consumer.subscription_state import SubscriptionState
from aiokafka.errors import (
    KafkaConnectionError,
    KafkaError,
    NoOffsetForPartitionError,
    OffsetOutOfRangeError,
)
from aiokafka.structs import TopicPartition

from eddyline.kafka.aiokafka_internals import FetchGate
from eddyline.kafka.skips import Skips
from eddyline.kafka.unreadable import UnreadableBatch
from streams.consumer.thread import ConsumerThread
from tests.unit.streams.test_consumer import AT, NEXT, in_a_loop, record

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


class FakeConsumer:
    """aiokafka's consumer in a group, as far as the thread uses it. errors: raised by calls"""

    def __init__(self, fetcher: Any = None) -> None:
        self._fetcher = fetcher
        self._coordinator = SimpleNamespace(_group_instance_id="m", check_errors=lambda: None)
        self.listener: Any = None
        self.mine = {AT}
        self.threads: set[str] = set()
        self.commits: list[dict[Any, int]] = []
        self.errors: dict[str, Exception] = {}
        self.calls: list[str] = []

    def _call(self, name: str) -> None:
        self.threads.add(threading.current_thread().name)
        self.calls.append(name)
        if name in self.errors:
            raise self.errors[name]

    def subscribe(self, topics: Any, listener: Any) -> None:
        self.topics, self.listener = list(topics), listener

    async def start(self) -> None:
        self._call("start")
        await self.listener.on_partitions_revoked(set())
        self.listener.on_partitions_assigned(self.mine)

    async def stop(self) -> None:
        self._call(f"stop as {self._coordinator._group_instance_id}")

    def assignment(self) -> set[Any]:
        return self.mine

    async def getmany(self, *partitions: Any, timeout_ms: int) -> Any:
        self._call("getmany")
        return await self._fetcher.fetched_records(partitions, timeout_ms / 1000)

    def seek(self, at: Any, offset: int) -> None:
        self._call(f"seek {offset}")

    def pause(self, at: Any) -> None:
        self._call(f"pause {at.partition}")

    def resume(self, at: Any) -> None:
        self._call(f"resume {at.partition}")

    async def commit(self, offsets: Any) -> None:
        self._call("commit")
        self.commits.append({at: stored.offset for at, stored in offsets.items()})


class Owner:
    """The service above. offsets: what `release` returns"""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.offsets: dict[Any, int] = {}
        self.loops: set[Any] = set()
        self.wait_s = 0.0

    async def release(self) -> dict[Any, int]:
        self.loops.add(asyncio.get_running_loop())
        self.calls.append("release")
        await asyncio.sleep(self.wait_s)
        return self.offsets

    def assigned(self) -> None:
        self.loops.add(asyncio.get_running_loop())
        self.calls.append("assigned")


def thread_of(consumer: Any, small_max: int = 4, request_s: float = 5.0) -> Any:
    """The thread of a consumer, and its owner."""
    owner = Owner()
    made = ConsumerThread(lambda: consumer, ["clicks"], owner, small_max, request_s)
    return made, owner


def unstarted(consumer: Any, small_max: int = 4) -> Any:
    """A thread that is not started: its coroutines run in the test's loop."""
    thread, _ = thread_of(consumer, small_max)
    thread._consumer = consumer
    thread.epochs |= {AT._replace(partition=n): 7 for n in range(4)}
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
        fetcher = TakesAtOnce(*sizes)
        thread = unstarted(FakeConsumer(fetcher))
        sent: list[bool] = []

        async def goes_on() -> None:
            """As aiokafka's routine, which is woken in the step that takes records."""
            await fetcher._wait_consume_future
            sent.append(bool(fetcher._get_actions_per_node(None)[0]))

        routine = asyncio.create_task(goes_on())
        await asyncio.sleep(0)
        thread._gate = FetchGate(thread._consumer)
        took = await thread._fetch(set(), 0)
        assert all(epoch == 7 for epoch, _ in took.records.values()) and took.lost == {}
        assert {at.partition: len(records) for at, (_, records) in took.records.items()} == {
            n: size for n, size in enumerate(sizes) if size
        }
        await asyncio.wait_for(routine, 5)
        assert sent == [not held]
        fetcher._wait_consume_future = asyncio.get_running_loop().create_future()
        await thread._fetch(set(), 0)  # the next call: from here on it may fetch
        assert fetcher._get_actions_per_node(None)[0]
        assert fetcher._wait_consume_future.done() is held

    run()


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


@in_a_loop
async def test_the_consumer_lives_in_its_own_thread_and_reports_in_the_loop_of_the_app() -> None:
    consumer = FakeConsumer()
    thread, owner = thread_of(consumer)
    owner.offsets = {AT: 5, TopicPartition("clicks", 9): 6}
    assert thread.assignment() == set() and thread.highwater_seen(AT) is None
    assert not thread.fetching_ended() and await thread.read_empty_tails() == {}
    assert await thread.commit({AT: 1}) and consumer.commits == []
    async with asyncio.timeout(5):
        await thread.start()
        assert owner.calls == ["release", "assigned"] and consumer.topics == ["clicks"]
        assert owner.loops == {asyncio.get_running_loop()}
        assert consumer.commits == [{AT: 5}], "what is not assigned is not committed"
        await thread.stop()
    assert consumer.threads == {"kafka_consumer"}
    assert consumer.calls[-1] == "stop as None", "a static member leaves, too"
    assert not thread._thread.is_alive()


@in_a_loop
async def test_a_thread_that_cannot_start_or_never_did_ends() -> None:
    consumer = FakeConsumer()
    consumer.errors["start"] = KafkaConnectionError("away")
    thread, _ = thread_of(consumer)
    async with asyncio.timeout(5):
        with pytest.raises(KafkaConnectionError, match="away"):
            await thread.start()
        assert thread.assignment() == set()
        await thread.stop()
        assert not thread._thread.is_alive()
        never, _ = thread_of(FakeConsumer())
        await never.stop()


@in_a_loop
async def test_a_rebalance_takes_all_positions_and_waits_only_so_long() -> None:
    consumer = FakeConsumer()
    thread, owner = thread_of(consumer, request_s=0.05)
    async with asyncio.timeout(5):
        await thread.start()
        await thread.seek_to({AT: 7, TopicPartition("clicks", 9): 7})
        assert thread.positioned == {AT} and thread.epochs == {AT: 1}
        owner.wait_s, owner.offsets = 60, {AT: 9}
        await thread._call(consumer.listener.on_partitions_revoked({AT}))
        assert thread.positioned == set() and consumer.commits == []
        await thread.seek_to({AT: 7})  # by a rewind from before
        consumer.listener.on_partitions_assigned({AT})
        assert thread.positioned == set()
        await thread.stop()


@in_a_loop
async def test_committed_offsets_never_go_back_and_a_failure_is_no_error() -> None:
    consumer = FakeConsumer()
    thread = unstarted(consumer)
    assert await thread._commit({AT: 7}) and await thread._commit({AT: 7, NEXT: 3})
    assert await thread._commit({AT: 6})
    consumer.errors["commit"] = KafkaError("no")
    assert not await thread._commit({AT: 8})
    del consumer.errors["commit"]
    assert await thread._commit({AT: 8})
    assert consumer.commits == [{AT: 7}, {AT: 8}]


@pytest.mark.parametrize(
    "error", [OffsetOutOfRangeError({AT: 3}), NoOffsetForPartitionError(AT)], ids=repr
)
def test_positions_that_are_not_in_the_log_are_named_with_their_epoch(error: Any) -> None:
    @in_a_loop
    async def run() -> None:
        consumer = FakeConsumer(TakesAtOnce())
        consumer.errors["getmany"] = error
        found = await unstarted(consumer)._fetch({AT}, 0)
        assert (found.records, found.lost) == ({}, {AT: 7})

    run()


@in_a_loop
async def test_another_error_of_a_fetch_is_raised() -> None:
    consumer = FakeConsumer(TakesAtOnce())
    consumer.errors["getmany"] = KafkaError("no")
    with pytest.raises(KafkaError, match="no"):
        await unstarted(consumer)._fetch({AT}, 0)


# --- batches that cannot be read

BAD = UnreadableBatch("clicks", 0, 5, 5, 8, "codec", "unknown", b"")


class ReturnsOnce(FakeConsumer):
    """A consumer whose next fetch returns these records."""

    def __init__(self, records: Any) -> None:
        super().__init__(SimpleNamespace(_get_actions_per_node=None))
        self.records = records

    async def getmany(self, *partitions: Any, timeout_ms: int) -> Any:
        records, self.records = self.records, {}
        return records


@in_a_loop
async def test_a_batch_that_cannot_be_read_stops_its_partition_alone() -> None:
    consumer = ReturnsOnce({AT: [BAD], NEXT: [record(3, 1)]})
    consumer.mine = {AT, NEXT}
    thread = unstarted(consumer)
    found = await thread._fetch({AT, NEXT}, 0)
    assert found.records == {NEXT: (7, [record(3, 1)])} and found.lost == {}
    assert consumer.calls == ["pause 0"] and thread.stops.stopped == {AT: BAD}
    await thread._resume(Skips([("clicks", 1, 5, 8)]))
    assert consumer.calls == ["pause 0"] and thread.stops.stopped == {AT: BAD}
    await thread._resume(Skips([("clicks", 0, 5, 8)]))
    assert consumer.calls[1:] == ["seek 9", "resume 0"] and thread.stops.stopped == {}
    assert thread.epochs[AT] == 7, "nothing is read again: batches from before stay valid"


@in_a_loop
async def test_a_batch_that_was_given_up_is_passed_in_the_same_epoch() -> None:
    consumer = ReturnsOnce({AT: [BAD], NEXT: [record(n, 1) for n in range(3, 6)]})
    thread = unstarted(consumer)
    thread.stops.skips = Skips([("clicks", 0, 5, 8), ("clicks", 1, 4, 4)])
    found = await thread._fetch({AT, NEXT}, 0)
    assert [r.offset for r in found.records[NEXT][1]] == [3, 5] and AT not in found.records
    assert consumer.calls == ["seek 9"] and thread.stops.stopped == {}


@in_a_loop
async def test_a_stopped_partition_that_is_read_from_elsewhere_is_resumed() -> None:
    consumer = ReturnsOnce({AT: [BAD]})
    thread = unstarted(consumer)
    await thread._fetch({AT}, 0)
    await thread._seek_to({AT: 2})
    assert consumer.calls == ["pause 0", "seek 2", "resume 0"] and thread.stops.stopped == {}
    consumer.records = {AT: [BAD]}
    await thread._fetch({AT}, 0)
    thread.on_partitions_assigned = ConsumerThread.on_partitions_assigned.__get__(thread)
    thread._app_loop = SimpleNamespace(call_soon_threadsafe=lambda call: None)
    thread.on_partitions_assigned({AT})
    assert thread.stops.stopped == {}, "a rebalance has dropped the pause"
