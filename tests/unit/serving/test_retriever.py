"""Answers without gRPC, and the service behind a real gRPC server; stores and towers in memory."""

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace

import grpc
import msgspec
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry, generate_latest

from eddyline.errors import StoreUnavailable
from eddyline.schema import events
from eddyline.schema.events import KINDS, Item, encode
from eddyline.schema.item_record import ItemRecord
from eddyline.schema.partitioning import partition_of, user_slot
from eddyline.schema.user_history import Entry, UserHistory
from eddyline.settings.loader import Settings
from eddyline.stores.memory import MemoryStore
from eddyline.stores.state_store import Fence, ItemMetadata, LogId, Source, UserEffects, UserState
from embeddings.towers.user_tower import query_vector
from index.exact import ExactIndex
from index.filters import Filter, Range
from index.port import IndexReader
from serving.answer import outages
from serving.answer.click_waits import ClickPending, ClickWaits
from serving.answer.deadline import Deadline, DeadlinePassed
from serving.answer.fusion import Cascade
from serving.answer.fusion import Source as PathSource
from serving.answer.fusions import make_fusion
from serving.answer.retriever import Answer, Query, Retriever
from serving.answer.seen import SeenPolicy
from serving.answer.user_reader import AfterToken, UserReader
from serving.metrics import WorkerCollector
from serving.proto import retrieval_pb2 as pb
from serving.proto import retrieval_pb2_grpc
from serving.recall import registry
from serving.recall.base import Candidates, RecallContext, RecallPath, RecallRequest
from serving.recall.popularity import Popularity
from serving.recall.registry import make_paths
from serving.rpc import converters, filter_messages
from serving.rpc.backends import LocalIndex, WorkerBackend
from serving.rpc.client import CallFailed, Client
from serving.rpc.retrieval_service import RetrievalService
from serving.rpc.server import BATCH_BYTES_MAX, NAME, NOT_SERVING, SERVING, PortTaken, WorkerServer
from serving.worker.replica import TailState

D, N = 4, 12
LOG = LogId("cluster", "topic")
SETTINGS = Settings(
    worker_port=0,
    worker_threads=2,
    k_max=50,
    query_timeout_ms=400,
    wait_ms_max=300,
    clicks_partitions=8,
    item_slots=1,
    popular_bucket_s=10,
    popular_half_life_s=10,
    popular_limit=100,
    popular_refresh_ms=50,
    backoff_ms_max=100,
)


class Store(MemoryStore):
    """A store that can be away, or slow."""

    def __init__(self) -> None:
        super().__init__()
        self.away = False
        self.slow_s = 0.0
        self.reads = 0

    def read_user(self, slot: str, partition: int, user_id: str, generation: str) -> UserState:
        self.reads += 1
        time.sleep(self.slow_s)
        self._look()
        return super().read_user(slot, partition, user_id, generation)

    def popular_buckets(self, slot, limit, known):  # type: ignore[no-untyped-def]
        self._look()
        return super().popular_buckets(slot, limit, known)

    def read_item_metadata(self, item_ids, item_slots):  # type: ignore[no-untyped-def]
        self._look()
        return super().read_item_metadata(item_ids, item_slots)

    def _look(self) -> None:
        if self.away:
            raise StoreUnavailable("Redis at redis://nowhere: ConnectionError")


class Mean:
    """A tower that is simple to foresee: the mean of the history."""

    history_max = 3

    def __init__(self) -> None:
        self.filters: list[tuple[int, dict[str, object]]] = []

    def encode_one(self, history: np.ndarray, profile: Mapping[str, object]) -> np.ndarray:
        self.filters.append((len(history), dict(profile)))
        mean = history.mean(axis=0)
        return (mean / np.linalg.norm(mean)).astype(np.float32)

    def combine(self, forward: np.ndarray, embedding: np.ndarray | None) -> np.ndarray:
        return query_vector(forward, embedding)


class Tail:
    """The state of a replica."""

    def __init__(self) -> None:
        self.away = ""

    def state(self) -> TailState:
        return TailState(caught_up=True, lag_records=2, records=5, undecodable=1)

    def missing(self) -> str:
        return self.away


class World:
    """Twelve items around a circle: i0, i1, … each 8° and a little more further, at_ms growing."""

    def __init__(self, fusion: str = "cascade") -> None:
        self.store, self.index, self.tower = Store(), ExactIndex(D), Mean()
        self.index.upsert(
            [
                ItemRecord(f"i{n}", 0, n, n, time.time_ns() // 1000, angle(8 * n + n * n / 10))
                for n in range(N)
            ]
        )
        self.popularity = Popularity(SETTINGS, self.store)
        self.users = UserReader(self.store, clicks_partitions=8, generation="g1")
        self.replica = Tail()
        context = RecallContext(SETTINGS, self.store, self.tower, self.popularity, ExitStack())
        self.paths = make_paths(context)
        self.retriever = Retriever(
            store=self.store,
            users=self.users,
            popularity=self.popularity,
            paths=self.paths,
            item_slots=1,
            fusion=make_fusion(msgspec.structs.replace(SETTINGS, fusion=fusion)),
            waits=ClickWaits(self.store, calls_max=SETTINGS.waiting_calls_max),
            seen=SeenPolicy(SETTINGS),
        )
        held = LocalIndex("g1", self.index, self.replica)  # type: ignore[arg-type]
        self.backend = WorkerBackend(held, self.retriever)

    def user(
        self, user_id: str, *items: str, kind: str = "click", offset: int = 7, e: object = None
    ) -> None:
        partition = partition_of(user_id, 8)
        slot, source = user_slot(partition), Source("clicks", partition)
        entries = tuple(Entry(item, 100 - n, KINDS.index(kind)) for n, item in enumerate(items))
        history = UserHistory(
            partition=partition,
            offset=offset,
            at_ms=100,
            produced_us=1,
            appended_ms=2,
            read_us=3,
            entries=entries,
        )
        effects = UserEffects(histories={user_id: history})
        if e is not None:
            effects.embeddings["g1"] = {user_id: (9, np.asarray(e, np.float32).tobytes())}
        expected = self.store.fences(source, [slot])[slot]
        self.store.write_users(slot, source, expected, Fence(offset, LOG), effects)

    def clicked(self, counts: Mapping[int, Mapping[str, int]]) -> None:
        source = Source("clicks", 0)
        expected = self.store.fences(source, ["i0"])["i0"]
        new = Fence(expected.offset + 1 if expected else 0, LOG)
        self.store.count_clicks("i0", source, expected, new, counts, 10)
        assert self.popularity.refresh()

    def ask(self, user_id: str, k: int, **more: object) -> Answer:
        return self.retriever.retrieve(Query(user_id, k, **more), self.index, Deadline(5.0))  # type: ignore[arg-type]


def angle(degrees: float) -> np.ndarray:
    return np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees)), 0, 0], np.float32)


def ids(answer: Answer) -> list[str]:
    return [item.hit.item_id for item in answer.items]


def popular(world: World, k: int) -> Candidates:
    request = RecallRequest(None, k, (), None, 0.0, Deadline(5.0))
    return world.paths[1].recall(request, world.index)


def whys(answer: Answer) -> dict[str, str]:
    return {result.path: result.candidates.why for result in answer.paths}


@pytest.fixture
def world() -> World:
    return World()


# ---------------------------------------------------------------- without gRPC


def test_neighbours_of_what_was_clicked_without_what_was_clicked(world: World) -> None:
    world.user("ana", "i3")
    answer = world.ask("ana", 4)
    assert ids(answer) == ["i2", "i4", "i1", "i5"]
    assert {item.path for item in answer.items} == {"towers"}
    assert [item.path_rank for item in answer.items] == [1, 2, 3, 4]
    assert [summary.path for summary in answer.paths] == ["towers"]
    assert (answer.missing, answer.short_because) == ([], "")
    stamps = answer.stamps
    assert 0 < stamps.user_read_us <= stamps.embedded_us <= stamps.searched_us <= stamps.answered_us


def test_the_last_known_items_make_the_history(world: World) -> None:
    world.user("ana", "gone", "i8", "i7", "never", "i6", "i1", "i1")
    assert ids(world.ask("ana", 2)) == ["i5", "i9"]
    assert world.tower.filters[0][0] == 3  # i8, i7, i6: history_max known ones, the newest


def test_a_long_list_is_read_to_its_end_where_its_newest_items_are_gone(world: World) -> None:
    world.user("ana", *(f"gone-{n}" for n in range(7)), "i8", "i7", "i6", "i1")
    assert ids(world.ask("ana", 2)) == ["i5", "i9"]
    world.user("bob", "i8", *(f"gone-{n}" for n in range(50)), "i7", "i6", "i1", offset=9)
    assert ids(world.ask("bob", 2)) == ["i5", "i9"]
    assert [size for size, _ in world.tower.filters] == [3, 3]


def test_dislikes_are_seen_but_no_history(world: World) -> None:
    world.user("ana", "i3", "i4", kind="dislike")
    answer = world.ask("ana", 3)
    assert ids(answer) == ["i11", "i10", "i9"]
    assert whys(answer)["towers"] == "the user's list holds dislikes only"
    assert "i3" not in ids(world.ask("ana", 50))


def test_the_user_embedding_turns_the_query(world: World) -> None:
    world.user("ana", "i3", e=10 * angle(88))
    assert ids(world.ask("ana", 1)) == ["i9"]


@pytest.mark.parametrize("e", [[1.0] * (D + 1), [float("nan")] * D, []])
def test_an_embedding_that_does_not_fit_is_not_used(world: World, e: list[float]) -> None:
    world.user("ana", "i3", e=e)
    assert ids(world.ask("ana", 2)) == ["i2", "i4"]


def test_an_unknown_user_gets_the_popular_ones_and_then_the_newest(world: World) -> None:
    world.clicked({5: {"i2": 1000, "i7": 3000, "gone": 9000}, 6: {"i4": 600}})
    answer = world.ask("nobody", 5)
    assert ids(answer) == ["i7", "i4", "i2", "i11", "i10"]
    assert [item.path for item in answer.items] == ["popular"] * 3 + ["newest"] * 2
    assert answer.items[0].hit.score == pytest.approx(1.5)
    assert whys(answer) == {
        "towers": "nothing is known of this user",
        "popular": "of 4 popular items 3 are live and unseen",
        "newest": "",
    }
    assert answer.user.history.offset == -1


def test_a_user_whose_items_are_all_unknown_gets_popular_with_the_reason(world: World) -> None:
    world.clicked({1: {"i5": 1000}})
    world.user("ana", "x", "y")
    answer = world.ask("ana", 1)
    assert ids(answer) == ["i5"]
    assert whys(answer)["towers"] == "none of the 2 items of the user's list is in the index"


@pytest.mark.parametrize("k", [N - 3, N - 2, N - 1, N, 10 * N])
def test_as_many_as_there_are_and_why_not_more(world: World, k: int) -> None:
    world.user("ana", "i0", "i1", "gone")
    answer = world.ask("ana", k)
    assert len(answer.items) == min(k, N - 2)
    assert (answer.short_because == "") == (k <= N - 2)
    if k > N - 2:
        expected = f"{N - 2} of {k}: {N} items are live, 2 of them are in the user's list"
        assert answer.short_because == expected


def test_a_user_who_has_seen_everything_gets_the_reason(world: World) -> None:
    world.user("ana", *(f"i{n}" for n in range(N)))
    answer = world.ask("ana", 5)
    assert ids(answer) == []
    assert answer.short_because == "0 of 5: 12 items are live, 12 of them are in the user's list"


def test_redis_away_the_last_known_popular_list_serves_and_the_answer_says_so(world: World) -> None:
    world.user("ana", "i3")
    world.clicked({1: {"i5": 1000}})
    world.store.away = True
    assert not world.popularity.refresh()
    answer = world.ask("ana", 2, with_cards=True)
    assert ids(answer) == ["i5", "i11"]
    assert whys(answer)["towers"] == "the user could not be read"
    assert answer.missing[0] == "redis: Redis at redis://nowhere: ConnectionError"
    assert answer.missing[1].startswith("redis: the popular list is 0.")
    assert answer.stamps.user_read_us == 0
    assert any("since" in line for line in world.retriever.missing())


def test_a_list_that_several_paths_read_is_missing_once(world: World) -> None:
    world.store.away = True
    assert not world.popularity.refresh()
    context = RecallContext(SETTINGS, world.store, world.tower, world.popularity, ExitStack())
    retriever = Retriever(
        store=world.store,
        users=world.users,
        popularity=world.popularity,
        paths=make_paths(context, ["popular_fast", "popular_slow"]),
        item_slots=1,
        seen=SeenPolicy(SETTINGS),
    )
    answer = retriever.retrieve(Query("ana", 2), world.index, Deadline(5.0))
    away = "Redis at redis://nowhere: ConnectionError"
    no_list = f"redis: there is no popular list: {away}"
    assert answer.missing == [f"redis: {away}", no_list]
    assert retriever.missing()[1:] == [no_list]


def test_while_redis_is_away_only_one_call_in_a_while_tries_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outages, "PROBE_S", 0.1)
    world.user("ana", "i3")
    world.store.away = True
    for _ in range(20):
        assert world.ask("ana", 1).missing
    assert world.store.reads == 1
    world.store.away = False
    time.sleep(0.11)
    assert world.ask("ana", 1).missing == []
    assert world.retriever.missing() == []


def test_kafka_away_is_said(world: World) -> None:
    world.user("ana", "i3")
    world.replica.away = "no answer since 3 s"
    response = world.backend.retrieve(Query("ana", 1), Deadline(5.0), 0)
    assert list(response.missing) == ["kafka: no answer since 3 s"]
    stats = pb.StatsResponse()
    world.backend.fill_stats(stats)
    assert list(stats.missing) == ["kafka: no answer since 3 s"]


def test_cards(world: World) -> None:
    world.user("ana", "i3")
    card = events.encode(Item(item_id="i2", title="Heat", categories=["Crime"]))
    cards = {"i2": ItemMetadata(0, 1, card), "i4": ItemMetadata(0, 2, b"")}
    world.store.write_item_metadata("i0", Source("items", 0), None, Fence(2, LOG), cards)
    assert world.ask("ana", 3).cards == {}
    found = world.ask("ana", 3, with_cards=True).cards
    assert {item_id: item.title for item_id, item in found.items()} == {"i2": "Heat"}


def test_a_click_that_is_in_needs_no_waiting(world: World) -> None:
    world.user("ana", "i3", offset=7)
    partition = partition_of("ana", 8)
    for offset in (6, 7):
        after = world.ask("ana", 1, after=AfterToken(partition, offset, 0)).after
        assert after is not None and after.applied
    after = world.ask("ana", 1, after=AfterToken(partition, 8, 0)).after
    assert after is not None and not after.applied
    assert after.why == f"partition {partition} is applied up to offset 7, not 8"
    with pytest.raises(ClickPending):
        world.ask("ana", 1, after=AfterToken(partition, 8, 30))


def test_a_deadline_is_looked_at_before_every_step(world: World) -> None:
    with pytest.raises(DeadlinePassed, match="before the user was read; 0 ms were given"):
        world.retriever.retrieve(Query("ana", 1), world.index, Deadline(0.0))
    with pytest.raises(DeadlinePassed, match="before the user was read"):
        world.retriever.retrieve(Query("ana", 1), world.index, Deadline(-3.0))
    world.store.slow_s = 0.03
    with pytest.raises(DeadlinePassed, match="before the index was searched; 20 ms were given"):
        world.retriever.retrieve(Query("ana", 1), world.index, Deadline(0.02))


def test_a_popular_list_is_read_to_its_end_where_few_of_it_are_live(world: World) -> None:
    world.clicked(
        {1: {f"gone-{n}": 9_000 for n in range(95)} | {"i5": 3_000, "i7": 2_000, "i1": 1_000}}
    )
    for k in (1, 2, 3):
        found = popular(world, k)
        assert [hit.item_id for hit in found.hits] == ["i5", "i7", "i1"][:k] and not found.why
    assert popular(world, 4).why == "of 98 popular items 3 are live and unseen"


def test_the_popular_list_refreshes_itself_and_recovers(world: World) -> None:
    world.popularity.start()
    try:
        world.clicked({1: {"i5": 1000}})
        world.store.away = True
        deadline = time.monotonic() + 5
        while not world.popularity.missing():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert popular(world, 1).hits[0].item_id == "i5"
        world.store.away = False
        while world.popularity.missing():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert 0 <= world.popularity.age_ms() < 5_000
    finally:
        world.popularity.close()


def test_a_popular_list_that_was_never_read_says_so(world: World) -> None:
    assert popular(world, 3).why == "the list was never read: not yet"
    assert world.popularity.age_ms() == -1
    world.store.away = True
    world.popularity.refresh()
    assert "ConnectionError" in popular(world, 3).why
    assert world.popularity.missing().startswith("there is no popular list")


# ---------------------------------------------------------------- behind gRPC


@pytest.fixture
def service() -> RetrievalService:
    return RetrievalService(SETTINGS)


@pytest.fixture
def server(service: RetrievalService) -> Iterator[WorkerServer]:
    made = WorkerServer(SETTINGS, service)
    yield made
    made.stop(1.0)


@pytest.fixture
def client(server: WorkerServer, service: RetrievalService, world: World) -> Iterator[Client]:
    service.serve(world.backend)
    with Client(server.address) as made:
        yield made


def test_an_answer_over_the_wire(client: Client, world: World) -> None:
    world.user("ana", "i3")
    before_us = time.time_ns() // 1000
    response = client.retrieve("ana", 3, after=(partition_of("ana", 8), 7))
    assert [(i.item_id, i.rank, i.path, i.path_rank, i.generation) for i in response.items] == [
        ("i2", 1, "towers", 1, "g1"),
        ("i4", 2, "towers", 2, "g1"),
        ("i1", 3, "towers", 3, "g1"),
    ]
    assert all(0 <= item.age_ms < 60_000 for item in response.items)
    fresh = response.freshness
    assert fresh.generation == "g1"
    user = fresh.user
    assert (user.known, user.partition, user.offset, user.fence_offset) == (
        True,
        partition_of("ana", 8),
        7,
        7,
    )
    assert (user.produced_us, user.appended_ms, user.read_us, user.at_ms) == (1, 2, 3, 100)
    assert abs(user.applied_us - before_us) < 60_000_000
    assert [(w.partition, w.offset, w.at_ms) for w in fresh.index] == [(0, N - 1, N - 1)]
    stamps = fresh.worker
    assert before_us <= stamps.received_us <= stamps.user_read_us <= stamps.embedded_us
    assert stamps.embedded_us <= stamps.searched_us <= stamps.answered_us
    assert fresh.after.applied
    assert not response.items[0].HasField("card")


def test_an_unknown_user_over_the_wire(client: Client) -> None:
    response = client.retrieve("nobody", 20)
    assert len(response.items) == N
    assert response.short_because == "12 of 20: 12 items are live, 0 of them are in the user's list"
    assert not response.freshness.user.known
    assert (response.freshness.user.offset, response.freshness.user.fence_offset) == (-1, -1)
    assert [p.path for p in response.paths] == ["towers", "popular", "newest"]
    assert not response.freshness.HasField("after")


@pytest.mark.parametrize(
    ("user_id", "k", "sentence"),
    [
        ("ana", 0, "k: 0, allowed are 1 … 50"),
        ("ana", -1, "k: -1, allowed are 1 … 50"),
        ("ana", 51, "k: 51, allowed are 1 … 50"),
        ("ana", 10**9, "k: 1000000000, allowed are 1 … 50"),
        ("", 5, "user_id: '' has 0 bytes, allowed are 1 … 256"),
        ("u" * 257, 5, "has 257 bytes, allowed are 1 … 256"),
        ("ü" * 129, 5, "has 258 bytes, allowed are 1 … 256"),
        ("u" * 10_000, 5, "has 10000 bytes, allowed are 1 … 256"),
        ("a\nb", 5, "user_id: 'a\\nb' has a control character"),
    ],
)
def test_bad_input_gets_a_code_and_a_sentence(
    client: Client, user_id: str, k: int, sentence: str
) -> None:
    with pytest.raises(CallFailed) as failed:
        client.retrieve(user_id, k)
    assert failed.value.code == "INVALID_ARGUMENT"
    assert sentence in failed.value.detail
    assert len(failed.value.detail) < 200


@pytest.mark.parametrize(
    ("user_id", "k"), [("ana", 1), ("ana", 50), ("u", 5), ("u" * 256, 5), ("ü" * 128, 5)]
)
def test_the_limits_themselves_are_good(client: Client, user_id: str, k: int) -> None:
    assert client.retrieve(user_id, k).items


@pytest.mark.parametrize(
    ("partition", "offset", "wait_ms", "sentence"),
    [
        (-1, 5, 0, "after.partition: -1, but clicks of 'ana' lie in"),
        (partition_of("ana", 8) + 1, 5, 0, "but clicks of 'ana' lie in"),
        (partition_of("ana", 8), -1, 0, "after.offset: -1, must be at least 0"),
        (partition_of("ana", 8), 5, -1, "after.wait_ms: -1, allowed are 0 … 300"),
        (partition_of("ana", 8), 5, 301, "after.wait_ms: 301, allowed are 0 … 300"),
    ],
)
def test_a_bad_token(
    client: Client, partition: int, offset: int, wait_ms: int, sentence: str
) -> None:
    with pytest.raises(CallFailed, match="INVALID_ARGUMENT") as failed:
        client.retrieve("ana", 5, after=(partition, offset), wait_ms=wait_ms)
    assert sentence in failed.value.detail


def test_waiting_for_a_click_stays_within_the_deadline(client: Client, world: World) -> None:
    world.user("ana", "i3")
    response = client.retrieve(
        "ana", 5, after=(partition_of("ana", 8), 99), wait_ms=300, timeout_s=0.25
    )
    assert not response.freshness.after.applied
    assert response.freshness.after.waited_ms < 250
    assert len(response.items) == 5


@pytest.mark.parametrize("letter", ["x", "\U0001f600"])
def test_cards_leave_an_answer_below_the_limit_of_every_client(world: World, letter: str) -> None:
    """A thousand cards with 64 categories of 256 characters would be 16 to 65 MB."""
    count = 1_000
    settings = msgspec.structs.replace(SETTINGS, k_max=count, query_timeout_ms=60_000)
    service = RetrievalService(settings)
    items = [ItemRecord(f"more-{n:04d}", 0, 100 + n, n, 1, angle(n / 10)) for n in range(count)]
    world.index.upsert(items)
    categories = [f"{c:02d}".ljust(256, letter) for c in range(64)]
    body = encode(Item(item_id="x", title="long", at_ms=1, categories=categories))
    cards = {item.item_id: ItemMetadata(0, 1, body) for item in items}
    world.store.write_item_metadata("i0", Source("items", 0), None, Fence(2, LOG), cards)
    one = WorkerServer(settings, service)
    try:
        service.serve(world.backend)
        with grpc.insecure_channel(one.address) as channel:  # its limit is gRPC's default
            stub = retrieval_pb2_grpc.RetrievalStub(channel)  # type: ignore[no-untyped-call]
            request = pb.RetrieveRequest(user_id="nobody", k=count, with_cards=True)
            answer = stub.Retrieve(request, timeout=30)
    finally:
        one.stop(0.0)
    have = [item.HasField("card") for item in answer.items]
    assert len(have) == count and have == sorted(have, reverse=True) and sum(have) >= 50
    assert 3_900_000 < answer.ByteSize() <= converters.ANSWER_BYTES_MAX
    lacks = sum(i.item_id.startswith("more-") and not i.HasField("card") for i in answer.items)
    left_out = f"worker: {lacks} cards are left out, or the answer would exceed 4,000,000 bytes"
    assert left_out in answer.missing


def test_an_item_names_its_paths_whatever_its_fused_score_is(world: World) -> None:
    world.user("ana", "i3")
    answer = world.ask("ana", 2)
    sources = [PathSource("towers", 1, 0.5, 0.25), PathSource("popular", 7, 3.0, -0.25)]
    items = [answer.items[0]._replace(sources=sources), answer.items[1]]
    fused = converters.response_of(replace(answer, items=items), "1", world.index, "")
    assert [(p.path, p.rank, p.score, p.share) for p in fused.items[0].paths] == sources
    assert fused.items[0].fused_score == 0 and not fused.items[1].paths


@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_more_items_than_an_answer_can_hold_are_refused_with_the_limit(
    monkeypatch: pytest.MonkeyPatch, client: Client, world: World, beyond: int
) -> None:
    """An answer of exactly the limit is sent; a larger one is refused before any client sees it."""
    monkeypatch.setattr(converters, "ITEMS_THAT_FIT", 0)
    monkeypatch.setattr(converters.time, "time_ns", lambda: 1_700_000_000_000_000_000)
    answer = world.ask("ana", 10)
    size = converters.response_of(answer, "1", world.index, "").ByteSize()
    monkeypatch.setattr(converters, "ANSWER_BYTES_MAX", size - beyond)
    if beyond <= 0:
        assert converters.response_of(answer, "1", world.index, "").ByteSize() == size
        return
    sentence = f"k: 10 items take {size:,} bytes, an answer has at most {size - 1:,}"
    with pytest.raises(filter_messages.BadQuery, match=sentence):
        converters.response_of(answer, "1", world.index, "")
    monkeypatch.setattr(converters, "ANSWER_BYTES_MAX", 10)
    with pytest.raises(CallFailed, match=r"INVALID_ARGUMENT: k: 10 items take .* ask for fewer"):
        client.retrieve("ana", 10)


def test_a_request_that_is_far_too_large_is_refused(client: Client) -> None:
    with pytest.raises(CallFailed, match="RESOURCE_EXHAUSTED"):
        client.retrieve("u" * BATCH_BYTES_MAX, 5)
    sentence = "INVALID_ARGUMENT: user_id: .* has 4000000 bytes"
    with pytest.raises(CallFailed, match=sentence):
        client.retrieve("u" * 4_000_000, 5)
    assert client.retrieve("ana", 5).items


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, 0.02])
def test_a_passed_deadline(client: Client, world: World, timeout_s: float) -> None:
    world.store.slow_s = 0.1
    with pytest.raises(CallFailed) as failed:
        client.retrieve("ana", 5, timeout_s=timeout_s)
    assert failed.value.code == "DEADLINE_EXCEEDED"
    assert "deadline" in failed.value.detail


def test_the_worker_has_a_deadline_for_calls_that_bring_none(client: Client, world: World) -> None:
    world.store.slow_s = 0.5
    with pytest.raises(grpc.RpcError) as failed:
        client._stub.Retrieve(pb.RetrieveRequest(user_id="ana", k=5))
    assert failed.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert failed.value.details() == (
        "the deadline passed before the index was searched; 400 ms were given"
    )


def test_too_many_calls_at_a_time(client: Client, world: World) -> None:
    world.store.slow_s = 0.3
    codes: list[str] = []

    def call() -> None:
        try:
            client.retrieve("ana", 5)
            codes.append("OK")
        except CallFailed as error:
            codes.append(error.code)

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert codes.count("RESOURCE_EXHAUSTED") == 4, codes
    world.store.slow_s = 0.0
    assert client.retrieve("ana", 5).items


def test_not_ready(server: WorkerServer, service: RetrievalService) -> None:
    service.waiting_for("Kafka and an active generation")
    with Client(server.address) as client:
        with pytest.raises(CallFailed) as failed:
            client.retrieve("ana", 5)
        assert failed.value.code == "UNAVAILABLE"
        assert (
            failed.value.detail
            == "the worker is not ready: it waits for Kafka and an active generation"
        )
        stats = client.stats()
        assert (stats.ready, list(stats.missing)) == (
            False,
            ["worker: waits for Kafka and an active generation"],
        )


def test_stats(client: Client, world: World) -> None:
    world.clicked({1: {"i5": 1000}})
    client.retrieve("ana", 5)
    with pytest.raises(CallFailed):
        client.retrieve("ana", 0)
    stats = client.stats()
    assert (stats.ready, stats.generation, stats.queries, stats.queries_failed) == (
        True,
        "g1",
        2,
        1,
    )
    assert (stats.index.live, stats.index.dimension) == (N, D)
    assert [(w.partition, w.offset) for w in stats.watermarks] == [(0, N - 1)]
    assert (stats.tail.caught_up, stats.tail.lag_records, stats.tail.undecodable) == (True, 2, 1)
    assert stats.popular.items == 1 and 0 <= stats.popular.age_ms < 5_000
    assert list(stats.missing) == []
    world.store.away = True
    client.retrieve("ana", 5)
    assert [line.split(" (since")[0] for line in client.stats().missing] == [
        "redis: Redis at redis://nowhere: ConnectionError"
    ]


def test_an_error_inside_is_an_answer_too(
    client: Client, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a secret")

    world.user("ana", "i3")
    with monkeypatch.context() as inside:
        inside.setattr(Cascade, "fuse", broken)
        with pytest.raises(CallFailed) as failed:
            client.retrieve("ana", 5)
    assert failed.value.code == "INTERNAL"
    assert failed.value.detail == "ZeroDivisionError; the worker's log has more"
    # One inside a path costs that path alone, and its message stays inside, too.
    monkeypatch.setattr(world.tower, "encode_one", broken)
    answer = client.retrieve("ana", 5)
    assert [item.path for item in answer.items] == ["newest"] * 5
    why = "recall path towers failed: ZeroDivisionError; the worker's log has more"
    assert list(answer.missing) == [f"worker: {why}"]


def test_health_and_reflection(server: WorkerServer) -> None:
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    with grpc.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", NAME):
            assert (
                stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=5).status
                == NOT_SERVING
            )
        server.set_serving(True)
        for name in ("", NAME):
            assert (
                stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=5).status == SERVING
            )
        reflect = reflection_pb2_grpc.ServerReflectionStub(channel)
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        answer = next(reflect.ServerReflectionInfo(iter([question]), timeout=5))
        names = {service.name for service in answer.list_services_response.service}
        assert {"eddyline.retrieval.v1.Retrieval", "grpc.health.v1.Health"} <= names


def test_a_port_that_is_taken(server: WorkerServer, service: RetrievalService) -> None:
    port = int(server.address.rpartition(":")[2])
    taken = Settings(worker_port=port)
    with pytest.raises(PortTaken, match=f"127.0.0.1:{port} cannot be bound.*EDDYLINE_WORKER_PORT"):
        WorkerServer(taken, service)


def test_a_worker_that_is_not_there() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(CallFailed) as failed:
        client.retrieve("ana", 5, timeout_s=1.0)
    assert failed.value.code in ("UNAVAILABLE", "DEADLINE_EXCEEDED")
    assert "worker at 127.0.0.1:1" in str(failed.value)


# ---------------------------------------------------------------- filters and popularity


def tagged(world: World) -> None:
    """Even items are short films of the year of their number, odd ones are books."""
    world.index.upsert(
        [
            ItemRecord(
                f"i{n}",
                0,
                100 + n,
                n,
                0,
                angle(8 * n + n * n / 10),
                {
                    "categories": ["book" if n % 2 else "film"],
                    "tags": ["short"],
                    "attributes": {"year": n},
                },
            )
            for n in range(N)
        ]
    )


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (pb.Filters(), {*range(N)}),
        (pb.Filters(categories=["film"]), {0, 2, 4, 6, 8, 10}),
        (pb.Filters(categories=["film", "book"], tags=["short"], tags_all=["short"]), {*range(N)}),
        (pb.Filters(tags_all=["short", "long"]), set()),
        (pb.Filters(ranges=[pb.Range(attribute="year", min=9)]), {9, 10, 11}),
        (pb.Filters(ranges=[pb.Range(attribute="year", min=2, max=3)], deny=["i2"]), {3}),
        (pb.Filters(allow=["i1", "i5", "x"]), {1, 5}),
        (pb.Filters(deny=["i1", "i5", "x"]), {*range(N)} - {1, 5}),
    ],
)
@pytest.mark.parametrize("user", ["ana", "nobody"])
def test_every_path_respects_the_filter(
    client: Client, world: World, filters: pb.Filters, expected: set[int], user: str
) -> None:
    tagged(world)
    world.user("ana", "i3", "i4")
    world.clicked({1: {"i5": 3000, "i6": 2000, "i2": 1000}})
    expected = expected - {3, 4} if user == "ana" else expected
    response = client.retrieve(user, N, filters=filters)
    assert {item.item_id for item in response.items} == {f"i{n}" for n in expected}
    few = client.retrieve(user, 2, filters=filters)
    assert len(few.items) == min(2, len(expected))
    if filters != pb.Filters() and len(expected) < N:
        assert response.short_because.startswith(f"{len(expected)} of {N}: ")
        assert "live items pass the filter, " in response.short_because
        assert response.short_because.endswith("of them are in the user's list")


def test_popular_and_newest_fill_within_the_filter(client: Client, world: World) -> None:
    tagged(world)
    world.clicked({1: {"i5": 3000, "i6": 2000, "i2": 1000}})
    response = client.retrieve("nobody", 4, filters=pb.Filters(categories=["film"]))
    assert [(item.item_id, item.path) for item in response.items] == [
        ("i6", "popular"),
        ("i2", "popular"),
        ("i10", "newest"),
        ("i8", "newest"),
    ]


@pytest.mark.parametrize(
    ("filters", "sentence"),
    [
        (pb.Filters(categories=["a"] * 257), "filters.categories: 257 values, allowed are 0 … 256"),
        (pb.Filters(tags=[""]), "filters.tags: '' has 0 bytes, allowed are 1 … 256"),
        (pb.Filters(tags_none=["a"] * 257), "filters.tags_none: 257 values, allowed are 0 … 256"),
        (pb.Filters(categories_none=[""]), "filters.categories_none: '' has 0 bytes"),
        (
            pb.Filters(texts=[pb.Texts(attribute="brand", values=["a"])]),
            "filters.texts: 'brand' is not in the setting filter_texts; it has none",
        ),
        (
            pb.Filters(texts_none=[pb.Texts(attribute="brand", values=["a"])]),
            "filters.texts: 'brand' is not in the setting filter_texts; it has none",
        ),
        (pb.Filters(texts=[pb.Texts(values=["a"])]), "filters.texts.attribute: '' has 0 bytes"),
        (
            pb.Filters(texts=[pb.Texts(attribute="brand")]),
            "filters.texts.values: 0 values, allowed are 1 … 64",
        ),
        (
            pb.Filters(texts=[pb.Texts(attribute="brand", values=["a"] * 65)]),
            "filters.texts.values: 65 values, allowed are 1 … 64",
        ),
        (
            pb.Filters(texts_none=[pb.Texts(attribute="b", values=["a"])] * 2),
            "filters.texts_none: 'b' is given twice",
        ),
        (
            pb.Filters(texts=[pb.Texts(attribute=f"b{n}", values=["a"]) for n in range(17)]),
            "filters.texts: 17 values, allowed are 0 … 16",
        ),
        (pb.Filters(tags_all=["x" * 257]), "has 257 bytes, allowed are 1 … 256"),
        (pb.Filters(deny=["d"] * 2_001), "filters.deny: 2001 values, allowed are 0 … 2000"),
        (
            pb.Filters(ranges=[pb.Range(attribute="year")]),
            "filters.ranges: 'year' has neither min nor max",
        ),
        (pb.Filters(ranges=[pb.Range(min=1)]), "filters.ranges.attribute: '' has 0 bytes"),
        (
            pb.Filters(ranges=[pb.Range(attribute="year", min=2, max=1)]),
            "filters.ranges: 'year': 2.0 … 1.0 holds no number",
        ),
        (
            pb.Filters(ranges=[pb.Range(attribute="year", min=float("nan"))]),
            "nan … inf holds no number",
        ),
        (
            pb.Filters(ranges=[pb.Range(attribute="y", min=1)] * 2),
            "filters.ranges: 'y' is given twice",
        ),
        (
            pb.Filters(ranges=[pb.Range(attribute=f"y{n}", min=1) for n in range(17)]),
            "filters.ranges: 17 values, allowed are 0 … 16",
        ),
    ],
)
def test_a_bad_filter_names_field_and_value(
    client: Client, filters: pb.Filters, sentence: str
) -> None:
    with pytest.raises(CallFailed) as failed:
        client.retrieve("ana", 5, filters=filters)
    assert failed.value.code == "INVALID_ARGUMENT"
    assert sentence in failed.value.detail


def test_an_attribute_that_no_item_has_is_named_with_the_near_ones(
    client: Client, world: World
) -> None:
    def filtered(*names: str) -> pb.RetrieveResponse:
        ranges = [pb.Range(attribute=name, min=0) for name in names]
        return client.retrieve("ana", 5, filters=pb.Filters(ranges=ranges))

    with pytest.raises(CallFailed) as failed:
        filtered("year")
    assert failed.value.code == "INVALID_ARGUMENT" and "attributes are none" in failed.value.detail
    tagged(world)
    with pytest.raises(CallFailed) as failed:
        filtered("year", "yaer")
    assert failed.value.detail == (
        "filters.ranges: no item has the attribute 'yaer' as a number or date; attributes are "
        "'year'"
    )
    assert filtered("year").items
    # Items that had it have all gone: nothing passes, but the name is right.
    world.index.upsert([ItemRecord(f"i{n}", 0, 500 + n, n, 0, angle(n)) for n in range(N)])
    found = filtered("year")
    assert not found.items and "0 live items pass the filter" in found.short_because
    # No item is live: every name may be right.
    world.index.retire([ItemRecord(f"i{n}", 0, 900 + n, n, 0, None) for n in range(N)])
    assert not filtered("anything").items


def test_the_limits_of_a_filter_are_good(client: Client, world: World) -> None:
    numbers = {"attributes": {f"y{n}": 0 for n in range(16)}}
    world.index.upsert([ItemRecord("with-numbers", 0, 100, 0, 0, angle(3), numbers)])
    ranges = [pb.Range(attribute=f"y{n}", min=1) for n in range(16)]
    most = pb.Filters(categories=["a"] * 256, deny=["d"] * 2_000, ranges=ranges)
    assert not client.retrieve("ana", 5, filters=most).items


def test_popularity_is_held_back(client: Client, world: World) -> None:
    world.user("ana", "i3")
    assert [i.item_id for i in client.retrieve("ana", 3).items] == ["i2", "i4", "i1"]
    world.clicked({1: {"i2": 100_000, "i4": 1_000}})
    response = client.retrieve("ana", 3, popularity_beta=0.2)
    assert [i.item_id for i in response.items] == ["i1", "i5", "i0"]
    # 101 clicks in all, two items on the list: an item without a click has one of 104.
    nearness = float(np.cos(np.radians(8 * 3 + 0.9 - 8.1)))
    assert response.items[0].score == pytest.approx(nearness + 0.2 * np.log(104), abs=1e-5)
    assert [i.item_id for i in client.retrieve("ana", 3, popularity_beta=0.0).items] == [
        "i2",
        "i4",
        "i1",
    ]


@pytest.mark.parametrize("beta", [-0.1, 10.1, float("nan"), float("inf")])
def test_a_bad_beta(client: Client, beta: float) -> None:
    with pytest.raises(
        CallFailed, match=r"INVALID_ARGUMENT: popularity_beta: .*, allowed are 0 … 10"
    ):
        client.retrieve("ana", 5, popularity_beta=beta)


def test_beta_comes_from_the_settings_where_the_request_has_none() -> None:
    settings = Settings(popularity_beta=0.5)
    assert (
        converters.query_of(pb.RetrieveRequest(user_id="ana", k=1), settings).popularity_beta == 0.5
    )
    filters = pb.RetrieveRequest(user_id="ana", k=1, popularity_beta=0.0)
    assert converters.query_of(filters, settings).popularity_beta == 0.0


def test_a_query_in_another_spelling_is_the_same_query(client: Client, world: World) -> None:
    world.index.upsert(
        [
            ItemRecord(name, 0, 500 + n, 1, 0, angle(n), {"tags": ["\u00e9t\u00e9"]})
            for n, name in enumerate(("caf\u00e9", "th\u00e9", "lait"))
        ]
    )
    world.user("zo\u00eb", "i3", "i4")
    for user in ("zo\u00eb", "zoe\u0308", " zo\u00eb\u2003"):
        response = client.retrieve(user, 5)
        assert response.freshness.user.known
        assert not {"i3", "i4"} & {item.item_id for item in response.items}
        filters = pb.Filters(tags=["e\u0301t\u00e9 "], deny=["cafe\u0301"])
        found = client.retrieve(user, 5, filters=filters).items
        assert {item.item_id for item in found} == {"th\u00e9", "lait"}
        allowed = client.retrieve(user, 5, filters=pb.Filters(allow=["the\u0301 "])).items
        assert [item.item_id for item in allowed] == ["th\u00e9"]


def test_the_form_of_a_query() -> None:
    spelled = "e\u0301 "
    request = pb.RetrieveRequest(user_id=spelled, k=1)
    lists = "categories tags tags_all categories_none tags_none allow deny".split()
    for name in lists:
        getattr(request.filters, name).append(spelled)
    request.filters.ranges.add(attribute=spelled, min=1)
    request.filters.texts.add(attribute=spelled, values=[spelled])
    request.filters.texts_none.add(attribute=spelled, values=[spelled])
    request.session.add(item_id=spelled)
    similar = pb.SimilarItemsRequest(item_ids=[spelled], k=1, filters=request.filters)
    explained = pb.ExplainRequest(request=request, item_ids=[spelled])
    for form, text in (("nfc", "\u00e9"), ("as_is", spelled)):
        settings, one = Settings(id_form=form), frozenset({text})
        query, item_ids = converters.explained_of(explained, settings)
        assert query == converters.query_of(request, settings)
        assert (query.user_id, item_ids) == (text, [text])
        assert [entry.item_id for entry in query.session] == [text]
        # Texts of attributes are compared in NFC in any case.
        texts = {text: frozenset({"\u00e9"})}
        ranges = {text: Range(low=1)}
        expected = Filter(**dict.fromkeys(lists, one), texts=texts, texts_none=texts, ranges=ranges)
        assert query.filters == expected
        nearest = converters.similar_of(similar, settings)
        assert (nearest.item_ids, nearest.filters) == ([text], expected)
    with pytest.raises(filter_messages.BadQuery, match="user_id: is empty"):
        converters.query_of(pb.RetrieveRequest(user_id="\u2003", k=1), Settings())
    similar.item_ids.append("\u00e9")
    with pytest.raises(filter_messages.BadQuery, match="item_ids: 'é' is given twice"):
        converters.similar_of(similar, Settings())
    request.filters.ranges.add(attribute="\u00e9", min=1)
    with pytest.raises(filter_messages.BadQuery, match="'é' is given twice"):
        converters.query_of(request, Settings())


def test_the_token_of_a_click_is_that_of_the_partition_of_the_id() -> None:
    """A click under another spelling is forwarded; its token names another partition."""
    spelled, settings = "zoe\u0308", Settings(clicks_partitions=8)
    own, sent = (partition_of(user, 8) for user in ("zo\u00eb", spelled))
    assert own != sent
    good = pb.RetrieveRequest(user_id=spelled, k=1, after=pb.After(partition=own, offset=3))
    assert converters.query_of(good, settings).after is not None
    good.after.partition = sent
    with pytest.raises(filter_messages.BadQuery, match="send them under the id in Unicode NFC"):
        converters.query_of(good, settings)


# ---------------------------------------------------------------- a recall path of one file


class ToyPath(RecallPath):
    """What a new file in serving/recall/ holds; it always returns i9."""

    name = "toy"

    def __init__(self, context: RecallContext) -> None: ...

    def recall(self, request: RecallRequest, index: IndexReader) -> Candidates:
        hits = [hit for hit in index.describe(["i9"], request.filters) if hit]
        return Candidates(hits, "it knows i9 only", degradation=self.degradation())

    def degradation(self) -> str:
        return "toy: its data are a day old"


def test_a_path_that_is_one_line_in_the_registry_is_seen_everywhere(
    server: WorkerServer, service: RetrievalService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.PATHS, "toy", ToyPath)
    named = msgspec.structs.replace(SETTINGS, recall_paths="toy,towers,popular,newest")
    monkeypatch.setitem(globals(), "SETTINGS", named)
    world = World()
    service.serve(world.backend)
    world.user("ana", "i3")
    with Client(server.address) as client:
        response = client.retrieve("ana", 3)
        assert [(i.item_id, i.path, i.path_rank) for i in response.items] == [
            ("i9", "toy", 1),
            ("i2", "towers", 1),
            ("i4", "towers", 2),
        ]
        assert [(p.path, p.candidates, p.taken, p.why) for p in response.paths] == [
            ("toy", 1, 1, "it knows i9 only"),
            ("towers", 2, 2, ""),
        ]
        assert list(response.missing) == ["toy: its data are a day old"]
        assert list(client.stats().missing) == ["toy: its data are a day old"]
    collectors = CollectorRegistry()
    collectors.register(WorkerCollector(service))
    metrics = generate_latest(collectors).decode()
    assert 'eddyline_worker_path_queries_total{path="toy"} 1.0' in metrics
    assert 'eddyline_worker_path_items_total{path="toy"} 1.0' in metrics
    assert 'eddyline_worker_path_items_total{path="towers"} 2.0' in metrics
