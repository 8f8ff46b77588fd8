"""Shards behind real gRPC servers; the coordinator's answers against those of one index."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from types import SimpleNamespace

import grpc
import msgspec
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from eddyline.errors import SettingsError, StoreUnavailable
from eddyline.schema.events import ID_BYTES_MAX
from eddyline.schema.item_key import keys_of
from eddyline.schema.item_record import ItemRecord
from eddyline.schema.partitioning import item_shard, partition_of, user_slot
from eddyline.schema.user_history import Entry, UserHistory
from eddyline.settings.loader import Settings, load
from eddyline.stores.memory import MemoryStore
from eddyline.stores.state_store import Fence, LogId, Source, UserEffects
from embeddings.towers.user_tower import query_vector
from index.arrays import Vector
from index.backends.registry import make_backend
from index.exact import ExactIndex
from index.factory import HnswIndex
from index.filters import LIST_IDS_MAX, Filter, Range
from index.port import Index
from index.search.multi_vector import query_multi
from serving.__main__ import Worker
from serving.answer.click_waits import ClickWaits
from serving.answer.deadline import Deadline, DeadlinePassed
from serving.answer.retriever import Retriever
from serving.answer.seen import SeenPolicy
from serving.answer.user_reader import UserReader
from serving.coordinator import shards as shards_
from serving.coordinator.backend import CoordinatorBackend
from serving.coordinator.scatter_gather import ScatterGather
from serving.coordinator.shards import LATE_MAX, SHARDS_MAX, Shards, parse
from serving.coordinator.vector_cache import VectorCache
from serving.proto import retrieval_pb2 as pb
from serving.proto import shard_pb2, shard_pb2_grpc
from serving.recall.base import RecallContext
from serving.recall.popularity import Popularity
from serving.recall.registry import make_paths
from serving.recall.towers import OVER_FETCH
from serving.rpc.backends import LocalIndex, ShardBackend, WorkerBackend
from serving.rpc.client import CallFailed, Client, open_channel
from serving.rpc.retrieval_service import RetrievalService
from serving.rpc.server import NAME, NOT_SERVING, SERVING, SHARD_NAME, PortTaken, WorkerServer
from serving.rpc.shard_service import ATTRIBUTES_MAX, EXCLUDED_MAX, IDS_MAX, ShardService
from serving.rules.answer_rules import AnswerRules
from serving.rules.editorial import EditorialRules
from serving.rules.editorial_watch import CurrentRules
from serving.sharding import ShardAssignment, shard_of
from serving.worker.replica import TailState

D, N, SEED = 16, 600, 11
LOG = LogId("cluster", "topic")
SETTINGS = Settings(
    worker_port=0,
    coordinator_port=0,
    worker_threads=4,
    query_timeout_ms=2_000,
    shard_timeout_ms=1_500,
    clicks_partitions=8,
    item_slots=1,
    popular_bucket_s=10,
    popular_half_life_s=10,
    popular_limit=100,
    popular_refresh_ms=50,
    backoff_ms_max=200,
)


def unit(rows: Vector) -> Vector:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def catalogue(n: int = N) -> list[ItemRecord]:
    """n items; every tenth shares its vector with the one before it, so that scores tie."""
    rng = np.random.default_rng(SEED)
    vectors = unit(rng.normal(size=(n, D)))
    vectors[10::10] = vectors[9:-1:10]
    return [
        ItemRecord(
            f"item-{i}",
            i % 3,
            i,
            int(rng.integers(50)),
            1_000 + i,
            vectors[i],
            {
                "categories": [f"c{i % 7}"],
                "tags": ["odd" if i % 2 else "even"],
                "attributes": {"year": i % 40},
            },
        )
        for i in range(n)
    ]


class Mean:
    """A tower that is simple to foresee: the mean of the history."""

    history_max = 3

    def encode_one(self, history: Vector, profile: object) -> Vector:
        mean: Vector = unit(history.mean(axis=0))
        return mean

    def combine(self, forward: np.ndarray, embedding: np.ndarray | None) -> np.ndarray:
        return query_vector(forward, embedding)


class OneShard:
    """A worker of one shard; its answers can be made late, and it can be killed and come back."""

    def __init__(
        self, share: ShardAssignment, index: Index, port: int = 0, generation: str = "g1"
    ) -> None:
        self.share, self.index, self.generation = share, index, generation
        self.behind, self.slow_s = "", 0.0
        self.now = self.most = 0
        self.with_service = True
        self.server: WorkerServer | None = None
        self.up(port)

    def up(self, port: int) -> None:
        service, self.shard = RetrievalService(SETTINGS), _Slow(self)
        held = LocalIndex(self.generation, self.index, self)  # type: ignore[arg-type]
        service.serve(ShardBackend(held, self.share))
        self.shard.serve(held)
        settings = Settings(worker_port=port, worker_threads=4)
        shard = self.shard if self.with_service else None
        self.server = WorkerServer(settings, service, shard)
        self.server.set_serving(True)
        self.address = self.server.address

    def state(self) -> TailState:
        return TailState()

    def missing(self) -> str:
        return self.behind

    def down(self) -> int:
        """Stop at once; its port."""
        if self.server is not None:
            self.server.stop(0.0)
        self.server = None
        return int(self.address.rpartition(":")[2])


class _Slow(ShardService):
    def __init__(self, of: OneShard) -> None:
        super().__init__(of.share, SETTINGS.k_max)
        self._of, self._lock = of, threading.Lock()

    def Candidates(self, request, context):  # type: ignore[no-untyped-def]
        with self._lock:
            self._of.now += 1
            self._of.most = max(self._of.most, self._of.now)
        time.sleep(self._of.slow_s)
        try:
            return super().Candidates(request, context)
        finally:
            with self._lock:
                self._of.now -= 1


class Plant:
    """Shards, a coordinator in front of them, and one index with everything."""

    def __init__(
        self,
        count: int,
        records: Sequence[ItemRecord],
        text_names: frozenset[str] = frozenset(),
        settings: Settings = SETTINGS,
        rules: EditorialRules | None = None,
        *,
        patient: bool = True,
    ) -> None:
        """patient: no shard is late, however busy the machine is"""
        if patient:
            settings = msgspec.structs.replace(
                settings, query_timeout_ms=30_000, shard_timeout_ms=15_000
            )
        self.whole: Index = ExactIndex(D, text_names)
        self.shards = []
        for number in range(count):
            share = ShardAssignment(number, count)
            index = ExactIndex(D, text_names)
            index.apply(*share.split(records))
            self.shards.append(OneShard(share, index))
        self.whole.apply(records)
        self.store = MemoryStore()
        self.users = UserReader(self.store, clicks_partitions=8, generation="g1")
        self.popularity = Popularity(settings, self.store)
        context = RecallContext(settings, self.store, Mean(), self.popularity, ExitStack())
        paths = make_paths(context)
        self.rules = CurrentRules(rules or EditorialRules())
        retriever = Retriever(
            store=self.store,
            users=self.users,
            popularity=self.popularity,
            paths=paths,
            item_slots=1,
            rules=AnswerRules.of(settings, paths, self.popularity, self.rules),
            seen=SeenPolicy(SETTINGS),
        )
        self.service = RetrievalService(settings)
        self.server = WorkerServer(settings, self.service, role="coordinator")
        addresses = [shard.address for shard in self.shards]
        self.links = Shards(settings, addresses, "g1", self.server)
        self.backend = CoordinatorBackend("g1", D, self.links, retriever, text_names=text_names)
        self.service.serve(self.backend)
        self.links.start()
        self.alone = RetrievalService(settings)
        self.alone_server = WorkerServer(settings, self.alone)
        tail = SimpleNamespace(state=TailState, missing=str)
        held = LocalIndex("g1", self.whole, tail)  # type: ignore[arg-type]
        self.alone.serve(WorkerBackend(held, retriever))
        self.client, self.one = Client(self.server.address), Client(self.alone_server.address)

    def index(self, seconds: float = 5.0) -> ScatterGather:
        return ScatterGather(self.links, D, Deadline(seconds), self.backend.vectors)

    def user(self, user_id: str, *items: str) -> None:
        partition = partition_of(user_id, 8)
        slot, source = user_slot(partition), Source("clicks", partition)
        entries = tuple(Entry(item, 100 - n, 0) for n, item in enumerate(items))
        history = UserHistory(
            partition=partition,
            offset=7,
            at_ms=100,
            produced_us=1,
            appended_ms=2,
            read_us=3,
            entries=entries,
        )
        expected = self.store.fences(source, [slot])[slot]
        offset = (expected.offset if expected else 6) + 1
        effects = UserEffects(histories={user_id: history})
        self.store.write_users(slot, source, expected, Fence(offset, LOG), effects)

    def clicked(self, counts: dict[str, int]) -> None:
        expected = self.store.fences(Source("clicks", 0), ["i0"])["i0"]
        self.store.count_clicks("i0", Source("clicks", 0), expected, Fence(0, LOG), {1: counts}, 10)
        assert self.popularity.refresh()

    def close(self) -> None:
        self.client.close()
        self.one.close()
        self.server.stop(0.0)
        self.alone_server.stop(0.0)
        self.links.close()
        for shard in self.shards:
            shard.down()


@pytest.fixture(scope="module")
def plant() -> Iterator[Plant]:
    """Four shards that no test harms."""
    made = Plant(4, catalogue(), patient=False)
    yield made
    made.close()


@pytest.fixture
def frail(monkeypatch: pytest.MonkeyPatch) -> Iterator[Plant]:
    """Three shards to harm."""
    monkeypatch.setattr(shards_, "CHECK_S", 0.1)
    monkeypatch.setattr(shards_, "PAUSE_S", 0.05)
    made = Plant(3, catalogue(90), patient=False)
    yield made
    made.close()


def wait_until(what: str, check, timeout_s: float = 30.0):  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + timeout_s
    while not (found := check()):
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s for: {what}"
        time.sleep(0.01)
    return found


def seen(response: pb.RetrieveResponse) -> tuple[object, ...]:
    """All of an answer that does not tell the time or the process."""
    items = [
        (i.item_id, i.score, i.rank, i.path, i.path_rank, i.generation) for i in response.items
    ]
    paths = [(p.path, p.candidates, p.taken, p.why) for p in response.paths]
    marks = [(w.partition, w.offset, w.at_ms, w.written_us) for w in response.freshness.index]
    user = response.freshness.user.SerializeToString(deterministic=True)
    rules = [[(rule.kind, rule.name) for rule in i.rules] for i in response.items]
    more = rules, list(response.filled), response.rules_version
    return items, paths, marks, user, response.short_because, list(response.missing), more


# ---------------------------------------------------------------- who holds what


@pytest.mark.parametrize("count", [1, 2, 4, 7, 256])
def test_every_item_is_held_by_exactly_one_shard(count: int) -> None:
    records = catalogue(200)
    shares = [ShardAssignment(n, count) for n in range(count)]
    for record in records:
        assert sum(share.holds(record.item_id) for share in shares) == 1
    split = [share.split(records) for share in shares]
    assert sorted(r.offset for mine, _ in split for r in mine) == list(range(200))
    assert all(len(mine) + len(others) == 200 for mine, others in split)


def test_the_hash_is_for_ever_the_same_and_even() -> None:
    assert [item_shard(f"item-{n}", 4) for n in range(8)] == [0, 3, 3, 0, 2, 3, 2, 0]
    counts = np.bincount([item_shard(f"item-{n}", 8) for n in range(8_000)], minlength=8)
    assert counts.min() > 900 and counts.max() < 1_100


@pytest.mark.parametrize("made", [ExactIndex, HnswIndex])
def test_records_of_others_move_the_watermarks_and_nothing_else(made) -> None:  # type: ignore[no-untyped-def]
    index, records = made(D), catalogue(60)
    mine, others = ShardAssignment(1, 4).split(records)
    assert index.apply(mine, others) == len(mine) == index.stats().live
    assert {p: mark.offset for p, mark in index.watermarks().items()} == {0: 57, 1: 58, 2: 59}
    index.apply([], [ItemRecord(others[0].item_id, 0, 99, 7, 8, None)])
    assert index.watermarks()[0].offset == 99 and index.stats().live == len(mine)
    assert index.stats().tombstones == 0
    index.close()


@pytest.mark.parametrize(
    ("shard", "shards", "good"), [(0, 1, True), (1, 1, False), (3, 4, True), (4, 4, False)]
)
def test_a_shard_beyond_the_last_is_a_bad_setting(shard: int, shards: int, good: bool) -> None:
    environ = {"EDDYLINE_SHARD": str(shard), "EDDYLINE_SHARDS": str(shards)}
    if good:
        assert shard_of(load(environ)) == (shard, shards)
    else:
        with pytest.raises(
            SettingsError, match=f"shard = {shard}: must be less than shards = {shards}"
        ):
            shard_of(load(environ))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "0 addresses, allowed are 1 … 256; set EDDYLINE_SHARD_ADDRESSES"),
        ("   ", "0 addresses"),
        ("a:1,,b:2", "'' is not host:port"),
        ("a:1,b", "'b' is not host:port"),
        ("a:0", "'a:0' is not host:port"),
        ("a:65536", "'a:65536' is not host:port"),
        (":5", "':5' is not host:port"),
        ("a:x", "'a:x' is not host:port"),
        ("a:1, a:1", "'a:1' is there twice"),
        (
            ",".join(f"a:{n}" for n in range(1, SHARDS_MAX + 2)),
            "257 addresses, allowed are 1 … 256",
        ),
    ],
)
def test_bad_addresses_are_named(text: str, sentence: str) -> None:
    with pytest.raises(SettingsError, match="shard_addresses") as failed:
        parse(text)
    assert sentence in str(failed.value)


def test_good_addresses() -> None:
    assert parse("a:1, [::1]:65535") == ["a:1", "[::1]:65535"]
    assert len(parse(",".join(f"a:{n}" for n in range(1, SHARDS_MAX + 1)))) == SHARDS_MAX


# ---------------------------------------------------------------- the same answers as one index
# The largest k that a shard takes.
K_MAX = OVER_FETCH * SETTINGS.k_max


def filters(rng: np.random.Generator) -> Filter | None:
    some = [f"item-{n}" for n in rng.integers(N + 20, size=40)]
    return [
        None,
        Filter(categories=frozenset({"c1", "c4"})),
        Filter(tags=frozenset({"odd"}), ranges={"year": Range(5, 20)}),
        Filter(tags_all=frozenset({"even"}), deny=frozenset(some)),
        Filter(allow=frozenset(some)),
        Filter(allow=frozenset(some[:1])),
        Filter(ranges={"year": Range(low=38)}, deny=frozenset(some)),
        Filter(categories=frozenset({"nothing"})),
    ][int(rng.integers(8))]


def test_every_look_up_gives_what_one_index_gives(plant: Plant) -> None:
    rng = np.random.default_rng(5)
    for _ in range(60):
        items, passing = plant.index(), filters(rng)
        vector = unit(rng.normal(size=D))
        k = int(rng.choice([-1, 0, 1, 2, 10, 100, N - 1, N, N + 1, K_MAX]))
        exclude = [f"item-{n}" for n in rng.integers(N + 20, size=int(rng.choice([0, 1, 30])))]
        assert items.query(vector, k, exclude, passing) == plant.whole.query(
            vector, k, exclude, passing
        )
        assert items.newest(k, exclude, passing) == plant.whole.newest(k, exclude, passing)
        names = [f"item-{n}" for n in rng.integers(N + 50, size=25)]
        assert items.describe(names, passing) == plant.whole.describe(names, passing)
        assert items.find_keys(keys_of(names), passing) == plant.whole.describe(names, passing)
        assert items.terms_of(names, ["tags", "none"]) == plant.whole.terms_of(names, ["tags"])
        assert np.array_equal(items.vectors_of(names), plant.whole.vectors_of(names))
        assert not items.status().missing
    assert plant.index().describe([]) == []
    assert plant.index().find_keys(np.empty(0, np.uint64)) == []
    names = [f"item-{n}" for n in range(2 * IDS_MAX + 1)]
    assert plant.index().find_keys(keys_of(names)) == plant.whole.describe(names)
    terms = plant.whole.terms_of(names, ["categories"])
    assert plant.index().terms_of(names, ["categories"]) == terms and terms[3] != terms[4]
    assert plant.index().vectors_of([]).shape == (0, D)


def test_an_attribute_that_no_shard_has_is_an_error(frail: Plant) -> None:
    """Not one that items of one shard have, or had; nor one that a missing shard may have."""

    def filtered(name: str, **more: list[str]) -> pb.RetrieveResponse:
        ranges = [pb.Range(attribute="year", min=0), pb.Range(attribute=name, max=9)]
        for user in ("ana", "nobody"):
            response = frail.client.retrieve(user, 5, filters=pb.Filters(ranges=ranges, **more))
        return response

    frail.user("ana", "item-1", "item-2", "item-3")
    wait_until("all shards", lambda: len(filtered("rare", allow=["item-5"]).missing) == 0)
    for _ in range(2):  # the second time with the cached vectors of ana's items
        with pytest.raises(CallFailed) as failed:
            filtered("rare")
        assert failed.value.code == "INVALID_ARGUMENT"
        assert failed.value.detail == (
            "filters.ranges: no item has the attribute 'rare' as a number or date"
        )
    holder = frail.shards[item_shard("item-7", 3)]
    texts = {"attributes": {"rare": "7", "year": 3}}
    holder.index.apply([ItemRecord("item-7", 0, 1_000, 5, 5, catalogue(90)[7].vector, texts)])
    assert [item.item_id for item in filtered("rare").items] == ["item-7"]
    holder.index.apply([ItemRecord("item-7", 0, 1_001, 6, 6, None)])
    assert not filtered("rare").items
    with pytest.raises(CallFailed):
        filtered("unknown")
    frail.shards[0].down()
    wait_until(
        "a shard to be missing", lambda: frail.index().newest(1) and frail.links.all[0].failure
    )
    assert not filtered("unknown").items


def test_empty_shards_refuse_no_attribute(frail: Plant) -> None:
    for shard in frail.shards:
        gone = [ItemRecord(f"item-{n}", 0, 2_000 + n, 0, 0, None) for n in range(90)]
        shard.index.apply(*shard.share.split(gone))
    no_items = Filter(ranges={"anything": Range(low=1)})
    wait_until("the shards to say so", lambda: not frail.index().stats().live)
    assert frail.index().newest(5, (), no_items) == []


def test_several_vectors_at_once(plant: Plant) -> None:
    rng = np.random.default_rng(6)
    for merge in ("max", "sum"):
        vectors = unit(rng.normal(size=(4, D)))
        expected = query_multi(plant.whole, vectors, 20, ["item-3"], merge=merge)
        assert query_multi(plant.index(), vectors, 20, ["item-3"], merge=merge) == expected  # type: ignore[arg-type]


def test_the_same_answers_as_one_worker(plant: Plant) -> None:
    rng = np.random.default_rng(7)
    plant.clicked(
        {f"item-{n}": int(1_000 * rng.integers(1, 90)) for n in range(0, 120, 2)} | {"gone": 9_000}
    )
    users = ["nobody"]
    for n in range(11):
        users.append(f"user-{n}")
        plant.user(
            users[-1], *(f"item-{i}" for i in rng.integers(N + 30, size=int(rng.integers(1, 12))))
        )
    choices = [
        None,
        pb.Filters(categories=["c2"]),
        pb.Filters(tags=["odd"], deny=["item-1", "item-3"]),
        pb.Filters(allow=[f"item-{n}" for n in range(30)]),
        pb.Filters(categories=["none"]),
        pb.Filters(ranges=[pb.Range(attribute="year", max=3)]),
    ]
    compared, paths = 0, set()
    for user in users:
        for n in range(9):
            k = int(rng.choice([1, 5, 20, N, N + 5]))
            beta = [None, 0.0, 0.3][n % 3]
            one = plant.one.retrieve(
                user, min(k, 1_000), filters=choices[n % 6], popularity_beta=beta
            )
            answer = plant.client.retrieve(
                user, min(k, 1_000), filters=choices[n % 6], popularity_beta=beta
            )
            assert seen(answer) == seen(one)
            assert answer.shards.count == 4 and answer.shards.answered == answer.shards.asked
            assert not one.HasField("shards")
            compared += 1
            paths |= {item.path for item in one.items}
    assert compared >= 100 and paths == {"towers", "popular", "newest"}


def test_a_call_waits_for_its_click_at_the_coordinator(frail: Plant) -> None:
    frail.user("ana", "item-3")
    waits = frail.backend.retriever.waits = ClickWaits(frail.store)
    offset = frail.client.retrieve("ana", 5).freshness.user.fence_offset + 1
    later = threading.Timer(0.2, lambda: frail.user("ana", "item-7", "item-3"))
    later.start()
    try:
        answer = frail.client.retrieve(
            "ana", 5, after=(partition_of("ana", 8), offset), wait_ms=2_000
        )
        assert answer.freshness.after.applied and answer.freshness.after.waited_ms >= 150
        assert "item-7" not in {item.item_id for item in answer.items}
        assert not answer.shards.missing
    finally:
        later.join(5)
        waits.close()


def test_one_shard_takes_requests_at_the_limits_of_their_fields() -> None:
    """Ids of 256 bytes: a whole history, and both lists of the filter."""
    made = Plant(1, catalogue(40), patient=False)

    def ids(name: str, count: int) -> list[str]:
        return [f"{name}{n}".ljust(ID_BYTES_MAX, "-") for n in range(count)]

    try:
        made.user("ana", *ids("seen", 996), "item-3", "item-7", "item-9", "item-11")
        made.clicked({item: 1_000 + n for n, item in enumerate([*ids("hot", 1_999), "item-5"])})
        allow = [*ids("allow", LIST_IDS_MAX - 9), *(f"item-{n}" for n in range(9))]
        filters = pb.Filters(allow=allow, deny=ids("deny", LIST_IDS_MAX))
        for user in ("ana", "nobody"):
            answer = made.client.retrieve(user, 20, filters=filters, timeout_s=60.0)
            assert not answer.shards.missing and not answer.missing
            alone = made.one.retrieve(user, 20, filters=filters, timeout_s=60.0)
            assert seen(answer) == seen(alone)
    finally:
        made.close()


def test_one_shard_is_all_items() -> None:
    made = Plant(1, catalogue(40), patient=False)
    try:
        made.user("ana", "item-3", "item-7")
        answer = made.client.retrieve("ana", 10)
        assert seen(answer) == seen(made.one.retrieve("ana", 10)) and answer.shards.count == 1
    finally:
        made.close()


def test_cached_vectors_are_never_stale(frail: Plant) -> None:
    """Items of the user's list change, go and return; each answer is by the present ones."""
    rng, version = np.random.default_rng(9), 1_000
    listed = [f"item-{n}" for n in range(6)]
    frail.user("ana", *listed)
    choices = [None, pb.Filters(allow=["item-50"]), pb.Filters(categories=["c1"])]
    for n in range(40):
        version += 1
        item = listed[int(rng.integers(6))]
        gone = n % 4 == 3
        new = [ItemRecord(item, 0, version, 5, 6, None if gone else unit(rng.normal(size=D)))]
        frail.whole.apply(new)
        for shard in frail.shards:
            shard.index.apply(*shard.share.split(new))
        for filters_ in (choices[n % 3], None):
            answer = frail.client.retrieve("ana", 10, filters=filters_)
            assert seen(answer) == seen(frail.one.retrieve("ana", 10, filters=filters_)), n
            assert not answer.shards.missing
    assert 1 <= len(frail.backend.vectors) <= 6


def test_a_second_query_needs_one_look_up(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant.user("bob", *(f"item-{n}" for n in range(100, 130)))
    plant.client.retrieve("bob", 10)
    calls: list[object] = []
    ask = shards_.Connection.call

    def noted(self: shards_.Connection, request: object, until: float) -> object:
        calls.append(request)
        return ask(self, request, until)  # type: ignore[arg-type]

    monkeypatch.setattr(shards_.Connection, "call", noted)
    plant.client.retrieve("bob", 10)
    assert [type(request) for request in calls] == 4 * [shard_pb2.CandidatesRequest]


def test_a_version_that_changes_while_it_is_read_is_not_kept() -> None:
    class Turning(ExactIndex):
        """Its item turns between a look at its version and the reading of its vector."""

        def vectors_of(self, item_ids: Sequence[str]) -> Vector:
            version = 1 + max(mark.offset for mark in self.watermarks().values())
            self.apply([ItemRecord("a", 0, version, 0, 0, unit(np.full(D, 1.0 + version % 2)))])
            return super().vectors_of(item_ids)

    index = Turning(D)
    index.apply([ItemRecord("a", 0, 1, 0, 0, unit(np.ones(D)))])
    shard = OneShard(ShardAssignment(), index)
    links = Shards(SETTINGS, [shard.address], "g1")
    try:
        links.check()
        cache = VectorCache()
        assert len(ScatterGather(links, D, Deadline(5.0), cache).vectors_of(["a", "b"])) == 1
        assert len(cache) == 0
    finally:
        links.close()
        shard.down()


@pytest.mark.parametrize(("used", "kept"), [(2, 2), (3, 3), (4, 3), (300, 3)])
def test_cached_vectors_are_bounded(used: int, kept: int) -> None:
    cache = VectorCache(3)
    for n in range(used):
        cache.keep({f"i{n}": (n, np.ones(D, np.float32))})
        cache.look_up(["i0"])
    assert len(cache) == kept and "i0" in cache.look_up(["i0"])
    assert cache.look_up([f"i{used - 1}"]).keys() == {f"i{used - 1}"}


def test_graphs_find_as_much_as_one_graph(frail: Plant) -> None:
    rng = np.random.default_rng(3)
    vectors = unit(
        rng.normal(size=(60, D))[rng.integers(60, size=3_000)] + 0.4 * rng.normal(size=(3_000, D))
    )
    records = [ItemRecord(f"i{n}", 0, n, n, n, vectors[n]) for n in range(3_000)]
    graphs = [HnswIndex(D, exact_below=100) for _ in range(4)]
    whole, exact = graphs.pop(), ExactIndex(D)
    exact.apply(records)
    whole.apply(records)
    for shard, index in zip(frail.shards, graphs, strict=True):
        index.apply(*shard.share.split(records))
    for index in (whole, *graphs):
        assert index.rebuild() and index.stats().main
    for shard, index in zip(frail.shards, graphs, strict=True):
        port = shard.down()
        shard.index = index
        shard.up(port)
    wait_until("all shards", lambda: not frail.client.retrieve("nobody", 90).shards.missing)
    shared = found = found_whole = 0
    for query in unit(
        rng.normal(size=(60, D))[rng.integers(60, size=50)] + 0.4 * rng.normal(size=(50, D))
    ):
        items = frail.index(60.0)  # no shard is late on a busy machine
        many = {hit.item_id for hit in items.query(query, 100)}
        assert not items.status().missing
        one = {hit.item_id for hit in whole.query(query, 100)}
        truth = {hit.item_id for hit in exact.query(query, 100)}
        shared, found, found_whole = (
            shared + len(many & one),
            found + len(many & truth),
            found_whole + len(one & truth),
        )
    assert shared >= 0.97 * 5_000 and found >= found_whole - 0.005 * 5_000, (
        shared,
        found,
        found_whole,
    )
    for index in (whole, *graphs):
        index.close()


# ---------------------------------------------------------------- what a shard refuses


@pytest.fixture
def stub(plant: Plant) -> Iterator[shard_pb2_grpc.ShardStub]:
    with open_channel(plant.shards[1].address) as channel:
        yield shard_pb2_grpc.ShardStub(channel)  # type: ignore[no-untyped-call]


N_OF_SHARD_1 = sum(item_shard(record.item_id, 4) == 1 for record in catalogue())
MINE = shard_pb2.Target(generation="g1", shard=1, shards=4)
NEAREST = shard_pb2.Nearest(vector=np.ones(D, "<f4").tobytes(), k=3)


@pytest.mark.parametrize(
    ("generation", "shard", "shards"),
    [("g2", 1, 4), ("", 1, 4), ("g1", 0, 4), ("g1", 2, 4), ("g1", 1, 5), ("g1", 1, 0)],
)
def test_what_is_meant_for_another_is_refused(
    stub, generation: str, shard: int, shards: int
) -> None:  # type: ignore[no-untyped-def]
    target = shard_pb2.Target(generation=generation, shard=shard, shards=shards)
    for call, request in (
        (stub.Vectors, shard_pb2.VectorsRequest(target=target, item_ids=["item-1"])),
        (stub.Candidates, shard_pb2.CandidatesRequest(target=target, nearest=NEAREST)),
    ):
        with pytest.raises(grpc.RpcError) as failed:
            call(request, timeout=5)
        assert failed.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        requested = f"requested {generation!r}, shard {shard} of {shards}"
        assert (
            failed.value.details()
            == f"this worker holds generation 'g1', shard 1 of 4; {requested}"
        )


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (shard_pb2.CandidatesRequest(target=MINE), "wanted: is missing"),
        (
            shard_pb2.CandidatesRequest(
                target=MINE, nearest=shard_pb2.Nearest(vector=bytes(4 * D - 1), k=1)
            ),
            "63 bytes",
        ),
        (
            shard_pb2.CandidatesRequest(
                target=MINE, nearest=shard_pb2.Nearest(vector=bytes(4 * D + 4), k=1)
            ),
            "68 bytes",
        ),
        (
            shard_pb2.CandidatesRequest(
                target=MINE,
                nearest=shard_pb2.Nearest(vector=np.full(D, np.nan, "<f4").tobytes(), k=1),
            ),
            "NaN or infinity",
        ),
        (
            shard_pb2.CandidatesRequest(
                target=MINE, nearest=NEAREST, filters=pb.Filters(tags=["t"] * 257)
            ),
            "filters.tags: 257 values",
        ),
    ],
)
def test_a_bad_call_is_refused_by_name(
    stub, request_: shard_pb2.CandidatesRequest, sentence: str
) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(grpc.RpcError) as failed:
        stub.Candidates(request_, timeout=5)
    assert failed.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert sentence in failed.value.details()


@pytest.mark.parametrize(
    ("name", "k", "good"),
    [
        (name, k, 0 <= k <= OVER_FETCH * SETTINGS.k_max)
        for name in ("nearest", "newest")
        for limit in (0, OVER_FETCH * SETTINGS.k_max)
        for k in (limit - 1, limit, limit + 1)
    ]
    + [("nearest", 2**31 - 1, False), ("newest", -(2**31), False)],
)
def test_the_k_of_a_shards_call_has_limits(stub, name: str, k: int, good: bool) -> None:  # type: ignore[no-untyped-def]
    request = shard_pb2.CandidatesRequest(target=MINE)
    if name == "nearest":
        request.nearest.CopyFrom(shard_pb2.Nearest(vector=NEAREST.vector, k=k))
    else:
        request.newest.k = k
    if good:
        assert len(stub.Candidates(request, timeout=5).item_ids) == min(k, N_OF_SHARD_1)
        return
    with pytest.raises(grpc.RpcError) as failed:
        stub.Candidates(request, timeout=5)
    assert failed.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    allowed = f"allowed are 0 … {OVER_FETCH * SETTINGS.k_max}"
    assert failed.value.details() == f"{name}.k: {k}, {allowed}"


LEFT_OUT_MAX = EXCLUDED_MAX + SETTINGS.k_max
COUNTS = [most + more for most in (IDS_MAX, LEFT_OUT_MAX) for more in (-1, 0, 1)]


@pytest.mark.parametrize("count", [*COUNTS, 20 * IDS_MAX])
def test_the_lists_of_a_shards_call_have_limits(stub, count: int) -> None:  # type: ignore[no-untyped-def]
    ids = [f"{n}".rjust(ID_BYTES_MAX if count <= LEFT_OUT_MAX else 5, "x") for n in range(count)]
    made_of = shard_pb2.Nearest(vector=NEAREST.vector, k=1, made_of=ids)
    made_of.made_of_offsets.extend([-2] * count)
    calls = {
        "item_ids": (stub.Vectors, shard_pb2.VectorsRequest(target=MINE, item_ids=ids)),
        "exclude": (
            stub.Candidates,
            shard_pb2.CandidatesRequest(target=MINE, nearest=NEAREST, exclude=ids),
        ),
        "named.item_ids": (
            stub.Candidates,
            shard_pb2.CandidatesRequest(target=MINE, named=shard_pb2.Named(item_ids=ids)),
        ),
        "keyed.keys": (
            stub.Candidates,
            shard_pb2.CandidatesRequest(target=MINE, keyed=shard_pb2.Keyed(keys=range(count))),
        ),
        "nearest.made_of": (
            stub.Candidates,
            shard_pb2.CandidatesRequest(target=MINE, nearest=made_of),
        ),
    }
    for name, (call, request) in calls.items():
        most = LEFT_OUT_MAX if name in ("exclude", "nearest.made_of") else IDS_MAX
        if count <= most:
            call(request, timeout=5)
            continue
        with pytest.raises(grpc.RpcError) as failed:
            call(request, timeout=5)
        assert failed.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert failed.value.details() == f"{name}: {count} values, allowed are 0 … {most}"


@pytest.mark.parametrize("count", [ATTRIBUTES_MAX - 1, ATTRIBUTES_MAX, ATTRIBUTES_MAX + 1, 999])
def test_the_terms_of_a_shards_items(stub, count: int) -> None:  # type: ignore[no-untyped-def]
    names = ["tags", "categories", *(f"a{n}" for n in range(count - 2))]
    numbers = [n for n in range(N) if item_shard(f"item-{n}", 4) == MINE.shard][:3]
    ids = ["never", *(f"item-{n}" for n in numbers)]
    request = shard_pb2.TermsRequest(target=MINE, item_ids=ids, attributes=names)
    if count > ATTRIBUTES_MAX:
        with pytest.raises(grpc.RpcError) as failed:
            stub.Terms(request, timeout=5)
        allowed = f"allowed are 0 … {ATTRIBUTES_MAX}"
        assert failed.value.details() == f"attributes: {count} values, {allowed}"
        return
    found = stub.Terms(request, timeout=5)
    terms = [
        (ids[at], names[of], text)
        for at, of, text in zip(found.items, found.attributes, found.texts, strict=True)
    ]
    expected = []
    for n in numbers:
        parity = "odd" if n % 2 else "even"
        expected += [(f"item-{n}", "categories", f"c{n % 7}"), (f"item-{n}", "tags", parity)]
    assert terms == expected
    request.item_ids.extend(f"x{n}" for n in range(IDS_MAX))
    with pytest.raises(grpc.RpcError) as failed:
        stub.Terms(request, timeout=5)
    assert failed.value.details() == "item_ids: 1028 values, allowed are 0 … 1024"


def test_a_worker_of_all_items_has_no_shard_service() -> None:
    """148 bytes with a large k got every item and its vector from any worker."""
    for settings, assignment, has in (
        (SETTINGS, ShardAssignment(), False),
        (msgspec.structs.replace(SETTINGS, shard_service=True), ShardAssignment(), True),
        (SETTINGS, ShardAssignment(1, 4), True),
    ):
        worker = Worker(settings, make_backend("hnswlib"), assignment, threading.Event())
        server = worker.listen()
        try:
            with open_channel(server.address) as channel, pytest.raises(grpc.RpcError) as failed:
                request = shard_pb2.VectorsRequest(target=MINE)
                shard_pb2_grpc.ShardStub(channel).Vectors(request, timeout=5)  # type: ignore[no-untyped-call]
            codes = {True: grpc.StatusCode.UNAVAILABLE, False: grpc.StatusCode.UNIMPLEMENTED}
            assert failed.value.code() == codes[has]
        finally:
            server.stop(0.0)


def test_a_coordinator_names_a_worker_without_shard_service(frail: Plant) -> None:
    port = frail.shards[1].down()
    frail.shards[1].with_service = False
    frail.shards[1].up(port)

    def refused() -> bool:
        missing = frail.client.retrieve("nobody", 5).shards.missing
        time.sleep(0.2)  # the checks go on, and do not take it back
        named = "EDDYLINE_SHARD_SERVICE=true" in str(frail.client.stats().missing)
        return named and bool(missing) and missing[0].reason == "refused"

    wait_until("the refusal", refused)
    [missing] = frail.client.retrieve("nobody", 5).shards.missing
    assert "EDDYLINE_SHARD_SERVICE=true" in missing.detail
    calls = frail.links.all[1].misses
    for _ in range(20):
        assert len(frail.client.retrieve("nobody", 5).shards.missing) == 1
    assert frail.links.all[1].misses == calls
    frail.shards[1].with_service = True
    frail.shards[1].up(frail.shards[1].down())
    wait_until("all shards", lambda: not frail.client.retrieve("nobody", 5).shards.missing)


def test_calls_of_coordinators_are_counted(plant: Plant) -> None:
    shard = plant.shards[1].shard
    before = shard.counts()
    with open_channel(plant.shards[1].address) as channel:
        stub = shard_pb2_grpc.ShardStub(channel)  # type: ignore[no-untyped-call]
        stub.Vectors(shard_pb2.VectorsRequest(target=MINE, item_ids=["item-1"]), timeout=5)
        stub.Candidates(shard_pb2.CandidatesRequest(target=MINE, nearest=NEAREST), timeout=5)
        with pytest.raises(grpc.RpcError):
            stub.Candidates(shard_pb2.CandidatesRequest(target=MINE), timeout=5)
    after = shard.counts()
    assert {n: after[n] - before[n] for n in after} == {"answered": 2, "failed": 1}


def test_a_shard_leaves_users_to_the_coordinator(plant: Plant) -> None:
    with Client(plant.shards[2].address) as client, pytest.raises(CallFailed) as failed:
        client.retrieve("ana", 5)
    assert failed.value.code == "FAILED_PRECONDITION"
    assert (
        failed.value.detail
        == "this worker holds shard 2 of 4 only; ask the coordinator of the shards"
    )
    with open_channel(plant.shards[2].address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        found = {
            n: check(health_pb2.HealthCheckRequest(service=n), timeout=5).status
            for n in ("", SHARD_NAME, NAME)
        }
    assert found == {"": SERVING, SHARD_NAME: SERVING, NAME: NOT_SERVING}


def test_a_shard_that_is_not_ready() -> None:
    service, shard = RetrievalService(SETTINGS), ShardService(ShardAssignment(1, 4), 10)
    server = WorkerServer(SETTINGS, service, shard)
    try:
        with open_channel(server.address) as channel, pytest.raises(grpc.RpcError) as failed:
            shard_pb2_grpc.ShardStub(channel).Vectors(
                shard_pb2.VectorsRequest(target=MINE), timeout=5
            )  # type: ignore[no-untyped-call]
        assert failed.value.code() == grpc.StatusCode.UNAVAILABLE
    finally:
        server.stop(0.0)


# ---------------------------------------------------------------- shards that are missing


def health(plant: Plant) -> int:
    with open_channel(plant.server.address) as channel:
        status: int = (
            health_pb2_grpc.HealthStub(channel)
            .Check(health_pb2.HealthCheckRequest(), timeout=5)
            .status
        )
        return status


def held_by(plant: Plant, number: int) -> set[str]:
    return {f"item-{n}" for n in range(90) if plant.shards[number].share.holds(f"item-{n}")}


def test_a_shard_dies_and_comes_back(frail: Plant) -> None:
    frail.user("ana", *sorted(held_by(frail, 0))[:2])
    whole = frail.client.retrieve("ana", 20)
    port = frail.shards[1].down()
    for _ in range(3):
        answer = frail.client.retrieve("ana", 20)
        assert len(answer.items) == 20 and not {i.item_id for i in answer.items} & held_by(frail, 1)
        status = answer.shards
        assert (status.count, status.asked, status.answered) == (3, 3, 2)
        missing = status.missing[0]
        assert (missing.shard, missing.address, missing.reason) == (
            1,
            frail.shards[1].address,
            "away",
        )
        assert any(
            line.startswith(f"shard 1 at {missing.address}: away: ") for line in answer.missing
        )
    assert health(frail) == SERVING
    held = frail.client.stats().held
    assert [status.answers for status in held] == [True, False, True] and held[1].misses >= 1
    frail.shards[1].up(port)

    def is_back() -> bool:
        try:
            return not frail.client.retrieve("ana", 20).shards.missing
        except CallFailed:  # for a moment a busy machine may hold the other shards too
            return False

    wait_until("the shard", is_back)
    assert seen(frail.client.retrieve("ana", 20)) == seen(whole)


def test_no_shard_answers_and_they_come_back(frail: Plant) -> None:
    ports = [shard.down() for shard in frail.shards]
    with pytest.raises(CallFailed) as failed:
        frail.client.retrieve("nobody", 5)
    assert failed.value.code == "UNAVAILABLE"
    assert (
        "no shard answers: shard 0 at 127.0.0.1:" in failed.value.detail
        and "shard 2 at" in failed.value.detail
    )
    wait_until("health to say so", lambda: health(frail) == NOT_SERVING)
    assert not frail.client.stats().ready and len(frail.client.stats().missing) == 3
    frail.shards[2].up(ports[2])
    wait_until("health to say so", lambda: health(frail) == SERVING)
    answer = frail.client.retrieve("nobody", 5)
    assert len(answer.items) == 5 and answer.shards.answered == 1


def test_a_late_shard_costs_no_more_than_half_of_what_is_left(frail: Plant) -> None:
    frail.user("ana", *sorted(held_by(frail, 0))[:2])
    frail.shards[2].slow_s = 1.5
    began = time.monotonic()
    answer = frail.client.retrieve("ana", 10, timeout_s=0.8)
    assert time.monotonic() - began < 0.8
    assert len(answer.items) == 10
    assert [(m.shard, m.reason) for m in answer.shards.missing] == [(2, "late")]
    waited_ms = int(
        answer.shards.missing[0].detail.removeprefix("no answer within ").removesuffix(" ms")
    )
    assert 100 < waited_ms <= 400
    assert frail.links.all[2].failure is None, "one late answer is chance"
    for _ in range(LATE_MAX):
        frail.client.retrieve("ana", 10, timeout_s=0.8)
    frail.shards[2].slow_s = 0.0
    wait_until("the shard", lambda: not frail.client.retrieve("ana", 20).shards.missing)


def test_a_shard_that_hangs_is_soon_left_out_at_once(
    frail: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    frail.shards[2].slow_s = 2.5
    monkeypatch.setattr(shards_.Connection, "end_check", lambda *_: None)  # nor does a look help it
    for _ in range(LATE_MAX):
        frail.client.retrieve("nobody", 10, timeout_s=1.0)
    began = time.monotonic()
    answer = frail.client.retrieve("nobody", 10)
    # A shard that is waited for costs `shard_timeout_ms`.
    assert time.monotonic() - began < SETTINGS.shard_timeout_ms / 1000 - 0.1
    assert [m.reason for m in answer.shards.missing] == ["late"]


def test_a_shard_of_another_generation_or_place_is_never_asked(frail: Plant) -> None:
    port = frail.shards[0].down()
    frail.shards[0].generation = "g2"
    frail.shards[0].up(port)
    port = frail.shards[1].down()
    frail.shards[1].share = ShardAssignment(2, 3)
    frail.shards[1].up(port)
    wait_until(
        "a look",
        lambda: frail.links.all[1].failure and frail.links.all[1].failure.reason == "refused",
    )
    wait_until(
        "a look",
        lambda: frail.links.all[0].failure and frail.links.all[0].failure.reason == "refused",
    )
    missing = frail.client.retrieve("nobody", 10).shards.missing
    assert [(m.shard, m.reason, m.detail) for m in missing] == [
        (0, "refused", "it has generation 'g2', not 'g1'"),
        (1, "refused", "it holds shard 2 of 3, not shard 1 of 3"),
    ]


def test_a_call_that_is_refused_says_so_at_once(
    frail: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two looks a shard can change its generation."""
    monkeypatch.setattr(shards_, "CHECK_S", 60.0)
    wait_until(
        "the last look",
        lambda: all(link.check_at > time.monotonic() + 30 for link in frail.links.all),
    )
    port = frail.shards[0].down()
    frail.shards[0].generation = "g2"
    frail.shards[0].up(port)

    def refused() -> bool:
        missing = frail.client.retrieve("nobody", 10).shards.missing
        return [(m.shard, m.reason) for m in missing] == [(0, "refused")]

    wait_until("the refusal", refused)


def test_what_a_shard_lacks_is_said(frail: Plant) -> None:
    frail.shards[1].behind = "Kafka at nowhere: no answer (since 3.0 s)"
    answer = frail.client.retrieve("nobody", 3)
    assert list(answer.missing) == ["kafka: shard 1: Kafka at nowhere: no answer (since 3.0 s)"]
    assert not answer.shards.missing


def test_the_watermark_is_the_lowest(frail: Plant) -> None:
    new = [ItemRecord("new", 0, 500, 600, 700, unit(np.ones(D)))]
    for shard in frail.shards[:2]:
        shard.index.apply(*shard.share.split(new))

    def offset() -> int:
        return next(
            w.offset for w in frail.client.retrieve("nobody", 3).freshness.index if w.partition == 0
        )

    assert offset() == 87
    frail.shards[2].index.apply(*frail.shards[2].share.split(new))
    assert offset() == 500


def test_a_passed_deadline(frail: Plant) -> None:
    with pytest.raises(DeadlinePassed, match="before the shards were called"):
        frail.index(0.0).newest(3)
    with pytest.raises(CallFailed, match="DEADLINE_EXCEEDED"):
        frail.client.retrieve("nobody", 3, timeout_s=0.0)


def test_redis_away_is_said_as_one_worker_says_it(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant.user("ana", "item-3")

    def away(*_: object) -> None:
        raise StoreUnavailable("Redis at redis://nowhere: ConnectionError")

    monkeypatch.setattr(plant.store, "read_user", away)
    answer = plant.client.retrieve("ana", 8)
    assert seen(answer) == seen(plant.one.retrieve("ana", 8)) and len(answer.items) == 8
    assert list(answer.missing) == ["redis: Redis at redis://nowhere: ConnectionError"]
    monkeypatch.undo()
    wait_until("the user", lambda: not plant.client.retrieve("ana", 8).missing)


def test_a_coordinators_port_that_is_taken_names_its_setting(plant: Plant) -> None:
    port = int(plant.server.address.rpartition(":")[2])
    with pytest.raises(
        PortTaken, match=f"127.0.0.1:{port} cannot be bound.*EDDYLINE_COORDINATOR_PORT"
    ):
        WorkerServer(
            Settings(coordinator_port=port), RetrievalService(SETTINGS), role="coordinator"
        )


def test_calls_to_a_shard_are_bounded(frail: Plant) -> None:
    frail.shards[0].slow_s = 0.1
    codes: list[str] = []

    def call() -> None:
        try:
            frail.client.retrieve("nobody", 5)
            codes.append("OK")
        except CallFailed as error:
            codes.append(error.code)

    threads = [threading.Thread(target=call) for _ in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert set(codes) == {"OK", "RESOURCE_EXHAUSTED"} and codes.count("OK") >= 8
    assert 1 <= frail.shards[0].most <= SETTINGS.worker_threads


def test_stats_are_sums(plant: Plant) -> None:
    stats = plant.client.stats()
    assert stats.ready and stats.index.live == N and stats.index.dimension == D
    assert [(s.shard, s.answers, s.generation) for s in stats.held] == [
        (n, True, "g1") for n in range(4)
    ]
    assert sum(s.live for s in stats.held) == N
    assert [(w.partition, w.offset) for w in stats.watermarks] == [(0, 597), (1, 598), (2, 599)]
    with Client(plant.shards[3].address) as client:
        assert (client.stats().shard, client.stats().shards) == (3, 4)
