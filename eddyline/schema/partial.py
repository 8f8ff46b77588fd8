"""Items and profiles with a bad optional part: the part is left out, the rest applies.

A null price must not keep a sold-out item in the answers. `validation` calls this after the strict
decoder of `events` has refused a record, so a good record costs nothing. What identifies a record,
its time and its availability are never left out: where they cannot be read the record is refused.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Literal, TypeVar

import msgspec

from eddyline.errors import Rejected
from eddyline.schema import events
from eddyline.schema.events import Item, ItemPatch, UserProfile
from eddyline.schema.id_form import IdForm, in_form

# Reasons of the strict decoder that an optional part may have caused.
CURABLE = frozenset({"bad_field", "malformed_json", "wrong_vector_length", "not_finite"})
# Why a part is left out.
Reason = Literal[
    "null",
    "wrong_type",
    "empty",
    "too_long",
    "too_many",
    "too_large",
    "not_finite",
    "not_unicode",
    "wrong_length",
]

# (part, reason) -> how many of them were left out. part: a field of an item or a profile.
Omitted = Counter[tuple[str, Reason]]
_T = TypeVar("_T", Item, ItemPatch, UserProfile)


def item(
    value: bytes,
    first: Rejected,
    omitted: Omitted,
    *,
    vector_dimension: int,
    id_form: IdForm,
    **limits: Any,
) -> Item:
    """The item without its bad optional parts.

    first:   why the strict decoder refused the record
    omitted: gets the parts that were left out
    vector_dimension, id_form, limits: arguments of `events.decode_item`
    Raises Rejected where more than optional parts is bad.
    """
    # A null vector is the default.
    checkers = _item_parts(id_form) | {"vector": _or_null(_vector(vector_dimension))}
    limits |= {"vector_dimension": vector_dimension, "id_form": id_form}
    decode = partial(events.decode_item, **limits)
    return _decoded(Item, checkers, decode, value, first, omitted)


def patch(
    value: bytes,
    first: Rejected,
    omitted: Omitted,
    *,
    vector_dimension: int,
    id_form: IdForm,
    **limits: Any,
) -> ItemPatch:
    """The patch without its bad optional parts, which keep their value. As `item` otherwise."""
    checkers = _item_parts(id_form)
    checkers |= {
        "attributes": partial(_patched_attributes, id_form),
        "vector": _vector(vector_dimension),
    }
    checkers = {part: _or_null(checker) for part, checker in checkers.items()}  # null removes it
    limits |= {"vector_dimension": vector_dimension, "id_form": id_form}
    decode = partial(events.decode_patch, **limits)
    return _decoded(ItemPatch, checkers, decode, value, first, omitted)


def profile(
    value: bytes, first: Rejected, omitted: Omitted, *, id_form: IdForm, **limits: Any
) -> UserProfile:
    """The profile without its bad attributes. As `item` otherwise."""
    decode = partial(events.decode_profile, id_form=id_form, **limits)
    checkers: dict[str, _Checker] = {"attributes": partial(_attributes, id_form)}
    return _decoded(UserProfile, checkers, decode, value, first, omitted)


class _Bad(Exception):
    """A part is left out."""

    def __init__(self, reason: Reason) -> None:
        self.reason: Reason = reason


# The good rest of a part; `note` gets the reason of each element that is left out. Raises _Bad.
_Checker = Callable[[Any, Callable[[Reason], None]], Any]


def _decoded(
    kind: type[_T],
    checkers: Mapping[str, _Checker],
    decode: Callable[[bytes], _T],
    value: bytes,
    first: Rejected,
    omitted: Omitted,
) -> _T:
    """The record without its bad parts. checkers: by part; decode: the strict decoder"""
    left_out = Omitted()
    found = _object(value, first)
    for part, checker in checkers.items():
        _check(found, left_out, part, checker)
    made = decode(_encoded(found, kind, first))
    omitted.update(left_out)
    return made


def _check(found: dict[str, Any], omitted: Omitted, part: str, checker: _Checker) -> None:
    if part not in found:
        return

    def note(reason: Reason) -> None:
        omitted[part, reason] += 1

    try:
        found[part] = checker(found[part], note)
    except _Bad as bad:
        note(bad.reason)
        del found[part]


def _object(value: bytes, first: Rejected) -> dict[str, Any]:
    """The JSON object; NaN and Infinity are read, as some producers write them."""
    try:
        found = json.loads(value.decode())
    except (ValueError, RecursionError):
        raise first from None
    if not isinstance(found, dict):
        raise first
    return found


def _encoded(found: Mapping[str, Any], kind: type[msgspec.Struct], first: Rejected) -> bytes:
    """The known fields: an unknown one may hold what JSON cannot."""
    try:
        return msgspec.json.encode({f: found[f] for f in kind.__struct_fields__ if f in found})
    except (ValueError, OverflowError, TypeError, RecursionError):
        raise first from None


def _text(one: Any, chars_max: int, *, may_be_empty: bool) -> str:
    if one is None:
        raise _Bad("null")
    if not isinstance(one, str):
        raise _Bad("wrong_type")
    if not one and not may_be_empty:
        raise _Bad("empty")
    if len(one) > chars_max:
        raise _Bad("too_long")
    try:
        one.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        raise _Bad("not_unicode") from None
    return one


def _title(one: Any, _: Callable[[Reason], None]) -> str:
    return _text(one, events.TITLE_CHARS_MAX, may_be_empty=True)


def _label(one: Any, id_form: IdForm) -> str:
    """A category, a tag or the name of an attribute, in its form."""
    label = _text(one, events.TEXT_CHARS_MAX, may_be_empty=False)
    return _text(in_form(label, id_form), events.TEXT_CHARS_MAX, may_be_empty=False)


def _labels(id_form: IdForm, one: Any, note: Callable[[Reason], None]) -> list[str]:
    if one is None:
        raise _Bad("null")
    if not isinstance(one, list):
        raise _Bad("wrong_type")
    good = []
    for label in one:
        try:
            good.append(_label(label, id_form))
        except _Bad as bad:
            note(bad.reason)
    for _ in good[events.LABELS_MAX :]:
        note("too_many")
    return good[: events.LABELS_MAX]


def _attributes(id_form: IdForm, one: Any, note: Callable[[Reason], None]) -> dict[str, Any]:
    if one is None:
        raise _Bad("null")
    if not isinstance(one, dict):
        raise _Bad("wrong_type")
    good: dict[str, Any] = {}
    for name, value in one.items():
        try:
            key, checked = _label(name, id_form), _scalar(value)
            if len(good) == events.ATTRIBUTES_MAX and key not in good:
                raise _Bad("too_many")
            good[key] = checked
        except _Bad as bad:
            note(bad.reason)
    return good


def _patched_attributes(
    id_form: IdForm, one: Any, note: Callable[[Reason], None]
) -> dict[str, Any]:
    """As `_attributes`; null removes one."""
    if not isinstance(one, dict):
        raise _Bad("wrong_type")
    good: dict[str, Any] = {}
    for name, value in one.items():
        if value is not None:
            good |= _attributes(id_form, {name: value}, note)
        else:
            with suppress(_Bad):
                good[_label(name, id_form)] = None
    for _ in range(events.ATTRIBUTES_MAX, len(good)):
        note("too_many")
    return dict(list(good.items())[: events.ATTRIBUTES_MAX])


def _scalar(one: Any) -> events.Scalar:
    if isinstance(one, bool):
        return one
    if isinstance(one, int):
        if not -(2**63) <= one < 2**63:
            raise _Bad("too_large")
        return one
    if isinstance(one, float):
        if not math.isfinite(one):
            raise _Bad("not_finite")
        return one
    return _text(one, events.VALUE_CHARS_MAX, may_be_empty=True)


def _vector(dimension: int) -> _Checker:
    def check(one: Any, _: Callable[[Reason], None]) -> list[float]:
        if not isinstance(one, list):
            raise _Bad("wrong_type")
        if len(one) != dimension:
            raise _Bad("wrong_length")
        if not all(isinstance(x, int | float) and not isinstance(x, bool) for x in one):
            raise _Bad("wrong_type")
        if not all(abs(x) <= events.VECTOR_NUMBER_MAX for x in one):  # NaN compares false
            raise _Bad("not_finite")
        return one

    return check


def _or_null(checker: _Checker) -> _Checker:
    return lambda one, note: None if one is None else checker(one, note)


def _item_parts(id_form: IdForm) -> dict[str, _Checker]:
    """The parts of a whole item, without its vector."""
    labels = partial(_labels, id_form)
    return {
        "title": _title,
        "categories": labels,
        "tags": labels,
        "attributes": partial(_attributes, id_form),
    }
