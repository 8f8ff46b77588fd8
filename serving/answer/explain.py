"""Why an item is, or is not, in an answer: the same paths and fusion, for some items."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import msgspec

from eddyline.schema.events import Item, quote
from eddyline.stores.state_store import ItemMetadata
from index.filters import Filter
from index.port import Hit, IndexReader
from serving.answer.card_reader import CardReader
from serving.answer.fusion import ItemRule, PathCalls
from serving.answer.seen import SeenPolicy
from serving.recall.base import RecallPath, RecallRequest
from serving.rules.answer_rules import AnswerRules, without_denied
from serving.rules.editorial import ActiveRules
from serving.rules.selection import BOOSTED, DENIED, LIMIT, NO_WISHES, PINNED, Chosen, Wishes

_decoder = msgspec.json.Decoder(Item)


class PathRank(NamedTuple):
    """An item as one recall path sees it.

    rank:  1 is the best; 0: not among the first ones that were looked at
    hit:   None if the path does not return the item at all; `why` may say why
    share: of the item's fused score
    """

    path: str
    rank: int
    hit: Hit | None
    why: str = ""
    share: float = 0.0


class Explanation(NamedTuple):
    """Why an item is, or is not, in an answer.

    rank:  its place in the order of the fusion; 0: not among the first ones that were looked at
    hit:   the live item; None if it is not live
    paths: empty if the item cannot be returned
    fused_score: of the fusion; 0 where it has none
    rules: that placed, moved or removed the item
    """

    item_id: str
    in_answer: bool
    rank: int
    why: str
    hit: Hit | None
    paths: Sequence[PathRank] = ()
    fused_score: float = 0.0
    rules: Sequence[ItemRule] = ()


class Explainer:
    """Explains answers of one generation. Thread rule: any thread."""

    def __init__(
        self, paths: Sequence[RecallPath], rules: AnswerRules, cards: CardReader, seen: SeenPolicy
    ) -> None:
        """rules: that choose the answers; seen: see `Retriever`."""
        self._seen = seen
        self._paths = paths
        self._rules = rules
        self._cards = cards

    def explain(
        self,
        request: RecallRequest,
        item_ids: Sequence[str],
        index: IndexReader,
        most: int,
        wishes: Wishes = NO_WISHES,
        earlier: Collection[str] = (),
    ) -> list[Explanation]:
        """One explanation for each item. Raises DeadlinePassed.

        most: so many items of each path have a rank; earlier: the items of the pages before
        """
        chosen = self._rules.choose(request, index, wishes)
        taken = {one.hit.item_id: n for n, one in enumerate(chosen.items, 1)}
        active = self._rules.active(request.now_ms, wishes.scene)
        deep = without_denied(request._replace(k=max(most, request.k)), active)
        arm = self._rules.arm_of(wishes)
        order, _ = self._rules.fusion_for(arm).fuse(self._paths, deep, index)
        diverse = self._rules.diversity_of(wishes, arm) > 0
        places = {one.hit.item_id: n for n, one in enumerate(order, 1)} | taken
        fused = {one.hit.item_id: one for one in (*order, *chosen.items)}
        calls = PathCalls(index, request)
        ranked = {
            path.name: {
                hit.item_id: (rank, hit)
                for rank, hit in enumerate(calls.call(path, deep).candidates.hits, 1)
            }
            for path in self._paths
        }
        live = dict(zip(item_ids, index.describe(item_ids), strict=True))
        gone = [item_id for item_id, hit in live.items() if hit is None]
        stored, unread = self._cards.stored(gone, request.deadline)
        found = []
        for item_id, hit in live.items():
            if hit is None:
                why = _not_live(stored.get(item_id), unread.get(item_id, ""))
                found.append(Explanation(item_id, False, 0, why, None))
            elif item_id in earlier:
                why = "it was on an earlier page: pages repeat no item"
                found.append(Explanation(item_id, False, 0, why, hit))
            elif barred := self._barred(request, item_id, index):
                found.append(Explanation(item_id, False, 0, barred, hit))
            elif name := self._denied_by(active, item_id, index):
                why = f"the editorial rule {quote(name)} denies it"
                denied = [ItemRule(DENIED, name)]
                found.append(Explanation(item_id, False, 0, why, hit, rules=denied))
            else:
                paths = [self._by_path(path, ranked, deep, item_id, calls) for path in self._paths]
                score = 0.0
                if one := fused.get(item_id):
                    score, shares = one.fused_score, {s.path: s.share for s in one.sources}
                    paths = [path._replace(share=shares.get(path.path, 0.0)) for path in paths]
                rank, is_chosen = places.get(item_id, 0), item_id in taken
                why = _place(rank, is_chosen, request.k, deep.k, paths)
                why, rules = _by_rules(why, item_id, rank, request.k, chosen, diverse)
                found.append(Explanation(item_id, is_chosen, rank, why, hit, paths, score, rules))
        return found

    def _denied_by(self, active: ActiveRules, item_id: str, index: IndexReader) -> str:
        """The editorial rule that keeps the item out; "" if none does."""
        if name := active.denied_items.get(item_id):
            return name
        if not active.denied_terms:
            return ""
        [terms] = index.terms_of([item_id], {name for name, _ in active.denied_terms})
        names = (active.denied_terms.get(term, "") for term in sorted(terms))
        return next(filter(None, names), "")

    def _by_path(
        self,
        path: RecallPath,
        ranked: dict[str, dict[str, tuple[int, Hit]]],
        deep: RecallRequest,
        item_id: str,
        calls: PathCalls,
    ) -> PathRank:
        if place := ranked[path.name].get(item_id):
            return PathRank(path.name, *place)
        only = replace(deep.filters or Filter(), allow=frozenset({item_id}))
        alone = deep._replace(k=1, filters=only)
        candidates = calls.call(path, alone).candidates
        hit = next(iter(candidates.hits), None)
        return PathRank(path.name, 0, hit, "" if hit else candidates.why)

    def _barred(self, request: RecallRequest, item_id: str, index: IndexReader) -> str:
        """Why a live item may not be in the answer; "" if it may."""
        if item_id in request.excluded and request.user is not None:
            return self._seen.why(request.user, item_id, request.now_ms)
        filters = request.filters
        if filters is None or index.describe([item_id], filters)[0] is not None:
            return ""
        failed = [
            name for name, part in _parts(filters) if index.describe([item_id], part)[0] is None
        ]
        return f"it does not pass the filter: {', '.join(failed)}"


def _not_live(stored: ItemMetadata | None, unread: str) -> str:
    """The reason, as far as Redis knows. unread: why it could not be read."""
    if unread:
        return f"it is not live; Redis does not say why: {unread}"
    if stored is None:
        return "it is not live: ingest has applied no record of it"
    source = f"items/{stored.partition}/{stored.offset}"
    if stored.deleted:
        return f"it is not live: {source} deleted it"
    if not _decoder.decode(stored.body).available:
        return f"it is not live: {source} says that it is not available"
    if (refused := stored.refused) is not None and refused.hidden:
        where = f"items/{refused.partition}/{refused.offset}"
        return f"it is not live: its newer record {where} was refused ({refused.reason})"
    return (
        f"it is not live: {source} was applied, but this worker's index has no vector of it yet, "
        "or the item tower refused it"
    )


def _place(rank: int, chosen: bool, k: int, most: int, paths: Sequence[PathRank]) -> str:
    by = ", ".join(f"number {one.rank} of {one.path}" for one in paths if one.rank)
    if chosen:
        return f"number {rank} of the answer" + (f": {by}" if by else "")
    if rank:
        return f"number {rank} of all candidates, the answer has {k}: {by}"
    returned = [one.path for one in paths if one.hit]
    if returned:
        return f"it is not among the first {most} of {' and '.join(returned)}"
    return "no recall path returns it for this user"


def _by_rules(
    why: str, item_id: str, rank: int, k: int, chosen: Chosen, diverse: bool
) -> tuple[str, Sequence[ItemRule]]:
    """(the reason, with what the rules did to the item; the rules)."""
    if removed := chosen.removed.get(item_id):
        name, text = removed
        most = dict(chosen.limits)[name]
        full = f"the answer has {most} items of {quote(name)} {quote(text)}, its limit"
        return f"{why}; left out: {full}", [ItemRule(LIMIT, name)]
    one = next((item for item in chosen.items if item.hit.item_id == item_id), None)
    if one is not None:
        did = "; ".join(f"{rule.kind} by {quote(rule.name)}" for rule in one.rules)
        return (f"{why}; {did}" if did else why), one.rules
    if 0 < rank <= k:
        by = ["items that differ more"] if diverse else []
        if any(rule.kind == PINNED for item in chosen.items for rule in item.rules):
            by.append("pinned items")
        if any(rule.kind == BOOSTED for item in chosen.items for rule in item.rules):
            by.append("boosted items")
        if by:
            return f"{why}; its place went to {' and '.join(by)}", ()
    return why, ()


def _parts(filters: Filter) -> Iterator[tuple[str, Filter]]:
    """(name, filter with this part alone) of each part that is set."""
    for name in ("categories", "tags", "tags_all", "categories_none", "tags_none", "deny"):
        if values := getattr(filters, name):
            yield name, Filter(**{name: values})
    for attribute, wanted in filters.texts.items():
        yield f"texts of {attribute!r}", Filter(texts={attribute: wanted})
    for attribute, barred in filters.texts_none.items():
        yield f"texts_none of {attribute!r}", Filter(texts_none={attribute: barred})
    if filters.allow is not None:
        yield "allow", Filter(allow=filters.allow)
    for attribute, between in filters.ranges.items():
        yield f"range of {attribute!r}", Filter(ranges={attribute: between})
