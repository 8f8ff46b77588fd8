"""Protobuf messages by a serialized descriptor, against Protobuf's own library."""

from __future__ import annotations

import base64
import math
import struct
import time
from typing import Any

import pytest
from google.protobuf import (
    descriptor_pb2,
    descriptor_pool,
    message_factory,
    struct_pb2,
    timestamp_pb2,
    wrappers_pb2,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eddyline.errors import Rejected
from eddyline.schema.mapping import protobuf

F = descriptor_pb2.FieldDescriptorProto
SCALARS = {
    "double": st.floats(),
    "float": st.floats(width=32),
    "int64": st.integers(-(2**63), 2**63 - 1),
    "uint64": st.integers(0, 2**64 - 1),
    "int32": st.integers(-(2**31), 2**31 - 1),
    "fixed64": st.integers(0, 2**64 - 1),
    "fixed32": st.integers(0, 2**32 - 1),
    "bool": st.booleans(),
    "string": st.text(max_size=8),
    "bytes": st.binary(max_size=8),
    "uint32": st.integers(0, 2**32 - 1),
    "sfixed32": st.integers(-(2**31), 2**31 - 1),
    "sfixed64": st.integers(-(2**63), 2**63 - 1),
    "sint32": st.integers(-(2**31), 2**31 - 1),
    "sint64": st.integers(-(2**63), 2**63 - 1),
    "enum": st.integers(-(2**31), 2**31 - 1) | st.sampled_from([0, 1, 2]),
}
COLOURS = ["NONE", "RED", "BLUE"]


def file_of(syntax: str = "proto3") -> Any:
    """A file with a message that has each scalar type alone, repeated and optional, and more."""
    file = descriptor_pb2.FileDescriptorProto(name="shop.proto", package="shop", syntax=syntax)
    file.dependency.extend(
        f"google/protobuf/{n}.proto" for n in ("timestamp", "struct", "wrappers")
    )
    colours = file.enum_type.add(name="Colour")
    for number, name in enumerate(COLOURS):
        colours.value.add(name=name, number=number)
    file.message_type.add(name="First").field.add(name="x", number=1, type=F.TYPE_INT32, label=1)
    item = file.message_type.add(name="Item")
    entry = item.nested_type.add(name="SizesEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=F.TYPE_BOOL, label=1)
    entry.field.add(name="value", number=2, type=F.TYPE_SINT32, label=1)
    inner = item.nested_type.add(name="Inner")
    inner.field.add(name="n", number=1, type=F.TYPE_INT64, label=1)
    inner.field.add(name="m", number=2, type=F.TYPE_STRING, label=3)
    inner.field.add(name="again", number=3, type=F.TYPE_MESSAGE, type_name=".shop.Item", label=1)
    number = 10
    for name in SCALARS:
        kind = getattr(F, f"TYPE_{name.upper()}")
        for label, prefix in ((1, "one"), (3, "many")):
            made = item.field.add(name=f"{prefix}_{name}", number=number, type=kind, label=label)
            if name == "enum":
                made.type_name = ".shop.Colour"
            number += 1
    item.oneof_decl.add(name="choice")
    for name, kind in (("text", F.TYPE_STRING), ("count", F.TYPE_INT32)):
        item.field.add(name=name, number=number, type=kind, label=1, oneof_index=0)
        number += 1
    if syntax == "proto3":
        item.oneof_decl.add(name="_maybe")
        maybe = item.field.add(name="maybe", number=number, type=F.TYPE_BOOL, label=1)
        maybe.oneof_index, maybe.proto3_optional = 1, True
    more = {
        "inner": (1, ".shop.Item.Inner"),
        "inners": (3, ".shop.Item.Inner"),
        "sizes": (3, ".shop.Item.SizesEntry"),
        "at": (1, ".google.protobuf.Timestamp"),
        "extra": (1, ".google.protobuf.Struct"),
        "price": (1, ".google.protobuf.DoubleValue"),
    }
    for n, (name, (label, type_name)) in enumerate(more.items(), number + 1):
        item.field.add(name=name, number=n, type=F.TYPE_MESSAGE, label=label, type_name=type_name)
    return file


def class_of(file: Any, name: str = "shop.Item") -> Any:
    pool = descriptor_pool.DescriptorPool()
    for module in (timestamp_pb2, struct_pb2, wrappers_pb2):
        pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(name))


FILE = file_of()
ITEM = class_of(FILE)
READ = protobuf.compile_schema(FILE.SerializeToString())
# The path of `Item`: one index, 1.
PATH = b"\x02\x02"


def read(message: Any, messages: Any = READ) -> Any:
    return protobuf.decode(messages, b"head" + PATH + message.SerializeToString(), 4)


def as_json(kind: str, value: Any) -> Any:
    if kind == "bytes":
        return base64.b64encode(value).decode()
    if kind == "enum":
        return COLOURS[value] if 0 <= value < len(COLOURS) else value
    return value


def same(kind: str, found: Any, expected: Any) -> bool:
    if kind in ("float", "double") and math.isnan(expected):
        return math.isnan(found)
    if kind == "float" and expected and math.isfinite(expected):
        return struct.pack("<f", found) == struct.pack("<f", expected)
    return bool(found == as_json(kind, expected))


@given(st.data())
# A busy machine draws the many fields of an example slowly.
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_type_is_read_as_the_library_reads_it(data: st.DataObject) -> None:
    message = ITEM()
    for name, values in SCALARS.items():
        if data.draw(st.booleans()):
            setattr(message, f"one_{name}", data.draw(values))
        getattr(message, f"many_{name}").extend(data.draw(st.lists(values, max_size=3)))
    found = read(message)
    for name in SCALARS:
        assert same(name, found[f"one_{name}"], getattr(message, f"one_{name}")), name
        many = list(getattr(message, f"many_{name}"))
        assert len(found[f"many_{name}"]) == len(many)
        pairs = zip(found[f"many_{name}"], many, strict=True)
        assert all(same(name, one, other) for one, other in pairs), name


def test_a_float_is_the_number_that_was_written() -> None:
    assert read(ITEM(one_float=249.9))["one_float"] == 249.9
    assert read(ITEM(one_float=16_777_216))["one_float"] == 16_777_216
    assert read(ITEM(one_float=math.inf))["one_float"] == math.inf


def test_what_was_not_sent_has_its_default_where_it_has_no_presence() -> None:
    found = read(ITEM())
    assert found["one_bool"] is False and found["one_string"] == "" and found["many_int32"] == []
    assert found["one_enum"] == "NONE" and found["sizes"] == {}
    assert not found.keys() & {"maybe", "inner", "at", "price", "extra", "text", "count"}
    assert read(ITEM(maybe=False))["maybe"] is False
    old = file_of("proto2")
    found = read(class_of(old)(one_int32=0), protobuf.compile_schema(old.SerializeToString()))
    assert found["one_int32"] == 0 and "one_int64" not in found


def test_messages_maps_and_well_known_types() -> None:
    message = ITEM(count=4, sizes={True: -3, False: 7})
    message.inner.n, message.inner.again.inner.n = 5, 6
    message.inners.add(m=["a", "b"])
    message.at.seconds, message.at.nanos = 1_772_355_600, 123_999_999
    message.extra.update({"a": [1, None, {"b": True}], "c": "x"})
    message.price.value = 0.0
    found = read(message)
    assert found["inner"]["n"] == 5 and found["inner"]["again"]["inner"]["n"] == 6
    assert found["inners"] == [{"n": 0, "m": ["a", "b"]}]
    assert found["sizes"] == {"true": -3, "false": 7}
    assert found["at"] == 1_772_355_600_123 and found["price"] == 0.0
    assert found["extra"] == {"a": [1.0, None, {"b": True}], "c": "x"}
    assert found["count"] == 4 and "text" not in found


def test_parts_of_a_message_are_merged_and_the_last_member_counts() -> None:
    first, second = ITEM(text="a", one_int32=1), ITEM(count=2, one_int32=3)
    first.inner.n, second.inner.m[:] = 1, ["x"]
    data = PATH + first.SerializeToString() + second.SerializeToString()
    found = protobuf.decode(READ, data, 0)
    assert found["inner"] == {"n": 1, "m": ["x"]} and found["one_int32"] == 3
    assert found["count"] == 2 and "text" not in found


def test_a_decimal_of_connect_is_a_number() -> None:
    file = descriptor_pb2.FileDescriptorProto(name="d.proto", syntax="proto3")
    row = file.message_type.add(name="Row")
    row.field.add(
        name="price", number=1, type=F.TYPE_MESSAGE, type_name=".confluent.type.Decimal", label=1
    )
    own = descriptor_pb2.FileDescriptorProto(name="decimal.proto", package="confluent.type")
    own.syntax = "proto3"
    decimal = own.message_type.add(name="Decimal")
    for number, (name, kind) in enumerate(
        (("value", F.TYPE_BYTES), ("precision", F.TYPE_UINT32), ("scale", F.TYPE_INT32)), 1
    ):
        decimal.field.add(name=name, number=number, type=kind, label=1)
    value = class_of(own, "confluent.type.Decimal")(value=(-24990).to_bytes(3, "big", signed=True))
    value.scale = 2
    body = value.SerializeToString()
    data = b"\0" + b"\x0a" + bytes([len(body)]) + body
    for references in ([], [own.SerializeToString()]):
        read_ = protobuf.compile_schema(file.SerializeToString(), references)
        assert protobuf.decode(read_, data, 0) == {"price": -249.9}


def test_a_group_and_unknown_fields() -> None:
    file = descriptor_pb2.FileDescriptorProto(name="g.proto", syntax="proto2")
    row = file.message_type.add(name="Row")
    inner = row.nested_type.add(name="Line")
    inner.field.add(name="sku", number=1, type=F.TYPE_STRING, label=1)
    row.field.add(name="line", number=2, type=F.TYPE_GROUP, type_name=".Row.Line", label=3)
    message = class_of(file, "Row")()
    message.line.add(sku="a")
    message.line.add(sku="b")
    messages = protobuf.compile_schema(file.SerializeToString())
    unknown = b"\x7b\x0a\x01x\x7c" + b"\x80\x01\x05" + b"\x8d\x01\0\0\0\0"
    data = b"\0" + unknown + message.SerializeToString() + unknown
    assert protobuf.decode(messages, data, 0) == {"line": [{"sku": "a"}, {"sku": "b"}]}
    for damaged in (b"\0\x13\x0a\x01x", b"\0\x13\x0a\x01x\x1c", b"\0\x14", b"\0\x0f"):
        with pytest.raises(Rejected, match="malformed_protobuf"):
            protobuf.decode(messages, damaged, 0)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (b"\0", {"x": 0}),
        (b"\x02\0", {"x": 0}),
        # A map's entry is no message of the text: `Inner` is the first one in `Item`.
        (b"\x04\x02\0", {"n": 0, "m": []}),
        (b"\x02\x04", None),
        (b"\x02\x01", None),
        (b"\x04\x02\x02", None),
        (b"\x01", None),
        (b"\xca\x01", None),
        (b"\x04\x02", None),
        (b"", None),
    ],
)
def test_the_path_names_the_message(path: bytes, expected: Any) -> None:
    if expected is None:
        with pytest.raises(Rejected, match="malformed_protobuf"):
            protobuf.decode(READ, path, 0)
    else:
        assert protobuf.decode(READ, path, 0) == expected


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_the_nesting_of_a_record_is_limited(more: int) -> None:
    message = ITEM()
    inner = message
    for _ in range((protobuf.DEPTH_MAX + more) // 2):
        inner = inner.inner.again
    if (protobuf.DEPTH_MAX + more) % 2:
        inner.inner.n = 1
    data = b"\x02\x02" + message.SerializeToString()
    if more > 0:
        with pytest.raises(Rejected, match="malformed_protobuf"):
            protobuf.decode(READ, data, 0)
    else:
        protobuf.decode(READ, data, 0)


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_the_elements_of_a_record_are_limited(more: int) -> None:
    message = ITEM(many_bool=[False] * (protobuf.ELEMENTS_MAX + more))
    if more > 0:
        with pytest.raises(Rejected, match="elements"):
            read(message)
    else:
        assert len(read(message)["many_bool"]) == protobuf.ELEMENTS_MAX + more


@given(st.binary(max_size=80))
@settings(max_examples=300, deadline=None)
def test_any_bytes_give_a_value_or_a_reason(data: bytes) -> None:
    for path in (b"", PATH):
        try:
            protobuf.decode(READ, path + data, 0)
        except Rejected as rejected:
            assert rejected.reason == "malformed_protobuf"


@given(st.binary(max_size=80) | st.integers(0, len(FILE.SerializeToString())))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_a_schema_or_a_reason(data: bytes | int) -> None:
    whole = FILE.SerializeToString()
    damaged = data if isinstance(data, bytes) else whole[:data] + b"\xff" + whole[data + 1 :]
    try:
        protobuf.compile_schema(damaged)
    except ValueError:
        pass


def test_editions_are_refused() -> None:
    file = descriptor_pb2.FileDescriptorProto(name="e.proto", syntax="editions")
    with pytest.raises(ValueError, match="syntax 'editions': proto2 and proto3 are read"):
        protobuf.compile_schema(file.SerializeToString())


def test_a_field_whose_type_no_file_has_is_missing() -> None:
    file = descriptor_pb2.FileDescriptorProto(name="m.proto", package="shop", syntax="proto3")
    file.dependency.extend(["google/type/money.proto", "confluent/meta.proto"])
    row = file.message_type.add(name="Row")
    entry = row.nested_type.add(name="PricesEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=F.TYPE_STRING, label=1)
    money = {"type": F.TYPE_MESSAGE, "type_name": ".google.type.Money"}
    entry.field.add(name="value", number=2, label=1, **money)
    row.field.add(name="sku", number=1, type=F.TYPE_STRING, label=1)
    row.oneof_decl.add(name="_price")
    price = row.field.add(name="price", number=2, label=1, oneof_index=0, **money)
    price.proto3_optional = True
    row.field.add(name="old", number=3, label=3, **money)
    row.field.add(
        name="prices", number=4, label=3, type=F.TYPE_MESSAGE, type_name=".shop.Row.PricesEntry"
    )
    schema = protobuf.compile_schema(file.SerializeToString())
    data = b"\0\x0a\x01a\x12\x02\x10\x05\x1a\0\x22\x05\x0a\x01k\x12\0"
    assert protobuf.decode(schema, data, 0) == {"sku": "a", "prices": {"k": None}}


@pytest.mark.parametrize("name", ["", "default", "google/protobuf/timestamp.proto"])
def test_the_names_of_files_do_not_count(name: str) -> None:
    """A registry names a file otherwise than the references to it do."""
    line = descriptor_pb2.FileDescriptorProto(name=name, package="shop", syntax="proto2")
    message = line.message_type.add(name="Line")
    message.field.add(name="at", number=1, type=F.TYPE_MESSAGE, label=1)
    message.field[0].type_name = ".google.protobuf.Timestamp"
    file = descriptor_pb2.FileDescriptorProto(name=name, syntax="proto3")
    file.dependency.append("shop/line.proto")
    row = file.message_type.add(name="Row")
    row.field.add(name="line", number=1, type=F.TYPE_MESSAGE, type_name=".shop.Line", label=1)
    references = [timestamp_pb2.DESCRIPTOR.serialized_pb, line.SerializeToString()]
    schema = protobuf.compile_schema(file.SerializeToString(), references)
    data = b"\0\x0a\x04\x0a\x02\x08\x07"
    assert protobuf.decode(schema, data, 0) == {"line": {"at": 7_000}}


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_the_messages_of_a_record_are_limited(more: int) -> None:
    count = protobuf.ELEMENTS_MAX + more
    number = ITEM.DESCRIPTOR.fields_by_name["inners"].number
    tag = number << 3 | 2
    data = PATH + bytes([tag & 0x7F | 0x80, tag >> 7, 0]) * count
    if more > 0:
        with pytest.raises(Rejected, match="elements"):
            protobuf.decode(READ, data, 0)
    else:
        assert len(protobuf.decode(READ, data, 0)["inners"]) == count


def test_a_size_beyond_the_record_is_refused_at_once() -> None:
    for name in ("one_bytes", "many_int32", "inner", "inners", "sizes"):
        tag = ITEM.DESCRIPTOR.fields_by_name[name].number << 3 | 2
        for size in (2**30, 2**40, 2**63):
            length = b"".join(bytes([size >> 7 * n & 0x7F | 0x80]) for n in range(9)) + b"\0"
            data = PATH + bytes([tag & 0x7F | 0x80, tag >> 7]) + length + b"\0"
            began = time.thread_time()
            with pytest.raises(Rejected, match="malformed_protobuf"):
                protobuf.decode(READ, data, 0)
            assert time.thread_time() - began < 0.5
