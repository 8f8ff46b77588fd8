"""Converts filters to messages and back; checks the limits of a request's filter."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from difflib import get_close_matches

from eddyline.errors import EddylineError
from eddyline.schema.events import ID_BYTES_MAX, quote
from eddyline.schema.id_form import IdForm, in_form, normal
from index.filters import LIST_IDS_MAX, RANGES_MAX, TERMS_MAX, TEXT_VALUES_MAX, Filter, Range
from index.port import IndexReader
from serving.answer.deadline import EndsQuery
from serving.proto import retrieval_pb2 as pb

# The near names of an unknown attribute are looked for among so many.
NAMES_COMPARED = 256
_ID_LISTS = ("allow", "deny")


class BadQuery(EddylineError, EndsQuery):
    """A field of a request is out of its limits; the message names field, value and limit."""


def filter_of(filters: pb.Filters, id_form: IdForm, factor: int = 1) -> Filter | None:
    """The filter, checked, its ids and labels in this form; None if it has no part.

    factor: what is barred may be so many times as much as in a user's request. Raises BadQuery.
    """

    def own(texts: Iterable[str]) -> frozenset[str]:
        return frozenset(in_form(text, id_form) for text in texts)

    for name in ("categories", "tags", "tags_all", "categories_none", "tags_none", *_ID_LISTS):
        most = LIST_IDS_MAX if name in _ID_LISTS else TERMS_MAX
        most *= factor if name.endswith("_none") else 1
        check_count(f"filters.{name}", getattr(filters, name), 0, most)
    if len(filters.ranges) > RANGES_MAX:
        raise BadQuery(
            f"filters.ranges: {len(filters.ranges)} values, allowed are 0 … {RANGES_MAX}"
        )
    ranges: dict[str, Range] = {}
    for one in filters.ranges:
        name, between = _range_of(one)
        name = in_form(name, id_form)
        if name in ranges:
            raise BadQuery(f"filters.ranges: {quote(name)} is given twice")
        ranges[name] = between
    found = Filter(
        categories=own(filters.categories),
        tags=own(filters.tags),
        tags_all=own(filters.tags_all),
        texts=_texts_of("filters.texts", filters.texts, id_form),
        categories_none=own(filters.categories_none),
        tags_none=own(filters.tags_none),
        texts_none=_texts_of("filters.texts_none", filters.texts_none, id_form, factor),
        ranges=ranges,
        allow=own(filters.allow) if filters.allow else None,
        deny=own(filters.deny),
    )
    return None if found == Filter() else found


def filters_of(filters: Filter, *, allow: Collection[str], deny: Collection[str]) -> pb.Filters:
    """The reverse of `filter_of` with these lists of ids; an empty `allow` allows all."""
    made = pb.Filters(
        categories=filters.categories,
        tags=filters.tags,
        tags_all=filters.tags_all,
        categories_none=filters.categories_none,
        tags_none=filters.tags_none,
        allow=allow,
        deny=deny,
    )
    for name, wanted in filters.texts.items():
        made.texts.add(attribute=name, values=wanted)
    for name, barred in filters.texts_none.items():
        made.texts_none.add(attribute=name, values=barred)
    for name, between in filters.ranges.items():
        one = made.ranges.add(attribute=name)
        if between.low > -math.inf:
            one.min = between.low
        if between.high < math.inf:
            one.max = between.high
    return made


def check_texts(filters: Filter | None, known: Collection[str]) -> None:
    """Raise BadQuery if a filter names texts of an attribute that is not one of these."""
    if filters is None or not (filters.texts or filters.texts_none):
        return
    check_text_names("filters.texts", (*filters.texts, *filters.texts_none), known)


def check_text_names(field: str, names: Iterable[str], known: Collection[str]) -> None:
    """Raise BadQuery if an attribute's name is not one of those with texts."""
    for name in names:
        if name not in known:
            named = ", ".join(map(quote, sorted(known))) or "none"
            raise BadQuery(
                f"{field}: {quote(name)} is not in the setting filter_texts; it has {named}"
            )


def check_ranges(filters: Filter | None, index: IndexReader) -> None:
    """Raise BadQuery if a range is over an attribute that no item has or had as a number."""
    known = index.number_names() if filters is not None and filters.ranges else None
    if filters is None or known is None:
        return
    for name in filters.ranges:
        if name not in known:
            some = sorted(known)[:NAMES_COMPARED]
            near = get_close_matches(name, some, 3) or some[:5]
            named = ", ".join(map(quote, near)) or "none"
            raise BadQuery(f"{no_such_attribute(name)}; attributes are {named}")


def no_such_attribute(name: str) -> str:
    """What is wrong with a range over an attribute that no item has or had as a number."""
    return f"filters.ranges: no item has the attribute {quote(name)} as a number or date"


def _texts_of(
    field: str, listed: Sequence[pb.Texts], id_form: IdForm, factor: int = 1
) -> dict[str, frozenset[str]]:
    if len(listed) > factor * RANGES_MAX:
        raise BadQuery(f"{field}: {len(listed)} values, allowed are 0 … {factor * RANGES_MAX}")
    found: dict[str, frozenset[str]] = {}
    for one in listed:
        check_count(f"{field}.attribute", [one.attribute], 1, 1)
        check_count(f"{field}.values", one.values, 1, factor * TEXT_VALUES_MAX)
        name = in_form(one.attribute, id_form)
        if name in found:
            raise BadQuery(f"{field}: {quote(one.attribute)} is given twice")
        found[name] = frozenset(map(normal, one.values))
    return found


def check_count(field: str, texts: Sequence[str], least: int, most: int) -> None:
    """Raise BadQuery for too few or too many texts, or for one of too few or too many bytes."""
    if not least <= len(texts) <= most:
        raise BadQuery(f"{field}: {len(texts)} values, allowed are {least} … {most}")
    for text in texts:
        if not 1 <= len(text.encode()) <= ID_BYTES_MAX:
            size = len(text.encode())
            allowed = f"allowed are 1 … {ID_BYTES_MAX}"
            raise BadQuery(f"{field}: {quote(text)} has {size} bytes, {allowed}")


def _range_of(one: pb.Range) -> tuple[str, Range]:
    size = len(one.attribute.encode())
    if not 1 <= size <= ID_BYTES_MAX:
        named = f"{quote(one.attribute)} has {size} bytes"
        raise BadQuery(f"filters.ranges.attribute: {named}, allowed are 1 … {ID_BYTES_MAX}")
    if not (one.HasField("min") or one.HasField("max")):
        raise BadQuery(f"filters.ranges: {quote(one.attribute)} has neither min nor max")
    low = one.min if one.HasField("min") else -math.inf
    high = one.max if one.HasField("max") else math.inf
    try:
        return one.attribute, Range(low, high)
    except ValueError as error:
        raise BadQuery(f"filters.ranges: {quote(one.attribute)}: {error}") from None
