"""References that are not ours: ALS and item-based neighbours of the library implicit.

Both are fitted anew on the first query of each day (UTC), on all events from before the day that
are no dislikes; of a user's events on one item one counts. Everything but what is set here is the
library's default. One thread: the same log and seed give the same bits.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from typing_extensions import override

from eddyline.errors import SettingsError
from evaluation.event_log import DISLIKE, EventLog
from evaluation.product import Product
from evaluation.ranks import Ints
from evaluation.references import DAY_MS, ReferenceRow, Scores
from evaluation.rows import Query

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

# Factors as many as the towers' dimension; neighbours kept of each item.
FACTORS, ITERATIONS, NEIGHBOURS = 64, 15, 200


def check_library(rows: Sequence[str]) -> None:
    """Raise SettingsError if implicit is missing. rows: those that need it"""
    try:
        import implicit  # noqa: F401
    except ImportError:
        raise SettingsError(
            f"the rows {', '.join(rows)} need implicit, which is missing: install "
            "eddyline[evaluate], or name other rows with --rows"
        ) from None


class RefittedRow(ReferenceRow):
    """A row that is fitted anew each day. Subclasses say how."""

    def __init__(self, names: str, log: EventLog, product: Product, scored: int) -> None:
        super().__init__(names, log, product, scored)
        self._user_row_of = {user_id: row for row, user_id in enumerate(log.user_ids)}
        self._day, self._fitted = -1, -1
        self._before: csr_matrix

    @override
    def scores(self, query: Query) -> Scores:
        if query.at_ms // DAY_MS != self._day:
            self._day = query.at_ms // DAY_MS
            self._fit(int(np.searchsorted(self.log.at_ms, self._day * DAY_MS, side="left")))
        user = self._user_row_of[query.user_id]
        items = self._before[user].indices.astype(np.int64)
        newer = (
            self.row_of.get(e.item_id) for e in query.user.history.entries if e.kind != DISLIKE
        )
        items = np.union1d(items, np.array([i for i in newer if i is not None], np.int64))
        found = np.atleast_2d(self.of_user(user, items))
        # Items without an event in the log are unknown to the library.
        padded = np.concatenate((found, np.zeros((len(found), 1), found.dtype)), axis=1)
        return padded[:, self.rows]

    @abstractmethod
    def fit(self, before: csr_matrix) -> None:
        """Fit. before: float32 (users, items) of the log, 1 where a user has an event"""

    @abstractmethod
    def of_user(self, user: int, items: Ints) -> Scores:
        """The scores of the log's items, (items,) or (names, items).

        items: of the user, strictly before the query: those of before the day, and of the list
        """

    def _fit(self, end: int) -> None:
        """Fit on the events before `end`."""
        if end == self._fitted:
            return
        from scipy.sparse import csr_matrix
        from threadpoolctl import threadpool_limits

        self._fitted, kept = end, self.positive(0, end)
        users, items = self.log.users[kept], self.log.items[kept]
        shape = (len(self.log.user_ids), len(self.log.item_ids))
        self._before = csr_matrix((np.ones(len(kept), np.float32), (users, items)), shape)
        self._before.data[:] = 1.0
        with threadpool_limits(1, "blas"), warnings.catch_warnings():
            # The library warns of matrices that it makes itself.
            warnings.simplefilter("ignore")
            self.fit(self._before)


class AlsRow(RefittedRow):
    """Factors by alternating least squares.

    als-daily: the user's factors of the fit; als-daily-live: those that follow from the user's
    items at the query
    """

    def __init__(self, log: EventLog, product: Product, scored: int, seed: int) -> None:
        super().__init__("als-daily als-daily-live", log, product, scored)
        self._seed = seed

    @override
    def fit(self, before: csr_matrix) -> None:
        from implicit.cpu.als import AlternatingLeastSquares

        self._model = AlternatingLeastSquares(
            factors=FACTORS, iterations=ITERATIONS, num_threads=1, random_state=self._seed
        )
        self._model.fit(before, show_progress=False)

    @override
    def of_user(self, user: int, items: Ints) -> Scores:
        from scipy.sparse import csr_matrix

        n = len(self.log.item_ids)
        row = csr_matrix((np.ones(len(items), np.float32), items, [0, len(items)]), (1, n))
        live = self._model.recalculate_user(user, row)
        factors: Scores = np.stack((self._model.user_factors[user], live))
        scores: Scores = factors @ self._model.item_factors.T
        return scores


class ItemNeighboursRow(RefittedRow):
    """Item-based neighbours by cosine; an item's score is the sum over the user's items."""

    def __init__(self, log: EventLog, product: Product, scored: int) -> None:
        super().__init__("item-knn-daily", log, product, scored)

    @override
    def fit(self, before: csr_matrix) -> None:
        from implicit.nearest_neighbours import CosineRecommender

        model = CosineRecommender(K=NEIGHBOURS, num_threads=1)
        model.fit(before, show_progress=False)
        self._similarity = model.similarity

    @override
    def of_user(self, user: int, items: Ints) -> Scores:
        near = self._similarity[items]
        n = len(self.log.item_ids)
        return np.bincount(near.indices, weights=near.data, minlength=n).astype(np.float64)
