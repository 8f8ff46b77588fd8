"""The item record: round trip, golden bytes of every version, arbitrary bytes are rejected."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eddyline.errors import Rejected
from eddyline.schema.events import (
    ATTRIBUTES_MAX,
    LABELS_MAX,
    TEXT_CHARS_MAX,
    VALUE_CHARS_MAX,
    Item,
    decode_item,
    encode,
)
from eddyline.schema.item_record import (
    ATTRIBUTES_BYTES_MAX,
    DIMENSION_MAX,
    ItemRecord,
    decode_record,
    encode_record,
)

patient = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
GOLDEN = Path(__file__).parents[3] / "golden"
values = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
)
maps = st.dictionaries(
    st.text(max_size=8), values | st.lists(st.text(max_size=4), max_size=3), max_size=4
)


def record(d: int = 4, **fields: Any) -> ItemRecord:
    vector = (
        None
        if d == 0
        else (np.arange(1, d + 1) / np.linalg.norm(np.arange(1, d + 1))).astype("<f4")
    )
    parts = {
        "item_id": "film-1",
        "partition": 2,
        "offset": 41,
        "at_ms": 1_700_000_000_000,
        "written_us": 1_700_000_000_000_123,
        "attributes": {"categories": ["Drama"], "year": 1995},
    }
    return ItemRecord(vector=vector, **(parts | fields))


def same(left: ItemRecord, right: ItemRecord) -> bool:
    vectors = (left.vector is None and right.vector is None) or np.array_equal(
        left.vector, right.vector
    )
    plain = [
        (r.item_id, r.partition, r.offset, r.at_ms, r.written_us, r.attributes)
        for r in (left, right)
    ]
    return bool(vectors) and plain[0] == plain[1]


@patient
@given(st.integers(0, 70), st.integers(0, 2**31 - 1), st.integers(0, 2**63 - 1), maps)
def test_roundtrip(d: int, partition: int, offset: int, attributes: dict[str, Any]) -> None:
    sent = record(d, partition=partition, offset=offset, attributes=attributes)
    got = decode_record(sent.item_id.encode(), encode_record(sent))
    assert same(sent, got) and got.retired == (d == 0)


def test_the_vector_is_a_read_only_float32_view() -> None:
    value = encode_record(record(8))
    vector = decode_record(b"x", value).vector
    assert vector is not None and vector.dtype == np.float32 and not vector.flags.writeable
    assert vector.base is not None and np.isclose(np.linalg.norm(vector), 1)


@pytest.mark.parametrize("name", ["item-record-v1", "item-record-v1-retired"])
def test_golden_bytes(name: str) -> None:
    """Files of version 1 stay readable for ever; a new layout gets a new version and new files."""
    value = (GOLDEN / f"{name}.bin").read_bytes()
    expected = record(0 if name.endswith("retired") else 4)
    if expected.retired:
        expected = record(0, attributes={})
    assert same(decode_record(b"film-1", value), expected)
    assert encode_record(expected) == value


def test_every_truncation_and_extension_is_refused() -> None:
    value = encode_record(record())
    for length in range(len(value)):
        with pytest.raises(Rejected):
            decode_record(b"film-1", value[:length])
    with pytest.raises(Rejected):
        decode_record(b"film-1", value + b"\0")


@pytest.mark.parametrize("d", [0, 4])
def test_no_flipped_bit_raises_anything_but_rejected(d: int) -> None:
    value = encode_record(record(d))
    for at in range(len(value) * 8):
        flipped = bytearray(value)
        flipped[at // 8] ^= 1 << at % 8
        try:
            got = decode_record(b"film-1", bytes(flipped))
        except Rejected:
            continue
        assert (0 if got.vector is None else len(got.vector)) == d


@patient
@given(st.binary(max_size=64), st.binary(max_size=200))
def test_any_bytes_are_decoded_or_rejected(key: bytes, tail: bytes) -> None:
    header = encode_record(record(0, attributes={}))
    for value in (tail, header[:36] + len(tail).to_bytes(4, "little") + tail, header[:2] + tail):
        try:
            decode_record(key, value)
        except Rejected as rejected:
            assert rejected.reason == "bad_record"


@pytest.mark.parametrize(
    "attributes",
    [
        b"\x91" * 60_000,
        b"\x81\xa1a" + b"\x91" * 60_000,
        b"\x81\x91\x01\x02",
        b"\xdd\xff\xff\xff\xff",
    ],
)
def test_hostile_attributes_are_rejected(attributes: bytes) -> None:
    header = encode_record(record(0, attributes={}))
    with pytest.raises(Rejected):
        decode_record(b"film-1", header[:36] + len(attributes).to_bytes(4, "little") + attributes)


def test_limits_of_the_dimension_and_of_the_attributes() -> None:
    for d in (DIMENSION_MAX - 1, DIMENSION_MAX):
        assert same(decode_record(b"film-1", encode_record(record(d))), record(d))
    with pytest.raises(Rejected):
        decode_record(b"film-1", encode_record(record(DIMENSION_MAX + 1)))
    overhead = len(msgspec.msgpack.encode({"a": "x" * 70_000})) - 70_000
    for length, fits in ((-1, True), (0, True), (1, False), (100_000, False)):
        sent = record(attributes={"a": "x" * (ATTRIBUTES_BYTES_MAX - overhead + length)})
        if fits:
            assert same(decode_record(b"film-1", encode_record(sent)), sent)
        else:
            with pytest.raises(Rejected):
                decode_record(b"film-1", encode_record(sent))


def test_the_largest_item_that_the_codec_takes_fits_a_record() -> None:
    label = "𝕏" * (TEXT_CHARS_MAX - 2)
    item = Item(
        item_id="film-1",
        title="t",
        categories=[f"{label}{n:02}" for n in range(LABELS_MAX)],
        tags=[f"{label}{n:02}" for n in range(LABELS_MAX)],
        attributes={f"{label}{n:02}": "𝕏" * VALUE_CHARS_MAX for n in range(ATTRIBUTES_MAX)},
    )
    got = decode_item(
        encode(item),
        key="film-1",
        appended_ms=0,
        far_future_ms_max=0,
        vector_dimension=0,
        id_form="nfc",
    )
    attributes = {"categories": got.categories, "tags": got.tags, "attributes": got.attributes}
    sent = record(DIMENSION_MAX, attributes=attributes)
    value = encode_record(sent)
    assert same(decode_record(b"film-1", value), sent)
    assert len(value) < 1_000_000, "Kafka's default limit of a message"


def test_a_key_that_is_not_utf8_is_rejected() -> None:
    with pytest.raises(Rejected):
        decode_record(b"\xff", encode_record(record()))
