"""A bad optional part is left out and counted; a bad identity, time or availability refuses."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eddyline.errors import Rejected
from eddyline.schema import validation
from eddyline.schema.events import (
    ATTRIBUTES_MAX,
    LABELS_MAX,
    TEXT_CHARS_MAX,
    TITLE_CHARS_MAX,
    VALUE_CHARS_MAX,
    Item,
    ItemPatch,
    decode_item,
    encode,
)
from eddyline.schema.partial import Omitted, Reason
from eddyline.schema.partitioning import partition_of
from eddyline.settings.loader import Settings

NOW_MS = 1_700_000_000_000
SETTINGS = Settings(item_vector_dimension=3)
GOOD: dict[str, Any] = {
    "item_id": "f1",
    "title": "Heat",
    "categories": ["Crime"],
    "tags": ["la"],
    "attributes": {"price": 9.5},
    "available": False,
    "at_ms": NOW_MS,
    "vector": [0.1, 0.2, 0.3],
}


def read(value: bytes, key: str = "f1") -> tuple[Item | None, Omitted]:
    omitted = Omitted()
    partition = partition_of(key, SETTINGS.items_partitions)
    _, item, _ = validation.item(SETTINGS, partition, key.encode(), value, NOW_MS, omitted)
    return item, omitted


def changed(**changes: Any) -> bytes:
    return json.dumps({**GOOD, **changes}).encode()


LONG = "x" * TEXT_CHARS_MAX
NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("part", "sent", "kept", "reasons"),
    [
        ("attributes", {"price": None, "size": 4}, {"size": 4}, {"null": 1}),
        ("attributes", {"price": NAN, "size": INFINITY}, {}, {"not_finite": 2}),
        ("attributes", {"price": [1], "size": {"a": 1}}, {}, {"wrong_type": 2}),
        ("attributes", {"big": 2**63, "small": -(2**63) - 1}, {}, {"too_large": 2}),
        (
            "attributes",
            {"big": 2**63 - 1, "small": -(2**63)},
            {"big": 2**63 - 1, "small": -(2**63)},
            {},
        ),
        ("attributes", {"": 1, "b": True}, {"b": True}, {"empty": 1}),
        ("attributes", {LONG: 1, LONG + "x": 2}, {LONG: 1}, {"too_long": 1}),
        (
            "attributes",
            {"a": "x" * VALUE_CHARS_MAX, "b": "x" * (VALUE_CHARS_MAX + 1)},
            {"a": "x" * VALUE_CHARS_MAX},
            {"too_long": 1},
        ),
        ("attributes", {"half": "\ud800"}, {}, {"not_unicode": 1}),
        ("attributes", None, {}, {"null": 1}),
        ("attributes", ["price"], {}, {"wrong_type": 1}),
        ("title", None, "", {"null": 1}),
        ("title", 7, "", {"wrong_type": 1}),
        ("title", "x" * TITLE_CHARS_MAX, "x" * TITLE_CHARS_MAX, {}),
        ("title", "x" * (TITLE_CHARS_MAX + 1), "", {"too_long": 1}),
        ("categories", ["", "a", None, 3], ["a"], {"empty": 1, "null": 1, "wrong_type": 1}),
        ("tags", [LONG, LONG + "x"], [LONG], {"too_long": 1}),
        ("tags", "la", [], {"wrong_type": 1}),
        ("tags", None, [], {"null": 1}),
        ("vector", None, None, {}),
        ("vector", [1, 2], None, {"wrong_length": 1}),
        ("vector", [1, 2, 3, 4], None, {"wrong_length": 1}),
        ("vector", [1, 2, NAN], None, {"not_finite": 1}),
        ("vector", [1, 2, 2e19], None, {"not_finite": 1}),
        ("vector", [1, 2, None], None, {"wrong_type": 1}),
        ("vector", [1, 2, True], None, {"wrong_type": 1}),
        ("vector", "abc", None, {"wrong_type": 1}),
    ],
)
def test_the_part_is_left_out_and_the_rest_applies(
    part: str, sent: Any, kept: Any, reasons: dict[str, int]
) -> None:
    item, omitted = read(changed(**{part: sent}))
    assert item is not None and not item.available and getattr(item, part) == kept
    assert omitted == Omitted({(part, reason): count for reason, count in reasons.items()})
    assert {reason for _, reason in omitted} <= set(get_args(Reason))
    for other in {"title", "categories", "tags", "attributes", "at_ms"} - {part}:
        assert getattr(item, other) == GOOD[other]


PATCHED = {part: GOOD[part] for part in ("title", "categories", "tags", "attributes", "vector")}


@pytest.mark.parametrize("part", PATCHED)
def test_a_bad_part_of_a_patch_keeps_its_value_and_null_removes_the_others(part: str) -> None:
    others = dict.fromkeys(PATCHED.keys() - {part})
    omitted = Omitted()
    value = json.dumps({"item_id": "f1", part: 7, **others}).encode()
    _, patch, _ = validation.item(SETTINGS, None, b"f1", value, NOW_MS, omitted, patches=True)
    assert patch == ItemPatch(item_id="f1", **others)
    assert omitted == Omitted({(part, "wrong_type"): 1})


def test_a_null_vector_beside_a_bad_part_is_not_counted() -> None:
    item, omitted = read(changed(title=7, vector=None))
    assert item is not None and item.vector is None
    assert omitted == Omitted({("title", "wrong_type"): 1})


def test_null_removes_an_attribute_beside_a_bad_one() -> None:
    omitted = Omitted()
    value = json.dumps({"item_id": "f1", "attributes": {"a": None, "b": [1], "c": 2}}).encode()
    _, patch, _ = validation.item(SETTINGS, None, b"f1", value, NOW_MS, omitted, patches=True)
    assert patch == ItemPatch(item_id="f1", attributes={"a": None, "c": 2})
    assert omitted == Omitted({("attributes", "wrong_type"): 1})


@pytest.mark.parametrize("count", [-1, 0, 1, 1_000])
@pytest.mark.parametrize("part", ["attributes", "tags"])
def test_the_first_labels_and_attributes_up_to_the_limit_stay(part: str, count: int) -> None:
    most = ATTRIBUTES_MAX if part == "attributes" else LABELS_MAX
    names = [f"n{n}" for n in range(most + count)]
    sent: Any = dict.fromkeys(names, 1) if part == "attributes" else names
    item, omitted = read(changed(**{part: sent}))
    assert list(getattr(item, part)) == names[:most]
    assert omitted[part, "too_many"] == max(0, count)


@pytest.mark.parametrize(
    "changes",
    [
        {"item_id": None},
        {"item_id": 7},
        {"item_id": "f2"},
        {"at_ms": "today"},
        {"at_ms": NAN},
        {"at_ms": 10**30},
        {"at_ms": -1},
        {"available": None},
        {"available": "yes"},
    ],
)
def test_identity_time_and_availability_refuse_the_record(changes: dict[str, Any]) -> None:
    for more in ({}, {"attributes": {"price": None}}):
        with pytest.raises(Rejected):
            read(changed(**changes, **more))


@pytest.mark.parametrize("value", [b"", b"{", b"[]", b"7", b"\xff{}", b"[" * 100_000, b'{"a":'])
def test_what_is_no_object_is_refused(value: bytes) -> None:
    with pytest.raises(Rejected):
        read(value)


def test_nothing_is_counted_for_a_record_that_is_refused() -> None:
    omitted = Omitted()
    value = changed(title=None, available=None)
    partition = partition_of("f1", SETTINGS.items_partitions)
    with pytest.raises(Rejected):
        validation.item(SETTINGS, partition, b"f1", value, NOW_MS, omitted)
    assert not omitted


def test_a_profile_loses_bad_attributes_only() -> None:
    omitted = Omitted()
    value = json.dumps({"user_id": "u", "attributes": {"age": 3, "city": None, "x": NAN}}).encode()
    partition = partition_of("u", SETTINGS.clicks_partitions)
    _, found, _ = validation.profile(SETTINGS, partition, b"u", value, NOW_MS, omitted)
    assert found is not None and found.attributes == {"age": 3}
    assert omitted == Omitted({("attributes", "null"): 1, ("attributes", "not_finite"): 1})
    with pytest.raises(Rejected):
        validation.profile(SETTINGS, partition, b"u", b'{"attributes":{"a":null}}', NOW_MS)


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=[])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["title", "categories", "tags", "attributes", "vector"]), anything
    )
)
def test_whatever_the_optional_parts_hold_the_item_applies(parts: dict[str, Any]) -> None:
    item, _ = read(changed(**parts))
    assert item is not None and not item.available
    again = decode_item(
        encode(item),
        key="f1",
        appended_ms=NOW_MS,
        far_future_ms_max=0,
        vector_dimension=3,
        id_form="nfc",
    )
    assert again == item


def test_an_unknown_field_that_json_cannot_hold_leaves_the_rest() -> None:
    """Half a surrogate pair in a field that nobody reads, beside a bad optional part."""
    item, omitted = read(changed(unknown="\ud800", title=3))
    assert item is not None and not item.available and item.title == ""
    assert omitted == {("title", "wrong_type"): 1}
