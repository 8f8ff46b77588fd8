"""Patches of items: absent fields keep their last accepted value, null removes one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from eddyline.errors import FenceMoved, SettingsError
from eddyline.kafka import topic_checks, topics
from eddyline.kafka.topics import ITEMS
from eddyline.schema import validation
from eddyline.schema.events import ATTRIBUTES_MAX
from eddyline.settings.loader import Settings
from embeddings.data.sources import assemble
from streams.fences import PUBLISHED_SLOT, published_source
from streams.ports import RecordBatch
from tests.applying import ingest
from tests.unit.streams.test_emptied_items import body, of
from tests.unit.streams.test_ingest_rules import HERE, SETTINGS, Rig
from tests.unit.streams.test_refused_newer import applied, refused_of, stored
from tests.unit.streams.test_strays import FILM, OTHER, change, record

WHOLE: dict[str, Any] = {
    "title": "t",
    "categories": ["c"],
    "attributes": {"price": 3, "year": 1999},
    "at_ms": 1_600_000_000_000,
}
PATCHES = msgspec.structs.replace(SETTINGS, items_patches=True)


@pytest.mark.parametrize("size", [1, 2, 99])
@pytest.mark.parametrize(
    ("patches", "after"),
    [
        ([{}], WHOLE),
        ([{"attributes": {"price": 2}}], {"attributes": {"price": 2, "year": 1999}}),
        ([{"attributes": {"price": None, "new": "x"}}], {"attributes": {"year": 1999, "new": "x"}}),
        ([{"attributes": None}], {"attributes": {}}),
        ([{"title": None, "categories": None}], {"title": "", "categories": []}),
        ([{"title": ""}], {"title": ""}),
        ([{"available": False}, {"title": "u"}], {"available": False, "title": "u"}),
        (
            [{"attributes": {"price": 1}}, {"attributes": {"price": 2}}, {"tags": ["x"]}],
            {"attributes": {"price": 2, "year": 1999}, "tags": ["x"]},
        ),
        # A bad optional part is left out: it keeps its value.
        (
            [{"title": 7, "categories": "c", "attributes": {"price": [], "year": 2000}}],
            {"attributes": {"price": 3, "year": 2000}},
        ),
        ([{"attributes": []}], WHOLE),
    ],
)
def test_absent_fields_stay(
    patches: list[dict[str, Any]], after: dict[str, Any], size: int
) -> None:
    log = [of(0, **WHOLE), *(of(n, **one) for n, one in enumerate(patches, 1))]
    rig = applied(log, size, items_patches=True)
    assert rig.out.letters == []
    want = {"item_id": FILM, "tags": [], "available": True, "vector": None} | WHOLE | after
    assert body(rig) == want
    last = rig.out.published[-1]
    assert (last.offset, last.at_ms) == (len(patches), WHOLE["at_ms"])
    assert last.attributes.get("attributes", {}) == want["attributes"]


@pytest.mark.parametrize(
    ("log", "letters"),
    [
        ([of(0, attributes={"price": 2})], [(0, "no_base")]),
        ([of(0, available=False)], [(0, "no_base")]),
        ([of(0, **WHOLE), change(1, None, 1), of(2, attributes={"price": 2})], [(2, "no_base")]),
        ([of(0, title=""), of(1, title="t"), of(2, available=False)], [(0, "no_base")]),
        ([of(0, tags=["x"])], []),
        ([of(0, **WHOLE), of(1, available=None)], [(1, "bad_field")]),
        ([of(0, **WHOLE), of(1, attributes={f"a{n}": n for n in range(ATTRIBUTES_MAX - 2)})], []),
        (
            [of(0, **WHOLE), of(1, attributes={f"a{n}": n for n in range(ATTRIBUTES_MAX - 1)})],
            [(1, "too_many_attributes")],
        ),
    ],
)
def test_a_patch_of_nothing_is_refused(log: list[Any], letters: list[Any]) -> None:
    rig = applied(log, items_patches=True)
    assert rig.out.letters == letters
    known = stored(rig) is not None and not letters[-1:] == [(2, "no_base")]
    refused = letters[-1] if letters and known and letters[-1][0] == log[-1].offset else None
    assert refused_of(rig) == refused


def test_the_first_append_decides_as_for_whole_items() -> None:
    older = of(1, attributes={"price": 1})
    forwarded = record(1, older.value, 9, (OTHER, 4), FILM, "items")
    whole = of(0, **WHOLE)
    whole.timestamp += 5
    rig = applied([whole, forwarded], items_patches=True)
    assert body(rig)["attributes"]["price"] == 3
    assert len(rig.out.forwarded) == 1  # the whole state, behind the outdated patch


@pytest.mark.parametrize("size", [1, 99])
def test_where_the_metadata_is_ahead_the_stored_state_is_published(size: int) -> None:
    log = [of(0, **WHOLE), of(1, attributes={"price": 2}), of(2, attributes={"price": None})]
    rig = applied(log, items_patches=True)
    again = Rig(items_patches=True)
    again.store.restore(rig.store.snapshot())
    again.store.drop_fences(PUBLISHED_SLOT, [published_source("g", HERE)])
    assert again.items.fences.open({HERE: (0, 99)}) == {HERE: 0}
    for first in range(0, len(log), size):
        ingest(again.items, HERE, log[first : first + size])
    [one] = again.out.published
    assert (one.offset, one.attributes) == (2, rig.out.published[-1].attributes)
    ingest(again.items, HERE, [of(3, attributes={"price": 5})])
    again.items.flush()
    assert body(again)["attributes"] == {"year": 1999, "price": 5}


@pytest.mark.parametrize("size", [1, 2, 3, 99])
def test_a_second_reading_does_not_bring_back_what_was_before(size: int) -> None:
    """A delete that a new generation publishes again is older than the stored item."""
    log = [of(0, **WHOLE), change(1, None, 1), of(2, **WHOLE), of(3, attributes={"price": 2})]
    rig = applied(log, items_patches=True)
    again = Rig(items_patches=True)
    again.store.restore(rig.store.snapshot())
    again.store.drop_fences(PUBLISHED_SLOT, [published_source("g", HERE)])
    assert again.items.fences.open({HERE: (0, 99)}) == {HERE: 0}
    log.append(of(4, tags=["x"]))
    again.items.metadata._wait_s = 60.0  # nothing is written between the batches
    for first in range(0, len(log), size):
        ingest(again.items, HERE, log[first : first + size])
    again.items.flush()
    assert again.out.letters == []
    assert body(again)["tags"] == ["x"] and body(again)["attributes"] == {"price": 2, "year": 1999}
    assert again.out.published[-1].attributes["attributes"] == {"price": 2, "year": 1999}


def mapped(tmp_path: Path, text: str) -> Settings:
    file = tmp_path / "map.toml"
    file.write_text(text, encoding="utf-8")
    return msgspec.structs.replace(SETTINGS, items_map=str(file))


MAP = """
[items]
patches = true
[items.fields]
item_id = "sku"
title = "name"
categories = "in.groups"
available = { path = "stock", above = 0 }
attributes = { price = "price", brand = { path = "brand", type = "text" } }
"""


def test_a_map_says_so_and_tells_null_from_absent(tmp_path: Path) -> None:
    settings = mapped(tmp_path, MAP)

    def made(**fields: Any) -> dict[str, Any]:
        value = msgspec.json.encode({"sku": FILM, **fields})
        [(_, patch, _)] = validation.item_changes(
            settings, record(0, value, 0, None, FILM, "items")
        )
        found = msgspec.json.decode(msgspec.json.encode(patch))
        assert found.pop("item_id") == FILM
        return found

    assert made() == {}
    assert made(name="t", price=3, stock=0) == {
        "title": "t",
        "attributes": {"price": 3},
        "available": False,
    }
    assert made(name=None, price=None, stock=None) == {"title": None, "attributes": {"price": None}}
    assert made(**{"in": {"groups": None}}) == {"categories": None}
    assert made(**{"in": {}}) == made(**{"in": None}) == {}
    assert made(price=3, brand=None) == {"attributes": {"price": 3, "brand": None}}


def test_a_column_that_an_update_left_alone_keeps_its_value(tmp_path: Path) -> None:
    settings = mapped(
        tmp_path,
        '[items]\npreset = "debezium"\npatches = true\n[items.fields]\nitem_id = "id"\n'
        'title = "title"\nattributes = { text = "text" }\n',
    )
    row = {"id": FILM, "title": "__debezium_unavailable_value", "price": 2}
    row["text"] = "__debezium_unavailable_value"
    value = msgspec.json.encode({"before": None, "after": row, "op": "u", "ts_ms": 1})
    one = record(0, value, 0, None, FILM, "items")
    [(_, patch, _)] = validation.item_changes(settings, one)
    found = msgspec.json.decode(msgspec.json.encode(patch))
    assert "title" not in found and "text" not in found.get("attributes", {})


def test_only_items_have_patches(tmp_path: Path) -> None:
    file = tmp_path / "map.toml"
    file.write_text('[users]\npatches = true\n[users.fields]\nuser_id = "id"\n', encoding="utf-8")
    settings = msgspec.structs.replace(SETTINGS, users_map=str(file))
    with pytest.raises(SettingsError, match="patches = true is for items"):
        validation.map_of(settings, "users")


@pytest.mark.parametrize(
    ("configs", "found"),
    [
        ({}, []),
        ({"cleanup.policy": "compact"}, ["compaction keeps the last one of an item alone"]),
        ({"cleanup.policy": "compact,delete"}, ["compaction keeps the last one"]),
        ({"retention.ms": "604800000"}, ["patches go by age"]),
    ],
)
def test_a_topic_that_loses_patches_is_named(configs: dict[str, str], found: list[str]) -> None:
    _, wanted = topics.topic_configs(PATCHES, topics.ITEMS)
    assert wanted["cleanup.policy"] == "delete" and wanted["retention.ms"] == "-1"
    findings = topic_checks.check_one(PATCHES, topics.ITEMS, wanted | configs, 1)
    assert len(findings) == len(found)
    assert all(part in str(one) for part, one in zip(found, findings, strict=True))
    assert topic_checks.check_one(SETTINGS, topics.ITEMS, wanted, 1)


def test_the_trainer_merges_them_in_the_order_of_the_log() -> None:
    log = [of(0, attributes={"price": 1}), of(1, **WHOLE), of(2, attributes={"price": 2})]
    data = assemble(PATCHES, {"items": log, "users": [], "clicks": []}, cut={})
    [item] = data.items
    assert (item.title, item.attributes) == ("t", {"price": 2, "year": 1999})
    assert data.versions == {FILM: (HERE, 2)} and data.rejected == {"no_base": 1}


def test_what_an_emptied_redis_refuses_is_no_dead_letter() -> None:
    """Its fences say that it lost the items; the batch is read again, and nothing is refused."""
    rig = Rig(items_patches=True)
    log = [of(0, **WHOLE), of(1, attributes={"price": 2})]
    ingest(rig.items, HERE, log[:1], 0)
    rig.items.metadata.write(HERE)
    rig.store._state = type(rig.store._state)()
    [found] = rig.items.apply([RecordBatch(ITEMS, HERE, log[1:], 0)])
    assert isinstance(found, FenceMoved) and rig.out.letters == []
    rig.items.open(HERE)
    assert rig.items.fences.open({HERE: (0, rig.end)}) == {HERE: 0}
    ingest(rig.items, HERE, log, 0)
    assert rig.out.letters == [] and body(rig)["attributes"] == {"price": 2, "year": 1999}
