"""Protobuf's binary encoding: a message by its writer's schema, as the value that JSON would have.

The schema is a serialized FileDescriptorProto, which a registry gives instead of the text: no
compiler is needed. Fields have the names of the schema. Numbers stay numbers, enums become names,
bytes base64, times milliseconds since 1970, decimals numbers. A field without presence (proto3)
that was not sent has its default; another one is missing. The specification:
https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from eddyline.errors import Rejected

# Messages within messages, of a record and of a schema; as Protobuf's own libraries.
DEPTH_MAX = 100
# Elements of packed fields of a record: an element may take one byte.
ELEMENTS_MAX = 100_000
_VARINT_BYTES_MAX = 10
_VARINT, _FIXED64, _BYTES, _GROUP, _GROUP_END, _FIXED32 = range(6)
_FIXED_BYTES = {_FIXED64: 8, _FIXED32: 4}

# Numbers of FieldDescriptorProto.Type.
_TYPE_GROUP, _TYPE_MESSAGE, _TYPE_ENUM = 10, 11, 14
# Ours: bytes that stay bytes.
_RAW = 100
_REPEATED = 3

# What a damaged schema raises.
SCHEMA_ERRORS = (ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error)

_Reader = Callable[[Any], Any]
# (field's number, wire type, a varint's number or the bytes) of each field, in the record's order.
_Raw = Iterator[tuple[int, int, Any]]


@dataclass(slots=True)
class _Field:
    """A field of a message.

    kind:     a number of FieldDescriptorProto.Type
    message:  of a message or a group, None for a type that no file has
    oneof:    numbers of all fields of which one at most is set
    implicit: it has no presence: its default stands where it was not sent
    """

    name: str
    kind: int
    repeated: bool = False
    implicit: bool = True
    message: Message | None = None
    names: dict[int, str] = field(default_factory=dict)
    oneof: Sequence[int] = ()


@dataclass(slots=True)
class Message:
    """A message type. nested: in the order of the schema, without those that are maps' entries.

    convert: what a well-known type becomes
    """

    fields: dict[int, _Field] = field(default_factory=dict)
    nested: list[Message] = field(default_factory=list)
    is_map_entry: bool = False
    convert: _Reader | None = None


def compile_schema(file: bytes, references: Sequence[bytes] = ()) -> list[Message]:
    """The messages of a file, in its order.

    file, references: serialized FileDescriptorProtos
    Raises one of SCHEMA_ERRORS for a file that is none.
    """
    messages: dict[str, Message] = {}
    enums: dict[str, dict[int, str]] = {}
    made: list[Message] = []
    parsed = [_file(one) for one in (*references, file)]
    for one in parsed:
        made = [_declare(found, one["package"], messages, enums, 0) for found in one["messages"]]
        _declare_enums(one["enums"], one["package"], enums)
    messages |= _WELL_KNOWN  # also where a file declares them
    for one in parsed:
        for found in one["messages"]:
            _fill(found, one["package"], messages, enums, one["syntax"] == "proto3")
    return made


def decode(messages: Sequence[Message], data: bytes, at: int) -> Any:
    """The message that begins at byte `at`, after the path of its type. Raises Rejected.

    The path is a number of indexes and the indexes, zigzag; the number 0 is short for one index 0.
    """
    try:
        count, at = _varint(data, at)
        count = _zigzag(count)
        path = [0] if count == 0 else []
        if not 0 <= count <= DEPTH_MAX:
            raise ValueError(f"{count} indexes of a message")
        for _ in range(count):
            index, at = _varint(data, at)
            path.append(_zigzag(index))
        message: Message | None = None
        for index in path:
            among = messages if message is None else message.nested
            if not 0 <= index < len(among):
                raise ValueError(f"message {index}, of {len(among)}")
            message = among[index]
        assert message is not None
        return _message(message, data[at:], 0)
    except (ValueError, IndexError, OverflowError, struct.error) as error:
        raise Rejected("malformed_protobuf", "", str(error)[:160]) from None


# ---- bytes


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(an unsigned number of at most 64 bits, the byte after it)."""
    found = shift = 0
    for _ in range(_VARINT_BYTES_MAX):
        if at >= len(data):
            raise ValueError("the record ends within a number")
        byte = data[at]
        at += 1
        found |= (byte & 0x7F) << shift
        if byte < 0x80:
            return found & 0xFFFF_FFFF_FFFF_FFFF, at
        shift += 7
    raise ValueError(f"a number of more than {_VARINT_BYTES_MAX} bytes")


def _zigzag(number: int) -> int:
    return (number >> 1) ^ -(number & 1)


def _signed(number: int, bits: int) -> int:
    number &= (1 << bits) - 1
    return number - (1 << bits) if number >> (bits - 1) else number


def _raw(data: bytes) -> _Raw:
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == _GROUP:
            end, after = _group_end(data, at, number)
            yield number, wire, data[at:end]
            at = after
            continue
        value, at = _value(data, at, wire)
        yield number, wire, value


def _value(data: bytes, at: int, wire: int) -> tuple[Any, int]:
    """(a varint's number or the bytes, the byte after it)."""
    if wire == _VARINT:
        return _varint(data, at)
    if wire == _BYTES:
        size, at = _varint(data, at)
    elif wire in _FIXED_BYTES:
        size = _FIXED_BYTES[wire]
    else:
        raise ValueError(f"wire type {wire} at byte {at}")
    if at + size > len(data):
        raise ValueError(f"{size} bytes at byte {at}, of {len(data)}")
    return data[at : at + size], at + size


def _group_end(data: bytes, at: int, number: int) -> tuple[int, int]:
    """(the end of a group's content, the byte after its end tag)."""
    opened = [number]
    while True:
        begin = at
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == _GROUP:
            opened.append(number)
            if len(opened) > DEPTH_MAX:
                raise ValueError(f"more than {DEPTH_MAX} messages within each other")
        elif wire == _GROUP_END:
            if opened.pop() != number:
                raise ValueError(f"a group ends at byte {begin} that did not begin")
            if not opened:
                return begin, at
        else:
            _, at = _value(data, at, wire)


# ---- messages


def _message(message: Message, data: bytes, depth: int) -> Any:
    if depth > DEPTH_MAX:
        raise ValueError(f"more than {DEPTH_MAX} messages within each other")
    sent: dict[int, list[tuple[int, Any]]] = {}
    for number, wire, value in _raw(data):
        known = message.fields.get(number)
        if known is None:
            continue
        for other in known.oneof:  # the last one counts
            if other != number:
                sent.pop(other, None)
        sent.setdefault(number, []).append((wire, value))
    found: dict[str, Any] = {}
    for number, known in message.fields.items():
        values = sent.get(number, [])
        if known.repeated:
            found[known.name] = _several(known, values, depth)
            continue
        value = _one(known, values, depth)
        if value is None and known.implicit:
            value = _default(known)
        if value is not None:
            found[known.name] = value
    return found if message.convert is None else message.convert(found)


def _one(known: _Field, values: list[tuple[int, Any]], depth: int) -> Any:
    """The value of a field that was sent, None for one that was not."""
    if known.kind in (_TYPE_MESSAGE, _TYPE_GROUP):
        parts = [value for wire, value in values if wire in (_BYTES, _GROUP)]
        if not parts or known.message is None:
            return None
        # A message in several parts is the sum of them, and so are its bytes.
        return _message(known.message, b"".join(parts), depth + 1)
    expected, read = _SCALARS[known.kind]
    for wire, value in reversed(values):
        if wire == expected:
            return _named(known, read(value))
    return None


def _several(known: _Field, values: list[tuple[int, Any]], depth: int) -> Any:
    found: list[Any] = []
    if known.kind in (_TYPE_MESSAGE, _TYPE_GROUP):
        message = known.message
        if message is None:
            return found
        parts = [value for wire, value in values if wire in (_BYTES, _GROUP)]
        found = [_message(message, part, depth + 1) for part in parts]
        if not message.is_map_entry:
            return found
        return {_key(entry["key"]): entry.get("value") for entry in found}
    expected, read = _SCALARS[known.kind]
    for wire, value in values:
        if wire == expected:
            found.append(_named(known, read(value)))
        elif wire == _BYTES:  # packed
            at = 0
            while at < len(value):
                one, at = _value(value, at, expected)
                found.append(_named(known, read(one)))
                if len(found) > ELEMENTS_MAX:
                    raise ValueError(f"more than {ELEMENTS_MAX:,} elements")
    return found


def _named(known: _Field, value: Any) -> Any:
    return known.names.get(value, value) if known.kind == _TYPE_ENUM else value


def _default(known: _Field) -> Any:
    if known.kind in (_TYPE_MESSAGE, _TYPE_GROUP):
        return None
    if known.kind == _TYPE_ENUM:
        return _named(known, 0)
    expected, read = _SCALARS[known.kind]
    return read(0 if expected == _VARINT else bytes(_FIXED_BYTES.get(expected, 0)))


def _key(key: Any) -> str:
    """A key of a map, as JSON has it."""
    return str(key).lower() if isinstance(key, bool) else str(key)


def _float(data: bytes) -> float:
    """The shortest decimal number with these 32 bits: 249.9, not 249.89999389648438."""
    found: float = struct.unpack("<f", data)[0]
    for digits in (6, 7, 8):
        short = float(f"{found:.{digits}g}")
        if abs(short) < 3e38 and struct.pack("<f", short) == data:
            return short
    return found


def _unpacked(form: str) -> _Reader:
    unpack = struct.Struct(form).unpack
    return lambda data: unpack(data)[0]


# By the number of the type: its wire type, and what reads it.
_SCALARS: Final[dict[int, tuple[int, _Reader]]] = {
    1: (_FIXED64, _unpacked("<d")),
    2: (_FIXED32, _float),
    3: (_VARINT, lambda number: _signed(number, 64)),
    4: (_VARINT, lambda number: number),
    5: (_VARINT, lambda number: _signed(number, 32)),
    6: (_FIXED64, _unpacked("<Q")),
    7: (_FIXED32, _unpacked("<I")),
    8: (_VARINT, bool),
    9: (_BYTES, bytes.decode),
    12: (_BYTES, lambda data: base64.b64encode(data).decode()),
    13: (_VARINT, lambda number: number & 0xFFFF_FFFF),
    _TYPE_ENUM: (_VARINT, lambda number: _signed(number, 32)),
    15: (_FIXED32, _unpacked("<i")),
    16: (_FIXED64, _unpacked("<q")),
    17: (_VARINT, lambda number: _zigzag(number & 0xFFFF_FFFF)),
    18: (_VARINT, _zigzag),
    _RAW: (_BYTES, lambda data: data),
}


# ---- schemas


def _file(data: bytes) -> dict[str, Any]:
    """The parts of a FileDescriptorProto that say how messages are read."""
    found: dict[str, Any] = {"package": "", "syntax": "proto2", "messages": [], "enums": []}
    for number, _, value in _raw(data):
        if number in (2, 12):
            found["package" if number == 2 else "syntax"] = value.decode()
        elif number in (4, 5):
            found["messages" if number == 4 else "enums"].append(value)
    if found["syntax"] not in ("proto2", "proto3"):
        raise ValueError(f"syntax {found['syntax']!r}: proto2 and proto3 are read")
    return found


def _full(package: str, name: str) -> str:
    return f"{package}.{name}" if package else name


def _text(data: bytes, wanted: int) -> str:
    found = [value for number, _, value in _raw(data) if number == wanted]
    return str(found[-1].decode()) if found else ""


def _declare(
    data: bytes,
    package: str,
    messages: dict[str, Message],
    enums: dict[str, dict[int, str]],
    depth: int,
) -> Message:
    """A DescriptorProto's message without its fields, which may have types that come later."""
    if depth > DEPTH_MAX:
        raise ValueError(f"more than {DEPTH_MAX} messages within each other")
    name, message = _full(package, _text(data, 1)), Message()
    messages[name] = message
    for number, _, value in _raw(data):
        if number == 3:
            nested = _declare(value, name, messages, enums, depth + 1)
            if not nested.is_map_entry:
                message.nested.append(nested)
        elif number == 4:
            _declare_enums([value], name, enums)
        elif number == 7:
            message.is_map_entry = any(n == 7 and on for n, _, on in _raw(value))
    return message


def _declare_enums(found: list[bytes], package: str, enums: dict[str, dict[int, str]]) -> None:
    for data in found:
        names: dict[int, str] = {}
        for number, _, value in _raw(data):
            if number == 2:
                own = {n: v for n, _, v in _raw(value)}
                # Of several names for one number the first one stands, as in Protobuf's JSON.
                names.setdefault(_signed(own.get(2, 0), 32), own[1].decode())
        enums[_full(package, _text(data, 1))] = names


def _fill(
    data: bytes,
    package: str,
    messages: dict[str, Message],
    enums: dict[str, dict[int, str]],
    proto3: bool,
) -> None:
    name = _full(package, _text(data, 1))
    if name in _WELL_KNOWN:
        return
    message = messages[name]
    members: dict[int, list[int]] = {}
    for number, _, value in _raw(data):
        if number == 3:
            _fill(value, name, messages, enums, proto3)
        elif number == 2:
            own = {n: v for n, _, v in _raw(value)}
            type_name = own.get(6, b"").decode().removeprefix(".")
            kind, is_member = own[5], 9 in own
            if kind not in _SCALARS and kind not in (_TYPE_GROUP, _TYPE_MESSAGE):
                raise ValueError(f"field {own[1].decode()!r} has the type {kind}")
            message.fields[own[3]] = _Field(
                own[1].decode(),
                kind,
                repeated=own.get(4) == _REPEATED,
                implicit=message.is_map_entry or (proto3 and not is_member),
                message=messages.get(type_name),
                names=enums.get(type_name, {}),
            )
            if is_member:
                members.setdefault(own[9], []).append(own[3])
    for numbers in members.values():
        for number in numbers:
            message.fields[number].oneof = numbers


# ---- well-known types


def _milliseconds(found: dict[str, Any]) -> int:
    return int(found["seconds"] * 1_000 + found["nanos"] // 1_000_000)


def _decimal(found: dict[str, Any]) -> int | float:
    digits = int.from_bytes(found["value"], "big", signed=True)
    return digits if not found["scale"] else float(f"{digits}e{-found['scale']}")


def _made(convert: _Reader, **fields: tuple[int, int]) -> Message:
    """A message of fields: name → (number, type)."""
    made = {number: _Field(name, kind) for name, (number, kind) in fields.items()}
    return Message(made, convert=convert)


def _structs() -> dict[str, Message]:
    """Struct, Value and ListValue: JSON in messages."""
    value, struct_, values = Message(), Message(), Message()
    entry = Message({1: _Field("key", 9), 2: _Field("value", 11, message=value)}, is_map_entry=True)
    kinds = (("null_value", 5), ("number_value", 1), ("string_value", 9), ("bool_value", 8))
    members = [_Field(name, kind, implicit=False) for name, kind in kinds]
    members += [
        _Field("struct_value", _TYPE_MESSAGE, message=struct_),
        _Field("list_value", _TYPE_MESSAGE, message=values),
    ]
    value.fields = dict(enumerate(members, 1))
    for member in members:
        member.oneof = range(1, len(members) + 1)
    value.convert = lambda found: next(
        (one for name, one in found.items() if name != "null_value"), None
    )
    struct_.fields[1] = _Field("fields", _TYPE_MESSAGE, repeated=True, message=entry)
    struct_.convert = lambda found: found["fields"]
    values.fields[1] = _Field("values", _TYPE_MESSAGE, repeated=True, message=value)
    values.convert = lambda found: found["values"]
    return {"Struct": struct_, "Value": value, "ListValue": values}


_WRAPPERS = {
    "Double": 1,
    "Float": 2,
    "Int64": 3,
    "UInt64": 4,
    "Int32": 5,
    "Bool": 8,
    "String": 9,
    "Bytes": 12,
    "UInt32": 13,
}
_WELL_KNOWN: Final[dict[str, Message]] = {
    "google.protobuf.Timestamp": _made(_milliseconds, seconds=(1, 3), nanos=(2, 5)),
    "google.protobuf.Duration": _made(_milliseconds, seconds=(1, 3), nanos=(2, 5)),
    "google.protobuf.Empty": Message(),
    "confluent.type.Decimal": _made(_decimal, value=(1, _RAW), precision=(2, 13), scale=(3, 5)),
    **{f"google.protobuf.{name}": message for name, message in _structs().items()},
    **{
        f"google.protobuf.{name}Value": _made(lambda found: found["value"], value=(1, kind))
        for name, kind in _WRAPPERS.items()
    },
}
