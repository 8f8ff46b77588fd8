"""Items nearest to items and to a vector: `SimilarItems` and `SearchByVector`, on real servers."""

from __future__ import annotations

import time
from collections.abc import Iterator

import grpc
import numpy as np
import pytest

from eddyline.schema.events import Item, encode
from eddyline.schema.item_record import ItemRecord
from eddyline.stores.state_store import Fence, ItemMetadata, Source
from serving.proto import retrieval_pb2 as pb
from serving.proto import retrieval_pb2_grpc
from serving.rpc.client import Client
from serving.rpc.converters import SIMILAR_TO_MAX
from serving.rpc.retrieval_service import RetrievalService
from serving.rpc.server import WorkerServer
from tests.unit.serving.answers import fails, ids
from tests.unit.serving.test_coordinator import Plant, catalogue, seen, unit
from tests.unit.serving.test_retriever import LOG, SETTINGS, N, World, angle


def test_the_nearest_of_an_item_are_its_neighbours(client: Client) -> None:
    answer = client.similar_items(["i3"], 4)
    assert ids(answer) == ["i2", "i4", "i1", "i5"]
    assert [item.score for item in answer.items] == sorted(
        (item.score for item in answer.items), reverse=True
    )
    assert all(0 < item.score < 1 for item in answer.items)
    assert [(i.rank, i.path, i.path_rank, i.generation) for i in answer.items][1] == (
        2,
        "similar",
        2,
        "g1",
    )
    assert [(p.path, p.candidates, p.taken, p.why) for p in answer.paths] == [("similar", 4, 4, "")]
    fresh = answer.freshness
    assert not fresh.HasField("user") and fresh.index[0].offset == N - 1
    assert 0 < fresh.worker.embedded_us <= fresh.worker.searched_us <= fresh.worker.answered_us


def test_the_nearest_of_several_are_those_of_their_middle(client: Client) -> None:
    assert ids(client.similar_items(["i2", "i6"], 3)) == ["i4", "i5", "i3"]
    # Opposite items have no middle.
    assert "i2" in ids(client.similar_items(["i1", "i3"], 1))


def test_an_item_that_came_a_moment_ago_is_found(client: Client, world: World) -> None:
    record = ItemRecord("new", 0, 99, 99, time.time_ns() // 1000, angle(25))
    world.index.upsert([record])
    assert ids(client.similar_items(["i3"], 2)) == ["new", "i2"]
    assert ids(client.similar_items(["new"], 1)) == ["i3"]
    world.index.retire([ItemRecord("new", 0, 100, 100, 1, None)])
    assert "new" not in ids(client.similar_items(["i3"], 50))


def test_opposite_items_are_answered(client: Client, world: World) -> None:
    world.index.upsert([ItemRecord("opposite", 0, 99, 99, 1, angle(180))])
    assert ids(client.similar_items(["i0", "opposite"], 2)) == ["i1", "i2"]


def test_items_that_are_not_live_are_named(client: Client) -> None:
    answer = client.similar_items(["gone", "i3", "never"], 1)
    assert ids(answer) == ["i2"] and answer.paths[0].why == "not live: 'gone', 'never'"
    assert fails(lambda: client.similar_items(["gone"], 1)) == (
        "NOT_FOUND: item_ids: not live: 'gone'"
    )
    many = [f"gone-{n}" for n in range(7)]
    assert fails(lambda: client.similar_items(many, 1)).endswith("'gone-3' and 3 more")


def test_a_filter_and_cards(client: Client, world: World) -> None:
    body = encode(Item(item_id="i5", title="five", at_ms=1, categories=["c"]))
    cards = {"i5": ItemMetadata(0, 1, body)}
    world.store.write_item_metadata("i0", Source("items", 0), None, Fence(2, LOG), cards)
    only = pb.Filters(allow=["i5", "i3"])
    answer = client.similar_items(["i3"], 3, with_cards=True, filters=only)
    assert ids(answer) == ["i5"] and answer.items[0].card.title == "five"
    assert answer.short_because == "1 of 3: no more other items are live and pass the filter"
    answer = client.search_by_vector(angle(0), "g1", N + 1, with_cards=True)
    assert answer.short_because == f"{N} of {N + 1}: no more items are live"
    assert [item.card.title for item in answer.items if item.HasField("card")] == ["five"]
    world.store.away = True
    answer = client.similar_items(["i3"], 1, with_cards=True)
    assert ids(answer) == ["i2"] and "redis" in answer.missing[0]
    assert not client.similar_items(["i3"], 1).missing


def test_the_nearest_of_a_vector(client: Client) -> None:
    answer = client.search_by_vector(2 * angle(26), "g1", 2)
    assert ids(answer) == ["i3", "i4"] and answer.items[0].path == "vector"
    assert 1.9 < answer.items[0].score < 2


@pytest.mark.parametrize(
    ("vector", "generation", "sentence"),
    [
        ([1, 0, 0, 0], "g2", "FAILED_PRECONDITION: generation: 'g2', this worker serves 'g1'"),
        ([1, 0, 0, 0], "", "INVALID_ARGUMENT: generation: it is empty"),
        ([1, 0, 0], "g1", "INVALID_ARGUMENT: query vector: shape (3,), the index has dimension 4"),
        ([1, 0, 0, 0, 0], "g1", "INVALID_ARGUMENT: query vector: shape (5,)"),
        ([], "g1", "INVALID_ARGUMENT: vector: 0 numbers, and all are 0"),
        ([0, 0, 0, 0], "g1", "INVALID_ARGUMENT: vector: 4 numbers, and all are 0"),
        ([1, float("nan"), 0, 0], "g1", "INVALID_ARGUMENT: vector: it holds NaN or infinity"),
        ([1, 0, 0, float("inf")], "g1", "INVALID_ARGUMENT: vector: it holds NaN or infinity"),
    ],
)
def test_a_bad_vector_is_refused_by_name(
    client: Client, vector: list[float], generation: str, sentence: str
) -> None:
    assert fails(lambda: client.search_by_vector(vector, generation, 1)).startswith(sentence)


@pytest.mark.parametrize(
    ("count", "good"),
    [(0, False), (1, True), (SIMILAR_TO_MAX, True), (SIMILAR_TO_MAX + 1, False), (5_000, False)],
)
def test_the_list_of_items_has_limits(client: Client, count: int, good: bool) -> None:
    def call() -> pb.RetrieveResponse:
        return client.similar_items(["i3", *(f"x{n}" for n in range(count - 1))][:count], 1)

    if good:
        assert ids(call()) == ["i2"]
    else:
        sentence = f"INVALID_ARGUMENT: item_ids: {count} ids, allowed are 1 … {SIMILAR_TO_MAX}"
        assert fails(call) == sentence


@pytest.mark.parametrize(
    ("k", "good"), [(-1, False), (0, False), (1, True), (50, True), (51, False), (10**6, False)]
)
def test_k_has_limits(client: Client, k: int, good: bool) -> None:
    for call in (
        lambda: client.similar_items(["i3"], k),
        lambda: client.search_by_vector(angle(0), "g1", k),
    ):
        if good:
            assert call().items
        else:
            assert fails(call) == f"INVALID_ARGUMENT: k: {k}, allowed are 1 … 50"


@pytest.mark.parametrize(
    ("item_ids", "sentence"),
    [
        ([""], "item_ids: '' has 0 bytes, allowed are 1 … 256"),
        (["ü" * 129], "has 258 bytes, allowed are 1 … 256"),
        (["i1", "i2", "i1"], "item_ids: 'i1' is given twice"),
    ],
)
def test_bad_ids_are_refused_by_name(client: Client, item_ids: list[str], sentence: str) -> None:
    found = fails(lambda: client.similar_items(item_ids, 1))
    assert found.startswith("INVALID_ARGUMENT") and sentence in found


def test_a_range_over_an_unknown_attribute_is_refused(world: World) -> None:
    world.index.upsert([ItemRecord("p", 0, 99, 99, 1, angle(1), {"numbers": {"price": 1.0}})])
    only = pb.Filters(ranges=[pb.Range(attribute="prise", max=3)])
    service = RetrievalService(SETTINGS)
    service.serve(world.backend)
    server = WorkerServer(SETTINGS, service)
    with Client(server.address) as client:
        found = fails(lambda: client.similar_items(["i3"], 1, filters=only))
    server.stop(0.0)
    assert found.startswith("INVALID_ARGUMENT: filters.ranges: no item has the attribute")


def test_a_worker_that_is_not_ready_and_a_passed_deadline(world: World) -> None:
    service = RetrievalService(SETTINGS)
    service.waiting_for("Kafka")
    server = WorkerServer(SETTINGS, service)
    with Client(server.address) as client:
        assert fails(lambda: client.similar_items(["i3"], 1)) == (
            "UNAVAILABLE: the worker is not ready: it waits for Kafka"
        )
        service.serve(world.backend)
        world.index.query = lambda *_: time.sleep(0.5) or []  # type: ignore[method-assign,assignment,func-returns-value]
        call = fails(lambda: client.similar_items(["i3"], 1, timeout_s=0.3))
        assert call.startswith("DEADLINE_EXCEEDED")
    server.stop(0.0)


def test_calls_are_counted_by_their_path(client: Client, service: RetrievalService) -> None:
    client.similar_items(["i3"], 4)
    client.search_by_vector(angle(0), "g1", 2)
    fails(lambda: client.similar_items(["gone"], 1))
    counts = service.counts()
    assert (counts.queries, counts.failed) == (3, 1)
    assert {name: (one.queries, one.items) for name, one in counts.paths.items()} == {
        "similar": (1, 4),
        "vector": (1, 2),
    }


def test_the_generated_stub_calls_them(client: Client) -> None:
    with grpc.insecure_channel(client.address) as channel:
        stub = retrieval_pb2_grpc.RetrievalStub(channel)  # type: ignore[no-untyped-call]
        answer = stub.SimilarItems(pb.SimilarItemsRequest(item_ids=["i3"], k=1), timeout=5)
    assert ids(answer) == ["i2"]


@pytest.fixture(scope="module")
def plant() -> Iterator[Plant]:
    made = Plant(3, catalogue(90))
    yield made
    made.close()


def test_a_coordinator_answers_as_one_worker(plant: Plant) -> None:
    rng = np.random.default_rng(3)
    choices = [None, pb.Filters(categories=["c2"]), pb.Filters(deny=["item-1", "item-3"])]
    for n in range(30):
        named = [
            f"item-{i}" for i in {2, *rng.integers(100, size=int(rng.integers(1, 9))).tolist()}
        ]
        k, filters = int(rng.choice([1, 10, 90])), choices[n % 3]
        one = plant.one.similar_items(named, k, filters=filters)
        answer = plant.client.similar_items(named, k, filters=filters)
        assert seen(answer) == seen(one) and answer.shards.answered == answer.shards.asked > 0
        vector = unit(rng.normal(size=len(plant.whole.vectors_of(["item-2"])[0])))
        assert seen(plant.client.search_by_vector(vector, "g1", k, filters=filters)) == seen(
            plant.one.search_by_vector(vector, "g1", k, filters=filters)
        )
    for client in (plant.one, plant.client):
        assert fails(lambda client=client: client.similar_items(["gone"], 1)) == (
            "NOT_FOUND: item_ids: not live: 'gone'"
        )
        assert fails(lambda client=client: client.search_by_vector([1.0], "g2", 1)).startswith(
            "FAILED_PRECONDITION: generation"
        )


def test_a_shard_refuses_and_an_item_of_a_dead_shard_is_not_called_gone() -> None:
    plant = Plant(3, catalogue(90))
    try:
        with Client(plant.shards[1].address) as client:
            assert fails(lambda: client.similar_items(["item-2"], 1)).startswith(
                "FAILED_PRECONDITION: this worker holds shard 1 of 3 only"
            )
        dead = next(
            f"item-{n}" for n in range(90) if plant.shards[0].index.vectors_of([f"item-{n}"]).size
        )
        plant.shards[0].down()
        assert fails(lambda: plant.client.similar_items([dead], 1)).startswith("UNAVAILABLE")
    finally:
        plant.close()
