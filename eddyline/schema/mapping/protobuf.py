"""Protobuf messages by their writer's schema, as the value that JSON would have.

The schema is a serialized FileDescriptorProto, which a registry gives instead of the text: no
compiler is needed. Protobuf's own library reads the bytes. Fields have the names of the schema.
Numbers stay numbers, enums become names, bytes base64, times milliseconds since 1970, decimals
numbers. A field without presence (proto3) that was not sent has its default; another one is
missing.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, Final, NamedTuple

from google.protobuf import (
    descriptor_pool,
    duration_pb2,
    empty_pb2,
    message_factory,
    struct_pb2,
    timestamp_pb2,
    wrappers_pb2,
)
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
)
from google.protobuf.message import DecodeError, Message

from eddyline.errors import Rejected
from eddyline.schema.mapping import values

# Messages within messages of a record: the limit of Protobuf's library.
DEPTH_MAX = 100
# Elements of a repeated field: an element may take one byte.
ELEMENTS_MAX = 100_000
_VARINT_BYTES_MAX = 10

_Reader = Callable[[Any], Any]


class Schema(NamedTuple):
    """The messages of a file, in its order, and how a message is read, by its full name."""

    messages: Sequence[Descriptor]
    readers: dict[str, _Reader]


def compile_schema(file: bytes, references: Sequence[bytes] = ()) -> Schema:
    """The messages of a file.

    file, references: serialized FileDescriptorProtos; each after those that it refers to
    Raises ValueError for a file that is none.
    """
    pool = descriptor_pool.DescriptorPool()
    known = set(_WELL_KNOWN)
    modules = (timestamp_pb2, duration_pb2, empty_pb2, struct_pb2, wrappers_pb2)
    files = [FileDescriptorProto.FromString(one.DESCRIPTOR.serialized_pb) for one in modules]
    files.append(_decimal_file())
    try:
        ours = [FileDescriptorProto.FromString(one) for one in (*references, file)]
        untyped = {name for one in ours for name in _prepared(one, known)}
        for number, one in enumerate(files + ours):
            # A registry gives a file no name, or another one than its references have.
            one.name = f"{number}.proto"
            one.dependency[:] = [f"{earlier}.proto" for earlier in range(number)]
            pool.AddSerializedFile(one.SerializeToString())
        package = f"{ours[-1].package}." if ours[-1].package else ""
        messages = [
            pool.FindMessageTypeByName(f"{package}{one.name}") for one in ours[-1].message_type
        ]
        readers: dict[str, _Reader] = {}
        for message in messages:
            _declare(message, readers, untyped)
    except (DecodeError, TypeError, KeyError) as error:
        raise ValueError(str(error)) from None
    return Schema(messages, readers)


def decode(schema: Schema, data: bytes, at: int) -> Any:
    """The message that begins at byte `at`, after the path of its type. Raises Rejected.

    The path is a number of indexes and the indexes, zigzag; the number 0 is short for one index 0.
    """
    try:
        message, at = _message_type(schema.messages, data, at)
        found = message_factory.GetMessageClass(message).FromString(data[at:])
        return schema.readers[message.full_name](found)
    except (ValueError, DecodeError, OverflowError) as error:
        raise Rejected("malformed_protobuf", "", str(error)[:160]) from None


def _message_type(messages: Sequence[Descriptor], data: bytes, at: int) -> tuple[Descriptor, int]:
    """(the message that the path names, the byte after the path)."""
    count, at = _long(data, at)
    if not 0 <= count <= DEPTH_MAX:
        raise ValueError(f"{count} indexes of a message")
    path = [] if count else [0]
    for _ in range(count):
        index, at = _long(data, at)
        path.append(index)
    for index in path:
        if not 0 <= index < len(messages):
            raise ValueError(f"message {index}, of {len(messages)}")
        message = messages[index]
        messages = [one for one in message.nested_types if not one.GetOptions().map_entry]
    return message, at


def _long(data: bytes, at: int) -> tuple[int, int]:
    """(a zigzag integer of variable length, the byte after it)."""
    found = 0
    for n, byte in enumerate(data[at : at + _VARINT_BYTES_MAX]):
        found |= (byte & 0x7F) << 7 * n
        if byte < 0x80:
            return (found >> 1) ^ -(found & 1), at + n + 1
    raise ValueError("the path of the message does not end")


# ---- schemas


def _prepared(file: FileDescriptorProto, known: set[str]) -> Iterator[str]:
    """Make a file complete; yield the full names of fields whose type no file has.

    These fields become bytes. known: full names of types of earlier files; gets those of this one
    """
    if file.syntax not in ("", "proto2", "proto3"):
        raise ValueError(f"syntax {file.syntax!r}: proto2 and proto3 are read")
    # What options and extensions refer to is not among the references.
    for name in ("extension", "service", "options", "public_dependency", "weak_dependency"):
        file.ClearField(name)
    scope = f"{file.package}." if file.package else ""
    for n in reversed(range(len(file.message_type))):
        if f"{scope}{file.message_type[n].name}" in _WELL_KNOWN:
            del file.message_type[n]
    known |= {f"{scope}{one.name}" for one in file.enum_type}
    messages = list(chain.from_iterable(_nested(one, scope) for one in file.message_type))
    for full_name, message in messages:
        known |= {full_name, *(f"{full_name}.{one.name}" for one in message.enum_type)}
    for full_name, message in messages:
        message.ClearField("extension")
        for field in message.field:
            if field.type_name and field.type_name.removeprefix(".") not in known:
                field.type = FieldDescriptorProto.TYPE_BYTES
                field.ClearField("type_name")
                yield f"{full_name}.{field.name}"


def _nested(message: DescriptorProto, scope: str) -> Iterator[tuple[str, DescriptorProto]]:
    """The message and all within it, each with its full name."""
    full_name = f"{scope}{message.name}"
    yield full_name, message
    for one in message.nested_type:
        yield from _nested(one, f"{full_name}.")


def _decimal_file() -> FileDescriptorProto:
    """The file of Connect's Decimal, which a registry knows without a reference."""
    file = FileDescriptorProto(package="confluent.type", syntax="proto3")
    decimal = file.message_type.add(name="Decimal")
    for number, (name, kind) in enumerate(
        (
            ("value", FieldDescriptorProto.TYPE_BYTES),
            ("precision", FieldDescriptorProto.TYPE_UINT32),
            ("scale", FieldDescriptorProto.TYPE_INT32),
        ),
        1,
    ):
        decimal.field.add(
            name=name, number=number, type=kind, label=FieldDescriptorProto.LABEL_OPTIONAL
        )
    return file


# ---- values


def _declare(message: Descriptor, readers: dict[str, _Reader], untyped: set[str]) -> _Reader:
    """The reader of a message; makes those of all messages in it."""
    full_name = message.full_name
    if full_name in readers:
        return readers[full_name]
    fields: list[tuple[str, bool, _Reader | None]] = []

    def read(value: Message) -> dict[str, Any]:
        found = {}
        for name, presence, convert in fields:
            if presence and not value.HasField(name):
                continue
            one = getattr(value, name)
            found[name] = one if convert is None else convert(one)
        return found

    readers[full_name] = _WELL_KNOWN.get(full_name, read)  # a message may have itself as a field
    fields += [
        (one.name, one.has_presence, _field(one, readers, untyped))
        for one in message.fields
        if one.full_name not in untyped
    ]
    for one in message.nested_types:
        _declare(one, readers, untyped)
    return readers[full_name]


def _field(
    field: FieldDescriptor, readers: dict[str, _Reader], untyped: set[str]
) -> _Reader | None:
    """What converts the library's value of a field; None for a value that stays."""
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        value = kind.fields_by_name["value"]
        convert = _one(value, readers, untyped)
        if value.full_name in untyped:
            convert = lambda _: None  # noqa: E731
        return lambda found: {
            _key(key): one if convert is None else convert(one)
            for key, one in _limited(found).items()
        }
    convert = _one(field, readers, untyped)
    if not field.is_repeated:
        return convert
    if convert is None:
        return lambda found: list(_limited(found))
    return lambda found: [convert(one) for one in _limited(found)]


def _one(field: FieldDescriptor, readers: dict[str, _Reader], untyped: set[str]) -> _Reader | None:
    """As `_field`, of one element."""
    if field.message_type is not None:
        _declare(field.message_type, readers, untyped)
        full_name = field.message_type.full_name
        return lambda found: readers[full_name](found)
    if field.enum_type is not None:
        # Of several names for one number the first one counts, as in Protobuf's JSON.
        names = {one.number: one.name for one in reversed(field.enum_type.values)}
        return lambda number: names.get(number, number)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return _base64
    return _float if field.type == FieldDescriptor.TYPE_FLOAT else None


def _limited(found: Any) -> Any:
    if len(found) > ELEMENTS_MAX:
        raise ValueError(f"more than {ELEMENTS_MAX:,} elements")
    return found


def _key(key: Any) -> str:
    """A key of a map, as JSON has it."""
    return str(key).lower() if isinstance(key, bool) else str(key)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _float(value: float) -> float:
    """The shortest decimal number with these 32 bits: 249.9, not 249.89999389648438."""
    for digits in (6, 7, 8):
        short = float(f"{value:.{digits}g}")
        if abs(short) < 3e38 and struct.unpack("<f", struct.pack("<f", short))[0] == value:
            return short
    return value


def _milliseconds(found: Any) -> int:
    return int(found.seconds * 1_000 + found.nanos // 1_000_000)


def _struct(found: Any) -> dict[str, Any]:
    return {key: _json(value) for key, value in _limited(found.fields).items()}


def _list(found: Any) -> list[Any]:
    return [_json(value) for value in _limited(found.values)]


def _json(value: Any) -> Any:
    """What a google.protobuf.Value holds."""
    kind = value.WhichOneof("kind")
    if kind in (None, "null_value"):
        return None
    found = getattr(value, kind)
    return {"struct_value": _struct, "list_value": _list}.get(kind, lambda one: one)(found)


_WELL_KNOWN: Final[dict[str, _Reader]] = {
    "google.protobuf.Timestamp": _milliseconds,
    "google.protobuf.Duration": _milliseconds,
    "google.protobuf.Empty": lambda found: {},
    "google.protobuf.Struct": _struct,
    "google.protobuf.Value": _json,
    "google.protobuf.ListValue": _list,
    "google.protobuf.BytesValue": lambda found: _base64(found.value),
    "google.protobuf.FloatValue": lambda found: _float(found.value),
    "confluent.type.Decimal": lambda found: values.decimal(found.value, found.scale),
    **{
        f"google.protobuf.{name}Value": lambda found: found.value
        for name in ("Double", "Int64", "UInt64", "Int32", "UInt32", "Bool", "String")
    },
}
