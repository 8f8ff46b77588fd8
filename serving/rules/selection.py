"""From the fused list to the answer: denied, boosted and pinned items, limits and diversity."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import compress
from typing import NamedTuple

import numpy as np

from eddyline.schema.events import quote
from index.arrays import Vector
from index.filters import Filter
from index.port import IndexReader, Term
from serving.answer.fusion import Fusion, ItemRule, PathResult, Recommendation, counted, merged
from serving.recall.base import RecallPath, RecallRequest
from serving.rules.diversity import ByMarginalRelevance, InOrder
from serving.rules.editorial import ActiveRules, Pin
from serving.rules.limits import Limit, LimitCounts, without_terms
from serving.rules.quotas import NEWEST

PINNED, BOOSTED, OVER_LIMIT = "pinned", "boosted", "over_limit"
# Of items that are not in the answer.
DENIED, LIMIT = "denied", "limit"
# The fused items that rules choose from: this many times k and so many more, but no more than
# `POOL_MAX` or k. Diversity costs O(k · pool · d).
POOL_FACTOR, POOL_MORE, POOL_MAX = 4, 50, 1_000
# Further recalls of an answer that lacks items within its limits. Each leaves out the values that
# are full, so most answers need none or one.
ROUNDS_MAX = 4
# A look-up of vectors, see `ScatterGather.vectors_of`.
VECTORS_MAX = 1_000
# A pinned item by value may fail the request's filter; so many are looked at.
PIN_CANDIDATES = 20


class Wishes(NamedTuple):
    """What a query asks of the rules.

    limits:    each attribute once; diversity: 0 … 1; None: as arm or settings have it
    scene:     of the editorial rules
    pins:      whether pinned items get their positions: not on later pages
    user_id:   of arm and quotas; label: the request's own arm, see `Arms.of`
    impression_id: of the draws of quotas; without one there are none
    """

    limits: Sequence[Limit] | None = None
    diversity: float | None = None
    scene: str = ""
    pins: bool = True
    user_id: str = ""
    impression_id: str = ""
    label: str = ""


NO_WISHES = Wishes()


class Chosen(NamedTuple):
    """The items of an answer.

    paths:   what the recall paths returned for it
    filled:  what the answer has beyond its limits, one sentence each
    version: of the editorial rules; arm: of the user, "" for none
    removed: item id -> a value that was full, of candidates before the answer was
    limits:  that the answer keeps
    """

    items: list[Recommendation]
    paths: list[PathResult]
    filled: Sequence[str] = ()
    version: str = ""
    removed: Mapping[str, Term] = {}
    limits: Sequence[Limit] = ()
    arm: str = ""


class Choice:
    """The choice of one answer's items. Thread rule: one thread."""

    def __init__(
        self,
        fusion: Fusion,
        paths: Sequence[RecallPath],
        request: RecallRequest,
        index: IndexReader,
        limits: Sequence[Limit],
        diversity: float,
        active: ActiveRules,
        k_max: int,
    ) -> None:
        self._fusion, self._paths = fusion, paths
        self.request, self._index = request, index
        self._limits, self._diversity = limits, diversity
        self._active, self._k_max = active, k_max
        names = {limit.attribute for limit in limits}
        self._attributes = sorted(names | {name for name, _ in active.boosted_terms})
        self._terms: dict[str, frozenset[Term]] = {}
        # The fused list, longer with every round, and what the paths returned for it.
        self._fused: list[Recommendation] = []
        self._results: list[PathResult] = []
        self._at: dict[int, Recommendation] = {}

    def made(self, pins: Sequence[Pin]) -> Chosen:
        """The answer's items. Raises EndsQuery."""
        request, k, depth = self.request, self.request.k, self._request_depth()
        self._recall(request._replace(k=max(k, depth)))
        self._at = self._placed(pins)
        return self._chosen(depth)

    @property
    def length(self) -> int:
        """Of the fused list."""
        return len(self._fused)

    def candidates(self) -> list[tuple[int, Recommendation]]:
        """(rank from 1, item) of the fused list, then of the newest items that are not in it."""
        request = self.request
        known = {one.hit.item_id for one in self._fused}
        newest = self._index.newest(NEWEST, request.excluded, request.filters)
        more = [Recommendation(hit, "", 0) for hit in newest if hit.item_id not in known]
        self._describe([one.hit.item_id for one in more])
        return [*enumerate((*self._fused, *more), 1)]

    def placed_at(
        self, places: Sequence[int], drawn: Sequence[tuple[int, Recommendation]], kind: str
    ) -> Chosen:
        """The answer with the first drawn items at these places, as far as the limits allow."""
        counts = LimitCounts(self._limits, self._terms)
        for one in self._at.values():
            counts.add(one.hit.item_id)
        free = [place for place in places if place not in self._at]
        for rank, one in drawn:
            if not free:
                break
            if counts.reached(one.hit.item_id):
                continue
            counts.add(one.hit.item_id)
            rules = [*one.rules, ItemRule(kind, f"quota_{kind}")]
            self._at[free.pop(0)] = one._replace(path=kind, path_rank=rank, rules=rules)
        return self._chosen(self._request_depth())

    def _request_depth(self) -> int:
        return min(POOL_FACTOR * self.request.k + POOL_MORE, POOL_MAX, self._k_max)

    def _chosen(self, depth: int) -> Chosen:
        """The answer around the items that have their places."""
        request, k, placed = self.request, self.request.k, self._at
        items, removed, counts = self._select(placed)
        for _ in range(ROUNDS_MAX if self._limits else 0):
            missing, full = k - len(items), counts.full()
            if missing <= 0 or not full or request.deadline.half_passed():
                break
            # Others of the same values would be over their limits too.
            rest = request._replace(
                k=min(max(k, depth), POOL_FACTOR * missing + POOL_MORE),
                excluded=frozenset(request.excluded) | {one.hit.item_id for one in items},
                filters=without_terms(request.filters, full),
            )
            if not self._recall(rest):
                break
            items, removed, counts = self._select(placed)
        items, filled = self._filled(items, removed)
        return Chosen(
            items,
            counted(items, self._results),
            filled,
            self._active.version,
            removed,
            limits=self._limits,
        )

    def _recall(self, request: RecallRequest) -> bool:
        """Add what the fusion returns to the list; whether anything is new."""
        items, results = self._fusion.fuse(self._paths, request, self._index)
        known = {one.hit.item_id for one in self._fused}
        new = [one for one in items if one.hit.item_id not in known]
        self._results = merged(self._results, results)
        self._describe([one.hit.item_id for one in new])
        self._fused += new
        return bool(new)

    def _describe(self, item_ids: Sequence[str]) -> None:
        """Look up the terms of these items, if any rule needs them."""
        if self._attributes and item_ids:
            terms = self._index.terms_of(item_ids, self._attributes)
            self._terms |= dict(zip(item_ids, terms, strict=True))

    def _ordered(self) -> list[Recommendation]:
        """The fused list in the order of the boosts."""
        active = self._active
        if not active.boosts:
            return self._fused
        ranked = []
        for rank, one in enumerate(self._fused, 1):
            factor, names = active.boost_of(one.hit.item_id, self._terms.get(one.hit.item_id, ()))
            if names:
                rules = [*one.rules, *(ItemRule(BOOSTED, name) for name in names)]
                one = one._replace(rules=rules)
            ranked.append((rank / factor, rank, one))
        return [one for _, _, one in sorted(ranked, key=lambda entry: entry[:2])]

    def _placed(self, pins: Sequence[Pin]) -> dict[int, Recommendation]:
        """Place in the answer, from 0 -> the item that is pinned there."""
        known = {one.hit.item_id: one for one in self._fused}
        placed: dict[int, Recommendation] = {}
        taken: set[str] = set()
        for pin in pins:
            place = pin.position - 1
            for item in self._of_pin(pin, known, taken):
                while place in placed:
                    place += 1
                if place >= self.request.k:
                    break
                rules = [*item.rules, ItemRule(PINNED, pin.name)]
                placed[place] = item._replace(rules=rules)
                taken.add(item.hit.item_id)
        self._describe([i for i in taken if i not in self._terms])
        return placed

    def _of_pin(
        self, pin: Pin, known: Mapping[str, Recommendation], taken: Collection[str]
    ) -> list[Recommendation]:
        """The items that the pin names, without those that the request may not have."""
        request = self.request
        barred = frozenset(request.excluded) | frozenset(taken)
        if pin.values:
            return self._of_values(pin, request._replace(excluded=barred))
        ids = [item_id for item_id in pin.items if item_id not in barred][: request.k]
        if not ids:
            return []
        live = self._index.describe(ids, request.filters)
        found = [hit for hit in live if hit is not None]
        return [
            known.get(hit.item_id) or Recommendation(hit, PINNED, rank)
            for rank, hit in enumerate(found, 1)
        ]

    def _of_values(self, pin: Pin, request: RecallRequest) -> list[Recommendation]:
        """The first items with one of the pin's values, by the fusion."""
        filters = request.filters or Filter()
        both = _both(filters, pin.filter)
        narrowed = request._replace(k=min(PIN_CANDIDATES, self._k_max), filters=both or pin.filter)
        items, results = self._fusion.fuse(self._paths, narrowed, self._index)
        self._results = merged(self._results, results)
        if both is None and items:
            live = self._index.describe([one.hit.item_id for one in items], filters)
            items = [one for one, hit in zip(items, live, strict=True) if hit is not None]
        return items[: pin.most]

    def _select(
        self, placed: Mapping[int, Recommendation]
    ) -> tuple[list[Recommendation], dict[str, Term], LimitCounts]:
        """(the items that the limits allow, what they removed, what is used of the limits)."""
        k, limits = self.request.k, self._limits
        counts = LimitCounts(limits, self._terms)
        pinned = {one.hit.item_id for one in placed.values()}
        pool = [one for one in self._ordered() if one.hit.item_id not in pinned]
        for one in placed.values():
            counts.add(one.hit.item_id)
        order = self._order(pool, [one.hit.item_id for one in placed.values()])
        removed: dict[str, Term] = {}

        def passes(at: int) -> bool:
            reached = counts.reached(pool[at].hit.item_id)
            if reached:
                removed[pool[at].hit.item_id] = reached[0]
            return not reached

        items: list[Recommendation] = []
        for place in range(k):
            if place in placed:
                items.append(placed[place])
                continue
            at = order.take(passes)
            if at is None:
                break
            counts.add(pool[at].hit.item_id)
            items.append(pool[at])
        # Fewer items than places before these.
        items += [one for place, one in sorted(placed.items()) if place >= len(items)]
        return items, removed, counts

    def _order(
        self, pool: Sequence[Recommendation], pinned: Sequence[str]
    ) -> InOrder | ByMarginalRelevance:
        diversity = self._diversity
        if not diversity or not pool:
            return InOrder(len(pool))
        first = [one.hit.item_id for one in pool[: max(POOL_MAX, self.request.k)]]
        vectors = vectors_of([*first, *pinned], self._index)
        mine, chosen = vectors[: len(first)], vectors[len(first) :]
        return ByMarginalRelevance(mine, diversity, chosen, count=len(pool))

    def _filled(
        self, items: list[Recommendation], removed: dict[str, Term]
    ) -> tuple[list[Recommendation], list[str]]:
        """(the items, filled up with those beyond the limits, and sentences about them)."""
        missing = self.request.k - len(items)
        if missing <= 0 or not removed:
            return items, []
        extra = [one for one in self._ordered() if one.hit.item_id in removed][:missing]
        made, beyond = [], Counter[str]()
        for one in extra:
            attribute = removed.pop(one.hit.item_id)[0]
            beyond[attribute] += 1
            made.append(one._replace(rules=[*one.rules, ItemRule(OVER_LIMIT, attribute)]))
        most = dict(self._limits)
        filled = [
            f"{n} items are beyond the limit of {most[name]} for each of {quote(name)}: "
            "no other item was found"
            for name, n in sorted(beyond.items())
        ]
        return items + made, filled


def vectors_of(item_ids: Sequence[str], index: IndexReader) -> Vector:
    """float32 (n, d): the vector of each item, 0 for one that is not live any more."""
    every = np.zeros((len(item_ids), index.dimension), np.float32)
    for start in range(0, len(item_ids), VECTORS_MAX):
        piece = list(item_ids[start : start + VECTORS_MAX])
        vectors, at = index.vectors_of(piece), list(range(start, start + len(piece)))
        if len(vectors) < len(piece):
            live = [hit is not None for hit in index.describe(piece)]
            at = [*compress(at, live)]
            vectors = index.vectors_of([*compress(piece, live)])
        if len(vectors) == len(at):  # else one more died just now: none of the piece counts
            every[at] = vectors
    return every


def _both(filters: Filter, values: Filter) -> Filter | None:
    """The filter that is passed by what passes both; None if no one filter is.

    values: has one part, a list or the texts of one attribute
    """
    if values.categories:
        return None if filters.categories else replace(filters, categories=values.categories)
    if values.tags:
        return None if filters.tags else replace(filters, tags=values.tags)
    if filters.texts.keys() & values.texts.keys():
        return None
    return replace(filters, texts={**filters.texts, **values.texts})
