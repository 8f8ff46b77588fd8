"""Spellings of one id or label are one: Unicode NFC without outer blanks (ADR 31)."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eddyline.errors import Rejected
from eddyline.schema import validation
from eddyline.schema.events import Forget, ItemPatch
from eddyline.schema.id_form import key_in_form, normal
from eddyline.schema.partial import Omitted
from eddyline.schema.partitioning import partition_of
from eddyline.settings.loader import Settings

NOW_MS = 1_700_000_000_000
SETTINGS = Settings(clicks_partitions=2, items_partitions=2)
AS_IS = msgspec.structs.replace(SETTINGS, id_form="as_is")
# Each with the other spellings of it.
SPELLINGS = {
    "zo\u00eb": ["zoe\u0308", " zo\u00eb", "zoe\u0308 ", "\u2003zo\u00eb\u00a0"],
    "u1": ["u1 ", " u1", "\u3000u1"],
    "\u1e69": ["s\u0323\u0307", "s\u0307\u0323", "\u1e61\u0323"],
    "\uac00": ["\u1100\u1161"],
    "\u03a9": ["\u2126"],
}
PAIRS = [(one, other) for one, others in SPELLINGS.items() for other in others]
# Texts that only look alike, or that other normal forms make equal.
DISTINCT = ["fi", "\ufb01", "ﬁx", "a b", "a  b", "A", "a", "\u0430", "\u00b2", "2", "\u200ba"]


def sent(value: Any, *, escaped: bool) -> bytes:
    return json.dumps(value, ensure_ascii=escaped).encode()


def click(settings: Settings = SETTINGS, *, escaped: bool = False, **fields: Any) -> Any:
    value = {"user_id": "u", "item_id": "i", "at_ms": NOW_MS} | fields
    if "merge_into" in fields or "forget_until_ms" in fields:
        del value["item_id"]
    return validation.user_event(settings, 0, sent(value, escaped=escaped), NOW_MS)


def item(settings: Settings = SETTINGS, key: str | None = None, **fields: Any) -> Any:
    value = {"item_id": "i"} | fields
    key = value["item_id"] if key is None else key
    omitted = Omitted()
    made = validation.item(
        settings,
        partition_of(normal(key), 2),
        key.encode(),
        sent(value, escaped=False),
        NOW_MS,
        omitted,
        fields.get("title") == "patch",
    )
    return *made, omitted


@given(st.text())
def test_the_form_is_nfc_and_a_second_time_changes_nothing(text: str) -> None:
    found = normal(text)
    assert normal(found) == found == found.strip()
    assert unicodedata.is_normalized("NFC", found)
    assert found == normal(unicodedata.normalize("NFD", text)) == normal(f" {text}\u2003")


@given(st.text(max_size=9), st.text(max_size=9))
def test_texts_that_differ_otherwise_stay_different(one: str, other: str) -> None:
    canonical = [unicodedata.normalize("NFD", text.strip()).strip() for text in (one, other)]
    assert (normal(one) == normal(other)) is (canonical[0] == canonical[1])


def test_texts_that_look_alike_stay_different() -> None:
    assert len({normal(text) for text in DISTINCT}) == len(DISTINCT)


@pytest.mark.parametrize("escaped", [False, True])
@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_two_spellings_of_a_user_and_an_item_are_one(one: str, other: str, escaped: bool) -> None:
    fields: dict[str, Any] = {"user_id": other, "item_id": other, "escaped": escaped}
    event, own = click(**fields, event_id=other, impression_id=other)
    assert (event.user_id, event.item_id) == (one, one)
    assert (event.event_id, event.impression_id) == (other, other), "a re-send repeats its bytes"
    assert own is (partition_of(one, 2) == 0), "it lies where the id belongs"
    merge, _ = click(user_id=other, merge_into=f"{other}-2", escaped=escaped)
    assert (merge.user_id, merge.merge_into) == (one, normal(f"{other}-2"))
    forget, _ = click(user_id=other, forget_until_ms=NOW_MS, escaped=escaped)
    assert isinstance(forget, Forget) and forget.user_id == one


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_a_spelling_is_an_id_of_its_own_if_it_is_to_be(one: str, other: str) -> None:
    event, own = click(AS_IS, user_id=other, item_id=other)
    assert (event.user_id, event.item_id) == (other, other)
    assert own is (partition_of(other, 2) == 0)
    item_id, found, _, _ = item(AS_IS, item_id=other, tags=[other], attributes={other: 1})
    assert (item_id, found.item_id, found.tags, found.attributes) == (
        other,
        other,
        [other],
        {other: 1},
    )
    with pytest.raises(Rejected, match="wrong_key"):
        item(AS_IS, item_id=other, key=one)


def test_a_user_is_not_merged_into_another_spelling_of_the_same_id() -> None:
    with pytest.raises(Rejected) as refused:
        click(user_id="zoe\u0308", merge_into="zo\u00eb ")
    assert refused.value.reason == "same_user"


@pytest.mark.parametrize("spelled", [" null", "NULL\u2003"])
def test_a_placeholder_with_blanks_is_no_user(spelled: str) -> None:
    with pytest.raises(Rejected) as refused:
        click(user_id=spelled)
    assert refused.value.reason == "placeholder_id"


@pytest.mark.parametrize("blank", [" ", "\u00a0", "\u2003 \u3000"])
def test_an_id_of_blanks_is_empty(blank: str) -> None:
    for call in (
        lambda: click(user_id=blank),
        lambda: click(item_id=blank),
        lambda: click(merge_into=blank),
        lambda: item(item_id=blank),
        lambda: validation.item(SETTINGS, 0, blank.encode(), None, NOW_MS),
        lambda: validation.profile(SETTINGS, 0, blank.encode(), None, NOW_MS),
    ):
        with pytest.raises(Rejected) as refused:
            call()
        assert refused.value.reason == "empty_id"


@pytest.mark.parametrize(("more", "refused"), [(3, False), (4, False), (5, True)])
def test_the_limit_of_an_id_holds_for_its_form(more: int, refused: bool) -> None:
    """U+0958 has three bytes, and six in NFC."""
    spelled = "\u0958" * 42 + "x" * more
    if refused:
        with pytest.raises(Rejected) as error:
            click(user_id=spelled)
        assert error.value.reason == "id_too_long"
    else:
        event, _ = click(user_id=spelled)
        assert len(event.user_id.encode()) == 252 + more


@pytest.mark.parametrize("value", [b'{"item_id": "e\xcc\x81 "}', b'{"item_id": "\xc3\xa9"}', None])
@pytest.mark.parametrize("key", ["\u00e9", "e\u0301", "\u00e9 "])
def test_an_item_has_its_place_under_its_id_alone(key: str, value: bytes | None) -> None:
    """Also where the partitions are the same: compaction keeps other spellings for ever."""
    here = partition_of("\u00e9", 2)
    for partition in (here, 1 - here):
        item_id, _, own = validation.item(SETTINGS, partition, key.encode(), value, NOW_MS)
        assert item_id == "\u00e9" and own is (partition == here and key == "\u00e9")


@pytest.mark.parametrize("key", ["\u00e9", "e\u0301", "\u00e9 "])
def test_a_profile_has_its_place_under_its_id_alone(key: str) -> None:
    here = partition_of("\u00e9", 2)
    value = sent({"user_id": "e\u0301", "attributes": {" a\u0308ge": 3}}, escaped=False)
    for sent_value, attributes in ((value, {"\u00e4ge": 3}), (None, None)):
        user, found, own = validation.profile(SETTINGS, here, key.encode(), sent_value, NOW_MS)
        assert (user, own) == ("\u00e9", key == "\u00e9")
        assert (found.attributes if found else None) == attributes


@pytest.mark.parametrize("title", ["", "patch"])
def test_labels_have_the_form_too(title: str) -> None:
    spelled = {"categories": [" Caf\u00e9", "Cafe\u0301"], "tags": ["new "], "title": title}
    _, found, _, omitted = item(**spelled, attributes={"prix\u00a0": 3, "e\u0301tat": "e\u0301 "})
    assert isinstance(found, ItemPatch) is (title == "patch")
    assert (found.categories, found.tags) == (["Caf\u00e9", "Caf\u00e9"], ["new"])
    assert found.attributes == {"prix": 3, "\u00e9tat": "e\u0301 "}, (
        "values stay: they may be links"
    )
    assert not omitted


@pytest.mark.parametrize("title", ["", "patch"])
def test_a_label_without_a_form_is_left_out_and_counted(title: str) -> None:
    """U+0958 is two characters in NFC."""
    long = "\u0958" * 129
    _, found, _, omitted = item(
        title=title,
        categories=["\u2003", "a "],
        tags=[long, long[:128]],
        attributes={" ": 1, "b": 2, f" {long}": 3},
    )
    assert found.categories == ["a"] and found.tags == [normal(long[:128])]
    assert found.attributes == {"b": 2}
    assert omitted == {
        ("categories", "empty"): 1,
        ("tags", "too_long"): 1,
        ("attributes", "empty"): 1,
        ("attributes", "too_long"): 1,
    }


def test_a_patch_removes_an_attribute_under_any_spelling() -> None:
    for bad in ({}, {"x": []}):  # with a bad part it takes the other way
        attributes = {"e\u0301tat ": None, "a": 1, "a ": 2} | bad
        _, found, _, _ = item(title="patch", attributes=attributes)
        assert found.attributes == {"\u00e9tat": None, "a": 2}


@pytest.mark.parametrize(
    ("key", "expected"),
    [(b"e\xcc\x81 ", b"\xc3\xa9"), (b"\xff ", b"\xff "), (None, b""), (b"a", b"a")],
)
def test_the_key_of_a_record_in_its_form(key: bytes | None, expected: bytes) -> None:
    assert key_in_form(key, "nfc") == expected
    assert key_in_form(key, "as_is") == (key or b"")
