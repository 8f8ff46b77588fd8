"""The consumer service: what fills the buffers, positions, acks, and rebalances."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections import defaultdict
from collections.abc import Callable, Collection, Coroutine, Mapping
from typing import Any

import aiokafka
import pytest
from aiokafka import TopicPartition
from aiokafka.consumer.fetcher import Fetcher
from aiokafka.consumer.group_coordinator import GroupCoordinator
from aiokafka.coordinator.assignors.range import RangePartitionAssignor
from aiokafka.errors import ConsumerStoppedError, KafkaError
from aiokafka.structs import ConsumerRecord

from eddyline.errors import KafkaUnavailable, StoreUnavailable
from eddyline.kafka.skips import Skips, Stops
from eddyline.kafka.unreadable import UnreadableBatch
from eddyline.settings.loader import Settings
from streams.consumer.buffer import FULL_BATCHES, RecordBuffer
from streams.consumer.consumer import (
    SESSION_S,
    TURNS_MAX,
    ConsumerOwner,
    LogConsumer,
    consumer_options,
)
from streams.consumer.thread import ConsumerThread, EmptyTail, Fetch
from tests.applying import batch_of

AT, NEXT, ITEMS = (
    TopicPartition("clicks", 0),
    TopicPartition("clicks", 1),
    TopicPartition("items", 0),
)


def in_a_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    @functools.wraps(test)
    def run() -> None:
        asyncio.run(test())

    del run.__wrapped__  # type: ignore[attr-defined]  # pytest would see a coroutine function
    return run


def record(offset: int, partition: int = 0) -> ConsumerRecord:
    return ConsumerRecord("clicks", partition, offset, 1_000, 1, b"k", b"v", None, 1, 1, ())


class FakeThread:
    """A consumer's thread: what was fetched, and where it was sought.

    fetched: by partition, what the next fetch returns; lost: partitions without a position
    """

    def __init__(self) -> None:
        self.epochs: defaultdict[TopicPartition, int] = defaultdict(int)
        self.positioned: set[TopicPartition] = set()
        self.committed: dict[TopicPartition, int] = {}
        self.fetched: dict[TopicPartition, list[ConsumerRecord]] = {}
        self.lost: dict[TopicPartition, int] = {}
        self.sought: list[dict[TopicPartition, int]] = []
        self.commits: list[dict[TopicPartition, int]] = []
        self.wanted: list[tuple[set[TopicPartition], float]] = []
        self.stored: dict[TopicPartition, int] = {}
        self.mine = {AT, NEXT}
        self.works = True
        self.tails: dict[TopicPartition, EmptyTail] = {}
        self.stops = Stops()

    async def resume(self, skips: Skips) -> None:
        for place in self.stops.resume(skips):
            self.stops.clear([place])

    def assignment(self) -> set[TopicPartition]:
        return set(self.mine)

    async def fetch(self, partitions: Collection[TopicPartition], wait_s: float) -> Fetch:
        self.wanted.append((set(partitions), wait_s))
        await asyncio.sleep(0.001)
        fetched, self.fetched = self.fetched, {}
        lost, self.lost = self.lost, {}
        return Fetch({at: (self.epochs[at], records) for at, records in fetched.items()}, lost)

    async def seek_to(self, offsets: Mapping[TopicPartition, int]) -> None:
        self.sought.append(dict(offsets))
        for at in offsets:
            self.epochs[at] += 1
            self.positioned.add(at)

    async def read_committed(self, partitions: Collection[TopicPartition]) -> None:
        self.committed |= {at: self.stored[at] for at in partitions if at in self.stored}

    async def begins(self, partitions: Collection[TopicPartition]) -> dict[TopicPartition, int]:
        return dict.fromkeys(partitions, 0)

    async def ends(self, partitions: Collection[TopicPartition]) -> dict[TopicPartition, int]:
        return dict.fromkeys(partitions, 100)

    async def commit(self, offsets: Mapping[TopicPartition, int]) -> bool:
        self.commits.append(dict(offsets))
        return self.works

    async def read_empty_tails(self) -> dict[TopicPartition, EmptyTail]:
        return self.tails

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    highwater_seen = fetching_ended = check_group = None


async def to_seven(bounds: Any) -> Any:
    return {at: 7 for at in bounds}


class Owner(ConsumerOwner):
    """The process of the consumer. reported: waits in seconds, and errors"""

    def __init__(self, position: Any) -> None:
        self.position = position  # type: ignore[method-assign]
        self.reported: list[Any] = []
        self.limits_s: list[float] = []

    def report_wait(self, error: Exception, wait_s: float) -> None:
        self.reported.append(wait_s)

    def end(self, error: Exception | None) -> None:
        self.reported.append(error)

    async def finish(self, limit_s: float) -> None:
        self.limits_s.append(limit_s)


class Rig:
    """A consumer service on a `FakeThread`. woken: topics whose agents were woken"""

    def __init__(self, position: Any = to_seven, topics: Collection[str] = ("clicks",)) -> None:
        self.thread, self.owner = FakeThread(), Owner(position)
        self.buffers = {topic: RecordBuffer(topic, 3) for topic in topics}
        self.woken: list[str] = []
        self.skips: list[Any] = [Skips()]
        self.skips_read = 0

        def read_skips() -> Skips:
            self.skips_read += 1
            if isinstance(
                found := self.skips[0] if len(self.skips) == 1 else self.skips.pop(0), Skips
            ):
                return found
            raise found

        async def wake(topic: str) -> None:
            self.woken.append(topic)

        self.consumer = LogConsumer(
            lambda owner: self.thread,  # type: ignore[arg-type,return-value]
            self.buffers,
            wake,
            self.owner,
            read_skips=read_skips,
            in_loop=["clicks"],
            request_s=5.0,
            backoff_s_max=0.01,
        )

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition():
                await asyncio.sleep(0.001)

    def taken(self, topic: str = "clicks") -> list[tuple[int, int, int]]:
        """(partition, first offset, records) of the buffered batches, as an agent takes them."""
        buffer, found = self.buffers[topic], []
        while batches := buffer.take(self.consumer.is_current):
            found += [(batch.partition, batch.first, len(batch.records)) for batch in batches]
        buffer.busy = False
        return found


async def started(rig: Rig) -> Rig:
    """A rig after its first rebalance."""
    rig.consumer.assigned()
    await rig.consumer.start()
    await rig.until(lambda: rig.thread.positioned == rig.thread.mine)
    return rig


# --- options


def test_the_consumer_is_made_as_the_design_says() -> None:
    settings = Settings(kafka_bootstrap_servers="127.0.0.1:9,127.0.0.2:9", kafka_timeout_ms=7_000)
    options = consumer_options(settings, "member-1")
    assert options["partition_assignment_strategy"] == [RangePartitionAssignor]
    assert (options["auto_offset_reset"], options["enable_auto_commit"]) == ("none", False)
    assert (options["fetch_max_wait_ms"], options["isolation_level"]) == (250, "read_committed")
    assert (options["session_timeout_ms"], options["request_timeout_ms"]) == (6_000, 7_000)
    assert options["bootstrap_servers"] == ["127.0.0.1:9", "127.0.0.2:9"]
    assert options["group_instance_id"] == "member-1"

    async def made() -> Any:
        consumer = aiokafka.AIOKafkaConsumer(**options)
        consumer._closed = True  # there is nothing to close
        return consumer

    assert asyncio.run(made())._group_instance_id == "member-1"


def test_what_is_relied_on_in_aiokafka_is_there() -> None:
    # Records are returned in the step that takes them, so an epoch read right after is theirs.
    taken = inspect.getsource(Fetcher.fetched_records)
    assert "if drained or not timeout:\n                return drained" in taken
    assert "del self._records[tp]" in inspect.getsource(Fetcher.seek_to)
    assert "await self._fetcher.fetched_records(" in inspect.getsource(
        aiokafka.AIOKafkaConsumer.getmany
    )
    assert "self._group_instance_id is None" in inspect.getsource(
        GroupCoordinator._maybe_leave_group
    )


def test_seeks_and_epochs_change_together_in_the_threads_loop() -> None:
    assert not any(
        line.strip().startswith("await")
        for line in inspect.getsourcelines(ConsumerThread._seek_to)[0]
    )


# --- fetching


@in_a_loop
async def test_fetched_records_go_to_the_buffer_and_wake_its_agent_once() -> None:
    rig = await started(Rig())
    rig.thread.fetched = {AT: [record(7), record(8)], NEXT: [record(7, 1)]}
    await rig.until(lambda: rig.woken == ["clicks"])
    rig.thread.fetched = {AT: [record(9)]}
    await rig.until(lambda: not rig.thread.fetched)
    await asyncio.sleep(0.01)
    assert rig.woken == ["clicks"], "the agent is busy: it finds the records"
    assert rig.taken() == [(0, 7, 3), (1, 7, 1)]
    rig.thread.fetched = {AT: [record(10)]}
    await rig.until(lambda: rig.woken == ["clicks"] * 2)
    await rig.consumer.stop()


@in_a_loop
async def test_a_full_buffer_stops_its_whole_topic_and_no_other() -> None:
    rig = Rig(topics=("clicks", "items"))
    rig.thread.mine = {AT, NEXT, ITEMS}
    await started(rig)
    rig.thread.fetched = {AT: [record(n) for n in range(3 * FULL_BATCHES)]}
    await rig.until(rig.buffers["clicks"].full)
    rig.thread.wanted.clear()
    await rig.until(lambda: len(rig.thread.wanted) > 2)
    assert rig.thread.wanted[1][0] == {ITEMS}
    assert rig.thread.wanted[1][1] < 0.1, "room is found soon"
    rig.taken()
    rig.thread.wanted.clear()
    await rig.until(lambda: len(rig.thread.wanted) > 2)
    assert rig.thread.wanted[1][0] == rig.thread.mine
    await rig.consumer.stop()


@in_a_loop
async def test_records_from_before_a_seek_are_dropped() -> None:
    rig = await started(Rig())
    rig.thread.fetched = {AT: [record(n) for n in range(6)]}
    await rig.until(lambda: rig.buffers["clicks"].batches() == 2)
    [first] = rig.buffers["clicks"].take(rig.consumer.is_current)
    await rig.consumer.rewind({AT})
    assert not rig.consumer.is_current(AT, first.epoch)
    assert rig.taken() == []
    assert rig.thread.sought[-1] == {AT: 7}
    await rig.consumer.stop()


@in_a_loop
async def test_nothing_is_fetched_while_a_position_is_looked_up() -> None:
    waiting = asyncio.Event()
    waiting.set()

    async def slow(bounds: Any) -> Any:
        await waiting.wait()
        return {at: 3 for at in bounds}

    rig = await started(Rig(slow))
    waiting.clear()
    rewinding = asyncio.create_task(rig.consumer.rewind({AT}))
    await asyncio.sleep(0.01)
    rig.thread.wanted.clear()
    # A fetch that was under way returns records of the partition: they do not count.
    rig.thread.fetched = {AT: [record(0)], NEXT: [record(0, 1)]}
    await rig.until(lambda: len(rig.thread.wanted) > 2)
    assert rig.thread.wanted[1][0] == {NEXT}
    assert rig.taken() == [(1, 0, 1)]
    waiting.set()
    await asyncio.wait_for(rewinding, 5)
    rig.thread.fetched = {AT: [record(3)]}
    await rig.until(lambda: rig.buffers["clicks"].batches() > 0)
    assert rig.taken() == [(0, 3, 1)]
    await rig.consumer.stop()


@in_a_loop
async def test_a_position_that_is_not_in_the_log_goes_back_to_the_fence() -> None:
    rig = await started(Rig())
    before = len(rig.thread.sought)
    rig.thread.lost = {AT: rig.thread.epochs[AT], NEXT: rig.thread.epochs[NEXT] - 1}
    await rig.until(lambda: len(rig.thread.sought) > before)
    assert rig.thread.sought[before:] == [{AT: 7}], "the other was sought since"
    await rig.consumer.stop()


@in_a_loop
async def test_an_error_of_the_group_crashes_the_service_and_a_stop_does_not() -> None:
    for error, crashes in ((KafkaError("no"), True), (ConsumerStoppedError(), False)):
        rig = await started(Rig())

        async def fails(*_: Any, error: Exception = error) -> Any:
            raise error

        rig.thread.fetch = fails  # type: ignore[method-assign]
        if crashes:
            await rig.until(lambda rig=rig: rig.consumer.crashed)
        else:
            await asyncio.sleep(0.02)
            assert not rig.consumer.crashed
        await rig.consumer.stop()


@pytest.mark.parametrize("turns", [0, 1, TURNS_MAX - 1, TURNS_MAX, TURNS_MAX + 1, 10 * TURNS_MAX])
def test_pipelines_get_their_turn_but_not_for_ever(turns: int) -> None:
    """The next fetch waits for small batches in this loop."""

    @in_a_loop
    async def run() -> None:
        rig, waited = Rig(topics=("clicks", "items")), 0
        rig.buffers["items"].busy = True  # applied elsewhere
        rig.buffers["clicks"].busy = True

        async def pipeline() -> None:
            nonlocal waited
            for _ in range(turns):
                await asyncio.sleep(0)
                waited += 1
            rig.buffers["clicks"].busy = False

        working = asyncio.create_task(pipeline())
        await asyncio.sleep(0)
        async with asyncio.timeout(5):
            await rig.consumer._let_small_batches_go_first()
        assert waited <= min(turns, TURNS_MAX)
        assert rig.buffers["clicks"].busy is (turns > TURNS_MAX)
        await working

    run()


@in_a_loop
async def test_the_next_fetch_is_sent_once_small_batches_are_applied() -> None:
    rig = await started(Rig())
    order = list[str]()
    fetch = rig.thread.fetch

    async def noted(partitions: Any, wait_s: float) -> Fetch:
        order.append("fetch")
        return await fetch(partitions, wait_s)

    async def apply(topic: str) -> None:
        async def agent() -> None:
            for _ in range(3):
                await asyncio.sleep(0)
            rig.taken()
            order.append("apply")

        applying.append(asyncio.create_task(agent()))

    applying: list[asyncio.Task[None]] = []
    rig.thread.fetch, rig.consumer._wake = noted, apply  # type: ignore[method-assign]
    for count in (1, 2):
        rig.thread.fetched = {AT: [record(1), record(2)]}
        await rig.until(lambda count=count: order.count("apply") == count)  # type: ignore[misc]
        at = len(order) - 1 - order[::-1].index("apply")
        assert order[at - 1] == "fetch"
        await rig.until(lambda at=at: len(order) > at + 1)  # type: ignore[misc]
    await rig.consumer.stop()


# --- positions


@in_a_loop
async def test_a_rewind_waits_for_the_store_and_gives_up_lost_partitions() -> None:
    answers = [StoreUnavailable("away"), StoreUnavailable("away"), None]

    async def away(bounds: Any) -> Any:
        if (error := answers.pop(0)) is not None:
            raise error
        return {at: 1 for at in bounds}

    rig = Rig(away)
    await asyncio.wait_for(rig.consumer.rewind({AT, TopicPartition("clicks", 5)}), 5)
    assert rig.thread.sought == [{AT: 1}]
    reported = rig.owner.reported
    assert (len(reported) == 2 and reported[0] < reported[1]) or reported[1] == 0.01
    rig.thread.mine = set()
    await asyncio.wait_for(rig.consumer.rewind({AT}), 5)
    assert len(rig.thread.sought) == 1


@in_a_loop
async def test_two_rewinds_of_a_partition_do_not_overlap() -> None:
    """What is read between one's look at the fences and its seek would not follow what it saw."""
    order: list[str] = []

    async def looks(bounds: Any) -> Any:
        order.append(f"look {len(order)}")
        for _ in range(5):
            await asyncio.sleep(0.01)
            assert AT not in rig.thread.positioned
        order.append(f"looked {len(order)}")
        return {at: 7 for at in bounds}

    rig = Rig(looks)
    both = [asyncio.create_task(rig.consumer.rewind({AT})) for _ in range(2)]
    await asyncio.wait_for(asyncio.gather(*both), 5)
    assert order == ["look 0", "looked 1", "look 2", "looked 3"]
    assert rig.consumer.positioned("clicks") == {0}


@in_a_loop
async def test_an_unexpected_error_while_positioning_ends_the_process() -> None:
    async def wrong(bounds: Any) -> Any:
        raise LookupError("no")

    rig = Rig(wrong)
    await asyncio.wait_for(rig.consumer.rewind({AT}), 5)
    assert [type(error) for error in rig.owner.reported] == [LookupError]


@in_a_loop
async def test_committed_offsets_are_known_after_a_rewind() -> None:
    rig = Rig()
    rig.thread.stored = {AT: 7}
    await rig.consumer.rewind({AT})
    assert rig.consumer.committed_of("clicks") == {0: 7}
    assert rig.consumer.committed_of("other") == {}


@in_a_loop
async def test_partitions_without_a_position_are_paused() -> None:
    rig = Rig()
    assert rig.consumer.paused("clicks") == 2 and rig.consumer.paused("items") == 0
    await rig.consumer.rewind({AT})
    assert rig.consumer.paused("clicks") == 1


# --- acks and rebalances


@in_a_loop
async def test_commits_follow_the_acks_and_a_failed_one_is_repeated() -> None:
    rig = await started(Rig())
    for last in (4, 9):
        rig.consumer.applied(batch_of([record(3), record(last)]))
    rig.thread.works = False
    await rig.until(lambda: bool(rig.thread.commits))
    rig.consumer.applied(batch_of([record(20, 1)]))
    rig.thread.works = True
    await rig.until(lambda: len(rig.thread.commits) > 1)
    assert rig.thread.commits[:2] == [{AT: 10}, {AT: 10, NEXT: 21}]
    await rig.consumer.stop()
    assert rig.thread.commits[-1] == {}


@in_a_loop
async def test_a_skipped_tail_is_committed_unless_the_partition_was_sought_since() -> None:
    rig = Rig()
    await rig.consumer.rewind({AT})
    tail = EmptyTail(rig.thread.epochs[AT], 6, 9)
    rig.thread.tails = {AT: tail, NEXT: tail, ITEMS: tail}
    assert await rig.consumer.empty_tails("clicks") == {0: tail}, "the others have no position"
    rig.consumer.skipped(AT, tail)
    rig.consumer.skipped(NEXT, tail)
    assert await rig.consumer.release() == {AT: 9}
    await rig.consumer.rewind({AT})
    rig.consumer.skipped(AT, tail)
    assert await rig.consumer.release() == {}


@in_a_loop
async def test_before_a_revocation_batches_end_and_nothing_new_is_taken() -> None:
    rig = await started(Rig())
    rig.thread.fetched = {AT: [record(7)]}
    await rig.until(lambda: rig.buffers["clicks"].batches() > 0)
    rig.consumer.applied(batch_of([record(6)]))
    assert await rig.consumer.release() == {AT: 7}
    assert rig.owner.limits_s == [SESSION_S / 2]
    # What is fetched from here on is read again by the next owner.
    rig.thread.fetched = {AT: [record(8)]}
    await rig.until(lambda: not rig.thread.fetched)
    await asyncio.sleep(0.01)
    assert rig.taken() == []
    rig.thread.positioned.clear()
    rig.consumer.assigned()
    await rig.until(lambda: rig.thread.positioned == rig.thread.mine)
    rig.thread.fetched = {AT: [record(9)]}
    await rig.until(lambda: rig.buffers["clicks"].batches() > 0)
    assert rig.taken() == [(0, 9, 1)]
    await rig.consumer.stop()


@in_a_loop
async def test_a_stop_finishes_commits_and_leaves() -> None:
    rig, order = await started(Rig()), list[str]()

    async def stop() -> None:
        order.append("left")

    async def finish(limit_s: float) -> None:
        order.append("finished")

    rig.thread.stop = stop  # type: ignore[method-assign]
    rig.owner.finish = finish  # type: ignore[method-assign]
    rig.consumer.applied(batch_of([record(4)]))
    await rig.consumer.stop()
    assert order == ["finished", "left"] and rig.thread.commits[-1] == {AT: 5}


# --- batches that cannot be read


@in_a_loop
async def test_what_is_left_out_is_read_once_after_each_rebalance() -> None:
    rig = Rig(topics=("clicks", "items"))
    rig.thread.mine = {AT, NEXT, ITEMS}
    rig.skips = [KafkaUnavailable("away"), wanted := Skips([("clicks", 0, 5, 8)])]
    await started(rig)
    assert rig.thread.stops.skips is wanted and rig.skips_read == 2
    await rig.consumer.rewind({AT})
    assert rig.skips_read == 2
    rig.consumer.assigned()
    await rig.until(lambda: rig.skips_read == 3)
    await rig.consumer.stop()


@in_a_loop
async def test_a_stopped_partition_looks_for_a_decision() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("streams.consumer.consumer.LOOK_S", 0.005)
        await _looks_for_a_decision()


async def _looks_for_a_decision() -> None:
    rig = await started(Rig())
    await asyncio.sleep(0.02)
    assert rig.skips_read == 1, "nothing stands still"
    bad = UnreadableBatch("clicks", 0, 5, 5, 8, "codec", "unknown", b"")
    rig.skips = [KafkaUnavailable("away"), Skips(), Skips([("clicks", 0, 5, 8)])]
    rig.thread.stops.pass_over(bad)
    assert rig.consumer.stopped() == [bad]
    await rig.until(lambda: rig.consumer.stopped() == [])
    assert rig.skips_read == 4
    await rig.consumer.stop()
