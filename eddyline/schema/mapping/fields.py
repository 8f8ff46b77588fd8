"""Fields of a map, compiled: functions from a place in a record to the value of one field.

A getter returns None where the record has no value. What identifies a record, its time and its
availability are refused where they cannot be read; other parts are passed on as they are, and
`schema.partial` leaves them out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from eddyline.errors import Rejected
from eddyline.schema.events import quote
from eddyline.schema.mapping import paths, values
from eddyline.schema.mapping.envelopes import UNAVAILABLE
from eddyline.schema.mapping.paths import Getter, Scope, compile_path
from eddyline.schema.mapping.spec import AttributesFrom, Condition, Field, KindWeight, Scalar
from eddyline.schema.mapping.values import BAD

IGNORE = "ignore"
# Names of nested attributes are joined down to this depth.
_FLATTEN_DEPTH_MAX = 8
# An optional part of a type that no event has: `partial` leaves it out and counts it.
_WRONG_TYPE: list[Any] = []

Spec = str | Field


def raw(spec: Spec, nulls: Collection[str]) -> Getter:
    """The value that a field names, before it is converted. Raises ValueError for a bad path."""
    field = Field(path=spec) if isinstance(spec, str) else spec
    named = [field.path, field.first, field.join, field.const]
    if sum(one is not None for one in named) != 1:
        raise ValueError("a field has one of path, first, join and const")
    get = _sourced(field, nulls)
    if field.last is not None:
        get = _then(get, _last(field.last))
    if field.map is not None:
        get = _then(get, _mapped(field.map))
    if field.above is not None:
        get = _then(get, _above(field.above))
    if field.type is not None:
        get = _then(get, values.CONVERTERS[field.type])
    if field.negate:
        get = _then(get, _negated)
    if (default := field.default) is not None:
        inner = get
        return lambda scope: default if (found := inner(scope)) is None else found
    return get


def own_name(spec: Spec, nulls: Collection[str]) -> str | None:
    """The name, if the value is a field of the element and nothing is done to it before.

    Getters read such a field themselves: most fields of most maps are, and a call takes as long as
    the rest.
    """
    if isinstance(spec, Field) and spec != Field(
        path=spec.path, format=spec.format, zone=spec.zone
    ):
        return None
    path = spec if isinstance(spec, str) else spec.path
    return None if nulls or path is None else paths.own_name(path)


def identity(name: str, spec: Spec, nulls: Collection[str], *, required: bool = False) -> Getter:
    """An id as text. The getter raises Rejected where the value cannot be an id.

    required: also where there is none
    """
    get, where = raw(spec, nulls), described(spec)
    own = own_name(spec, nulls)

    def read(scope: Scope) -> str | None:
        here = scope.here
        found = here.get(own) if own is not None and type(here) is dict else get(scope)
        if type(found) is str:
            found = found.strip()
        elif found is not None:
            bad, found = found, values.id_text(found)
            if found is BAD:
                raise Rejected("bad_field", name, f"{quote(bad)} at {where} is no id")
        if found:
            return str(found)
        if required:
            raise Rejected("missing_field", name, f"there is no value at {where}")
        return None

    return read


def time(spec: Spec, nulls: Collection[str]) -> Getter:
    """A time in milliseconds since 1970. The getter raises Rejected where it is none."""
    field = Field(path=spec) if isinstance(spec, str) else spec
    formats = time_formats(spec)
    convert = values.compile_time(formats, field.zone)
    get, where = raw(spec, nulls), described(spec)
    own = own_name(spec, nulls)
    unit = values.UNITS.get(formats[0], 0) if len(formats) == 1 else 0

    def read(scope: Scope) -> int | None:
        here = scope.here
        found = here.get(own) if own is not None and type(here) is dict else get(scope)
        if found is None:
            return None
        if type(found) is int and unit > 0:
            return found * unit
        at_ms: int | Any = convert(found)
        if at_ms is BAD:
            detail = f"{quote(found)} at {where} is no time of the format {' or '.join(formats)}"
            raise Rejected("bad_field", "at_ms", detail)
        return at_ms

    return read


def time_formats(spec: Spec) -> list[str]:
    """The formats of a time, in the order in which they are tried."""
    named = spec.format if isinstance(spec, Field) else None
    if named is None:
        return ["ms", "iso"]
    return [named] if isinstance(named, str) else named


def truth(name: str, spec: Spec, nulls: Collection[str]) -> Getter:
    """True or false. The getter raises Rejected where the value is neither."""
    get, where = raw(spec, nulls), described(spec)

    def read(scope: Scope) -> bool | None:
        found = get(scope)
        if found is None or type(found) is bool:
            return found
        answer: bool | Any = values.boolean(found)
        if answer is BAD:
            detail = f"the value at {where} is neither true nor false: {quote(found)}"
            raise Rejected("bad_field", name, detail)
        return answer

    return read


def kind(
    spec: Spec, nulls: Collection[str], kinds: Mapping[str, str | KindWeight], other: str
) -> Callable[[Scope], tuple[str, float | None] | None]:
    """Eddyline's kind, and the weight of this kind where the map has one.

    The kind `IGNORE` means that there is no event. The getter raises Rejected for a kind that is
    not listed, unless `other` says what it becomes.
    """
    get, where = raw(spec, nulls), described(spec)
    known = known_kinds(kinds)
    own = own_name(spec, nulls)

    def read(scope: Scope) -> tuple[str, float | None] | None:
        here = scope.here
        found = here.get(own) if own is not None and type(here) is dict else get(scope)
        if found is None:
            return None
        entry = known.get(found) if type(found) is str else None
        if entry is not None:
            return entry
        if not known:
            return (found, None)
        if other != "refuse":
            return (other, None)
        detail = f"{quote(found)} at {where} is none of the map's kinds"
        raise Rejected("unknown_kind", "kind", detail)

    return read


def known_kinds(kinds: Mapping[str, str | KindWeight]) -> dict[str, tuple[str, float | None]]:
    """What each listed kind becomes, and its weight where the map has one."""
    return {
        name: (entry, None) if isinstance(entry, str) else (entry.kind, entry.weight)
        for name, entry in kinds.items()
    }


def title(spec: Spec, nulls: Collection[str]) -> Getter:
    """A text. The getter raises Rejected for a value that the change event does not have."""
    get = raw(spec, nulls)

    def read(scope: Scope) -> Any:
        found = _available("title", get(scope))
        text = values.text(found)
        return None if found is None else _WRONG_TYPE if text is BAD else text

    return read


def labels(name: str, spec: Spec, nulls: Collection[str]) -> Getter:
    """A list of texts; one text is a list of one. Raises Rejected as `title` does."""
    get = raw(spec, nulls)
    split = spec.split if isinstance(spec, Field) else None

    def read(scope: Scope) -> Any:
        found = _available(name, get(scope))
        if found is None:
            return None
        if split is not None and isinstance(found, str):
            found = found.split(split)
        every = found if isinstance(found, list) else [found]
        texts = [values.text(one) for one in every if one is not None]
        return [_WRONG_TYPE if text is BAD else text for text in texts if text != ""]

    return read


def number(spec: Spec, nulls: Collection[str]) -> Getter:
    """A number, or what the record has in its place."""
    get, own = raw(spec, nulls), own_name(spec, nulls)

    def read(scope: Scope) -> Any:
        here = scope.here
        found = here.get(own) if own is not None and type(here) is dict else get(scope)
        if type(found) is float or type(found) is int:
            return found
        return None if found is None else _scalar(values.number(found), found)

    return read


def attribute(spec: Spec, nulls: Collection[str]) -> Getter:
    """A text, number or truth value."""
    get = raw(spec, nulls)

    def read(scope: Scope) -> Any:
        found = get(scope)
        if found is None:
            return None
        return _WRONG_TYPE if values.scalar(found) is BAD else found

    return read


def attributes_from(
    spec: AttributesFrom, nulls: Collection[str], patches: bool = False
) -> Callable[[Scope], dict[str, Any]]:
    """Attributes under the record's own names. Other values than scalars are left out.

    patches: null stays, as it removes an attribute
    """
    get = compile_path(spec.path)
    leave_out, dropped = frozenset(spec.leave_out), frozenset(nulls)
    flatten = spec.nested == "flatten"
    if (spec.name is None) != (spec.value is None):
        raise ValueError("attributes_from has both name and value, or neither")
    name = None if spec.name is None else compile_path(spec.name)
    value = None if spec.value is None else compile_path(spec.value)

    def pairs(scope: Scope) -> list[tuple[Any, Any]]:
        found = get(scope)
        if isinstance(found, dict):
            return _flat(found, "", _FLATTEN_DEPTH_MAX) if flatten else list(found.items())
        if not isinstance(found, list):
            return []
        if name is not None and value is not None:
            inner = [Scope(one, scope, scope.source) for one in found]
            return [(name(one), value(one)) for one in inner]
        if spec.split is not None:
            texts = (one.partition(spec.split) for one in found if isinstance(one, str))
            return [(before, after) for before, between, after in texts if between]
        return []

    def read(scope: Scope) -> dict[str, Any]:
        return {
            key: found
            for key, found in pairs(scope)
            if isinstance(key, str)
            and key
            and key not in leave_out
            and (values.scalar(found) is not BAD or (patches and found is None))
            and not (type(found) is str and found in dropped)
        }

    return read


def holds_null(spec: Spec) -> Callable[[Scope], bool]:
    """Whether the value of a field that is no more than a path is null, and not merely absent."""
    path = spec if isinstance(spec, str) else spec.path
    return (lambda scope: False) if path is None else paths.holds_null(path)


def condition(path: str, wanted: Scalar | list[Scalar] | Condition) -> Callable[[Scope], bool]:
    """Whether the value at a path is what a `where` wants."""
    get = compile_path(path)
    if not isinstance(wanted, Condition):
        among = _among(wanted)
        return lambda scope: among(get(scope))
    tests: list[Callable[[Any], bool]] = []
    if (exists := wanted.exists) is not None:
        tests.append(lambda found: (found is not None) == exists)
    if wanted.unless is not None:
        unwanted = _among(wanted.unless)
        tests.append(lambda found: not unwanted(found))
    if wanted.above is not None:
        above = _above(wanted.above)
        tests.append(lambda found: found is not None and above(found) is True)
    return lambda scope: all(test(found) for found in [get(scope)] for test in tests)


def is_relative(spec: Spec) -> bool:
    """Whether a field takes its value from the element that its rule is at, and nowhere else."""
    field = Field(path=spec) if isinstance(spec, str) else spec
    every = [field.path] if field.path is not None else field.first or field.join or []
    return bool(every) and all(paths.is_relative(path) for path in every)


def described(spec: Spec) -> str:
    """The paths of a field, for a message."""
    field = Field(path=spec) if isinstance(spec, str) else spec
    if field.first is not None:
        return " or ".join(field.first)
    if field.join is not None:
        return " and ".join(field.join)
    return field.path if field.path is not None else f"the constant {quote(field.const)}"


def _sourced(field: Field, nulls: Collection[str]) -> Getter:
    if field.const is not None:
        constant = field.const
        return lambda scope: constant
    dropped = frozenset(nulls)

    def without_nulls(path: str) -> Getter:
        get = compile_path(path)
        if not dropped:
            return get

        def read(scope: Scope) -> Any:
            found = get(scope)
            return None if type(found) is str and found in dropped else found

        return read

    if field.path is not None:
        return without_nulls(field.path)
    gets = [without_nulls(path) for path in field.first or field.join or ()]
    if field.first is not None:

        def first(scope: Scope) -> Any:
            for get in gets:
                found = get(scope)
                if found is not None and found != "":
                    return found
            return None

        return first

    def joined(scope: Scope) -> Any:
        parts = [values.id_text(get(scope)) for get in gets]
        return None if BAD in parts else field.sep.join(parts)

    return joined


def _then(get: Getter, change: Callable[[Any], Any]) -> Getter:
    def read(scope: Scope) -> Any:
        found = get(scope)
        return found if found is None or found is BAD else change(found)

    return read


def _last(separator: str) -> Callable[[Any], Any]:
    return lambda found: found.rpartition(separator)[2] if isinstance(found, str) else found


def _mapped(table: Mapping[str, Scalar]) -> Callable[[Any], Any]:
    def change(found: Any) -> Any:
        key = ("true" if found else "false") if type(found) is bool else values.text(found)
        return table.get(key, found) if type(key) is str else found

    return change


def _above(limit: float) -> Callable[[Any], Any]:
    def compare(found: Any) -> Any:
        number_ = values.number(found)
        return BAD if number_ is BAD else number_ > limit

    return compare


def _negated(found: Any) -> Any:
    answer = values.boolean(found)
    return BAD if answer is BAD else not answer


def _among(wanted: Scalar | list[Scalar]) -> Callable[[Any], bool]:
    every: Sequence[Scalar] = wanted if isinstance(wanted, list) else [wanted]
    # True equals 1 in Python, not in a record.
    known = frozenset((type(one) is bool, one) for one in every)
    return lambda found: (
        type(found) in (str, int, float, bool) and (type(found) is bool, found) in known
    )


def _available(name: str, found: Any) -> Any:
    if found is UNAVAILABLE:
        detail = (
            "the change event does not have this column, as the update left it alone: set REPLICA "
            "IDENTITY FULL, or take the field out of the map"
        )
        raise Rejected("unavailable_value", name, detail)
    return found


def _scalar(converted: Any, found: Any) -> Any:
    if converted is not BAD:
        return converted
    return found if values.scalar(found) is not BAD else _WRONG_TYPE


def _flat(found: Mapping[Any, Any], before: str, depth: int) -> list[tuple[Any, Any]]:
    pairs: list[tuple[Any, Any]] = []
    for key, value in found.items():
        if isinstance(value, dict):
            if depth > 1:
                pairs += _flat(value, f"{before}{key}.", depth - 1)
        else:
            pairs.append((f"{before}{key}", value))
    return pairs
