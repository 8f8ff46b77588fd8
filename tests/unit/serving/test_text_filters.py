"""Filters over texts of attributes, and of what an item may not have, through real servers."""

from __future__ import annotations

import numpy as np
import pytest

from eddyline.schema.item_record import ItemRecord
from index.exact import ExactIndex
from index.filters import TEXT_VALUES_MAX
from serving.proto import retrieval_pb2 as pb
from serving.rpc.client import CallFailed
from tests.unit.serving.test_coordinator import D, Plant, seen, unit

# The last two are spellings of one text.
BRANDS = ("Acme", "Beta", "Ünion", "Acme", "Beta", " U\u0308nion")


def catalogue(count: int) -> list[ItemRecord]:
    rng = np.random.default_rng(4)
    return [
        ItemRecord(
            f"item-{n}",
            0,
            n,
            n,
            1,
            unit(rng.normal(size=D)),
            {
                "categories": [f"c{n % 4}"],
                "tags": ["odd"] if n % 2 else [],
                "attributes": {"brand": BRANDS[n % 6], "color": ("", "red", "blue")[n % 3]},
            },
        )
        for n in range(count)
    ]


def numbers(answer: pb.RetrieveResponse) -> list[int]:
    return sorted(int(item.item_id.removeprefix("item-")) for item in answer.items)


def texts(attribute: str, *values: str) -> pb.Texts:
    return pb.Texts(attribute=attribute, values=values)


def test_one_worker_and_a_coordinator_answer_alike() -> None:
    plant = Plant(3, catalogue(30), frozenset({"brand", "color"}))
    try:
        plant.user("ana", "item-7")
        for filters, passes in (
            (pb.Filters(texts=[texts("brand", "Acme")]), lambda n: n % 3 == 0),
            (pb.Filters(texts=[texts("brand", "Beta", "U\u0308nion ")]), lambda n: n % 3),
            (
                pb.Filters(texts=[texts("brand", "Beta"), texts("color", "red")]),
                lambda n: n % 3 == 1,
            ),
            (pb.Filters(texts_none=[texts("color", "blue")]), lambda n: n % 3 != 2),
            (pb.Filters(categories_none=["c0", "c1"]), lambda n: n % 4 > 1),
            (pb.Filters(tags_none=["odd"], categories=["c2"]), lambda n: n % 4 == 2),
            (pb.Filters(texts=[texts("brand", "acme")]), lambda n: False),
        ):
            expected = [n for n in range(30) if passes(n) and n != 7]
            for user in ("ana", "nobody"):
                one = plant.one.retrieve(user, 30, filters=filters)
                assert seen(plant.client.retrieve(user, 30, filters=filters)) == seen(one)
                assert [n for n in numbers(one) if n != 7] == expected
            near = plant.client.similar_items(["item-7"], 30, filters=filters)
            assert numbers(near) == expected
        wrong = pb.Filters(texts=[texts("brnad", "Acme")])
        for client in (plant.one, plant.client):
            for call in (
                lambda client=client: client.retrieve("ana", 3, filters=wrong),
                lambda client=client: client.similar_items(["item-1"], 3, filters=wrong),
                lambda client=client: client.explain("ana", ["item-1"], 3, filters=wrong),
            ):
                with pytest.raises(CallFailed) as failed:
                    call()
                assert (failed.value.code, failed.value.detail) == (
                    "INVALID_ARGUMENT",
                    "filters.texts: 'brnad' is not in the setting filter_texts; it has 'brand', "
                    "'color'",
                )
        only = pb.Filters(texts=[texts("brand", "Beta")], texts_none=[texts("color", "red")])
        [item] = plant.client.explain("ana", ["item-3"], 3, filters=only).items
        assert item.why == "it does not pass the filter: texts of 'brand'"
        most = [f"b{n}" for n in range(TEXT_VALUES_MAX - 1)]
        full = pb.Filters(texts=[texts("brand", "Acme", *most)])
        assert numbers(plant.client.retrieve("nobody", 30, filters=full)) == [*range(0, 30, 3)]
    finally:
        plant.close()


def test_a_shard_with_another_setting_refuses_by_name() -> None:
    plant = Plant(2, catalogue(10), frozenset({"brand"}))
    try:
        for shard in plant.shards:
            assert isinstance(shard.index, ExactIndex)
            shard.index._text_names = frozenset()
        with pytest.raises(CallFailed) as failed:
            plant.client.retrieve("nobody", 3, filters=pb.Filters(texts=[texts("brand", "Acme")]))
        assert failed.value.code == "UNAVAILABLE"
        assert "'brand' is not in the setting filter_texts; it has none" in failed.value.detail
    finally:
        plant.close()
