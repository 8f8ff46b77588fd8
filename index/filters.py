"""Conditions on items: categories, tags, ranges of numbers and dates, lists of ids.

`Filter` states the condition. `matches` defines it for one item; the oracle uses it.
`index.storage.columns` evaluates it quickly over all rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from eddyline.schema.id_form import normal
from eddyline.schema.numbers import number_of

# Limits of one request. A filter of this size costs less than the search.
TERMS_MAX = 256
RANGES_MAX = 16
TEXT_VALUES_MAX = 64
LIST_IDS_MAX = 2_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from `low` to `high`, both included; an infinite end is open."""

    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        """Raise ValueError if the range is empty or an end is NaN."""
        if not self.low <= self.high:
            raise ValueError(f"{self.low} … {self.high} holds no number")


@dataclass(frozen=True, slots=True)
class Filter:
    """All set parts must hold; the default of a part sets no condition.

    categories: the item has at least one of them; tags: at least one; tags_all: every one
    texts:      attribute name -> texts; the item has one of them. See `text_of`
    categories_none, tags_none, texts_none: the item has none of them
    ranges:     attribute name -> range; an item without this number does not match. A text that is
                a number counts as that number, a date as milliseconds since 1970 UTC: see `numbers`
    allow:      if not None, only these item ids match; deny: these item ids do not match
    """

    categories: frozenset[str] = frozenset()
    tags: frozenset[str] = frozenset()
    tags_all: frozenset[str] = frozenset()
    texts: Mapping[str, frozenset[str]] = field(default_factory=dict)
    categories_none: frozenset[str] = frozenset()
    tags_none: frozenset[str] = frozenset()
    texts_none: Mapping[str, frozenset[str]] = field(default_factory=dict)
    ranges: Mapping[str, Range] = field(default_factory=dict)
    allow: frozenset[str] | None = None
    deny: frozenset[str] = frozenset()


def terms(attributes: Mapping[str, Any], field_name: str) -> set[str]:
    """The item's "categories" or "tags"; values that are not text are skipped."""
    values = attributes.get(field_name)
    return {v for v in values if isinstance(v, str)} if isinstance(values, list) else set()


def numbers(attributes: Mapping[str, Any]) -> dict[str, float]:
    """The item's numeric attributes; booleans, NaN and other texts than these are skipped.

    A text that is a date, or a number, counts as that number: some catalogues send all values as
    texts. An item is read by itself, so a filter finds it whatever the other items have.

    >>> numbers({"attributes": {"price": "19.90", "released": "1970-01-01T00:00:02Z", "of": "a"}})
    {'price': 19.9, 'released': 2000.0}
    """
    values = attributes.get("attributes")
    if not isinstance(values, dict):
        return {}
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, str):
            read = date_ms(value)
            if read is None:
                read = number_of(value)
            if read is not None:
                found[name] = float(read)
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and value == value:
            found[name] = float(value)
    return found


def text_of(attributes: Mapping[str, Any], name: str) -> str | None:
    """The text of one attribute, in Unicode NFC without outer blanks, as a filter has it.

    A boolean is "true" or "false"; None if there is neither.

    >>> item = {"attributes": {"brand": " Acme", "new": True, "price": 3}}
    >>> text_of(item, "brand"), text_of(item, "new"), text_of(item, "price")
    ('Acme', 'true', None)
    """
    values = attributes.get("attributes")
    value = values.get(name) if isinstance(values, dict) else None
    if isinstance(value, bool):
        return "true" if value else "false"
    return normal(value) if isinstance(value, str) else None


def date_ms(text: str) -> float | None:
    """Milliseconds since 1970 UTC of a date or time in ISO 8601; None for other text.

    The year, month and day must be there; without a zone the time is UTC.

    >>> date_ms("1970-01-02"), date_ms("1970-01-01 01:00:00.5+01:00"), date_ms("1970")
    (86400000.0, 500.0, None)
    """
    if len(text) < 10 or text[4] != "-" or text[7] != "-":
        return None
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return None
    zoned = found if found.tzinfo is not None else found.replace(tzinfo=UTC)
    return float((zoned - _EPOCH) // timedelta(milliseconds=1))


def matches(filters: Filter, item_id: str, attributes: Mapping[str, Any]) -> bool:
    """Whether one item passes the filter."""
    if item_id in filters.deny or (filters.allow is not None and item_id not in filters.allow):
        return False
    categories, tags = terms(attributes, "categories"), terms(attributes, "tags")
    if filters.categories and not filters.categories & categories:
        return False
    if (filters.tags and not filters.tags & tags) or not filters.tags_all <= tags:
        return False
    if filters.categories_none & categories or filters.tags_none & tags:
        return False
    if any(text_of(attributes, name) not in wanted for name, wanted in filters.texts.items()):
        return False
    if any(text_of(attributes, name) in barred for name, barred in filters.texts_none.items()):
        return False
    values = numbers(attributes)
    return all(
        name in values and between.low <= values[name] <= between.high
        for name, between in filters.ranges.items()
    )
