"""What must not take a worker off the air: open streams, waits, one dead slot, one bad record."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from redis.exceptions import ClusterDownError, ConnectionError, MovedError, TryAgainError

from eddyline.errors import SlotUnavailable, StoreUnavailable
from eddyline.schema.events import ID_BYTES_MAX, Item, encode
from eddyline.schema.partitioning import item_slot, partition_of
from eddyline.settings.loader import Settings
from eddyline.stores.memory import MemoryStore
from eddyline.stores.redis_errors import translate_error
from eddyline.stores.redis_url import target
from eddyline.stores.state_store import Fence, ItemMetadata, LogId, Source, UserState
from index.filters import LIST_IDS_MAX
from serving.answer.card_reader import CardReader
from serving.answer.click_waits import ClickWaits
from serving.answer.deadline import Deadline
from serving.answer.outages import Outages
from serving.answer.user_reader import UserReader
from serving.proto import retrieval_pb2 as pb
from serving.rpc import call_pools
from serving.rpc.client import CallFailed, Client, open_channel
from serving.rpc.retrieval_service import RetrievalService
from serving.rpc.server import WorkerServer
from tests.unit.serving.test_retriever import World

THREADS = 8
SETTINGS = Settings(
    worker_port=0, worker_threads=THREADS, query_timeout_ms=3_000, waiting_calls_max=64
)


@pytest.fixture
def world() -> World:
    made = World()
    made.user("ana", "i0", "i1")
    made.clicked({1: {f"i{n}": 1000 + n for n in range(12)}})
    return made


@pytest.fixture
def server(world: World) -> Iterator[WorkerServer]:
    world.retriever.waits = ClickWaits(world.store, calls_max=SETTINGS.waiting_calls_max)
    service = RetrievalService(SETTINGS)
    made = WorkerServer(SETTINGS, service)
    service.serve(world.backend)
    made.set_serving(True)
    yield made
    made.stop(1.0)


def check_s(address: str) -> float:
    """How long a health check takes, in seconds."""
    with open_channel(address) as channel:
        grpc.channel_ready_future(channel).result(5)
        begun = time.monotonic()
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        return time.monotonic() - begun


class Stream:
    """A reflection stream that stays open after its first answer."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._end = threading.Event()
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        self.call = stub.ServerReflectionInfo(self._requests())

    def _requests(self) -> Iterator[reflection_pb2.ServerReflectionRequest]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")
        self._end.wait(20)

    def code(self) -> grpc.StatusCode | None:
        """The status that ended it; None while it is open. Reads all that there is."""
        try:
            for _ in self.call:
                pass
        except grpc.RpcError as error:
            return error.code()
        return None

    def close(self) -> None:
        self._end.set()
        self.call.cancel()


def test_idle_reflection_streams_hold_no_query(server: WorkerServer) -> None:
    with open_channel(server.address) as channel, Client(server.address) as client:
        streams = [Stream(channel) for _ in range(THREADS + 4)]
        try:
            time.sleep(0.3)
            # The streams stay open for 20 s: a call that waits for one of them fails.
            assert check_s(server.address) < 5
            assert client.retrieve("ana", 3, timeout_s=5.0).items
            assert client.stats().ready
        finally:
            for stream in streams:
                stream.close()


def test_an_idle_reflection_stream_ends_and_leaves_its_place(
    monkeypatch: pytest.MonkeyPatch, world: World
) -> None:
    monkeypatch.setattr(call_pools, "REFLECTION_IDLE_S", 0.3)
    server = WorkerServer(SETTINGS, RetrievalService(SETTINGS))
    try:
        with open_channel(server.address) as channel:
            for _ in range(2):  # the second round finds the places free
                streams = [Stream(channel) for _ in range(call_pools.REFLECTION_STREAMS_MAX)]
                assert all(next(stream.call).list_services_response.service for stream in streams)
                begun = time.monotonic()
                codes = {stream.code() for stream in streams}
                assert codes <= {grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN}, codes
                assert 0.1 < time.monotonic() - begun < 3
                for stream in streams:
                    stream.close()
                time.sleep(0.1)
    finally:
        server.stop(0.0)


def test_health_answers_while_every_query_thread_is_busy(
    server: WorkerServer, world: World
) -> None:
    world.store.slow_s = 0.8

    def call() -> None:
        with Client(server.address) as client:
            try:
                client.retrieve("ana", 3)
            except CallFailed as error:
                assert error.code == "RESOURCE_EXHAUSTED"

    threads = [threading.Thread(target=call) for _ in range(3 * THREADS)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(0.3)
        # The shortest: a busy machine delays any single call. One behind a query takes 0.5 s.
        assert min(check_s(server.address) for _ in range(3)) < 0.4
    finally:
        for thread in threads:
            thread.join(10)


@pytest.mark.parametrize("waiters", [16, 200])
def test_waiters_refuse_no_plain_query(server: WorkerServer, world: World, waiters: int) -> None:
    """Each waiter comes back half a second after its answer, so that as many wait as may."""
    after = pb.After(partition=partition_of("ana", 8), offset=2**62, wait_ms=1_000)
    stop, waited, refused = threading.Event(), list[str](), list[str]()
    # As many connections as a caller with a pool has; 200 threads share them.
    clients = [Client(server.address) for _ in range(8)]

    def wait(client: Client) -> None:
        while not stop.is_set():
            request = pb.RetrieveRequest(user_id="ana", k=3, after=after)
            try:
                waited.append(client._stub.Retrieve(request, timeout=30).freshness.after.why)
            except grpc.RpcError as error:
                refused.append(f"{error.code().name}: {error.details()}")
            stop.wait(0.5)

    threads = [
        threading.Thread(target=wait, args=(clients[n % 8],), daemon=True) for n in range(waiters)
    ]
    for n, thread in enumerate(threads):
        thread.start()
        if n % 4 == 0:
            time.sleep(0.02)
    try:
        took, full_queue = list[float](), list[str]()
        with Client(server.address) as client:
            for _ in range(20):
                begun = time.monotonic()
                try:
                    assert client.retrieve("ana", 3, timeout_s=5.0).items
                    took.append(time.monotonic() - begun)
                except CallFailed as error:
                    full_queue.append(str(error))
                time.sleep(0.05)
        # Waiters that come back in one moment may fill the queue for that moment on a busy
        # machine; if they held threads while they wait, every plain query would be refused.
        assert len(took) >= 15, full_queue
        # The shortest: a busy machine delays any single call.
        assert min(took) < 0.3
        assert min(check_s(server.address) for _ in range(3)) < 0.4
    finally:
        stop.set()
        for thread in threads:
            thread.join(10)
        for open_client in clients:
            open_client.close()
    assert any("applied up to offset" in why for why in waited)
    assert all("RESOURCE_EXHAUSTED" in why for why in refused)
    full = any("calls wait for a click already" in why for why in refused)
    assert full == (waiters > SETTINGS.waiting_calls_max)


class Broken(MemoryStore):
    """Slots in `dead` do not answer; a slot lies on the server named in `servers`."""

    def __init__(self) -> None:
        super().__init__()
        self.dead: dict[str, StoreUnavailable] = {}
        self.servers: dict[str, str] = {}
        self.reads: list[str] = []

    def server_of(self, slot: str) -> str:
        return self.servers.get(slot, "")

    def read_user(self, slot: str, partition: int, user_id: str, generation: str) -> UserState:
        self.reads.append(slot)
        if slot in self.dead:
            raise self.dead[slot]
        return super().read_user(slot, partition, user_id, generation)


def user_of(partition: int) -> str:
    return next(f"u{n}" for n in range(1_000) if partition_of(f"u{n}", 8) == partition)


def outcomes(reader: UserReader, users: list[str]) -> dict[str, set[bool]]:
    found: dict[str, set[bool]] = {user: set() for user in users}
    for n in range(100):
        user = users[n % len(users)]
        try:
            reader.read(user)
            found[user].add(True)
        except StoreUnavailable:
            found[user].add(False)
    return found


@pytest.mark.parametrize(
    "error", [StoreUnavailable("redis-1: refused"), SlotUnavailable("hash slot 5 is being moved")]
)
def test_a_dead_slot_refuses_no_user_of_others(error: StoreUnavailable) -> None:
    store = Broken()
    store.dead["u0"], store.servers = error, {"u0": "redis-1", "u1": "redis-2"}
    reader = UserReader(store, clicks_partitions=8, generation="g1")
    dead, well = user_of(0), user_of(1)
    assert outcomes(reader, [dead, well]) == {dead: {False}, well: {True}}
    # One call tried the dead one; the rest were answered without it.
    assert store.reads.count("u0") == 1
    assert str(error) in reader.outages.missing()


def test_slots_of_one_server_fail_together_but_not_for_a_slot_that_moves() -> None:
    store = Broken()
    store.servers = {"u0": "redis-1", "u1": "redis-1", "u2": "redis-2"}
    reader = UserReader(store, clicks_partitions=8, generation="g1")
    users = [user_of(n) for n in range(3)]
    store.dead["u0"] = SlotUnavailable("hash slot 5 is being moved")
    assert list(outcomes(reader, users).values()) == [{False}, {True}, {True}]
    store.dead["u0"] = store.dead["u1"] = StoreUnavailable("redis-1: refused")
    time.sleep(0.25)
    store.reads.clear()
    assert list(outcomes(reader, users).values()) == [{False}, {False}, {True}]
    assert len([slot for slot in store.reads if slot != "u2"]) <= 2


def test_a_slot_that_another_server_took_over_ends_the_outage() -> None:
    store = Broken()
    store.servers, store.dead = {"u0": "redis-1"}, {"u0": StoreUnavailable("redis-1: refused")}
    reader = UserReader(store, clicks_partitions=8, generation="g1")
    assert outcomes(reader, [user_of(0)]) == {user_of(0): {False}}
    store.servers, store.dead = {"u0": "redis-2"}, {}
    assert reader.read(user_of(0)) is not None
    assert reader.outages.missing() == ""


def test_a_server_that_answers_for_one_slot_answers_for_all() -> None:
    store = Broken()
    store.servers = {"u0": "redis-1", "u1": "redis-1"}
    store.dead = {"u0": StoreUnavailable("redis-1: refused")}
    reader = UserReader(store, clicks_partitions=8, generation="g1")
    assert outcomes(reader, [user_of(0)]) == {user_of(0): {False}}
    store.dead = {}
    time.sleep(0.25)
    # The one who tries it is of another slot.
    assert outcomes(reader, [user_of(1)]) == {user_of(1): {True}}
    assert outcomes(reader, [user_of(0)]) == {user_of(0): {True}}


class Hanging(Broken):
    """Servers in `hangs` do not answer for half a second; counts the calls that hang there."""

    def __init__(self) -> None:
        super().__init__()
        self.hangs: set[str] = set()
        self.now: dict[str, int] = {}
        self.most: dict[str, int] = {}
        self.counting = threading.Lock()

    def hang(self, slot: str) -> None:
        server = self.server_of(slot)
        if server not in self.hangs:
            return
        with self.counting:
            self.now[server] = self.now.get(server, 0) + 1
            self.most[server] = max(self.most.get(server, 0), self.now[server])
        time.sleep(0.5)
        with self.counting:
            self.now[server] -= 1
        raise StoreUnavailable(f"{server}: no answer")

    def read_user(self, slot: str, partition: int, user_id: str, generation: str) -> UserState:
        self.hang(slot)
        return super().read_user(slot, partition, user_id, generation)

    def read_item_metadata(self, item_ids, item_slots):  # type: ignore[no-untyped-def]
        for slot in {item_slot(item_id, item_slots) for item_id in item_ids}:
            self.hang(slot)
        return super().read_item_metadata(item_ids, item_slots)


def many(call: Callable[[], object], seconds: float) -> float:
    """Call on a new thread every 20 ms; the share of calls that took more than 0.25 s."""
    took, threads = list[float](), list[threading.Thread]()

    def timed() -> None:
        begun = time.monotonic()
        call()
        took.append(time.monotonic() - begun)

    until = time.monotonic() + seconds
    while time.monotonic() < until:
        threads.append(threading.Thread(target=timed))
        threads[-1].start()
        time.sleep(0.02)
    for thread in threads:
        thread.join(10)
    return sum(one > 0.25 for one in took) / len(took)


def test_servers_that_hang_hold_one_call_each() -> None:
    store = Hanging()
    store.servers = {f"u{n}": f"redis-{n % 3}" for n in range(8)}
    store.hangs = {"redis-0", "redis-1"}
    reader = UserReader(store, clicks_partitions=8, generation="g1")
    users = itertools.cycle(user_of(n) for n in range(8))

    def read() -> None:
        with suppress(StoreUnavailable):
            reader.read(next(users))

    many(read, 0.6)  # those that came before the first one had hung
    store.most.clear()
    many(read, 2.0)
    assert store.most == {"redis-0": 1, "redis-1": 1}


def test_cards_of_a_server_that_hangs_cost_the_others_nothing() -> None:
    """Four slots of items on two servers, one of which hangs."""
    store, log = Hanging(), LogId("cluster", "topic")
    store.servers = {f"i{n}": f"redis-{n % 2}" for n in range(4)}
    ids = [f"item-{n}" for n in range(40)]
    for n in range(4):
        cards = {
            item_id: ItemMetadata(0, 1, encode(Item(item_id=item_id, at_ms=1)))
            for item_id in ids
            if item_slot(item_id, 4) == f"i{n}"
        }
        store.write_item_metadata(f"i{n}", Source("items", 0), None, Fence(2, log), cards)
    reader = CardReader(store, 4, Outages(store))
    assert reader.read(ids, Deadline(5.0)) == (
        {item_id: Item(item_id=item_id, at_ms=1) for item_id in ids},
        [],
    )
    store.hangs = {"redis-1"}
    found, missing = reader.read(ids, Deadline(5.0))
    assert sorted(found) == sorted(i for i in ids if item_slot(i, 4) in ("i0", "i2"))
    assert missing == ["redis: no cards: redis-1: no answer"]
    slow = many(lambda: reader.read(ids, Deadline(5.0)), 2.0)
    assert store.most == {"redis-1": 1} and slow < 0.1
    store.hangs = set()
    time.sleep(0.3)
    assert reader.read(ids, Deadline(5.0))[1] == []


@pytest.mark.parametrize(
    ("error", "of_one_slot"),
    [
        (MovedError("5 127.0.0.1:7001"), True),
        (TryAgainError("TRYAGAIN Multiple keys request during rehashing of slot"), True),
        (ClusterDownError("hash slot 5 is served by no node"), True),
        (ConnectionError("Error 111 connecting"), False),
    ],
)
def test_redis_errors_of_one_slot(error: Exception, of_one_slot: bool) -> None:
    to = target(Settings(redis_url="redis://127.0.0.1:7000/0", redis_cluster=True))
    found = translate_error(error, to)  # type: ignore[arg-type]
    assert isinstance(found, StoreUnavailable)
    assert isinstance(found, SlotUnavailable) == of_one_slot


def test_a_bad_card_drops_only_itself(world: World) -> None:
    good = b'{"item_id":"i2","at_ms":1,"title":"Two"}'
    log = LogId("cluster", "topic")
    cards = {"i2": ItemMetadata(0, 1, good), "i3": ItemMetadata(0, 2, b"{broken")}
    world.store.write_item_metadata("i0", Source("items", 0), None, Fence(2, log), cards)
    answer = world.ask("ana", 5, with_cards=True)
    assert {item_id: card.title for item_id, card in answer.cards.items()} == {"i2": "Two"}
    assert answer.missing == ["redis: 1 cards cannot be read, such as 'i3'"]


@pytest.mark.parametrize("length", [36, ID_BYTES_MAX])
@pytest.mark.parametrize("count", [LIST_IDS_MAX - 1, LIST_IDS_MAX])
def test_lists_at_their_documented_limits_are_taken(
    server: WorkerServer, length: int, count: int
) -> None:
    ids = [f"{n:x}".rjust(length, "0") for n in range(count)]
    with Client(server.address) as client:
        found = client.retrieve("ana", 3, filters=pb.Filters(deny=ids, allow=[*ids[1:], "i4"]))
    assert [item.item_id for item in found.items] == ["i4"]


@pytest.mark.parametrize("name", ["allow", "deny"])
@pytest.mark.parametrize(("more", "longer"), [(1, 0), (0, 1)])
def test_lists_beyond_their_limits_are_refused_by_name(
    server: WorkerServer, name: str, more: int, longer: int
) -> None:
    """The message is read and answered with the reason; gRPC's own limit is not met."""
    ids = [f"{n:x}".rjust(ID_BYTES_MAX + longer, "0") for n in range(LIST_IDS_MAX + more)]
    with Client(server.address) as client, pytest.raises(CallFailed) as failed:
        client.retrieve("ana", 3, filters=pb.Filters(**{name: ids}))
    assert failed.value.code == "INVALID_ARGUMENT"
    what = f"{LIST_IDS_MAX + 1} values" if more else f"has {ID_BYTES_MAX + 1} bytes"
    assert f"filters.{name}:" in failed.value.detail and what in failed.value.detail
