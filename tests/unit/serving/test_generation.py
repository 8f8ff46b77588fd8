"""Two generations live in one worker: each answers from its own index, embeddings and towers."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from eddyline.kafka import topics
from eddyline.process.retry import Stopped
from eddyline.schema.item_record import ItemRecord, encode_record
from eddyline.schema.partitioning import partition_of, user_slot
from eddyline.schema.user_history import Entry, UserHistory
from eddyline.settings.loader import Settings
from eddyline.stores.memory import MemoryStore
from eddyline.stores.state_store import Fence, LogId, Source, UserEffects
from embeddings.bundle import bundle
from embeddings.bundle.bundle import Bundle, NewBundle
from embeddings.towers import features
from embeddings.towers.base import TrainedModel
from embeddings.towers.micro_step import MicroSettings
from embeddings.towers.numerics import unit
from embeddings.towers.user_tower import query_vector
from index.backends.registry import make_backend
from serving.proto import retrieval_pb2 as pb
from serving.rpc.backends import ShardBackend, WorkerBackend
from serving.rpc.retrieval_service import RetrievalService
from serving.sharding import ALL, ShardAssignment
from serving.worker import replica
from serving.worker.generation import GenerationRuntime
from tests.unit.serving.direct_call import retrieve

N, PARTITIONS = 40, 4
DIMENSIONS = {"a": 16, "b": 8}
HISTORY = ("i3", "i7", "i1")


class Topic:
    """`item-vectors.<generation>` with one partition, and a connection to it."""

    def __init__(self) -> None:
        self.records: list[SimpleNamespace] = []
        self.at = 0

    def put(self, item_id: str, offset: int, vector: np.ndarray | None) -> None:
        value = encode_record(ItemRecord(item_id, 0, offset, 0, 1, vector))
        at = len(self.records)
        self.records.append(
            SimpleNamespace(partition=0, offset=at, key=item_id.encode(), value=value)
        )

    def begin(self, positions: dict[int, int]) -> None:
        self.at = positions.get(0, 0)

    def positions(self) -> dict[int, int]:
        return {0: self.at}

    def ends(self) -> dict[int, int]:
        return {0: len(self.records)}

    def poll(self, timeout_ms: int) -> dict[int, list[SimpleNamespace]]:
        batch = self.records[self.at :]
        self.at += len(batch)
        if not batch:
            time.sleep(0.005)
        return {0: batch} if batch else {}

    def stopped(self) -> dict[int, Any]:
        return {}

    def close(self) -> None: ...


def make_bundle(folder: Path, generation: str) -> Bundle:
    """Towers, vectors and dimension of its own; the same item ids in every generation."""
    d = DIMENSIONS[generation]
    rng = np.random.default_rng(ord(generation))

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(0, 0.4, shape).astype(np.float32)

    empty = features.learn_profiles([])
    ids = [f"i{n}" for n in range(N)]
    model = TrainedModel(
        kind="two_tower",
        version=1,
        dimension=d,
        history_max=5,
        item_space=empty,
        profile_space=empty,
        identity_ids=ids,
        arrays={
            "item.identity": draw(N, d),
            "item.features": draw(empty.rows, d),
            "item.projection": draw(0, d),
            "item.projection_bias": draw(d),
            "item.w1": draw(d, d),
            "item.b1": draw(d),
            "item.w2": draw(d, d),
            "item.b2": draw(d),
            "user.query": draw(d, 2 * d),
            "user.query_bias": draw(2 * d),
            "user.bias": draw(2, 5),
            "user.value": draw(2 * d, d),
            "user.start": draw(d),
            "user.profile": draw(empty.rows, d),
            "user.w1": draw(d, d),
            "user.b1": draw(d),
            "user.w2": draw(d, d),
            "user.b2": draw(d),
        },
        micro=MicroSettings(rate=0.002),
    )
    new = NewBundle(
        generation=generation,
        created_ms=1_000,
        model=model,
        item_ids=ids,
        item_vectors=unit(draw(N, d)),
        item_partitions=np.zeros(N, np.int32),
        item_offsets=np.arange(N),
        item_attributes=[{}] * N,
        cut={"0": N},
        measured={},
    )
    bundle.write(folder / generation, new)
    return bundle.load(folder / generation)


class Plant:
    """One store, one service, two generations."""

    def __init__(self, folder: Path) -> None:
        self.settings = Settings(
            data_dir=str(folder / "data"),
            clicks_partitions=PARTITIONS,
            item_slots=1,
            snapshot_interval_s=3_600,
            worker_threads=2,
        )
        self.store = MemoryStore()
        self.bundles = {name: make_bundle(folder, name) for name in DIMENSIONS}
        self.topics = {name: Topic() for name in DIMENSIONS}
        self.embeddings = {
            name: 0.5 * unit(np.arange(1, d + 1, dtype=np.float32)[None])[0]
            for name, d in DIMENSIONS.items()
        }
        self.service = RetrievalService(self.settings)
        self._user()

    def _user(self) -> None:
        partition = partition_of("ana", PARTITIONS)
        slot, source = user_slot(partition), Source("clicks", partition)
        history = UserHistory(
            partition=partition,
            offset=7,
            at_ms=100,
            produced_us=1,
            appended_ms=2,
            read_us=3,
            entries=tuple(Entry(item, 100 - n, 0) for n, item in enumerate(HISTORY)),
        )
        effects = UserEffects(histories={"ana": history})
        for name, vector in self.embeddings.items():
            effects.embeddings[name] = {"ana": (1, vector.astype("<f4").tobytes())}
        self.store.write_users(slot, source, None, Fence(7, LogId("cluster", "clicks")), effects)

    def open(self, name: str, assignment: ShardAssignment = ALL) -> GenerationRuntime:
        logs = {
            topic: LogId("cluster", topic) for topic in (topics.item_vectors(name), topics.CLICKS)
        }
        ann = make_backend("hnswlib")
        return GenerationRuntime(self.settings, self.bundles[name], logs, ann, assignment)

    def start(self, runtime: GenerationRuntime) -> WorkerBackend:
        runtime.build_graph()
        backend = runtime.start(self.store, write_snapshots=True)
        runtime.wait_caught_up(threading.Event())
        assert isinstance(backend, WorkerBackend)
        return backend

    def expected(self, name: str, without: tuple[str, ...] = ()) -> list[str]:
        """The answer for the user, computed from the bundle alone."""
        whole = self.bundles[name]
        rows = [whole.rows[item] for item in HISTORY]
        forward = whole.user_tower.encode_one(whole.item_vectors[rows], {})
        scores = whole.item_vectors @ query_vector(forward, self.embeddings[name])
        best = [whole.item_ids[row] for row in np.argsort(-scores)]
        return [item for item in best if item not in (*HISTORY, *without)][:5]

    def answer(self) -> pb.RetrieveResponse:
        return retrieve(self.service, "ana", 5)


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plant]:
    made = Plant(tmp_path)
    monkeypatch.setattr(replica, "POLL_MS", 10)
    monkeypatch.setattr(replica, "ENDS_S", 0.02)
    monkeypatch.setattr(replica, "ItemVectorLog", lambda _, generation: made.topics[generation])
    yield made


def ids(response: pb.RetrieveResponse) -> list[str]:
    return [item.item_id for item in response.items]


def running() -> list[str]:
    names = ("replica", "snapshots", "popular")
    return sorted(thread.name for thread in threading.enumerate() if thread.name in names)


def test_two_generations_answer_side_by_side_and_one_closes_alone(plant: Plant) -> None:
    opened = {name: plant.open(name) for name in DIMENSIONS}
    assert running() == [], "the process can still be forked"
    backends = {name: plant.start(runtime) for name, runtime in opened.items()}
    try:
        for name in "abab":
            plant.service.serve(backends[name])  # the switch
            response = plant.answer()
            assert ids(response) == plant.expected(name)
            assert {item.path for item in response.items} == {"towers"}
            assert {item.generation for item in response.items} == {name}
            stats = plant.service.stats()
            assert (stats.generation, stats.index.dimension) == (name, DIMENSIONS[name])
            assert stats.index.live == N
        assert plant.expected("a") != plant.expected("b")
        # A deleted item leaves the generation whose topic says so, and no other.
        gone = plant.expected("a")[0]
        plant.topics["a"].put(gone, N + 1, None)
        deadline = time.monotonic() + 10
        plant.service.serve(backends["a"])
        while gone in ids(plant.answer()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert ids(plant.answer()) == plant.expected("a", without=(gone,))
        plant.service.serve(backends["b"])
        assert ids(plant.answer()) == plant.expected("b")
    finally:
        opened["a"].close()
    try:
        assert running() == ["popular", "replica", "snapshots"], "the other one goes on"
        files = {path.name for path in plant.settings.snapshots.iterdir()}
        assert files == {"item-vectors.a.snapshot"}
        assert ids(plant.answer()) == plant.expected("b")
        plant.topics["b"].put("new", N + 1, unit(np.ones((1, DIMENSIONS["b"]), np.float32))[0])
        deadline = time.monotonic() + 10
        while plant.service.stats().index.live != N + 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert plant.service.stats().missing == []
    finally:
        opened["b"].close()
    assert running() == []


def test_a_generation_that_was_closed_is_opened_again_from_its_snapshot(plant: Plant) -> None:
    plant.topics["a"].put("i5", N + 1, None)
    first = plant.open(name="a")
    plant.start(first)
    first.close()
    assert plant.topics["a"].at == 1
    again = plant.open(name="a")
    try:
        assert again.index.stats().live == N - 1
        backend = plant.start(again)
        plant.service.serve(backend)
        assert ids(plant.answer()) == plant.expected("a", without=("i5",))
    finally:
        again.close()


def test_one_that_was_opened_and_never_started_closes(plant: Plant) -> None:
    plant.open(name="a").close()
    assert not plant.settings.snapshots.exists()


def test_a_stop_ends_the_wait_for_the_end_of_the_topic(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Topic, "ends", lambda _: {0: 9})
    runtime, stop = plant.open(name="a"), threading.Event()
    try:
        runtime.start(plant.store, write_snapshots=False)
        stop.set()
        with pytest.raises(Stopped):
            runtime.wait_caught_up(stop)
    finally:
        runtime.close()


def test_a_shard_has_no_recall_paths(plant: Plant) -> None:
    share = ShardAssignment(1, 3)
    runtime = plant.open(name="a", assignment=share)
    try:
        backend = runtime.start(plant.store, write_snapshots=False)
        assert isinstance(backend, ShardBackend)
        runtime.wait_caught_up(threading.Event())
        assert running() == ["replica"]
        assert runtime.index.stats().live == sum(share.holds(f"i{n}") for n in range(N))
    finally:
        runtime.close()
