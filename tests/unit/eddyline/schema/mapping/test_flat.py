"""Flat maps: the short way from a record to an event makes what the mapper makes."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import mapping as bench
from eddyline.errors import Rejected
from eddyline.schema import validation
from eddyline.schema.mapping import envelopes, mapper, spec
from eddyline.schema.mapping.flat import MappedClick
from eddyline.schema.mapping.mapper import Mapper
from eddyline.schema.mapping.registry import HEADER_BYTES, Access, Registry
from eddyline.settings.loader import Settings

MS = 1_772_355_600_123
SETTINGS = Settings(clicks_partitions=4, far_future_ms_max=60_000)
KINDS = ("", 'kinds = { seen = "view", bought = { kind = "purchase", weight = 2 }, no = "ignore" }')
FIELDS = {
    "at_ms": ('"t"', '{ path = "t", format = "s" }', '{ path = "t", format = ["iso", "ms"] }'),
    "kind": ('"k"', '{ path = "k", default = "seen" }'),
    "event_id": ('"e"', '"x.e"'),
    "impression_id": ('"p"',),
    "weight": ('"w"',),
}
TEXTS = (
    st.text(max_size=4)
    | st.sampled_from(["a", " b ", "", "\t", "a\x7f", "ü", "null", "x" * 256, "x" * 257, "\ud800"])
    | st.sampled_from(["view", "seen", "bought", "no", "7", "1.5", "2026-03-01T10:00:00Z"])
)
NUMBERS = (
    st.sampled_from([0, 1, -1, MS, MS // 1000, MS + 60_000, MS + 60_001, 253_402_300_800_000])
    | st.sampled_from(
        [
            10**18,
            -(10**18),
            2**63,
            2**64,
            10**249,
            10**400,
            -(10**400),
            17.0,
            1.5,
            100,
            100.5,
            0.0,
            -2,
        ]
    )
    | st.floats()
)
VALUES: Any = TEXTS | NUMBERS | st.none() | st.booleans() | st.just([1]) | st.just({"e": "f"})
USUAL = {"u": "ana", "i": 7, "t": MS // 1000, "k": "seen", "e": "e-1", "p": "p-1", "w": 1.5}
# Most fields of a record are as usual: otherwise few records would go the short way.
RECORDS = st.dictionaries(st.sampled_from([*USUAL, "x"]), VALUES, max_size=2)
HEADERS = st.lists(
    st.sampled_from(
        [
            ("trace", b"1"),
            ("produced_us", b"17"),
            ("origin_ms", b"1772355600000"),
            ("replayed_from", b"clicks/1/7"),
            ("eddyline_format", b"1"),
            ("none", None),
        ]
    ),
    max_size=2,
)


class JsonRegistry(Registry):
    """A registry whose schemas are JSON Schemas."""

    def decoded(self, value: bytes) -> Any:
        return envelopes.decoded(value[HEADER_BYTES:])


REGISTRY = JsonRegistry(Access(), envelopes.decoded)


def mapper_of(text: str, registry: Registry | None = None) -> Mapper:
    found = spec.parse(text.encode(), "clicks", "the test")
    assert found is not None
    return mapper.compiled(found, "clicks", "the test", registry)


def record(value: bytes | None, headers: Any = (), timestamp: int = MS) -> Any:
    return SimpleNamespace(
        topic="shop",
        partition=1,
        offset=7,
        timestamp=timestamp,
        key=b"k",
        value=value,
        headers=headers,
    )


def read(by_map: Mapper, one: Any) -> Any:
    """What becomes of the record: its events with all that their records say, or the refusal."""
    try:
        found = validation.user_events(SETTINGS, one, by_map)
    except Rejected as rejected:
        return rejected.reason, rejected.field, rejected.detail
    return [
        (
            (event, type(event.at_ms), type(getattr(event, "weight", None)), here),
            (r.topic, r.partition, r.offset, r.timestamp, r.key, r.value, list(r.headers)),
        )
        for r, event, here in found
    ]


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_both_ways_make_the_same(data: st.DataObject) -> None:
    draw = data.draw
    lines = ["[clicks]", draw(st.sampled_from(KINDS)), draw(st.sampled_from(["", 'nulls = ["x"]']))]
    lines += ["[clicks.fields]", 'user_id = "u"', 'item_id = "i"']
    for name, ways in FIELDS.items():
        if way := draw(st.sampled_from(["", *ways])):
            lines.append(f"{name} = {way}")
    in_registry = draw(st.booleans())
    if in_registry:
        lines.insert(1, 'encoding = "registry"')
    by_map = mapper_of("\n".join(lines), REGISTRY)
    sent = USUAL | draw(RECORDS)
    for name in draw(st.sets(st.sampled_from(sorted(USUAL)), max_size=1)):
        del sent[name]
    timestamp = draw(st.sampled_from([MS, MS, MS, -1]))
    value = bytes(HEADER_BYTES if in_registry else 0) + json.dumps(sent).encode()
    one = record(value, draw(st.just(()) | HEADERS), timestamp)
    short = read(by_map, one)
    by_map._flat = None
    assert short == read(by_map, one)


@pytest.mark.parametrize(
    "value", [None, b"", b"{", b"[]", b"7", b'"a"', b'{"u": NaN}', b'{"u":"\xff"}', b"[" * 5_000]
)
def test_values_that_are_no_object(value: bytes | None) -> None:
    by_map = mapper_of('[clicks.fields]\nuser_id = "u"\nitem_id = "i"')
    short = read(by_map, record(value))
    by_map._flat = None
    assert short == read(by_map, record(value))


@pytest.mark.parametrize("digits", [308, 309, 400, 5_000])
@pytest.mark.parametrize("name", list(USUAL))
def test_a_number_larger_than_any_float(name: str, digits: int) -> None:
    """Refused, or the same event both ways: no other error, which would end the process."""
    fields = {"u": "user_id", "i": "item_id", "t": "at_ms", "k": "kind"}
    fields |= {"e": "event_id", "p": "impression_id", "w": "weight"}
    lines = ["[clicks.fields]", *(f'{ours} = "{own}"' for own, ours in fields.items())]
    by_map = mapper_of("\n".join(lines))
    sent = json.dumps(USUAL | {"k": "view", name: 0}).replace(f'"{name}": 0', f'"{name}": <>')
    for sign in ("", "-"):
        one = record(sent.replace("<>", sign + "9" * digits).encode())
        short = read(by_map, one)
        flat, by_map._flat = by_map._flat, None
        assert short == read(by_map, one)
        by_map._flat = flat


def test_a_plain_record_of_a_flat_map_goes_the_short_way() -> None:
    by_map = mapper_of(bench.MAP)
    one = bench.record(3, bench.foreign(3))
    click = by_map.click(one)
    assert isinstance(click, MappedClick) and click.event.kind == "view"
    [(found, event, _)] = validation.user_events(SETTINGS, one, by_map)
    assert type(found) is MappedClick and event is not None
    assert found.value == by_map.records(one)[0].value


def test_a_plain_message_of_protobuf_goes_the_short_way() -> None:
    registry = bench.CompiledRegistry()
    by_map = mapper_of(bench.MAP.replace("[clicks]", bench.ENCODED, 1), registry)
    one = bench.record(3, registry.encoded(3))
    [(found, event, _)] = validation.user_events(SETTINGS, one, by_map)
    assert type(found) is MappedClick
    plain = validation.user_events(SETTINGS, bench.record(3, bench.plain(3)))
    assert event == plain[0][1]
    by_map._flat = None
    assert event == validation.user_events(SETTINGS, one, by_map)[0][1]


@pytest.mark.parametrize(
    "text",
    [
        '[clicks]\nenvelope = "cloudevents"\n[clicks.fields]\nuser_id = "u"\nitem_id = "i"',
        '[clicks]\neach = "l"\n[clicks.fields]\nuser_id = "u"\nitem_id = "i"',
        '[clicks.fields]\nuser_id = "a.u"\nitem_id = "i"',
        '[clicks.fields]\nuser_id = "u"\nitem_id = "i"\ncontext = { a = "a" }',
        '[clicks.fields]\nuser_id = "u"\nitem_id = "i"\nat_ms = { path = "t", format = "us" }',
        '[clicks.fields]\nuser_id = "u"\nmerge_into = "i"\nmake = "merge"',
        '[clicks.fields]\nuser_id = "u"\nitem_id = "i"\n[[clicks.rule]]\nwhere = { a = 1 }',
    ],
)
def test_other_maps_have_no_short_way(text: str) -> None:
    assert mapper_of(text)._flat is None


EDGES = [
    *({"u": text} for text in ("a", " b ", "\ta", "a\x7f", "ü", "", "x" * 256, "x" * 257)),
    *({"i": number} for number in (0, -1, 10**18, 2**64, 10**250 - 1, 10**250, 7.0, 7.5, True)),
    *({"t": t} for t in (0, -1, 253_402_300_799, 253_402_300_800, 1e9, "7", MS // 1000 + 61)),
    *({"k": kind} for kind in ("seen", "bought", "no", "other", "view", None, 1, True)),
    *({"e": text} for text in ("", " a", "x" * 64, "x" * 65, "x" * 256, "x" * 257, 5, None, "ü")),
    *({"p": text} for text in ("", "a", 5, "x" * 257, None, [])),
    *({"w": weight} for weight in (0, 0.0, 1e-9, 100, 100.5, 101, -1, 2, "2", True, None)),
]


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("changed", EDGES, ids=str)
def test_both_ways_make_the_same_at_the_edges(changed: dict[str, Any], kinds: str) -> None:
    by_map = mapper_of(
        f'[clicks]\n{kinds}\n[clicks.fields]\nuser_id = "u"\nitem_id = "i"\nkind = "k"\n'
        'at_ms = { path = "t", format = "s" }\nevent_id = "e"\nimpression_id = "p"\nweight = "w"'
    )
    usual = USUAL | {"k": "view" if not kinds else "seen"}
    assert by_map.click(record(json.dumps(usual).encode())) is not None
    one = record(json.dumps(usual | changed).encode())
    short = read(by_map, one)
    by_map._flat = None
    assert short == read(by_map, one)
