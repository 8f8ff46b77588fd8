"""Maps: what they make of records, what they refuse, and their limits."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from eddyline.errors import Rejected, SettingsError
from eddyline.schema import validation
from eddyline.schema.events import Click
from eddyline.schema.mapping import mapper, spec
from eddyline.schema.mapping.mapper import Mapper
from eddyline.schema.partitioning import partition_of_bytes
from eddyline.schema.records import MAPPED, OWN
from eddyline.settings.loader import Settings, load

MS = 1_772_355_600_123
FLAT = """
[clicks]
kinds = { seen = "view", bought = { kind = "purchase", weight = 2.5 }, hover = "ignore" }
[clicks.fields]
user_id = { first = ["uid", "visitor"] }
item_id = "sku"
at_ms = { path = "ts", format = ["s", "iso"] }
kind = "action"
event_id = "id"
"""


def compiled(text: str, topic: str = "clicks") -> Mapper:
    found = spec.parse(text.encode(), topic, "map.toml")
    assert found is not None
    return mapper.compiled(found, topic, "map.toml")


def record(value: Any, key: bytes | None = b"k", headers: Sequence[Any] = (), **more: Any) -> Any:
    raw = value if value is None or isinstance(value, bytes) else msgspec.json.encode(value)
    fields = {"topic": "shop", "partition": 0, "offset": 7, "timestamp": MS} | more
    return SimpleNamespace(key=key, value=raw, headers=headers, **fields)


def mapped(text: str, value: Any, topic: str = "clicks", **more: Any) -> list[Any]:
    return [
        None if one.value is None else msgspec.json.decode(one.value)
        for one in compiled(text, topic).records(record(value, **more))
    ]


def refused(text: str, value: Any, topic: str = "clicks", **more: Any) -> tuple[str, str]:
    with pytest.raises(Rejected) as found:
        compiled(text, topic).records(record(value, **more))
    return found.value.reason, found.value.field


def test_a_flat_record_becomes_a_click() -> None:
    [one] = compiled(FLAT).records(
        record({"uid": 17, "sku": 4.0, "ts": "1772355600", "action": "bought", "id": "e", "x": 1})
    )
    assert msgspec.json.decode(one.value or b"") == {
        "kind": "purchase",
        "weight": 2.5,
        "user_id": "17",
        "item_id": "4",
        "at_ms": 1_772_355_600_000,
        "event_id": "e",
    }
    assert (one.topic, one.partition, one.offset, one.timestamp) == ("shop", 0, 7, MS)
    assert one.key == b"17" and list(one.headers) == [MAPPED]


def test_the_first_path_with_a_value_and_the_first_format_that_fits_count() -> None:
    value = {"uid": None, "visitor": " v ", "sku": "a", "ts": "2026-03-01T09:00:00.123Z"}
    assert mapped(FLAT, value) == [{"user_id": "v", "item_id": "a", "at_ms": MS}]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"uid": None}, ("missing_field", "user_id")),
        ({"uid": ""}, ("missing_field", "user_id")),
        ({"uid": True}, ("bad_field", "user_id")),
        ({"uid": 1.5}, ("bad_field", "user_id")),
        ({"sku": ["a"]}, ("bad_field", "item_id")),
        ({"ts": "soon"}, ("bad_field", "at_ms")),
        ({"ts": "infinity"}, ("bad_field", "at_ms")),
        ({"action": "looked"}, ("unknown_kind", "kind")),
        ({"action": 5}, ("unknown_kind", "kind")),
    ],
)
def test_what_identifies_an_event_is_refused_with_field_and_reason(
    change: dict[str, Any], expected: tuple[str, str]
) -> None:
    assert refused(FLAT, {"uid": "u", "sku": "a"} | change) == expected


@pytest.mark.parametrize("value", [b"", b"{", b"\xff", b'{"a":"\xff"}', b"[" * 5_000, b"nope"])
def test_what_is_no_json_is_refused(value: bytes) -> None:
    assert refused(FLAT, value) == ("malformed_json", "")


def test_an_ignored_kind_makes_no_event() -> None:
    assert mapped(FLAT, {"uid": "u", "sku": "a", "action": "hover"}) == []


ORDERS = """
[clicks]
otherwise = "ignore"
[clicks.fields]
user_id = "$.customer.id"
event_id = "$.order"
kind = { const = "purchase" }
[[clicks.rule]]
where = { type = "order", total = { above = 0 }, test = { exists = false } }
each = "lines"
item_id = "product"
context = { shop = "^.shop", nested = "more" }
"""


def test_each_line_of_an_order_is_an_event_with_an_id_of_its_own() -> None:
    order = {
        "type": "order",
        "order": "o-1",
        "shop": "north",
        "total": 3,
        "customer": {"id": 5},
        "lines": [{"product": 1, "more": {}}, {"product": "2"}],
    }
    found = mapped(ORDERS, order)
    assert [(one["item_id"], one["event_id"]) for one in found] == [("1", "o-1#0"), ("2", "o-1#1")]
    assert [one["context"] for one in found] == [{"shop": "north"}] * 2
    del order["order"]
    assert [one["event_id"] for one in mapped(ORDERS, order)] == ["shop/0/7#0", "shop/0/7#1"]
    replayed = mapped(ORDERS, order, headers=[("replayed_from", b"shop/1/3")], offset=99)
    assert [one["event_id"] for one in replayed] == ["shop/1/3#0", "shop/1/3#1"]
    for change in ({"total": 0}, {"test": True}, {"type": "other"}, {"total": "x"}, {"lines": []}):
        assert mapped(ORDERS, order | change) == []


def test_one_bad_line_refuses_the_whole_order() -> None:
    order = {"type": "order", "total": 1, "customer": {"id": 5}, "lines": [{"product": 1}, {}]}
    assert refused(ORDERS, order) == ("missing_field", "item_id")


@pytest.mark.parametrize("lines", [spec.EVENTS_MAX - 1, spec.EVENTS_MAX, spec.EVENTS_MAX + 1])
def test_a_record_has_a_limited_number_of_events(lines: int) -> None:
    order = {
        "type": "order",
        "total": 1,
        "customer": {"id": 5},
        "lines": [{"product": n} for n in range(lines)],
    }
    if lines > spec.EVENTS_MAX:
        assert refused(ORDERS, order) == ("too_many_events", "")
    else:
        assert len(mapped(ORDERS, order)) == lines


ITEMS = """
[items]
nulls = ["(not set)"]
[items.fields]
item_id = "id"
title = "name"
categories = { path = "cats", split = "|" }
tags = "labels[*].text"
available = { path = "stock", above = 0 }
at_ms = { path = "changed", format = "%d.%m.%Y %H:%M", zone = "Europe/Vienna" }
attributes = { price = { path = "price", type = "number" }, brand = "maker" }
attributes_from = { path = "facts", leave_out = ["secret"], nested = "flatten" }
"""


def test_an_item_is_mapped_and_its_bad_optional_parts_are_left_to_be_left_out() -> None:
    value = {
        "id": 9,
        "name": " Oak table ",
        "cats": "furniture||wood",
        "labels": [{"text": "new"}, {"text": None}, {}],
        "stock": "3",
        "changed": "01.03.2026 10:00",
        "price": "249.90",
        "maker": "(not set)",
        "facts": {"legs": 4, "secret": 1, "size": {"w": 80, "no": [1]}, "gone": None},
    }
    assert mapped(ITEMS, value, "items") == [
        {
            "item_id": "9",
            "title": "Oak table",
            "categories": ["furniture", "wood"],
            "tags": ["new"],
            "available": True,
            "at_ms": 1_772_355_600_000,
            "attributes": {"legs": 4, "size.w": 80, "price": 249.9},
        }
    ]
    bad = value | {"price": "cheap", "name": {}, "stock": 0}
    settings = Settings(items_map="x", items_partitions=1)
    [one] = compiled(ITEMS, "items").records(record(bad))
    omitted = validation.Omitted()
    _, item, _ = validation.item(settings, 0, one.key, one.value, MS, omitted)
    assert item is not None and not item.available and "price" not in item.attributes
    assert omitted == {("title", "wrong_type"): 1, ("attributes", "wrong_type"): 1}
    assert refused(ITEMS, value | {"stock": "many"}, "items") == ("bad_field", "available")


@pytest.mark.parametrize(
    ("key", "expected"), [(b"a", "a"), (b"17", "17"), (b'{"id":17}', "17"), (b'"a"', "a")]
)
def test_a_record_without_a_value_deletes_the_item_of_its_key(key: bytes, expected: str) -> None:
    [one] = compiled(ITEMS, "items").records(record(None, key=key))
    assert (one.key, one.value) == (expected.encode(), None)


@pytest.mark.parametrize("key", [None, b"", b'{"other":1}', b"[1]"])
def test_a_delete_without_an_id_is_refused(key: bytes | None) -> None:
    assert refused(ITEMS, None, "items", key=key) == ("missing_field", "item_id")


def test_a_condition_makes_a_delete_and_a_merge() -> None:
    text = (
        ITEMS + '[[items.rule]]\nmake = "delete"\nwhere = { gone = [true, "yes"] }\n[[items.rule]]'
    )
    assert mapped(text, {"id": 1, "gone": True, "stock": 1}, "items") == [None]
    assert mapped(text, {"id": 1, "gone": 1, "stock": 1}, "items") != [None], "1 is not true"
    text = '[clicks]\n[[clicks.rule]]\nmake="merge"\nuser_id="old"\nmerge_into="new"\nat_ms="t"'
    found = mapped(text, {"old": 1, "new": 2, "t": 5})
    assert found == [{"user_id": "1", "merge_into": "2", "at_ms": 5}]


def test_a_profile_has_the_attributes_of_pairs() -> None:
    text = """
[users]
[users.fields]
user_id = "$key"
attributes_from = { path = "fields", name = "n", value = "v" }
"""
    value = {"fields": [{"n": "city", "v": "Graz"}, {"n": "bad", "v": []}, {"v": 1}, 5]}
    assert mapped(text, value, "users", key=b"u") == [
        {"user_id": "u", "attributes": {"city": "Graz"}}
    ]
    text = text.replace('name = "n", value = "v"', 'split = ":"')
    assert mapped(text, {"fields": ["country:AT", "x", 5]}, "users", key=b"u") == [
        {"user_id": "u", "attributes": {"country": "AT"}}
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "there is no table 'x'"),
        ("[items]", r"map.toml: has no table \[clicks\]"),
        ("[clicks]\nfoo = 1", "unknown field `foo`"),
        ("[clicks]", "a rule needs user_id"),
        ('[clicks]\nfields = { user_id = "a..b", item_id = "i" }', "path 'a..b' is wrong"),
        ('[clicks]\nfields = { user_id = {}, item_id = "i" }', "one of path, first, join"),
        (
            '[clicks]\nfields={user_id="u",item_id="i",at_ms={path="t",format="x"}}',
            "no time format 'x'",
        ),
        (
            '[clicks]\nfields={user_id="u",item_id="i",at_ms={path="t",format="iso",zone="Moon"}}',
            "no time zone 'Moon'",
        ),
        (
            '[clicks]\nkinds = { a = "b" }\nfields = { user_id = "u", item_id = "i", kind = "k" }',
            "kinds: 'a' = 'b'",
        ),
        ('[clicks]\nfields = { make = "item" }', "make = 'item': clicks has event"),
        ('[clicks]\npartition = "key"\nfields={user_id="u",item_id="i"}', "is for items"),
        ('[clicks]\nfields={user_id="u",item_id="i",where={a=1}}', "a `where` belongs into a rule"),
        ('[clicks]\nfields={user_id="u",item_id="i",title="t"}', "fields: has no title, but"),
        (
            '[clicks]\nfields={user_id="u",item_id="i"}\n[[clicks.rule]]\nmerge_into="x"',
            "a rule that makes event: has no merge_into",
        ),
        ('[clicks]\npreset = "nope"', "preset = 'nope'"),
        ("[clicks", "map.toml: "),
    ],
)
def test_a_wrong_map_is_named_with_file_and_key(text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        compiled(text)


def test_a_file_has_a_limited_size_and_number_of_rules() -> None:
    for size in (spec.MAP_BYTES_MAX - 1, spec.MAP_BYTES_MAX):
        compiled(FLAT + "#" * (size - len(FLAT)))
    with pytest.raises(SettingsError, match="a map has at most"):
        compiled(FLAT + "#" * (spec.MAP_BYTES_MAX + 1 - len(FLAT)))
    for rules in (spec.RULES_MAX - 1, spec.RULES_MAX):
        compiled(FLAT + "[[clicks.rule]]\n" * rules)
    with pytest.raises(SettingsError, match=r"length <= 32 - at `\$\.rule`"):
        compiled(FLAT + "[[clicks.rule]]\n" * (spec.RULES_MAX + 1))


def test_settings_read_the_map_and_refuse_a_wrong_one(tmp_path: Any) -> None:
    file = tmp_path / "shop.toml"
    file.write_text(FLAT, encoding="utf-8")
    settings = load({"EDDYLINE_CLICKS_MAP": str(file)}, folder=tmp_path)
    [(one, event, _)] = validation.user_events(settings, record({"uid": "u", "sku": "a"}))
    assert isinstance(event, Click) and event.at_ms == MS and list(one.headers) == [MAPPED]
    with pytest.raises(SettingsError, match=r"items_map = 'nope\.toml': neither a preset"):
        load({"EDDYLINE_ITEMS_MAP": "nope.toml"}, folder=tmp_path)
    with pytest.raises(SettingsError, match=r"has no table \[items\]"):
        load({"EDDYLINE_ITEMS_MAP": str(file)}, folder=tmp_path)
    assert validation.map_of(load({"EDDYLINE_ITEMS_MAP": "eddyline"}), "items") is None


def test_a_marked_record_is_in_the_own_format(tmp_path: Any) -> None:
    file = tmp_path / "shop.toml"
    file.write_text(FLAT, encoding="utf-8")
    settings = Settings(clicks_map=str(file))
    own = b'{"user_id":"u","item_id":"a"}'
    [(_, event, _)] = validation.user_events(settings, record(own, headers=[OWN]))
    assert event.user_id == "u"
    with pytest.raises(Rejected, match="missing_field"):
        validation.user_events(settings, record(own))


def test_items_by_key_lie_where_their_producer_puts_their_key(tmp_path: Any) -> None:
    file = tmp_path / "shop.toml"
    file.write_text(ITEMS.replace("[items]", '[items]\npartition = "key"', 1), encoding="utf-8")
    settings = Settings(items_map=str(file), items_partitions=4)
    key = b'{"id":17}'
    here = partition_of_bytes(key, 4)
    good = record({"id": 17, "stock": 1}, key=key, partition=here)
    assert validation.item_changes(settings, good)[0][0] == "17"
    elsewhere = record({"id": 17, "stock": 1}, key=key, partition=(here + 1) % 4)
    with pytest.raises(Rejected, match=f"wrong_partition.*belongs to partition {here}"):
        validation.item_changes(settings, elsewhere)
    with pytest.raises(Rejected, match="no_key"):
        validation.item_changes(settings, record({"id": 17, "stock": 1}, key=None))
    with pytest.raises(Rejected, match="only its own producer may write"):
        validation.item_changes(settings, record(b'{"item_id":"1"}', b"1", [OWN]))
    archived = record(b'{"item_id":"1"}', b"1", [MAPPED], partition=3)
    assert validation.item_changes(settings, archived)[0][0] == "1"


def test_a_long_event_id_becomes_its_digest() -> None:
    [one] = mapped(FLAT, {"uid": "u", "sku": "a", "id": "x" * 300})
    assert one["event_id"].startswith("sha256:") and len(one["event_id"]) == 71
    [one] = mapped(FLAT, {"uid": "u", "sku": "a", "id": "x" * 256})
    assert one["event_id"] == "x" * 256


@pytest.mark.parametrize(
    ("weight", "allowed"), [(0, False), (0.001, True), (100, True), (100.001, False)]
)
def test_the_weight_of_a_kind_is_that_of_an_event(weight: float, allowed: bool) -> None:
    text = FLAT.replace("weight = 2.5", f"weight = {weight}")
    if allowed:
        compiled(text)
    else:
        with pytest.raises(SettingsError, match=r"\$\.kinds"):
            compiled(text)


@pytest.mark.parametrize("each", [spec.EACH_MAX - 1, spec.EACH_MAX, spec.EACH_MAX + 1])
def test_the_lists_in_lists_are_limited(each: int) -> None:
    text = f"{FLAT}[[clicks.rule]]\neach = {['a'] * each}\n".replace("'", '"')
    if each > spec.EACH_MAX:
        with pytest.raises(SettingsError, match="length <= 4"):
            compiled(text)
    else:
        compiled(text)


@pytest.mark.parametrize("paths", [spec.NAMES_MAX - 1, spec.NAMES_MAX, spec.NAMES_MAX + 1])
def test_the_paths_of_a_field_are_limited(paths: int) -> None:
    text = FLAT.replace('["uid", "visitor"]', str(["uid"] * paths).replace("'", '"'))
    if paths > spec.NAMES_MAX:
        with pytest.raises(SettingsError, match="length <= 64"):
            compiled(text)
    else:
        compiled(text)
