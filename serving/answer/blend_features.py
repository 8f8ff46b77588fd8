"""What the blender knows of each candidate of a query, and of the query itself.

Every feature is about 0 … 1, so that one learning rate fits all. A feature whose source is away is
0 for all candidates: what is equal for all changes no order.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from index.arrays import Ints, Vector
from index.hits import HitColumns
from index.port import Hit

Matrix = npt.NDArray[np.float64]

# Of the towers' scores, which are cosines: their share of a list is a softmax.
TEMPERATURE = 0.07
DAY_MS = 86_400_000
DAYS_MAX = 4_000
# Items of the user whose vectors are compared with the candidates'.
LAST_ITEMS = 5

CONTEXTS = ("all", "events 0", "events 1–4", "events 5–19", "events 20+", "known", "idle", "towers")
# What is known of an item besides the lists of the paths: name -> what makes it about 0 … 1.
VALUES = {
    "co-visits": (1_000.0, 6.0),
    "co-visits both": (20.0, 3.0),
    "next": (1_000.0, 6.0),
    "visited before": (1_000.0, 6.0),
    "own clicks": (1.0, 3.0),
}
OTHERS = ("paths", "age", "own recency", "tower", "last", "best of last", "mean of last")


def feature_names(paths: Sequence[str]) -> tuple[str, ...]:
    """The features, in the order of the columns. paths: those that are fused, in their order."""
    of_paths = [f"{path} {part}" for path in paths for part in ("listed", "rank", "share")]
    return (*of_paths, *VALUES, *OTHERS)


def rank_features(paths: Sequence[str]) -> list[str]:
    """The features of the logarithmic ranks."""
    return [f"{path} rank" for path in paths]


class Listed(NamedTuple):
    """What a recall path listed. hits: best first, each item once; cosines: its scores are such."""

    path: str
    hits: Sequence[Hit]
    cosines: bool = False


@dataclass(slots=True)
class Table:
    """The union of the lists: each candidate once, in the order of the first list that has it.

    hits:   with the score of that list; ids: theirs
    at_ms:  int64 (candidates,), as `Hit.at_ms`
    ranks:  int64 (paths, candidates), from 0; -1 where the path did not list the candidate
    scores: float64, the same shape: those of the paths; 0 where not listed
    shares: float64, the same shape: the score's share of its list; 0 where not listed
    """

    hits: Sequence[Hit]
    ids: list[str]
    at_ms: Ints
    ranks: Ints
    scores: Matrix
    shares: Matrix

    @classmethod
    def of(cls, lists: Sequence[Listed], excluded: Collection[str] = ()) -> Table:
        """lists: of all fused paths, in their order; an empty one where a path found nothing.

        An excluded item has no rank, and only the first place of an item in a list counts.
        """
        found = [
            (row, one.hits)
            for row, one in enumerate(lists)
            if isinstance(one.hits, HitColumns) and len(one.hits)
        ]
        if found and len(found) == sum(len(one.hits) > 0 for one in lists):
            hits, places = _united(found)
            ids = hits.ids
            if not excluded or frozenset(excluded).isdisjoint(ids):
                numbers = [np.arange(len(of_row)) for _, of_row in found]
                parts = [
                    (row, at, number, of_row.scores)
                    for (row, of_row), at, number in zip(found, places, numbers, strict=True)
                ]
                return cls._filled(lists, hits, ids, hits.facts[:, 0], parts)
        return cls._of_objects(lists, excluded)

    @classmethod
    def _of_objects(cls, lists: Sequence[Listed], excluded: Collection[str]) -> Table:
        place: dict[str, int] = {}
        hits: list[Hit] = []
        # Of each candidate, the last list that has it.
        newest: list[int] = []
        parts: list[tuple[int, Ints, Ints, Matrix]] = []
        for row, one in enumerate(lists):
            places: list[int] = []
            numbers: list[int] = []
            for number, hit in enumerate(one.hits):
                item_id = hit.item_id
                at = place.get(item_id)
                if at is None:
                    if item_id in excluded:
                        continue
                    at = place[item_id] = len(hits)
                    hits.append(hit)
                    newest.append(row)
                elif newest[at] == row:
                    continue
                newest[at] = row
                places.append(at)
                numbers.append(number)
            scores = np.array([one.hits[number].score for number in numbers])
            parts.append((row, np.array(places, np.int64), np.array(numbers, np.int64), scores))
        at_ms = np.array([hit.at_ms for hit in hits], np.int64)
        return cls._filled(lists, hits, [*place], at_ms, parts)

    @classmethod
    def _filled(
        cls,
        lists: Sequence[Listed],
        hits: Sequence[Hit],
        ids: list[str],
        at_ms: Ints,
        parts: Sequence[tuple[int, Ints, Ints, Matrix]],
    ) -> Table:
        """parts: (number of the list, places in `hits`, ranks, scores) of each list."""
        ranks = np.full((len(lists), len(hits)), -1, np.int64)
        scores, shares = np.zeros(ranks.shape), np.zeros(ranks.shape)
        for row, places, numbers, of_list in parts:
            ranks[row, places] = numbers
            scores[row, places] = of_list
            shares[row, places] = _shares(of_list, lists[row].cosines)
        return cls(hits, ids, at_ms, ranks, scores, shares)


def _united(found: Sequence[tuple[int, HitColumns]]) -> tuple[HitColumns, list[Ints]]:
    """(each hit once, in the order of the first list that has it, the places in it by list)."""
    labels = np.concatenate([hits.labels for _, hits in found])
    numbers = np.arange(len(labels), dtype=np.int32)
    # By label the number of its first hit: of equal indexes the last one assigned stays, and what
    # no label names is never read.
    first_of = np.empty(int(labels.max()) + 1, np.int32)
    first_of[labels[::-1]] = numbers[::-1]
    first = first_of[labels]
    is_first = first == numbers
    chosen = is_first.nonzero()[0]
    places = (np.cumsum(is_first) - 1)[first]
    ends = np.cumsum([len(hits) for _, hits in found])
    # A later version of the index may have named more items.
    names = max((hits.names for _, hits in found), key=len)
    facts = np.concatenate([hits.facts for _, hits in found]).take(chosen, axis=0)
    scores = np.concatenate([hits.scores for _, hits in found]).take(chosen)
    return HitColumns(names, labels[chosen], facts, scores), np.split(places, ends[:-1])


def _shares(scores: Matrix, cosines: bool) -> Matrix:
    """Each score's share of its list; 0 where the scores say nothing."""
    if not len(scores):
        return scores
    if cosines:
        scores = np.exp((scores - np.maximum.reduce(scores)) / TEMPERATURE)
    scores = np.maximum(scores, 0.0)
    total = float(np.add.reduce(scores))
    return scores / total if 0 < total < math.inf else np.zeros(len(scores))


@dataclass(slots=True)
class Known:
    """What is known besides the lists; every array has one entry for each candidate.

    values:        name of `VALUES` -> float64 (n,), not negative
    now_ms:        time of the query
    events:        of the user's list
    last_ms:       time of the user's last event; 0 for none
    visits_sum:    co-visits of the user's last item
    own_recency:   float64 (n,), 1 / ln(2 + events of the user since the last one on this item); 0
                   for an item that is not in the list
    vectors:       float32 (n, d), unit norm; None if they are not known
    user_vector:   float32 (d,) of the towers; None if there is none
    last_vectors:  float32 (m, d), of the user's last items, newest first
    """

    values: Mapping[str, Matrix]
    now_ms: int
    events: int
    last_ms: int
    visits_sum: float
    own_recency: Matrix | None = None
    vectors: Vector | None = None
    user_vector: Vector | None = None
    last_vectors: Vector | None = None


def features(table: Table, known: Known, length: int) -> Matrix:
    """float64 (candidates, features), columns as `feature_names`. length: candidates of a path."""
    n, paths = len(table.ids), len(table.ranks)
    listed = table.ranks >= 0
    # By column, so that each is written in one go.
    found = np.zeros((3 * paths + len(VALUES) + len(OTHERS), n))
    scale = math.log(length + 1)
    found[0 : 3 * paths : 3] = listed
    # A rank beyond the length has 0, and so has -1.
    found[1 : 3 * paths : 3] = _rank_features(length).take(table.ranks, mode="wrap")
    np.log1p(length * table.shares, out=found[2 : 3 * paths : 3])
    found[2 : 3 * paths : 3] /= scale
    row = 3 * paths
    for name, (factor, divisor) in VALUES.items():
        values = known.values.get(name)
        if values is not None:
            found[row] = np.log1p(factor * values) / divisor
        row += 1
    found[row] = np.add.reduce(listed, axis=0) / paths
    found[row + 1] = _ages(table.at_ms, known.now_ms)
    if known.own_recency is not None:
        found[row + 2] = known.own_recency
    if known.vectors is not None:
        found[row + 3 :] = _cosines(known.vectors, known.user_vector, known.last_vectors)
    return np.ascontiguousarray(found.T)


@lru_cache(maxsize=8)
def _rank_features(length: int) -> Matrix:
    """float64 (length + 1,): the feature of each rank; the last is that of none."""
    found = np.log((length + 1) / np.arange(1, length + 2)) / math.log(length + 1)
    found[length] = 0.0
    return found


def context(known: Known) -> Matrix:
    """float64 (contexts,), as `CONTEXTS`."""
    events = known.events
    stages = (events == 0, 1 <= events < 5, 5 <= events < 20, events >= 20)
    idle = 1.0
    if known.last_ms:
        idle = math.log1p(max(0, known.now_ms - known.last_ms) / 1_000) / 18
    return np.array(
        [
            1.0,
            *map(float, stages),
            math.log1p(known.visits_sum) / 6,
            idle,
            float(known.user_vector is not None),
        ]
    )


def _ages(at_ms: Ints, now_ms: int) -> Matrix:
    days = (now_ms - at_ms.astype(np.float64)) / DAY_MS
    return np.log1p(np.clip(days, 0.0, DAYS_MAX)) / 9


def _cosines(vectors: Vector, user: Vector | None, last: Vector | None) -> Matrix:
    """float64 (4, n): with the user, the last item, and the best and mean of the last items."""
    found = np.zeros((4, len(vectors)))
    if user is not None:
        found[0] = vectors @ user
    if last is not None and len(last):
        with_last = vectors @ last[:LAST_ITEMS].T
        found[1] = with_last[:, 0]
        found[2] = with_last.max(axis=1)
        found[3] = with_last.mean(axis=1)
    return found
