"""Avro's binary encoding: a value by its writer's schema, as the value that JSON would have.

A map names fields, so a reader's schema is not needed: a field that a newer schema adds is there,
one that it drops is missing. Decimals become numbers. Times become milliseconds since 1970, as the
Debezium envelope makes them of its JSON. Bytes become base64. The specification:
https://avro.apache.org/docs/1.12.0/specification/
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable
from typing import Any, Final

from eddyline.errors import Rejected
from eddyline.schema.mapping import values

# Elements of all arrays and maps of a record: an element may take no byte.
ELEMENTS_MAX = 100_000
# Nesting of a schema.
DEPTH_MAX = 64
_DAY_MS = 86_400_000
_LONG_BYTES_MAX = 10

_float = struct.Struct("<f").unpack_from
_double = struct.Struct("<d").unpack_from

# Divisors that make milliseconds of a logical type, negative: factors.
_TIMES: Final = {
    "timestamp-millis": 1,
    "timestamp-micros": 1_000,
    "timestamp-nanos": 1_000_000,
    "local-timestamp-millis": 1,
    "local-timestamp-micros": 1_000,
    "local-timestamp-nanos": 1_000_000,
    "date": -_DAY_MS,
    "io.debezium.time.MicroTimestamp": 1_000,
    "io.debezium.time.NanoTimestamp": 1_000_000,
    "io.debezium.time.Date": -_DAY_MS,
}


class _Input:
    """The bytes of one record, and how far they are read."""

    __slots__ = ("at", "data", "elements")

    def __init__(self, data: bytes, at: int) -> None:
        self.data = data
        self.at = at
        self.elements = 0

    def take(self, count: int) -> bytes:
        begin, end = self.at, self.at + count
        if count < 0 or end > len(self.data):
            raise ValueError(f"{count} bytes at byte {begin}, of {len(self.data)}")
        self.at = end
        return self.data[begin:end]

    def long(self) -> int:
        """A zigzag integer of variable length, at most 64 bits."""
        found = shift = 0
        for _ in range(_LONG_BYTES_MAX):
            byte = self.take(1)[0]
            found |= (byte & 0x7F) << shift
            if byte < 0x80:
                return (found >> 1) ^ -(found & 1)
            shift += 7
        raise ValueError(f"a number of more than {_LONG_BYTES_MAX} bytes")


_Reader = Callable[[_Input], Any]


def compile_schema(schema: Any, references: dict[str, Any] | None = None) -> _Reader:
    """The function that reads a value of this schema, from JSON as the registry has it.

    references: names of types -> schemas that this one refers to
    Raises ValueError for a schema that is none.
    """
    names: dict[str, _Reader] = {}
    for found in (references or {}).values():
        _compile(found, names, "", 0)
    return _compile(schema, names, "", 0)


def decode(reader: _Reader, data: bytes, at: int = 0) -> Any:
    """The value that begins at byte `at` and ends with the data. Raises Rejected."""
    source = _Input(data, at)
    try:
        found = reader(source)
    except (ValueError, IndexError, RecursionError, OverflowError, struct.error) as error:
        raise Rejected("malformed_avro", "", str(error)[:160]) from None
    if source.at != len(data):
        detail = f"{len(data) - source.at} bytes are left: another schema wrote this"
        raise Rejected("malformed_avro", "", detail)
    return found


def _compile(schema: Any, names: dict[str, _Reader], space: str, depth: int) -> _Reader:
    if depth > DEPTH_MAX:
        raise ValueError(f"a schema has at most {DEPTH_MAX} levels")
    if isinstance(schema, str):
        return _named(schema, names, space)
    if isinstance(schema, list):
        return _union([_compile(one, names, space, depth + 1) for one in schema])
    if not isinstance(schema, dict):
        raise ValueError(f"{schema!r} is no schema")
    kind = schema.get("type")
    if kind in ("record", "error"):
        return _record(schema, names, space, depth)
    if kind == "enum":
        return _register(schema, names, space, _enum(list(schema["symbols"])))
    if kind == "fixed":
        size = int(schema["size"])
        reader = _logical(schema, lambda source: source.take(size))
        return _register(schema, names, space, reader)
    if kind == "array":
        return _array(_compile(schema["items"], names, space, depth + 1))
    if kind == "map":
        return _map(_compile(schema["values"], names, space, depth + 1))
    if kind in ("bytes", "int", "long"):
        return _logical(schema, _PRIMITIVES[kind])
    return _compile(kind, names, space, depth + 1)


def _named(name: str, names: dict[str, _Reader], space: str) -> _Reader:
    if name == "bytes":
        return _logical({}, _PRIMITIVES[name])
    if name in _PRIMITIVES:
        return _PRIMITIVES[name]
    full = name if "." in name or not space else f"{space}.{name}"
    if full not in names and name not in names:
        raise ValueError(f"there is no type {name!r}")
    return names.get(full) or names[name]


def _full_name(schema: dict[str, Any], space: str) -> str:
    name = str(schema.get("name", ""))
    own = schema.get("namespace", space)
    return name if "." in name or not own else f"{own}.{name}"


def _register(
    schema: dict[str, Any], names: dict[str, _Reader], space: str, reader: _Reader
) -> _Reader:
    names[_full_name(schema, space)] = reader
    return reader


def _record(schema: dict[str, Any], names: dict[str, _Reader], space: str, depth: int) -> _Reader:
    fields: list[tuple[str, _Reader]] = []

    def read(source: _Input) -> dict[str, Any]:
        return {name: reader(source) for name, reader in fields}

    full = _full_name(schema, space)
    names[full] = read  # a record may have itself as a field
    inner = full.rpartition(".")[0]
    fields += [
        (str(one["name"]), _compile(one["type"], names, inner, depth + 1))
        for one in schema["fields"]
    ]
    return read


def _union(branches: list[_Reader]) -> _Reader:
    def read(source: _Input) -> Any:
        number = source.long()
        if number < 0:
            raise ValueError(f"branch {number} of a union")
        return branches[number](source)

    return read


def _enum(symbols: list[str]) -> _Reader:
    def read(source: _Input) -> str:
        number = source.long()
        if number < 0:
            raise ValueError(f"symbol {number} of an enum")
        return symbols[number]

    return read


def _blocks(source: _Input) -> Any:
    """Once for each element of an array or a map."""
    while count := source.long():
        if count < 0:  # followed by the size of the block
            count = -count
            source.long()
        source.elements += count
        if source.elements > ELEMENTS_MAX:
            raise ValueError(f"more than {ELEMENTS_MAX:,} elements")
        for _ in range(count):
            yield None


def _array(item: _Reader) -> _Reader:
    return lambda source: [item(source) for _ in _blocks(source)]


def _map(value: _Reader) -> _Reader:
    return lambda source: {_text(source): value(source) for _ in _blocks(source)}


def _text(source: _Input) -> str:
    return source.take(source.long()).decode()


def _boolean(source: _Input) -> bool:
    return source.take(1) != b"\0"


_PRIMITIVES: Final[dict[str, _Reader]] = {
    "null": lambda source: None,
    "boolean": _boolean,
    "int": _Input.long,
    "long": _Input.long,
    "float": lambda source: _float(source.take(4))[0],
    "double": lambda source: _double(source.take(8))[0],
    "bytes": lambda source: source.take(source.long()),
    "string": _text,
}


def _logical(schema: dict[str, Any], reader: _Reader) -> _Reader:
    """The reader of a type with a meaning of its own, by Avro's name for it or by Connect's."""
    name = schema.get("logicalType")
    unit = _TIMES.get(str(schema.get("connect.name"))) or _TIMES.get(str(name))
    if unit is not None and schema.get("type") in ("int", "long"):
        if unit < 0:
            return lambda source: reader(source) * -unit
        return lambda source: reader(source) // unit
    if name == "decimal":
        scale = int(schema.get("scale", 0))
        return lambda source: values.decimal(reader(source), scale)
    if schema.get("type") in ("int", "long"):
        return reader
    return lambda source: base64.b64encode(reader(source)).decode()


def parsed(text: str) -> Any:
    """The schema's JSON; a bare name of a type is one too. Raises ValueError."""
    return json.loads(text)
