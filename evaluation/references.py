"""References that are not the product's: chance, plain popularity, and item-based neighbours."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
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

# Of item-kNN: an item's newest users, a user's newest items, the newest items of the query, and
# rows of neighbours that are kept.
USERS_MAX, ITEMS_MAX, HISTORY_MAX, KEPT_ROWS = 500, 200, 20, 1_000


class ReferenceRow(Row, ABC):
    """A row that scores all items of the log by itself. Subclasses say how."""

    def __init__(self, name: str, log: EventLog, product: Product, scored: int) -> None:
        self.results = {name: Results(scored)}
        self.log, self.product = log, product
        self._results = self.results[name]
        self._row_of = {item_id: row for row, item_id in enumerate(log.item_ids)}
        self._items: LiveItems | None = None
        # Row of each live item in the log's items; beyond them for one without an event.
        self.rows: Ints = np.empty(0, np.int64)

    @override
    def score(self, query: Query) -> None:
        items = self.product.items
        if items is not self._items:
            none = len(self.log.item_ids)
            self._items = items
            self.rows = np.array([self._row_of.get(i, none) for i in items.ids], np.int64)
        scores = self.scores(query)
        note(self._results, [query], PathScores(scores[None, :]), items)

    @abstractmethod
    def scores(self, query: Query) -> Scores:
        """The score of each live item, (items,)."""

    def positive(self, begin: int, end: int) -> Ints:
        """Numbers of the events that are no dislikes."""
        return begin + np.flatnonzero(self.log.kinds[begin:end] != DISLIKE)


class RandomRow(ReferenceRow):
    """Every order is equally likely."""

    def __init__(self, log: EventLog, product: Product, scored: int, seed: int) -> None:
        super().__init__("random", log, product, scored)
        self._rng = np.random.default_rng(seed)

    @override
    def scores(self, query: Query) -> Scores:
        return self._rng.random(len(self.rows))


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


class ItemNeighboursRow(ReferenceRow):
    """Item-based neighbours by cosine, fitted anew at the begin of each day.

    Of an item its newest `USERS_MAX` users count, of each of them the newest `ITEMS_MAX` items; the
    query is the user's newest `HISTORY_MAX` items.
    """

    def __init__(self, log: EventLog, product: Product, scored: int) -> None:
        super().__init__("item-knn-daily", log, product, scored)
        self._day = -1
        self._learned = 0
        self._users_of: Callable[[int], Ints] = lambda item: np.empty(0, np.int64)
        self._items_of: Callable[[int], Ints] = lambda user: np.empty(0, np.int64)
        self._norms = np.ones(len(log.item_ids) + 1)
        self._kept: OrderedDict[int, npt.NDArray[np.float32]] = OrderedDict()

    @override
    def learn(self, begin: int, end: int) -> None:
        self._learned = end

    @override
    def scores(self, query: Query) -> Scores:
        if query.at_ms // DAY_MS != self._day:
            self._day = query.at_ms // DAY_MS
            self._fit(int(np.searchsorted(self.log.at_ms, self._day * DAY_MS, side="left")))
        total = np.zeros(len(self.log.item_ids) + 1, np.float32)
        entries = [e for e in query.user.history.entries if e.kind != DISLIKE][:HISTORY_MAX]
        for entry in entries:
            item = self._row_of.get(entry.item_id)
            if item is not None:
                total += self._neighbours(item)
        return total[self.rows]

    def _fit(self, end: int) -> None:
        """Lists of users and items of the events before `end`."""
        kept = self.positive(0, min(end, self._learned))
        users, items = self.log.users[kept], self.log.items[kept]
        # Of equal pairs the last one.
        pairs = users[::-1].astype(np.int64) * len(self.log.item_ids) + items[::-1]
        last = np.sort(len(pairs) - 1 - np.unique(pairs, return_index=True)[1])
        users, items = users[last], items[last]
        self._users_of = _lists(items, users, len(self.log.item_ids), USERS_MAX)
        self._items_of = _lists(users, items, len(self.log.user_ids), ITEMS_MAX)
        counts = np.bincount(items, minlength=len(self.log.item_ids) + 1)
        self._norms = np.sqrt(np.maximum(counts, 1))
        self._kept.clear()

    def _neighbours(self, item: int) -> npt.NDArray[np.float32]:
        if item in self._kept:
            self._kept.move_to_end(item)
            return self._kept[item]
        lists = [self._items_of(user) for user in self._users_of(item).tolist()]
        together = np.bincount(
            np.concatenate(lists) if lists else np.empty(0, np.int64), minlength=len(self._norms)
        )
        cosines = together / (self._norms * self._norms[item])
        row: npt.NDArray[np.float32] = cosines.astype(np.float32)
        row[item] = 0.0
        self._kept[item] = row
        if len(self._kept) > KEPT_ROWS:
            self._kept.popitem(last=False)
        return row


def _lists(
    keys: npt.NDArray[np.int32], values: npt.NDArray[np.int32], n: int, limit: int
) -> Callable[[int], Ints]:
    """The newest `limit` values of each key 0 … n − 1, from pairs in the order of time."""
    order = np.argsort(keys, kind="stable")
    ends = np.cumsum(np.bincount(keys, minlength=n))
    starts = np.concatenate(([0], ends[:-1]))
    ordered = values[order].astype(np.int64)
    return lambda key: ordered[max(int(starts[key]), int(ends[key]) - limit) : int(ends[key])]
