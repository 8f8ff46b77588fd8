"""What a query may ask of items beside nearness: categories, tags, numeric ranges, lists of ids.

`Filter` is the question, `matches` its meaning for one item (the oracle uses it as it stands),
`index.storage.columns` the fast form of it over all rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# What one request may bring; a filter of this size costs less than the search.
TERMS_MAX = 256
RANGES_MAX = 16
LIST_IDS_MAX = 2_000


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from `low` to `high`, both included; an infinite end is open."""

    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        """Raise ValueError where it holds nothing, or an end is NaN."""
        if not self.low <= self.high:
            raise ValueError(f"{self.low} … {self.high} holds no number")


@dataclass(frozen=True, slots=True)
class Filter:
    """Every part that is given must hold; a part left out asks nothing.

    categories: one of them at least; tags: one of them at least; tags_all: every one
    ranges:     attribute -> range; an item without this number does not match
    allow:      only these items, where it is not None; deny: none of these
    """

    categories: frozenset[str] = frozenset()
    tags: frozenset[str] = frozenset()
    tags_all: frozenset[str] = frozenset()
    ranges: Mapping[str, Range] = field(default_factory=dict)
    allow: frozenset[str] | None = None
    deny: frozenset[str] = frozenset()

    @property
    def asks_columns(self) -> bool:
        """Whether anything but lists of ids is asked."""
        return bool(self.categories or self.tags or self.tags_all or self.ranges)


def texts(attributes: Mapping[str, Any], part: str) -> set[str]:
    """The categories or the tags of an item; what is no text is no label."""
    found = attributes.get(part)
    return {text for text in found if isinstance(text, str)} if isinstance(found, list) else set()


def numbers(attributes: Mapping[str, Any]) -> dict[str, float]:
    """The numeric attributes of an item; truth values and NaN are none."""
    found = attributes.get("attributes")
    if not isinstance(found, dict):
        return {}
    return {
        name: float(value)
        for name, value in found.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
    }


def matches(filters: Filter, item_id: str, attributes: Mapping[str, Any]) -> bool:
    """Whether one item passes."""
    if item_id in filters.deny or (filters.allow is not None and item_id not in filters.allow):
        return False
    if filters.categories and not filters.categories & texts(attributes, "categories"):
        return False
    tags = texts(attributes, "tags")
    if (filters.tags and not filters.tags & tags) or not filters.tags_all <= tags:
        return False
    has = numbers(attributes)
    return all(
        name in has and between.low <= has[name] <= between.high
        for name, between in filters.ranges.items()
    )
