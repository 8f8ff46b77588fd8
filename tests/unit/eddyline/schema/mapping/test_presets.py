"""Presets against records as their systems send them, and against any JSON."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eddyline.errors import Rejected, SettingsError
from eddyline.schema import validation
from eddyline.schema.mapping import envelopes, mapper, spec
from eddyline.schema.mapping.registry import Access, Registry
from eddyline.settings.loader import Settings, load

GOLDEN = Path(__file__).parents[4] / "golden" / "feeds"


@cache
def golden(preset: str) -> tuple[dict[str, Any], ...]:
    """Records as they were read from Kafka or taken from specifications, and their events."""
    text = (GOLDEN / f"{preset}.jsonl").read_text(encoding="utf-8")
    return tuple(json.loads(line) for line in text.splitlines())


def every_record() -> list[Any]:
    return [
        pytest.param(preset, one, id=f"{preset}-{one['name']}")
        for preset in spec.PRESETS
        if preset != "eddyline"
        for one in golden(preset)
    ]


def record(key: str | None, value: str | None, headers: Any = ()) -> Any:
    return SimpleNamespace(
        topic="shop",
        partition=0,
        offset=7,
        timestamp=1,
        key=None if key is None else key.encode(),
        value=None if value is None else value.encode(),
        headers=[(name, found.encode()) for name, found in headers],
    )


def mapped(preset: str, topic: str, raw: Any) -> list[tuple[str, Any]]:
    found = mapper.of(preset, topic)
    assert found is not None
    return [
        ((one.key or b"").decode(), None if one.value is None else json.loads(one.value))
        for one in found.records(raw)
    ]


@pytest.mark.parametrize(("preset", "one"), every_record())
def test_a_record_becomes_the_events_that_it_says(preset: str, one: dict[str, Any]) -> None:
    raw = record(one["key"], one["value"], one["headers"])
    if "refused" in one:
        with pytest.raises(Rejected) as rejected:
            mapped(preset, one["topic"], raw)
        assert [rejected.value.reason, rejected.value.field] == one["refused"]
    else:
        assert mapped(preset, one["topic"], raw) == [(key, found) for key, found in one["events"]]


def test_a_row_is_the_same_in_every_way_that_debezium_writes_it() -> None:
    rows = {
        one["name"]: one["events"][0][1]
        for one in golden("debezium")
        if one["name"].endswith("-insert")
    }
    precise = rows.pop("bytes-insert")
    for row in rows.values():
        row.pop("at_ms", None)
    assert len(rows) >= 6 and all(row == rows["plain-insert"] for row in rows.values())
    assert rows["plain-insert"]["attributes"]["price"] == 79.5
    # Without a schema nothing says where the point is: the price is left out, and counted.
    assert precise["attributes"]["price"] == []


def test_placeholders_of_every_type_are_no_values() -> None:
    text = """
[items]
preset = "debezium"
[items.fields]
item_id = { join = ["b", "a"] }
attributes_from = {}
"""
    found = spec.parse(text.encode(), "items", "map.toml")
    assert found is not None
    [one] = [one for one in golden("debezium") if one["name"] == "placeholder-by-type"]
    made = mapper.compiled(found, "items", "map.toml").records(record(one["key"], one["value"]))
    assert b"unavailable" not in (made[0].value or b"") and b"X19kZ" not in (made[0].value or b"")
    assert made[0].key == b"t/4"
    for name in ("title", "categories", "tags"):
        placed = {"after": {"id": 1, name: "__debezium_unavailable_value"}, "op": "u"}
        with pytest.raises(Rejected, match=f"unavailable_value: {name}: .*REPLICA IDENTITY FULL"):
            mapped("debezium", "items", record('{"id":1}', json.dumps(placed)))


def test_a_login_moves_the_visitors_history() -> None:
    identify = {"type": "identify", "userId": "u", "anonymousId": "a", "traits": {"plan": "x"}}
    raw = record(None, json.dumps(identify))
    assert mapped("segment", "clicks", raw) == [("a", {"user_id": "a", "merge_into": "u"})]
    assert mapped("segment", "users", raw) == [("u", {"user_id": "u", "attributes": {"plan": "x"}})]
    alias = {"type": "alias", "previousId": "a", "userId": "u"}
    assert mapped("segment", "clicks", record(None, json.dumps(alias)))[0][1]["merge_into"] == "u"
    assert mapped("segment", "clicks", record(None, '{"type":"page","userId":"u"}')) == []
    assert mapped("segment", "users", record(None, json.dumps(alias))) == []


def test_feedback_in_another_array_is_the_same_feedback() -> None:
    one = {"FeedbackType": "like", "UserId": "u", "ItemId": "1", "Timestamp": "2026-03-01"}
    alone = mapped("gorse", "clicks", record(None, json.dumps(one)))
    pair = mapped("gorse", "clicks", record(None, json.dumps([one | {"ItemId": "0"}, one])))
    assert alone == pair[1:] and alone[0][1]["event_id"] == "like/u/1"


def test_a_presets_parts_are_replaced_one_by_one() -> None:
    text = """
[clicks]
preset = "segment"
kinds = { "Product Viewed" = "ignore", "Product Shared" = { kind = "like", weight = 3 } }
[clicks.fields]
user_id = "$.context.account"
[[clicks.rule]]
where = { type = "track" }
each = "properties"
"""
    found = spec.parse(text.encode(), "clicks", "map.toml")
    assert found is not None
    made = mapper.compiled(found, "clicks", "map.toml")
    track = {"type": "track", "event": "Product Shared", "context": {"account": 5}}
    [one] = made.records(record(None, json.dumps(track | {"properties": {"sku": "s"}})))
    event = json.loads(one.value or b"")
    assert (event["kind"], event["weight"], event["user_id"]) == ("like", 3, "5")
    viewed = track | {"event": "Product Viewed", "properties": {"sku": "s"}}
    assert made.records(record(None, json.dumps(viewed))) == []


def test_a_preset_says_what_it_is_for() -> None:
    with pytest.raises(SettingsError, match="preset ga4: is for clicks, not for items"):
        mapper.of("ga4", "items")


_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
_NAMES = st.sampled_from(
    "type event userId anonymousId messageId properties products product_id timestamp op after "
    "before source schema payload fields field name parameters scale value id item_id user_id "
    "title tags categories price items events params data data_base64 specversion iodebeziumop "
    "FeedbackType UserId ItemId Timestamp Labels IsHidden item user __deleted event_name traits "
    "contexts_com_snowplowanalytics_snowplow_ecommerce_product_1".split()
) | st.text(max_size=5)
_KNOWN = st.sampled_from(
    "track identify alias c u d r t m true interaction item user snowplow_ecommerce_action "
    "add_to_cart __debezium_unavailable_value 2026-03-01T09:00:00Z read AP8=".split()
)
_JSON = st.recursive(
    _SCALARS | _KNOWN,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_NAMES, inner, max_size=6),
    max_leaves=25,
)
_HEADERS = st.lists(
    st.tuples(
        st.sampled_from(["ce_id", "ce_type", "ce_source", "content-type", "replayed_from", "x"]),
        st.none() | st.binary(max_size=9) | st.just(b"application/cloudevents+json"),
    ),
    max_size=4,
)
_TOPICS_OF = {
    preset: [topic for topic in spec.TOPICS if topic in spec.preset_tables(preset)]
    for preset in spec.PRESETS
    if preset != "eddyline"
}


@given(
    st.sampled_from([(p, t) for p, topics in _TOPICS_OF.items() for t in topics]),
    st.none() | _JSON.map(lambda found: json.dumps(found).encode()) | st.binary(max_size=30),
    st.none() | _JSON.map(lambda found: json.dumps(found).encode()) | st.binary(max_size=9),
    _HEADERS,
)
@settings(max_examples=300, deadline=None)
def test_any_record_gives_events_or_a_reason(
    where: tuple[str, str], value: bytes | None, key: bytes | None, headers: Any
) -> None:
    preset, topic = where
    named = Settings(**{f"{topic}_map": preset}, clicks_partitions=1, items_partitions=1)  # type: ignore[arg-type]
    raw = record(None, None)
    raw.key, raw.value, raw.headers = key, value, headers
    raw.timestamp = 1_800_000_000_000
    by_topic: Any = {
        "clicks": validation.user_events,
        "items": validation.item_changes,
        "users": validation.profiles,
    }
    try:
        first = by_topic[topic](named, raw)
    except Rejected as rejected:
        assert rejected.reason and rejected.detail
    else:
        assert first == by_topic[topic](named, raw), "the same each time"
        validation.unsent_record(named, topic, raw)


DOCS = Path(__file__).parents[5] / "docs" / "feeds"


def blocks(language: str) -> list[Any]:
    """The code blocks of the pages in this language."""
    return [
        pytest.param(block.split("\n```")[0], id=f"{page.stem}-{number}")
        for page in sorted(DOCS.glob("*.md"))
        for number, block in enumerate(
            page.read_text(encoding="utf-8").split(f"\n```{language}\n")[1:]
        )
    ]


@pytest.mark.parametrize("text", blocks("toml"))
def test_every_map_in_the_docs_is_one(text: str) -> None:
    tables = [topic for topic in spec.TOPICS if f"[{topic}]" in text]
    assert tables
    for topic in tables:
        found = spec.parse(text.encode(), topic, "the page")
        assert found is not None
        mapper.compiled(found, topic, "the page", Registry(Access(), envelopes.decoded))


@pytest.mark.parametrize("preset", spec.PRESETS)
def test_every_preset_has_a_page_with_a_command_that_can_be_copied(
    preset: str, tmp_path: Path
) -> None:
    page = (DOCS / f"{preset}.md").read_text(encoding="utf-8")
    commands = [block.split("\n```")[0] for block in page.split("\n```\n")[1:]]
    words = [word for command in commands for word in command.split()]
    environment = dict(word.split("=", 1) for word in words if word.startswith("EDDYLINE_"))
    load(environment, folder=tmp_path)
    if preset != "eddyline":
        assert preset in environment.values()
    assert f"[{preset}.md]({preset}.md)" in (DOCS / "maps.md").read_text(encoding="utf-8")
