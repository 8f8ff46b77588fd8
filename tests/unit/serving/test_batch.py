"""`RetrieveBatch`: the answers of `Retrieve`, each with its own status, from one read of Redis."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import pytest

from eddyline.errors import StoreRefused
from eddyline.schema.events import ID_BYTES_MAX
from eddyline.stores.memory import MemoryStore
from eddyline.stores.state_store import UserPlace, UserState
from index.filters import LIST_IDS_MAX
from serving.answer.impressions import Impressions
from serving.proto import retrieval_pb2 as pb
from serving.rpc import converters
from serving.rpc.backends import WorkerBackend
from serving.rpc.client import Client
from serving.rpc.retrieval_service import BATCH_MAX, RetrievalService
from tests.unit.serving.answers import fails, ids
from tests.unit.serving.test_coordinator import Plant, catalogue, seen
from tests.unit.serving.test_retriever import World

OK, INVALID, DEADLINE, EXHAUSTED = 0, 3, 4, 8


def one(user_id: str, k: int = 3, **more: object) -> pb.RetrieveRequest:
    return pb.RetrieveRequest(user_id=user_id, k=k, **more)  # type: ignore[arg-type]


def codes(response: pb.RetrieveBatchResponse) -> list[int]:
    return [answer.code for answer in response.answers]


@pytest.fixture(scope="module")
def plant() -> Iterator[Plant]:
    made = Plant(3, catalogue(90))
    for number, user in enumerate(("ana", "bob", "cyd")):
        made.user(user, f"item-{number}", f"item-{number + 20}")
    made.clicked({f"item-{n}": 100 + n for n in range(20)})
    yield made
    made.close()


def test_its_answers_are_those_of_single_calls(plant: Plant) -> None:
    session = [pb.SessionEvent(item_id="item-5")]
    requests = [
        one("ana", 5),
        one("bob", 7, limits=[pb.AttributeLimit(attribute="categories", most=1)]),
        one("nobody", 3, filters=pb.Filters(categories=["c2"])),
        one("", 4, session=session),
        one("cyd", 90, diversity=0.4, cursor=""),
        one("ana", 5, popularity_beta=1.0),
        one("ana", 5),
    ]
    for client in (plant.one, plant.client):
        singles = [client._call(client._stub.Retrieve, request, 5.0) for request in requests]
        found = client.retrieve_batch(requests)
        assert codes(found) == [OK] * len(requests)
        assert [seen(a.response) for a in found.answers] == [seen(single) for single in singles]
    impressions = {answer.response.impression_id for answer in found.answers}
    assert len(impressions) == len(requests)


def test_a_bad_request_costs_itself_alone(plant: Plant) -> None:
    partition = plant.users.partition_of("ana")
    requests = [
        one("ana"),
        one("", 3),
        one("ana", 0),
        one("ana", 3, filters=pb.Filters(ranges=[pb.Range(attribute="none", min=1)])),
        one("ana", 3, after=pb.After(partition=partition, offset=1, wait_ms=5)),
        one("ana", 3, after=pb.After(partition=partition, offset=1)),
        one("ana", 3, cursor="x"),
        one("bob"),
    ]
    for client in (plant.one, plant.client):
        found = client.retrieve_batch(requests)
        bad = [INVALID] * 4
        assert codes(found) == [OK, *bad, OK, INVALID, OK]
        assert [bool(answer.detail) for answer in found.answers] == [c != OK for c in codes(found)]
        assert not any(a.HasField("response") for a in found.answers if a.code)
        assert found.answers[4].detail == "after.wait_ms: 5, must be 0: no answer of a batch waits"
        assert found.answers[5].response.freshness.after.applied
        assert ids(found.answers[7].response) == ids(client.retrieve("bob", 3))


@pytest.mark.parametrize("count", [0, 1, BATCH_MAX - 1, BATCH_MAX, BATCH_MAX + 1, 20 * BATCH_MAX])
def test_the_number_of_requests_has_limits(plant: Plant, count: int) -> None:
    requests = [one(f"user-{n % 9}", 1) for n in range(count)]
    if 1 <= count <= BATCH_MAX:
        assert codes(plant.one.retrieve_batch(requests)) == [OK] * count
    else:
        sentence = f"INVALID_ARGUMENT: requests: {count} values, allowed are 1 … {BATCH_MAX}"
        assert fails(lambda: plant.one.retrieve_batch(requests)) == sentence


def test_long_exclusions_fit(plant: Plant) -> None:
    """2,000 ids of the greatest length; a few such requests, or shorter ids in each of many."""
    long = [f"{n}".rjust(ID_BYTES_MAX, "x") for n in range(LIST_IDS_MAX - 1)]
    short = [f"{n}".rjust(36, "x") for n in range(LIST_IDS_MAX - 1)]
    for ids_, count in ((long, 12), (short, BATCH_MAX)):
        deny = pb.Filters(deny=[*ids_, "item-89"])
        found = plant.one.retrieve_batch([one("nobody", 90, filters=deny)] * count)
        assert codes(found) == [OK] * count
        assert all("item-89" not in ids(a.response) for a in found.answers)
        single = plant.client.retrieve("nobody", 90, filters=deny)
        assert ids(single) == ids(found.answers[0].response)


def test_a_worker_of_one_shard_refuses_the_whole_call(plant: Plant) -> None:
    with Client(plant.shards[1].address) as client:
        assert fails(lambda: client.retrieve_batch([one("ana")])).startswith("FAILED_PRECONDITION")


# ---------------------------------------------------------------- one worker


def test_all_users_are_read_at_once(
    client: Client, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, user in enumerate(("ana", "bob", "cyd")):
        world.user(user, f"i{number}", offset=10 + number)
    reads: list[list[str]] = []

    def noted(users: Sequence[UserPlace], generation: str) -> list[UserState]:
        reads.append([user.user_id for user in users])
        return [MemoryStore.read_user(world.store, *user, generation) for user in users]

    monkeypatch.setattr(world.store, "read_users", noted)
    users = ["ana", "bob", "cyd", "ana", "nobody"]
    found = client.retrieve_batch([one(user) for user in users])
    assert reads == [["ana", "bob", "cyd", "nobody"]] and world.store.reads == 0
    offsets = [a.response.freshness.user.offset for a in found.answers]
    assert offsets == [10, 11, 12, 10, -1]
    stamps = {a.response.freshness.worker.user_read_us for a in found.answers}
    assert len(stamps) == 1 and min(stamps) > 0


def test_without_redis_every_answer_says_so(client: Client, world: World) -> None:
    world.user("ana", "i3")
    world.store.away = True
    found = client.retrieve_batch([one("ana"), one("bob")])
    assert codes(found) == [OK, OK]
    for answer in found.answers:
        assert answer.response.missing[0] == "redis: Redis at redis://nowhere: ConnectionError"
        assert len(answer.response.items) == 3


def test_a_user_whose_state_is_damaged_costs_that_answer_alone(
    client: Client, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.user("ana", "i3")
    read = world.store.read_user

    def damaged(slot: str, partition: int, user_id: str, generation: str) -> UserState:
        if user_id == "bob":
            raise StoreRefused("damaged")
        return read(slot, partition, user_id, generation)

    monkeypatch.setattr(world.store, "read_user", damaged)
    found = client.retrieve_batch([one("ana"), one("bob")])
    assert codes(found) == [OK, OK]
    assert not found.answers[0].response.missing
    assert ids(found.answers[0].response) == ids(client.retrieve("ana", 3))
    assert "damaged" in found.answers[1].response.missing[0]


def test_answers_that_the_deadline_passed_say_so(client: Client, world: World) -> None:
    world.user("ana", "i3")
    query = world.index.query

    def slow(*args: object) -> object:
        time.sleep(0.12)
        return query(*args)  # type: ignore[arg-type]

    world.index.query = slow  # type: ignore[method-assign,assignment]
    request = pb.RetrieveBatchRequest(requests=[one("ana")] * 8)
    # The server's own deadline, 400 ms: the client waits longer.
    found = client._stub.RetrieveBatch(request, timeout=None)
    assert codes(found)[0] == OK and codes(found)[-1] == DEADLINE
    assert codes(found) == sorted(codes(found))
    assert "the deadline passed before" in found.answers[-1].detail


def test_an_answer_without_room_says_so(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    size = client.retrieve("nobody", 12).ByteSize()
    monkeypatch.setattr(converters, "ANSWER_BYTES_MAX", int(2.5 * size))
    found = client.retrieve_batch([one("nobody", k) for k in (12, 12, 12, 1)])
    assert codes(found) == [OK, OK, EXHAUSTED, OK]
    assert "send this request again" in found.answers[2].detail


def test_its_queries_are_counted_one_by_one(client: Client, service: RetrievalService) -> None:
    client.retrieve_batch([one("ana"), one("bob"), one("", 1)])
    counts = service.counts()
    assert (counts.queries, counts.failed) == (3, 1)
    assert counts.paths["newest"].queries == 2
    assert fails(lambda: client.retrieve_batch([])).startswith("INVALID_ARGUMENT")
    assert service.counts().queries == 3


def test_its_answers_are_recorded(client: Client, service: RetrievalService, world: World) -> None:
    impressions = Impressions(1.0)
    service.serve(WorkerBackend(world.backend.held, world.retriever, impressions))
    found = client.retrieve_batch([one("ana", 2, scene="home"), one("bob", 3)])
    recorded = impressions.take(10)
    assert [(r.user_id, r.k, r.scene) for r in recorded] == [("ana", 2, "home"), ("bob", 3, "")]
    given = [answer.response.impression_id for answer in found.answers]
    assert [r.impression_id for r in recorded] == given
