"""The codec of producers' records: it decodes or raises Rejected, and never anything else."""

import json
import math
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eddyline.errors import Rejected
from eddyline.schema.events import (
    AT_MS_MAX,
    ATTRIBUTES_MAX,
    ID_BYTES_MAX,
    KINDS,
    LABELS_MAX,
    TEXT_CHARS_MAX,
    TITLE_CHARS_MAX,
    VALUE_CHARS_MAX,
    Click,
    Item,
    UserProfile,
    check_id,
    decode_click,
    decode_item,
    decode_key,
    decode_profile,
    decode_user_event,
    encode,
    is_moved,
    quote,
)

# A shared machine is slow at times; that is no finding.
patient = settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
NOW_MS = 1_700_000_000_000
FUTURE_MS = 300_000
CLICK = {"event_id": "e1", "user_id": "ana", "item_id": "f1", "at_ms": NOW_MS}
ITEM = {
    "item_id": "f1",
    "title": "Heat",
    "categories": ["Crime"],
    "attributes": {"year": 1995},
    "at_ms": NOW_MS,
}
PROFILE = {"user_id": "ana", "attributes": {"age": 31}, "at_ms": NOW_MS}


def click(value: bytes | None) -> Click:
    return decode_click(value, appended_ms=NOW_MS, far_future_ms_max=FUTURE_MS, id_form="nfc")


def forgetting(value: bytes | None) -> object:
    return decode_user_event(value, appended_ms=NOW_MS, far_future_ms_max=FUTURE_MS, id_form="nfc")


def item(value: bytes, key: str | None = "f1", dimension: int = 3) -> Item:
    return decode_item(
        value,
        key=key,
        appended_ms=NOW_MS,
        far_future_ms_max=FUTURE_MS,
        vector_dimension=dimension,
        id_form="nfc",
    )


def profile(value: bytes, key: str | None = "ana") -> UserProfile:
    return decode_profile(
        value, key=key, appended_ms=NOW_MS, far_future_ms_max=FUTURE_MS, id_form="nfc"
    )


def dumps(base: dict[str, Any], **changes: Any) -> bytes:
    return json.dumps(
        {k: v for k, v in {**base, **changes}.items() if v is not ...}, ensure_ascii=False
    ).encode()


def refusal(decode: Callable[[bytes], object], value: bytes) -> tuple[str, str]:
    with pytest.raises(Rejected) as caught:
        decode(value)
    assert len(str(caught.value)) < 400, "a reason stays short whatever the record holds"
    return caught.value.reason, caught.value.field


def test_roundtrips() -> None:
    for sent in (
        Click(user_id="ana", item_id="f1", at_ms=5),
        Click(
            user_id="ü",
            item_id="f" * 256,
            at_ms=0,
            kind="cart",
            event_id="e",
            weight=2.5,
            context={"page": 1},
        ),
    ):
        assert click(encode(sent)) == sent
    film = Item(
        item_id="f1",
        title="T",
        tags=["a"],
        attributes={"b": True},
        vector=[0.1, 0.2, 0.3],
        available=False,
    )
    assert item(encode(film)) == film
    person = UserProfile(user_id="ana", attributes={"x": 1.5, "y": "z"}, at_ms=3)
    assert profile(encode(person)) == person


def test_left_out_fields_take_their_defaults_and_unknown_ones_are_ignored() -> None:
    got = click(b'{"user_id":"u","item_id":"i","at_ms":1,"new":{"of":["a",{"later":"version"}]}}')
    assert got == Click(user_id="u", item_id="i", at_ms=1)
    assert (got.kind, got.weight, got.event_id) == ("click", 1.0, None)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_taken(kind: str) -> None:
    assert click(dumps(CLICK, kind=kind)).kind == kind


NO_JSON = [b"", b"{", b"hello", b"\xff\xfe", b'{"user_id": NaN}', b"\x00", b'{"at_ms": 01}']


@pytest.mark.parametrize("value", [*NO_JSON, b'{"user_id": "\\ud800"}', b'{"x":' + b"[" * 100_000])
@pytest.mark.parametrize("decode", [click, item, profile])
def test_what_is_not_json(decode: Callable[[bytes], object], value: bytes) -> None:
    assert refusal(decode, value)[0] == "malformed_json"


@pytest.mark.parametrize("value", [b"null", b"[]", b"1", b'"click"', b"true", b"[" * 100_000])
@pytest.mark.parametrize("decode", [click, item, profile])
def test_what_is_json_but_no_object(decode: Callable[[bytes], object], value: bytes) -> None:
    assert refusal(decode, value) == ("bad_field", "")


def test_no_value() -> None:
    with pytest.raises(Rejected) as caught:
        click(None)
    assert caught.value.reason == "no_value"


BAD_CLICKS: list[tuple[dict[str, Any], str]] = [
    ({"user_id": ...}, "user_id"),
    ({"item_id": ...}, "item_id"),
    ({"user_id": 7}, "user_id"),
    ({"user_id": None}, "user_id"),
    ({"user_id": ""}, "user_id"),
    ({"item_id": ""}, "item_id"),
    ({"event_id": ""}, "event_id"),
    ({"item_id": ["f1"]}, "item_id"),
    ({"kind": "teleport"}, "kind"),
    ({"kind": "Click"}, "kind"),
    ({"kind": 1}, "kind"),
    ({"kind": "x" * 1_000_000}, "kind"),
    ({"at_ms": "now"}, "at_ms"),
    ({"at_ms": 1.5}, "at_ms"),
    ({"at_ms": True}, "at_ms"),
    ({"at_ms": -1}, "at_ms"),
    ({"at_ms": AT_MS_MAX + 1}, "at_ms"),
    ({"at_ms": 10**40}, "at_ms"),
    ({"weight": 0}, "weight"),
    ({"weight": -1}, "weight"),
    ({"weight": 100.001}, "weight"),
    ({"weight": "1"}, "weight"),
    ({"context": {"a": {}}}, "context[...]"),
    ({"context": {"a": None}}, "context[...]"),
    ({"context": {"a": 2**63}}, "context[...]"),
    ({"context": {"a": -(2**63) - 1}}, "context[...]"),
    ({"context": {"a": "x" * 1_000_000}}, "context[...]"),
    ({"context": []}, "context"),
    ({"impression_id": ""}, "impression_id"),
]


@pytest.mark.parametrize(("changes", "field"), BAD_CLICKS, ids=lambda x: str(x)[:40])
def test_bad_fields_of_a_click(changes: dict[str, Any], field: str) -> None:
    assert refusal(click, dumps(CLICK, **changes)) == ("bad_field", field)


def test_numbers_that_json_has_no_word_for() -> None:
    for number in (b"NaN", b"Infinity", b"-Infinity"):
        assert (
            refusal(click, b'{"user_id":"u","item_id":"i","at_ms":1,"weight":' + number + b"}")[0]
            == "malformed_json"
        )
        assert (
            refusal(item, b'{"item_id":"f1","vector":[0,0,' + number + b"]}")[0] == "malformed_json"
        )
    for number in (b"1e400", b"-1e400"):
        assert refusal(item, b'{"item_id":"f1","vector":[0,0,' + number + b"]}")[0] in (
            "bad_field",
            "not_finite",
        )


def test_what_is_not_finite_is_refused_even_where_the_parser_lets_it_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for number in (math.nan, math.inf, -math.inf):
        film = Item(item_id="f1", vector=[0.0, number, 0.0])
        monkeypatch.setattr(
            "eddyline.schema.events.decode_json", lambda decoder, value, film=film: film
        )
        assert refusal(item, b"") == ("not_finite", "vector")


def test_the_wrong_length_of_a_vector() -> None:
    assert item(dumps(ITEM, vector=[0.5] * 3)).vector == [0.5] * 3
    for length in (0, 2, 4, 4_096):
        assert refusal(item, dumps(ITEM, vector=[0.5] * length)) == (
            "wrong_vector_length",
            "vector",
        )
    assert refusal(item, dumps(ITEM, vector=[0.5] * 4_097)) == ("bad_field", "vector")
    assert refusal(item, dumps(ITEM, vector=["a"] * 3))[0] == "bad_field"
    assert refusal(lambda v: item(v, dimension=0), dumps(ITEM, vector=[0.5])) == (
        "wrong_vector_length",
        "vector",
    )


def test_how_far_in_the_future_a_time_may_lie() -> None:
    for ahead in (-NOW_MS, 0, FUTURE_MS - 1, FUTURE_MS):
        assert click(dumps(CLICK, at_ms=NOW_MS + ahead)).at_ms == NOW_MS + ahead
    for ahead in (FUTURE_MS + 1, 10**12):
        assert refusal(click, dumps(CLICK, at_ms=NOW_MS + ahead)) == ("far_future", "at_ms")
        assert refusal(item, dumps(ITEM, at_ms=NOW_MS + ahead)) == ("far_future", "at_ms")
        assert refusal(profile, dumps(PROFILE, at_ms=NOW_MS + ahead)) == ("far_future", "at_ms")
        forget = dumps({"user_id": "ana"}, forget_until_ms=NOW_MS + ahead)
        assert refusal(forgetting, forget) == ("far_future", "forget_until_ms")


@pytest.mark.parametrize("letter", ["a", "é", "日", "𝕏"])
def test_an_id_has_at_most_256_bytes_whatever_its_script(letter: str) -> None:
    most = ID_BYTES_MAX // len(letter.encode())
    longest = letter * most + "a" * (ID_BYTES_MAX - most * len(letter.encode()))
    assert len(longest.encode()) == 256
    assert (
        click(dumps(CLICK, user_id=longest, item_id=longest, event_id=longest)).user_id == longest
    )
    assert click(dumps(CLICK, user_id=longest[:-1])).user_id == longest[:-1]
    for field in ("user_id", "item_id", "event_id"):
        for value in (longest + "a", longest * 40):
            reason, found = refusal(click, dumps(CLICK, **{field: value}))
            assert found == field and reason in ("bad_field", "id_too_long")
    assert (
        refusal(lambda v: item(v, key=longest + "a"), dumps(ITEM, item_id=longest + "a"))[1]
        == "item_id"
    )


@pytest.mark.parametrize("character", ["\x00", "\n", "\x1f", "\x7f", "\x85"])
@pytest.mark.parametrize("field", ["user_id", "item_id", "event_id"])
def test_control_characters_in_an_id(character: str, field: str) -> None:
    assert refusal(click, dumps(CLICK, **{field: f"a{character}b"})) == ("control_character", field)


def test_ids_that_look_odd_but_are_fine() -> None:
    for good in (" ", "a b", "ä", "日本", "🎬", "a:b{c}|d", "-1", "\u00a0"):
        check_id("user_id", good)
    for bad in ("", "\ud800", "x\udcff", "\ud800" * 256):
        with pytest.raises(Rejected):
            check_id("user_id", bad)


def test_limits_of_an_item() -> None:
    for length in (TITLE_CHARS_MAX - 1, TITLE_CHARS_MAX):
        assert item(dumps(ITEM, title="é" * length)).title == "é" * length
    for length in (TITLE_CHARS_MAX + 1, 1_000_000):
        assert refusal(item, dumps(ITEM, title="é" * length)) == ("bad_field", "title")
    for field in ("categories", "tags"):
        assert len(getattr(item(dumps(ITEM, **{field: ["c"] * LABELS_MAX})), field)) == LABELS_MAX
        for labels in (["c"] * (LABELS_MAX + 1), ["c"] * 100_000, "c", None):
            assert refusal(item, dumps(ITEM, **{field: labels})) == ("bad_field", field)
        for label in ("", "c" * (TEXT_CHARS_MAX + 1), 5):
            assert refusal(item, dumps(ITEM, **{field: [label]}))[0] == "bad_field"
    many = {str(n): n for n in range(ATTRIBUTES_MAX)}
    assert item(dumps(ITEM, attributes=many)).attributes == many
    assert refusal(item, dumps(ITEM, attributes={**many, "x": 1})) == ("bad_field", "attributes")
    for length in (VALUE_CHARS_MAX - 1, VALUE_CHARS_MAX):
        assert item(dumps(ITEM, attributes={"a": "é" * length})).attributes == {"a": "é" * length}
    assert refusal(item, dumps(ITEM, attributes={"a": "é" * (VALUE_CHARS_MAX + 1)})) == (
        "bad_field",
        "attributes[...]",
    )
    assert refusal(item, dumps(ITEM, available="yes")) == ("bad_field", "available")
    assert refusal(item, dumps(ITEM, item_id=...)) == ("bad_field", "item_id")


def test_attributes_that_are_taken_can_be_stored() -> None:
    for number in (2**63 - 1, -(2**63), 1e300, -0.0, True):
        attributes = profile(dumps(PROFILE, attributes={"a": number})).attributes
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(attributes)) == {"a": number}


@pytest.mark.parametrize("key", [None, "", "f2", "F1", "f 1"])
def test_the_key_of_a_record_is_its_id(key: str | None) -> None:
    assert refusal(lambda v: item(v, key=key), dumps(ITEM)) == ("wrong_key", "item_id")
    assert refusal(lambda v: profile(v, key=key), dumps(PROFILE)) == ("wrong_key", "user_id")


def test_keys() -> None:
    assert decode_key(None) is None
    assert decode_key("é".encode()) == "é"
    assert refusal(decode_key, b"\xff")[0] == "malformed_key"


def test_a_quoted_value_is_short() -> None:
    assert quote("a") == "'a'"
    assert len(quote("x" * 10**6)) == len(quote(b"\xff" * 10**6)) == 80


def decoded_or_rejected(value: bytes) -> None:
    for decode in (click, item, profile):
        try:
            decode(value)
        except Rejected as rejected:
            assert rejected.reason and len(str(rejected)) < 400


@patient
@given(st.binary(max_size=200))
def test_any_bytes_are_decoded_or_rejected(value: bytes) -> None:
    decoded_or_rejected(value)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
anything = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=8,
)
fields = st.sampled_from(sorted({*Click.__struct_fields__, *Item.__struct_fields__, "attributes"}))


@patient
@given(
    st.sampled_from([CLICK, ITEM, PROFILE]),
    st.dictionaries(fields, anything, max_size=4),
    st.data(),
)
def test_mutated_records_are_decoded_or_rejected(
    base: dict[str, Any], changes: dict[str, Any], data: st.DataObject
) -> None:
    value = json.dumps({**base, **changes}).encode()
    decoded_or_rejected(value)
    start = data.draw(st.integers(0, len(value)))
    end = data.draw(st.integers(start, min(len(value), start + 9)))
    decoded_or_rejected(value[:start] + data.draw(st.binary(max_size=9)) + value[end:])


@patient
@given(st.text(max_size=300))
def test_any_text_is_a_good_id_or_rejected(value: str) -> None:
    try:
        check_id("user_id", value)
    except Rejected:
        return
    assert 1 <= len(value.encode()) <= 256


@pytest.mark.parametrize(
    ("context", "moved"),
    [
        (b'{"eddyline.moved":true}', True),
        (b'{"eddyline.moved":true,"page":"a"}', True),
        (b'{"eddyline.moved":1}', False),
        (b'{"eddyline.moved":1.0}', False),
        (b'{"eddyline.moved":false}', False),
        (b'{"page":true}', False),
        (b"null", False),
    ],
)
def test_only_true_marks_a_moved_event(context: bytes, moved: bool) -> None:
    value = b'{"user_id":"u","item_id":"i","at_ms":1,"context":' + context + b"}"
    assert is_moved(click(value)) is moved


@pytest.mark.parametrize("field", [b'"n\xff": 1', b'"note": "\xc3("'])
def test_bytes_that_are_not_utf_8_refuse_the_record_even_in_an_unknown_field(field: bytes) -> None:
    value = b'{"user_id": "u", "item_id": "i", "at_ms": 1, ' + field + b"}"
    with pytest.raises(Rejected) as refused:
        decode_click(value, appended_ms=1, far_future_ms_max=0, id_form="nfc")
    assert refused.value.reason == "malformed_json"
