"""Paths of a map: where a value lies in a record. A path is compiled once into a function.

    a.b[0].c            fields and elements, from the element that the rule is at
    "dotted.name".b     a name with a dot, a bracket or a quote
    params[key=ref].v   of the first element whose `key` is the text `ref`
    products[*].id      of every element: a list
    .                   the element itself
    ^.a                 from one `each` further out; ^^ from two
    $.a                 from the whole value of the record
    $key.id             from the record's key: decoded if it is JSON, else text
    $headers.ce_id      a header of the record, as text

A path gives None where anything on the way is missing, null or of another type.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import msgspec

# Segments of a path, and its characters.
DEPTH_MAX = 16
CHARS_MAX = 500

_NAME = re.compile(r'\.?(?:"((?:[^"\\]|\\.)+)"|([^.\[\]"$^=]+))')
_BRACKET = re.compile(r"\[(?:(\d{1,9})|(\*)|([^\[\]=]+)=([^\[\]]*))\]")
_START = re.compile(r"\$headers|\$key|\$(?=\.|\[|$)|\^+|\.(?=$)|")

_decode = msgspec.json.Decoder().decode


class Source(msgspec.Struct):
    """The record that is mapped. root: its decoded value; decode: of bytes with a schema id"""

    key: bytes | None
    headers: Sequence[tuple[str, bytes | None]]
    decode: Callable[[bytes], Any] | None = None
    root: Any = None
    _key: Any = None

    def decoded_key(self) -> Any:
        """The key: decoded where it is a JSON object, array or string or has a schema id, else
        text.
        """
        if self._key is None and self.key is not None:
            if self.decode is not None and self.key[:1] == b"\0":
                self._key = self.decode(self.key)
            else:
                self._key = _key(self.key)
        return self._key

    def header(self, name: str) -> str | None:
        """The first header of this name as text; None if it is missing or not UTF-8."""
        for found, value in self.headers:
            if found == name:
                try:
                    return None if value is None else bytes(value).decode()
                except UnicodeDecodeError:
                    return None
        return None


class Scope(msgspec.Struct):
    """The element that a rule is at, and those around it. outer: None for the record itself."""

    here: Any
    outer: Scope | None
    source: Source


Getter = Callable[[Scope], Any]
_Step = Callable[[Any], Any]


def compile_path(path: str) -> Getter:
    """The function that reads this path. Raises ValueError with what is wrong with the path."""
    if len(path) > CHARS_MAX:
        raise ValueError(f"a path has at most {CHARS_MAX} characters, this one {len(path)}")
    start = _START.match(path)
    assert start is not None  # the last alternative is empty
    steps = _steps(path, start.end())
    prefix = start.group()
    if not path or (not prefix and not steps):
        raise ValueError("a path is empty")
    if prefix == "$headers":
        return _header(path, steps)
    if not prefix and len(steps) == 1 and isinstance(steps[0], str):
        return partial(_own_field, steps[0])
    return _based(prefix, _walk([_step(one) for one in steps]))


def holds_null(path: str) -> Callable[[Scope], bool]:
    """A function: whether the last name of this path is there, with the value null.

    Never, where the path does not end with a name.
    """
    start = _START.match(path)
    assert start is not None
    steps, prefix = _steps(path, start.end()), start.group()
    if prefix == "$headers" or not steps or not isinstance(steps[-1], str) or None in steps:
        return lambda scope: False
    name, outer = steps[-1], _based(prefix, _walk([_step(one) for one in steps[:-1]]))

    def read(scope: Scope) -> bool:
        found = outer(scope)
        return isinstance(found, dict) and name in found and found[name] is None

    return read


def _based(prefix: str, walk: _Step) -> Getter:
    """The function that walks from where the prefix of a path says."""
    if prefix in ("", "."):
        return lambda scope: walk(scope.here)
    if prefix == "$":
        return lambda scope: walk(scope.source.root)
    if prefix == "$key":
        return lambda scope: walk(scope.source.decoded_key())
    return partial(_from_outer, len(prefix), walk)


def own_name(path: str) -> str | None:
    """The name, if the path is a field of the element and no more."""
    name = _NAME.fullmatch(path)
    return name.group(2) if name is not None and not path.startswith(".") else None


def is_relative(path: str) -> bool:
    """Whether the path starts at the element that its rule is at."""
    start = _START.match(path)
    return start is not None and start.group() in ("", ".")


def _key(key: bytes) -> Any:
    if key[:1] in (b"{", b"[", b'"'):
        try:
            decoded = _decode(key)
        except (msgspec.DecodeError, RecursionError):
            pass
        else:
            if isinstance(decoded, dict) and decoded.keys() == {"schema", "payload"}:
                return decoded["payload"]
            return decoded
    return key.decode("utf-8", "surrogateescape")  # refused as an id, if it is not UTF-8


_Segment = str | int | tuple[str, str] | None


def _steps(path: str, at: int) -> list[_Segment]:
    """The segments: a name, a number, (name, text) to look for, None for every element."""
    found: list[_Segment] = []
    first = at if at == 0 else -1
    while at < len(path):
        if (name := _NAME.match(path, at)) is not None and (at == first or path[at] == "."):
            quoted, plain = name.groups()
            found.append(plain if quoted is None else re.sub(r"\\(.)", r"\1", quoted))
            at = name.end()
        elif (bracket := _BRACKET.match(path, at)) is not None:
            number, every, key, text = bracket.groups()
            if number is not None:
                found.append(int(number))
            else:
                found.append(None if every else (key, text))
            at = bracket.end()
        else:
            raise ValueError(f"the path {path!r} is wrong at its character {at + 1}")
    if len(found) > DEPTH_MAX:
        raise ValueError(f"a path has at most {DEPTH_MAX} parts, {path!r} has {len(found)}")
    return found


def _step(segment: _Segment) -> _Step | None:
    if segment is None:
        return None
    if isinstance(segment, str):
        return partial(_field, segment)
    if isinstance(segment, int):
        return partial(_element, segment)
    return partial(_found, *segment)


def _walk(steps: Sequence[_Step | None]) -> _Step:
    """One function for all steps; None is every element."""
    if None in steps:
        at = steps.index(None)
        before, after = _walk(steps[:at]), _walk(steps[at + 1 :])
        return lambda value: _every(before, after, value)
    plain = [step for step in steps if step is not None]
    if not plain:
        return lambda value: value
    if len(plain) == 1:
        return plain[0]

    def walk(value: Any) -> Any:
        for step in plain:
            value = step(value)
            if value is None:
                return None
        return value

    return walk


def _own_field(name: str, scope: Scope) -> Any:
    here = scope.here
    return here.get(name) if isinstance(here, dict) else None


def _field(name: str, value: Any) -> Any:
    return value.get(name) if isinstance(value, dict) else None


def _element(number: int, value: Any) -> Any:
    return value[number] if isinstance(value, list) and number < len(value) else None


def _found(name: str, text: str, value: Any) -> Any:
    for one in value if isinstance(value, list) else ():
        if isinstance(one, dict) and one.get(name) == text:
            return one
    return None


def _every(before: _Step, after: _Step, value: Any) -> Any:
    elements = before(value)
    if not isinstance(elements, list):
        return None
    return [found for one in elements if (found := after(one)) is not None]


def _from_outer(levels: int, walk: _Step, scope: Scope) -> Any:
    for _ in range(levels):
        if scope.outer is None:
            return None
        scope = scope.outer
    return walk(scope.here)


def _header(path: str, steps: Sequence[_Segment]) -> Getter:
    if len(steps) != 1 or not isinstance(steps[0], str):
        raise ValueError(f"the path {path!r} names no header: expected $headers.NAME")
    name = steps[0]
    return lambda scope: scope.source.header(name)
