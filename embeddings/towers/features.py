"""Maps an item or a profile to rows of an embedding table, each with a weight.

A feature space is learned at training time and stored in the bundle's manifest. Every feature is a
row of one table, so a tower's input is one weighted sum of rows:

    labels    categories, tags and `key=value` of text attributes: a vocabulary; others are ignored
    numbers   numeric attributes: quantile bins, learned at training time, one row per bin. An
              attribute is numeric if more than half of its values are; a text that is a number
              counts as one there, other values are ignored
    title     letter trigrams of its words, hashed (Huang et al. 2013, "Learning deep structured
              semantic models", section 3.2): a new title has rows at once

Each of the k rows of one group (all categories, all trigrams, …) weighs 1/√k, so that a long title
does not outweigh the other groups. Hashes are CRC-32: equal in every process, unlike Python's
`hash`.
"""

from __future__ import annotations

import logging
import math
import re
import unicodedata
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeGuard
from zlib import crc32

import msgspec
import numpy as np

from eddyline.schema.events import Item
from eddyline.schema.numbers import number_of

# A label on one item carries no more information than the item's ID embedding.
LABEL_ITEMS_MIN = 2
# 20,000 rows of 64 float32 are 5 MB; the rarest labels are ignored.
LABELS_MAX = 20_000
# 16 bins resolve a film's age to a few years; with more bins, each had too few films.
BINS_MAX = 16
# 9,742 film titles have about 5,400 distinct trigrams; 4,096 rows keep collisions rare.
TRIGRAM_ROWS = 4_096
# Further trigrams of a title of 1,000 characters add no information.
TRIGRAMS_MAX = 128

# Attributes that one log line names.
NAMES_LOGGED_MAX = 10

log = logging.getLogger(__name__)
_WORD = re.compile(r"\w+")


class Numeric(msgspec.Struct, frozen=True):
    """A numeric attribute. edges: ascending; bin i of len(edges) + 1 has the row `row + i`."""

    row: int
    edges: list[float]


class FeatureSpace(msgspec.Struct, frozen=True):
    """The learned features. Thread rule: any thread; immutable.

    labels:       label -> row; the prefixes are "c:" category, "t:" tag, "a:" attribute
    numbers:      attribute -> its bins
    trigram_row:  the first of `trigram_rows` rows of hashed trigrams
    rows:         number of rows of the table
    dense:        length of an item's dense vector, 0 for none
    """

    labels: dict[str, int] = {}
    numbers: dict[str, Numeric] = {}
    trigram_row: int = 0
    trigram_rows: int = 0
    rows: int = 0
    dense: int = 0

    def of_item(self, item: Item) -> tuple[list[int], list[float]]:
        """(rows, weights) of an item; both empty if it has no known feature."""
        rows: list[int] = []
        weights: list[float] = []
        labels = self.labels
        for prefix, names in (("c:", item.categories), ("t:", item.tags)):
            _add([labels[k] for n in names if (k := prefix + n) in labels], rows, weights)
        self._attributes(item.attributes, rows, weights)
        if self.trigram_rows and item.title:
            hashed = [crc32(t.encode()) % self.trigram_rows for t in trigrams(item.title)]
            _add([self.trigram_row + h for h in hashed], rows, weights)
        return rows, weights

    def of_profile(self, attributes: Mapping[str, object]) -> tuple[list[int], list[float]]:
        """(rows, weights) of a user's profile."""
        rows: list[int] = []
        weights: list[float] = []
        self._attributes(attributes, rows, weights)
        return rows, weights

    def _attributes(
        self, attributes: Mapping[str, object], rows: list[int], weights: list[float]
    ) -> None:
        for key, value in attributes.items():
            number = self.numbers.get(key)
            if number is None:
                row = self.labels.get(_label(key, value))
            elif (read := _number(value)) is not None:
                row = number.row + bisect_right(number.edges, read)
            else:
                row = None
            if row is not None:
                rows.append(row)
                weights.append(1.0)


def learn_items(items: Sequence[Item], *, dense: int = 0) -> FeatureSpace:
    """The feature space of a catalogue.

    >>> items = [Item(item_id=str(n), categories=["Drama"], title="Heat") for n in (1, 2)]
    >>> space = learn_items(items)
    >>> len(space.of_item(Item(item_id="3", categories=["Drama", "unknown"], title="Heat"))[0])
    5
    """
    counts = Counter("c:" + n for item in items for n in set(item.categories))
    counts.update("t:" + n for item in items for n in set(item.tags))
    return _learn(counts, (item.attributes for item in items), TRIGRAM_ROWS, dense)


def learn_profiles(profiles: Iterable[Mapping[str, object]]) -> FeatureSpace:
    """The feature space of user profiles.

    >>> space = learn_profiles([{"age": 20, "gender": "F"}, {"age": 50, "gender": "F"}])
    >>> space.of_profile({"age": 70, "gender": "F", "shoe": 44})
    ([2, 0], [1.0, 1.0])
    """
    return _learn(Counter(), profiles, 0, 0)


def trigrams(title: str) -> list[str]:
    """The letter trigrams of a title's words, each word between two `#`; repeats are kept.

    >>> trigrams("Up, again")
    ['#up', 'up#', '#ag', 'aga', 'gai', 'ain', 'in#']
    """
    found: list[str] = []
    for word in _WORD.findall(unicodedata.normalize("NFKC", title).casefold()):
        marked = f"#{word}#"
        found.extend(marked[i : i + 3] for i in range(len(marked) - 2))
        if len(found) >= TRIGRAMS_MAX:
            break
    return found[:TRIGRAMS_MAX]


def _learn(
    counts: Counter[str], attributes: Iterable[Mapping[str, object]], trigram_rows: int, dense: int
) -> FeatureSpace:
    values: dict[str, list[object]] = defaultdict(list)
    for some in attributes:
        for key, value in some.items():
            values[key].append(value)
    edges: dict[str, list[float]] = {}
    left_out: dict[str, int] = {}
    for key in sorted(values):
        if 2 * sum(map(_is_number, values[key])) > len(values[key]):
            read = [n for value in values[key] if (n := _number(value)) is not None]
            edges[key] = _edges(read)
            if len(read) < len(values[key]):
                left_out[key] = len(values[key]) - len(read)
        else:
            counts.update(_label(key, value) for value in values[key])
    if left_out:
        log.warning(
            "values of numeric attributes are no numbers and are left out",
            extra={
                "values_left_out": sum(left_out.values()),
                "attributes": " ".join(list(left_out)[:NAMES_LOGGED_MAX]),
            },
        )
    frequent = [name for name, n in counts.items() if n >= LABEL_ITEMS_MIN]
    frequent.sort(key=lambda name: (-counts[name], name))
    labels = {name: row for row, name in enumerate(frequent[:LABELS_MAX])}
    rows = len(labels)
    numbers = {}
    for key, some_edges in edges.items():
        numbers[key] = Numeric(rows, some_edges)
        rows += len(some_edges) + 1
    return FeatureSpace(labels, numbers, rows, trigram_rows, rows + trigram_rows, dense)


def _edges(values: Sequence[float]) -> list[float]:
    """The inner edges of at most 16 bins of equal counts; fewer if values repeat."""
    shares = np.linspace(0, 1, BINS_MAX + 1)[1:-1]
    found = np.unique(np.quantile(np.asarray(values, np.float64), shares, method="higher"))
    # An edge at the smallest value would leave the bin below it empty.
    return [float(e) for e in found if e > min(values)]


def _label(key: str, value: object) -> str:
    return f"a:{key}={value}"


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: object) -> float | None:
    """The value as a number, also of a text that is one; None for others."""
    if isinstance(value, str):
        return number_of(value)
    return value if _is_number(value) else None


def _add(group: list[int], rows: list[int], weights: list[float]) -> None:
    if group:
        rows += group
        weights += [1.0 / math.sqrt(len(group))] * len(group)
