"""References that are not the product's: chance and plain popularity; see also `refitted`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from evaluation.event_log import DISLIKE, EventLog
from evaluation.product import Product
from evaluation.ranks import Ints
from evaluation.rows import Query, Results, Row, note
from index.port import LiveItems
from serving.recall.base import PathScores

DAY_MS = 86_400_000
Scores = npt.NDArray[np.floating[Any]]


class ReferenceRow(Row, ABC):
    """A row that scores all items of the log by itself. Subclasses say how."""

    def __init__(self, names: str, log: EventLog, product: Product, scored: int) -> None:
        """names: of its results, separated by blanks"""
        self.results = {name: Results(scored) for name in names.split()}
        self.log, self.product = log, product
        self.row_of = {item_id: row for row, item_id in enumerate(log.item_ids)}
        self._items: LiveItems | None = None
        # Row of each live item in the log's items; beyond them for one without an event.
        self.rows: Ints = np.empty(0, np.int64)

    @override
    def score(self, query: Query) -> None:
        items = self.product.items
        if items is not self._items:
            none = len(self.log.item_ids)
            self._items = items
            self.rows = np.array([self.row_of.get(i, none) for i in items.ids], np.int64)
        scores = np.atleast_2d(self.scores(query))
        for results, of_one in zip(self.results.values(), scores, strict=True):
            note(results, [query], PathScores(of_one[None, :]), items)

    @abstractmethod
    def scores(self, query: Query) -> Scores:
        """The score of each live item: (items,), or (names, items)."""

    def positive(self, begin: int, end: int) -> Ints:
        """Numbers of the events that are no dislikes."""
        return begin + np.flatnonzero(self.log.kinds[begin:end] != DISLIKE)


class RandomRow(ReferenceRow):
    """Every order is equally likely."""

    def __init__(self, log: EventLog, product: Product, scored: int, seed: int) -> None:
        super().__init__("random", log, product, scored)
        self._seed = seed

    @override
    def scores(self, query: Query) -> Scores:
        # By the number of the event: whichever process scores it, and after whatever others.
        return np.random.default_rng((self._seed, query.number)).random(len(self.rows))


class CountsRow(ReferenceRow):
    """Plain popularity: the events of each item, of all time or of the last days."""

    def __init__(
        self, name: str, log: EventLog, product: Product, scored: int, window_ms: int = 0
    ) -> None:
        """window_ms: 0 for all time."""
        super().__init__(name, log, product, scored)
        self._window_ms = window_ms
        self._counts = np.zeros(len(log.item_ids) + 1, np.int64)
        self._learned = self._left = 0

    @override
    def scores(self, query: Query) -> Scores:
        log = self.log
        if self._window_ms:
            first = int(np.searchsorted(log.at_ms, query.at_ms - self._window_ms, side="left"))
            first = min(first, self._learned)
            np.subtract.at(self._counts, log.items[self.positive(self._left, first)], 1)
            self._left = max(self._left, first)
        return self._counts[self.rows].astype(np.float64)

    @override
    def learn(self, begin: int, end: int) -> None:
        np.add.at(self._counts, self.log.items[self.positive(begin, end)], 1)
        self._learned = end
