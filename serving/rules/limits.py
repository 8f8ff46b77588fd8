"""At most so many items of each value of an attribute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from eddyline.schema.events import LISTS
from index.filters import RANGES_MAX, TERMS_MAX, TEXT_VALUES_MAX, Filter
from index.port import Term

# A filter of a request, with what rules bar in addition, is at most so many times as large as the
# largest one of a request.
BARRED_FACTOR = 8


class Limit(NamedTuple):
    """most: items of each value of the attribute, from 1; see `IndexReader.terms_of` for names."""

    attribute: str
    most: int


class LimitCounts:
    """How many chosen items have each value. Thread rule: one thread."""

    def __init__(self, limits: Sequence[Limit], terms_of: Mapping[str, frozenset[Term]]) -> None:
        """terms_of: item id -> its terms, at least of the limited attributes"""
        self._most = dict(limits)
        self._terms_of = terms_of
        self._counts: dict[Term, int] = {}
        self._full: set[Term] = set()

    def add(self, item_id: str) -> None:
        """Count a chosen item."""
        for term in self._terms_of.get(item_id, ()):
            if (most := self._most.get(term[0])) is not None:
                self._counts[term] = count = self._counts.get(term, 0) + 1
                if count >= most:
                    self._full.add(term)

    def reached(self, item_id: str) -> list[Term]:
        """The item's values that have as many chosen items as they may have, sorted."""
        return sorted(self._full.intersection(self._terms_of.get(item_id, ())))

    def full(self) -> list[Term]:
        """All values that have as many items as they may have, those with the most items first."""
        return sorted(self._full, key=lambda term: (-self._counts[term], term))


def without_terms(filters: Filter | None, terms: Sequence[Term]) -> Filter:
    """The filter that in addition bars items with these terms, the first ones if they are too many.

    With the filter's own it bars at most `BARRED_FACTOR` times what a request may bar.
    """
    made = filters or Filter()
    lists = {"categories": set(made.categories_none), "tags": set(made.tags_none)}
    texts = {name: set(barred) for name, barred in made.texts_none.items()}
    for name, text in terms:
        if name in LISTS:
            if len(lists[name]) < BARRED_FACTOR * TERMS_MAX:
                lists[name].add(text)
        elif name in texts or len(texts) < BARRED_FACTOR * RANGES_MAX:
            barred = texts.setdefault(name, set())
            if len(barred) < BARRED_FACTOR * TEXT_VALUES_MAX:
                barred.add(text)
    return Filter(
        categories=made.categories,
        tags=made.tags,
        tags_all=made.tags_all,
        texts=made.texts,
        categories_none=frozenset(lists["categories"]),
        tags_none=frozenset(lists["tags"]),
        texts_none={name: frozenset(barred) for name, barred in texts.items()},
        ranges=made.ranges,
        allow=made.allow,
        deny=made.deny,
    )
