"""The port of recall paths: what a path is built from, its request and its result."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from eddyline.schema.co_visits import EMPTY, CoVisits
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import StateStore, UserState
from embeddings.towers.base import UserEncoder
from index.arrays import Floats, Ints, Keys, Mask, Vector
from index.filters import Filter
from index.port import Hit, IndexReader, LiveItems
from serving.answer.deadline import Deadline
from serving.recall.popularity import Popularity

# The paths that fill an answer which others leave open, in this order.
FILLS = ("popular", "newest")
# The rows of an item that a recall path may read, see `RecallPath.reads`.
AFTER, BEFORE = "after", "before"


class VisitEntries(NamedTuple):
    """The entries of all rows of a query: of each item the row after it, then the one before it.

    keys:   uint64 (n,), ascending, each once: the items that any row names
    place:  int64 (entries,), of each entry's key among them
    visits: float32 (entries,); next: likewise, as `CoVisits`
    sizes:  of the rows, in the same order
    """

    keys: Keys
    place: Ints
    visits: Vector
    next: Vector
    sizes: list[int]

    def summed(self, values: Vector, weights: Sequence[float]) -> Scored:
        """The sums of value · weight by key that are above 0; added in the order of the entries.

        values: float32 (entries,), not negative; weights: by row, not negative
        """
        weighted = values * np.repeat(np.array(weights, np.float64), self.sizes)
        sums: Floats = np.bincount(self.place, weighted, len(self.keys)).astype(
            np.float64, copy=False
        )
        above = sums > 0
        return Scored(self.keys[above], sums[above])


@dataclass(frozen=True)
class QueryCoVisits:
    """Co-visitation rows of a query.

    items:  the user's newest items, each once, newest first
    after:  of each, the row of the items visited after it; empty where no path reads it
    before: the row of the items visited before it, likewise
    """

    items: Sequence[str]
    after: Sequence[CoVisits]
    before: Sequence[CoVisits]

    @cached_property
    def entries(self) -> VisitEntries:
        """The entries of all rows; paths that weigh them differently share the sorting."""
        pairs = zip_longest(self.after, self.before, fillvalue=EMPTY)
        rows = [row for pair in pairs for row in pair]
        keys, place = np.unique(_joined([row.keys for row in rows], np.uint64), return_inverse=True)
        return VisitEntries(
            keys,
            place,
            _joined([row.visits for row in rows], np.float32),
            _joined([row.next for row in rows], np.float32),
            [len(row.keys) for row in rows],
        )


class Hidden(NamedTuple):
    """The items that an answer leaves out since the user had them.

    ids:  the items; of those beyond the user's list, the live ones
    keys: uint64 (n,), `item_key` of all, in no order, which may repeat; None where none of them is
          beyond the list
    """

    ids: set[str]
    keys: Keys | None = None


class RecallRequest(NamedTuple):
    """One query as a recall path sees it.

    user:            None if the store could not be read
    k:               the most candidates to return
    excluded:        item ids that must not be returned
    hidden:          of what `excluded` was made; its keys are those of `excluded` only where its
                     ids are this object
    filters:         every candidate passes them; None: no filter
    popularity_beta: strength of the popularity correction, see `Popularity.debias`; 0: none
    now_ms:          time of the query, milliseconds since 1970
    co_visits:       None if no path reads them, or they could not be read
    """

    user: UserState | None
    k: int
    excluded: Collection[str]
    filters: Filter | None
    popularity_beta: float
    deadline: Deadline
    now_ms: int = 0
    co_visits: QueryCoVisits | None = None
    hidden: Hidden | None = None


def _joined(parts: Sequence[npt.NDArray[Any]], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    return np.concatenate(parts) if parts else np.empty(0, dtype)


def locate(ascending: Keys, keys: Keys) -> tuple[Ints, Mask]:
    """(int64 (n,): places in `ascending`, bool (n,): whether the key is at its place)."""
    if not len(ascending):
        return np.zeros(len(keys), np.int64), np.zeros(len(keys), bool)
    at = np.minimum(np.searchsorted(ascending, keys), len(ascending) - 1)
    return at, ascending[at] == keys


class Scored(NamedTuple):
    """Scores by item key. keys: uint64 (n,), ascending, each once; scores: float64 (n,), above 0"""

    keys: Keys
    scores: Floats

    def of(self, keys: Keys) -> Floats:
        """float64 (m,): the score of each of these keys, 0 for one without."""
        at, known = locate(self.keys, keys)
        found = np.zeros(len(keys))
        found[known] = self.scores[at[known]]
        return found


class StageTimings(NamedTuple):
    """When a path finished its stages, microseconds since 1970; 0: the stage did not run."""

    embedded_us: int = 0
    searched_us: int = 0


NOT_TIMED = StageTimings()


class Candidates(NamedTuple):
    """The result of a recall path.

    hits:        best first
    why:         one clause on why there are fewer than `request.k`, else ""
    degradation: `server: reason` if the path works with old or missing data, else ""
    vector:      float32 (d,), whose inner products with items are the scores; None: they are others
    by_key:      the scores of all items that were found, live or not; None: they are not known
    """

    hits: Sequence[Hit]
    why: str = ""
    timings: StageTimings = NOT_TIMED
    degradation: str = ""
    vector: Vector | None = None
    by_key: Scored | None = None


class PathScores(NamedTuple):
    """How a path orders all live items for some requests, for rankings of the whole catalogue.

    scores: float32 or float64 (requests, items), the highest first, equal ones tied; -inf where the
            path never returns the item. Excluded items and filters are left to the caller
    error:  where two scores of a request differ by no more, `exact` decides
    exact:  (number of the request, places of items) -> float64 scores of those; None: error is 0
    """

    scores: npt.NDArray[np.floating]
    error: float = 0.0
    exact: Callable[[int, Ints], Floats] | None = None


class RecallPath(Protocol):
    """One way to find candidates for a user; `registry` lists all. Thread rule: any thread.

    reads: the rows of the user's items that it needs in a request, of `AFTER` and `BEFORE`
    """

    name: str
    reads: frozenset[str] = frozenset()

    def recall(self, request: RecallRequest, index: IndexReader) -> Candidates:
        """Live items that pass the filter and are not excluded. Raises DeadlinePassed."""

    def score_all(
        self, requests: Sequence[RecallRequest], index: IndexReader, items: LiveItems
    ) -> PathScores:
        """The order of `recall` over all live items, for every request.

        items: those of the index now. Reads of a request the user and the co-visits alone; the
        popularity correction is not applied.
        """

    def degradation(self) -> str:
        """`server: reason` if the path works with old or missing data now, else ""."""
        return ""


@dataclass(frozen=True, slots=True)
class RecallContext:
    """What the recall paths of one generation are built from.

    closing: a path registers the close of its threads and connections here
    """

    settings: Settings
    store: StateStore
    tower: UserEncoder
    popularity: Popularity
    closing: ExitStack
