"""`Explain`: each reason why an item is, or is not, in an answer, on real servers."""

from __future__ import annotations

import re
import time

import pytest

from eddyline.schema.events import Item, encode
from eddyline.schema.item_record import ItemRecord
from eddyline.stores.state_store import Fence, ItemMetadata, RefusedRecord, Source
from serving.answer.deadline import Deadline
from serving.answer.retriever import Query
from serving.proto import retrieval_pb2 as pb
from serving.rpc.client import Client
from serving.rpc.converters import EXPLAINED_MAX
from serving.rpc.retrieval_service import RetrievalService
from tests.unit.serving.answers import fails
from tests.unit.serving.test_coordinator import Plant, catalogue
from tests.unit.serving.test_retriever import LOG, World, angle


@pytest.fixture
def world() -> World:
    made = World()
    made.user("ana", "i3")
    made.clicked({5: {"i2": 1000, "i7": 3000}})
    return made


def one(answer: pb.ExplainResponse) -> pb.ExplainedItem:
    [item] = answer.items
    return item


def paths(item: pb.ExplainedItem) -> dict[str, tuple[int, bool]]:
    return {path.path: (path.rank, path.returned) for path in item.paths}


def test_items_in_an_answer_have_their_places(client: Client) -> None:
    answer = client.retrieve("ana", 4)
    found = client.explain("ana", [item.item_id for item in answer.items], 4)
    assert [(item.item_id, item.rank) for item in found.items] == [
        (item.item_id, item.rank) for item in answer.items
    ]
    assert all(item.in_answer and item.live for item in found.items)
    first = found.items[0]
    assert (
        first.why
        == "number 1 of the answer: number 1 of towers, number 2 of popular, number 9 of newest"
    )
    assert paths(first) == {"towers": (1, True), "popular": (2, True), "newest": (9, True)}
    assert first.paths[0].score == pytest.approx(answer.items[0].score)
    assert found.freshness.user.offset == 7 and not found.missing


def test_an_item_behind_the_answer_has_its_place(client: Client) -> None:
    item = one(client.explain("ana", ["i7"], 2))
    assert (item.in_answer, item.live) == (False, True) and item.rank > 2
    assert item.why.startswith(f"number {item.rank} of all candidates, the answer has 2: number ")
    assert paths(item)["popular"] == (1, True)


def test_a_path_that_does_not_return_an_item_says_so(client: Client) -> None:
    item = one(client.explain("nobody", ["i7"], 1))
    assert item.in_answer and item.why.startswith("number 1 of the answer: number 1 of popular")
    towers = item.paths[0]
    assert (towers.rank, towers.returned, towers.why) == (0, False, "nothing is known of this user")


def test_a_seen_item(client: Client) -> None:
    item = one(client.explain("ana", ["i3"], 4))
    assert (item.in_answer, item.rank, item.live, len(item.paths)) == (False, 0, True, 0)
    assert re.fullmatch(r"seen: clicked \d+ days ago, it does not come back", item.why)
    session = one(client.explain("", ["i5"], 4, session=["i5"]))
    assert re.fullmatch(r"seen: clicked \d+ \w+ ago, it does not come back", session.why)


def test_an_item_beyond_what_was_looked_at(world: World) -> None:
    query = Query("ana", 2)
    [found], _ = world.retriever.explain(query, ["i1"], world.index, Deadline(5.0), 2)
    assert (found.rank, found.in_answer) == (0, False)
    assert found.why == "it is not among the first 2 of towers and newest"
    assert [path.rank for path in found.paths] == [0, 0, 0]


@pytest.mark.parametrize(
    ("filters", "failed"),
    [
        (pb.Filters(categories=["c"]), "categories"),
        (pb.Filters(tags=["t"], tags_all=["a"]), "tags, tags_all"),
        (pb.Filters(ranges=[pb.Range(attribute="price", max=3)]), "range of 'price'"),
        (pb.Filters(allow=["i1"], categories=["ok"]), "allow"),
        (pb.Filters(deny=["i5"]), "deny"),
    ],
)
def test_the_part_of_a_filter_that_an_item_fails(
    client: Client, world: World, filters: pb.Filters, failed: str
) -> None:
    facts = {"categories": ["ok"], "tags": ["x"], "attributes": {"price": 5}}
    world.index.upsert([ItemRecord("i5", 0, 50, 50, 1, angle(40), facts)])
    item = one(client.explain("ana", ["i5"], 4, filters=filters))
    assert item.why == f"it does not pass the filter: {failed}" and item.live
    good = pb.Filters(categories=["ok"], ranges=[pb.Range(attribute="price", min=3)])
    assert one(client.explain("ana", ["i5"], 4, filters=good)).in_answer


def test_why_an_item_is_not_live(client: Client, world: World) -> None:
    live, sold_out = Item(item_id="x", title="t", at_ms=1), Item(item_id="x", available=False)
    refused = RefusedRecord(0, 9, 1, "bad_field", hidden=True)
    stored = {
        "deleted": ItemMetadata(0, 3, b""),
        "unavailable": ItemMetadata(0, 4, encode(sold_out)),
        "hidden": ItemMetadata(0, 5, encode(live), refused=refused),
        "late": ItemMetadata(0, 6, encode(live)),
        "refused but shown": ItemMetadata(
            0, 7, encode(live), refused=RefusedRecord(0, 9, 1, "bad_field")
        ),
    }
    world.store.write_item_metadata("i0", Source("items", 0), None, Fence(8, LOG), stored)
    found = client.explain("ana", ["never", *stored], 4)
    late = "this worker's index has no vector of it yet, or the item tower refused it"
    assert {item.item_id: item.why for item in found.items} == {
        "never": "it is not live: ingest has applied no record of it",
        "deleted": "it is not live: items/0/3 deleted it",
        "unavailable": "it is not live: items/0/4 says that it is not available",
        "hidden": "it is not live: its newer record items/0/9 was refused (bad_field)",
        "late": f"it is not live: items/0/6 was applied, but {late}",
        "refused but shown": f"it is not live: items/0/7 was applied, but {late}",
    }
    assert not any(item.live or item.in_answer or item.paths for item in found.items)
    world.store.away = True
    item = one(client.explain("ana", ["never"], 4))
    assert item.why.startswith("it is not live; Redis does not say why: ")


@pytest.mark.parametrize(
    ("count", "good"),
    [(0, False), (1, True), (EXPLAINED_MAX, True), (EXPLAINED_MAX + 1, False), (5_000, False)],
)
def test_the_list_of_items_has_limits(client: Client, count: int, good: bool) -> None:
    names = [f"x{n}" for n in range(count)]
    if good:
        assert len(client.explain("ana", names, 4).items) == count
    else:
        sentence = f"INVALID_ARGUMENT: item_ids: {count} ids, allowed are 1 … {EXPLAINED_MAX}"
        assert fails(lambda: client.explain("ana", names, 4)) == sentence


def test_bad_fields_are_refused_by_name(client: Client) -> None:
    assert fails(lambda: client.explain("", ["i1"], 4)).startswith("INVALID_ARGUMENT: user_id")
    assert fails(lambda: client.explain("ana", ["i1"], 0)).startswith("INVALID_ARGUMENT: k: 0")
    assert "given twice" in fails(lambda: client.explain("ana", ["i1", "i1"], 4))


def test_it_counts_as_no_query(client: Client, service: RetrievalService, world: World) -> None:
    client.explain("ana", ["i1"], 4)
    assert service.counts().queries == 0 and not service.counts().paths
    world.index.query = lambda *_: time.sleep(0.5) or []  # type: ignore[method-assign,assignment,func-returns-value]
    call = fails(lambda: client.explain("ana", ["i1"], 4, timeout_s=0.3))
    assert call.startswith("DEADLINE_EXCEEDED") and service.counts().failed == 0
    client.retrieve("nobody", 1)
    assert service.counts().queries == 1


def test_a_coordinator_explains_as_one_worker() -> None:
    plant = Plant(3, catalogue(90))
    try:
        plant.user("ana", "item-7")
        plant.clicked({f"item-{n}": 100 + n for n in range(20)})
        names = [f"item-{n}" for n in range(0, 95, 5)]
        for k, filters in ((5, None), (20, pb.Filters(categories=["c2"]))):
            one_worker, answer = (
                [
                    (i.item_id, i.in_answer, i.rank, i.why, i.live, paths(i))
                    for i in client.explain("ana", names, k, filters=filters).items
                ]
                for client in (plant.one, plant.client)
            )
            assert answer == one_worker
        with Client(plant.shards[1].address) as client:
            assert fails(lambda: client.explain("ana", ["item-1"], 1)).startswith(
                "FAILED_PRECONDITION"
            )
    finally:
        plant.close()
