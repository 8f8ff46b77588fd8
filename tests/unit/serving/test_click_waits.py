"""Calls that wait for a click: without a thread, each resumed once, within their time."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Collection, Iterator
from typing import Any

import grpc
import pytest

from eddyline.errors import KafkaUnavailable, StoreUnavailable
from eddyline.schema.partitioning import partition_of
from eddyline.settings.loader import Settings
from eddyline.stores.memory import MemoryStore
from eddyline.stores.state_store import Fence, LogId, Source, UserEffects
from serving.answer import click_ends, click_waits
from serving.answer.click_ends import ClickEnds
from serving.answer.click_waits import ClickWaits, TooManyWait
from serving.answer.fusion import Cascade
from serving.answer.user_reader import AfterToken
from serving.proto import retrieval_pb2 as pb
from serving.rpc.client import CallFailed, Client, open_channel
from serving.rpc.retrieval_service import RetrievalService
from serving.rpc.server import WorkerServer
from tests.unit.serving.test_retriever import World

LOG = LogId("cluster", "topic")
ANA = partition_of("ana", 8)


class Store(MemoryStore):
    """A store whose reads of fences are counted, and fail while `away` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.away, self.slow_s = False, 0.0
        self.reads: dict[int, int] = {}

    def fences(self, source: Source, slots: Any) -> Any:
        self.reads[source.partition] = self.reads.get(source.partition, 0) + 1
        if source.partition == 0:
            time.sleep(self.slow_s)
        if self.away:
            raise StoreUnavailable("nowhere")
        return super().fences(source, slots)

    def server_of(self, slot: str) -> str:
        return f"redis-{slot}"

    def apply(self, partition: int, offset: int, log: LogId = LOG) -> None:
        slot, source = f"u{partition}", Source("clicks", partition)
        expected = super().fences(source, [slot])[slot]
        self.write_users(slot, source, expected, Fence(offset, log), UserEffects())


class Ends:
    """A log whose partitions all end at `end`; None: Kafka is away."""

    def __init__(self, end: int | None) -> None:
        self.end, self.reads, self.closed = end, 0, 0

    def read(self, partitions: Collection[int]) -> dict[int, int]:
        self.reads += 1
        if self.end is None:
            raise KafkaUnavailable("nowhere")
        return dict.fromkeys(partitions, self.end)

    def close(self) -> None:
        self.closed += 1


class Resumed:
    """The tokens of resumed calls, and when they came."""

    def __init__(self) -> None:
        self.tokens: list[AfterToken] = []
        self.came = threading.Condition()

    def __call__(self, token: AfterToken) -> None:
        with self.came:
            self.tokens.append(token)
            self.came.notify_all()

    def wait(self, count: int = 1, timeout_s: float = 20.0) -> list[AfterToken]:
        with self.came:
            assert self.came.wait_for(lambda: len(self.tokens) >= count, timeout_s), "timed out"
        return self.tokens


@pytest.fixture
def store() -> Store:
    return Store()


def made(store: Store, end: int | None = None, **more: Any) -> tuple[ClickWaits, Ends]:
    ends = Ends(end)
    return ClickWaits(store, log_id=LOG, ends=ClickEnds(ends), **more), ends  # type: ignore[arg-type]


def test_a_call_is_resumed_as_soon_as_its_click_is_applied(store: Store) -> None:
    store.apply(3, 7)
    waits, _ = made(store)
    resumed, later = Resumed(), Resumed()
    waits.park(AfterToken(3, 8, 20_000), 20.0, resumed)
    waits.park(AfterToken(3, 9, 20_000), 20.0, later)
    time.sleep(0.1)
    assert resumed.tokens == [] and len(waits) == 2
    store.apply(3, 8)
    [token] = resumed.wait()
    assert (token.partition, token.offset, token.wait_ms, token.why) == (3, 8, 0, "")
    # Long before its time ends; the margin is for a busy machine.
    assert 90 <= token.waited_ms < 10_000 and later.tokens == []
    waits.close()
    assert [token.why for token in later.wait()] == ["the worker stops"]


def test_a_call_that_comes_after_the_end_is_answered_at_once(store: Store) -> None:
    waits, _ = made(store)
    waits.close()
    resumed = Resumed()
    waits.park(AfterToken(3, 8, 2_000), 2.0, resumed)
    assert [token.why for token in resumed.wait()] == ["the worker stops"]
    assert len(waits) == 0


def test_a_wait_ends_with_its_time(store: Store) -> None:
    waits, _ = made(store)
    resumed = Resumed()
    begun = time.monotonic()
    waits.park(AfterToken(3, 8, 150), 0.15, resumed)
    [token] = resumed.wait()
    assert 0.14 <= time.monotonic() - begun and 140 <= token.waited_ms < 5_000
    waits.close()


def test_many_calls_hold_no_thread_and_cost_one_read_of_a_fence(store: Store) -> None:
    waits, _ = made(store, calls_max=1_000)
    resumed, before = Resumed(), threading.active_count()
    for n in range(1_000):
        waits.park(AfterToken(n % 2, 8, 2_000), 2.0, resumed)
    assert threading.active_count() - before <= 3  # a watcher for each of the two servers
    time.sleep(0.1)
    store.reads.clear()
    time.sleep(0.5)
    assert all(reads <= 30 for reads in store.reads.values()), store.reads
    for partition in (0, 1):
        store.apply(partition, 8)
    assert len(resumed.wait(1_000)) == 1_000
    waits.close()


def test_a_slow_server_delays_nobody_who_waits_for_another(store: Store) -> None:
    store.slow_s = 2.0
    waits, _ = made(store)
    slow, quick = Resumed(), Resumed()
    waits.park(AfterToken(0, 8, 20_000), 20.0, slow)
    time.sleep(0.05)
    waits.park(AfterToken(1, 8, 20_000), 20.0, quick)
    store.apply(1, 8)
    quick.wait(timeout_s=1.5)
    assert slow.tokens == []
    waits.close()


def test_a_store_that_goes_away_ends_the_wait(store: Store) -> None:
    waits, _ = made(store)
    resumed = Resumed()
    waits.park(AfterToken(3, 8, 2_000), 2.0, resumed)
    time.sleep(0.05)
    store.away = True
    [token] = resumed.wait()
    assert token.why == "the fence cannot be read: nowhere"
    waits.close()


def test_state_of_another_log_ends_the_wait(store: Store) -> None:
    store.apply(3, 99, LogId("cluster", "older"))
    waits, _ = made(store)
    resumed = Resumed()
    waits.park(AfterToken(3, 8, 60_000), 60.0, resumed)
    resumed.wait()
    waits.close()


def test_an_offset_beyond_the_end_of_the_log_is_not_awaited(store: Store) -> None:
    store.apply(3, 7)
    waits, ends = made(store, end=10)
    beyond, last = Resumed(), Resumed()
    waits.park(AfterToken(3, 10, 60_000), 60.0, beyond)
    waits.park(AfterToken(3, 2**62, 60_000), 60.0, beyond)
    waits.park(AfterToken(3, 9, 60_000), 60.0, last)
    whys = {token.why for token in beyond.wait(2)}
    assert whys == {"partition 3 of clicks ends before offset 10"}
    time.sleep(0.3)
    assert last.tokens == [] and ends.reads <= 2  # it exists: nothing is left to find out
    store.apply(3, 9)
    last.wait()
    waits.close()
    assert ends.closed


def test_a_record_that_the_end_includes_a_moment_later_is_awaited(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With acks=1 the producer may be ahead of the log's end."""
    monkeypatch.setattr(click_waits, "END_S", 0.5)
    waits, ends = made(store, end=10)
    resumed = Resumed()
    waits.park(AfterToken(3, 10, 5_000), 5.0, resumed)
    time.sleep(0.05)
    ends.end = 11
    time.sleep(1.0)
    assert ends.reads
    assert resumed.tokens == []
    waits.close()


def test_without_kafka_every_offset_is_awaited(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(click_ends, "AGAIN_S", 0.2)
    waits, ends = made(store, end=None)
    resumed = Resumed()
    waits.park(AfterToken(3, 2**62, 60_000), 60.0, resumed)
    time.sleep(0.5)
    assert resumed.tokens == [] and 1 <= ends.reads <= 3
    ends.end = 10
    resumed.wait()
    waits.close()


def test_the_number_of_waiting_calls_is_limited(store: Store) -> None:
    store.apply(3, 7)
    waits, _ = made(store, calls_max=3)
    running, go = threading.Event(), threading.Event()

    def busy(_: AfterToken) -> None:
        running.set()
        assert go.wait(5)

    calls = [waits.park(AfterToken(3, 8 + n, 2_000), 2.0, busy) for n in range(3)]
    time.sleep(0.1)
    with pytest.raises(TooManyWait, match="3 calls wait for a click already"):
        waits.check(AfterToken(3, 20, 2_000))
    with pytest.raises(TooManyWait):
        waits.park(AfterToken(3, 20, 2_000), 2.0, busy)
    waits.check(AfterToken(3, 7, 2_000))  # known to be applied: it has nothing to wait for
    store.apply(3, 8)
    assert running.wait(5)
    with pytest.raises(TooManyWait):  # resumed, and not answered yet
        waits.check(AfterToken(3, 20, 2_000))
    waits.cancel(calls[1])
    waits.check(AfterToken(3, 20, 2_000))
    go.set()
    waits.close()


@pytest.mark.parametrize("seed", range(3))
def test_each_call_is_resumed_once_or_cancelled(store: Store, seed: int) -> None:
    """Callers that come and go on four threads while clicks are applied, then the end."""
    waits, _ = made(store, end=60, calls_max=10_000, threads=3)
    outcomes: dict[int, list[str]] = {}
    parked, numbers = list[tuple[int, Any]](), itertools.count()

    def park(rng: random.Random) -> None:
        for _ in range(150):
            number = next(numbers)
            outcomes[number] = []
            wait_s = rng.choice([0.0, 0.02, 0.2, 5.0])
            token = AfterToken(rng.randrange(3), rng.randrange(80), 5_000)
            call = waits.park(token, wait_s, lambda _, n=number: outcomes[n].append("resumed"))
            if rng.random() < 0.3:
                waits.cancel(call)
                parked.append((number, call))
            time.sleep(0.001)

    threads = [
        threading.Thread(target=park, args=(random.Random(10 * seed + n),)) for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for offset in range(0, 50, 5):
        for partition in range(3):
            store.apply(partition, offset)
        time.sleep(0.02)
    for thread in threads:
        thread.join(10)
    waits.close()
    cancelled = {number for number, _ in parked}
    for number, found in outcomes.items():
        # A cancelled call may have been resumed before.
        assert found == ["resumed"] or (number in cancelled and found == []), (number, found)
    assert len(waits) == 0 and len(outcomes) == 600


# ---------------------------------------------------------------- behind gRPC


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    made.user("ana", "i0", "i1", offset=7)
    yield made
    made.retriever.waits.close()  # type: ignore[union-attr]


@pytest.fixture
def server(world: World) -> Iterator[WorkerServer]:
    settings = Settings(worker_port=0, worker_threads=2, query_timeout_ms=1_000, wait_ms_max=15_000)
    world.retriever.waits = ClickWaits(world.store, calls_max=40)
    service = RetrievalService(settings)
    made = WorkerServer(settings, service)
    service.serve(world.backend)
    yield made
    made.stop(1.0)


def waiting(client: Client, wait_ms: int = 15_000, timeout_s: float | None = 5.0) -> Any:
    """A call that waits for a click; some milliseconds later, so that no queue is full."""
    time.sleep(0.01)
    after = pb.After(partition=ANA, offset=8, wait_ms=wait_ms)
    request = pb.RetrieveRequest(user_id="ana", k=3, after=after)
    return client._stub.Retrieve.future(request, timeout=timeout_s)


def all_parked(client: Client, world: World, count: int) -> list[Any]:
    """Calls that wait, one after the other, so that none fills the queue on a busy machine."""
    calls, waits = list[Any](), world.retriever.waits
    assert waits is not None
    deadline = time.monotonic() + 30
    for n in range(count):
        calls.append(waiting(client, timeout_s=20.0))
        while len(waits) <= n:
            assert time.monotonic() < deadline, f"{len(waits)} of {n + 1} calls are parked"
            time.sleep(0.005)
    return calls


def test_waiting_calls_leave_every_thread_to_others(server: WorkerServer, world: World) -> None:
    with Client(server.address) as client:
        calls = all_parked(client, world, 40)
        # The parked calls wait for 15 s: a query that waits for one of them fails.
        for _ in range(20):
            assert client.retrieve("ana", 3, timeout_s=5.0).items
        with pytest.raises(CallFailed, match=r"RESOURCE_EXHAUSTED.*40 calls wait for a click"):
            client.retrieve("ana", 3, after=(ANA, 8), wait_ms=100)
        assert client.retrieve("ana", 3, after=(ANA, 8)).freshness.after.why  # it does not wait
        world.user("ana", "i9", "i0", "i1", offset=8)
        for call in calls:
            fresh = call.result(timeout=10).freshness
            assert fresh.after.applied and fresh.user.offset == 8 and fresh.after.waited_ms > 0


def test_callers_that_are_gone_give_up_their_places(server: WorkerServer, world: World) -> None:
    with open_channel(server.address), Client(server.address) as client:
        calls = all_parked(client, world, 40)
        waits = world.retriever.waits
        assert waits is not None and len(waits) == 40
        for call in calls:
            call.cancel()
        deadline = time.monotonic() + 5.0  # a call waits for 15 s
        while len(waits):
            assert time.monotonic() < deadline, "the places stay taken"
            time.sleep(0.01)


def test_a_call_that_fails_after_its_wait_gets_its_status(
    server: WorkerServer, world: World
) -> None:
    with Client(server.address) as client:
        call = waiting(client, timeout_s=None)
        time.sleep(0.2)
        world.store.slow_s = 1.2
        world.user("ana", "i9", offset=8)
        with pytest.raises(grpc.RpcError) as failed:
            call.result(timeout=10)
        assert failed.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        world.store.slow_s = 0.0


def test_a_failure_inside_after_a_wait_is_no_silence(
    server: WorkerServer, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Client(server.address) as client:
        call = waiting(client)
        time.sleep(0.2)

        def broken(*_: Any) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(Cascade, "fuse", broken)
        world.user("ana", "i9", offset=8)
        with pytest.raises(grpc.RpcError) as failed:
            call.result(timeout=5)
        assert failed.value.code() is grpc.StatusCode.INTERNAL
