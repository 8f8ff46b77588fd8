"""One answer: read the user, recall candidates, fuse them, report the freshness. No gRPC here."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import msgspec
import numpy as np

from eddyline.errors import EddylineError, StoreUnavailable
from eddyline.schema.events import Item, quote
from eddyline.schema.user_history import EMPTY, Entry
from eddyline.stores.state_store import StateStore, UserState
from index.arrays import Vector
from index.filters import Filter
from index.port import IndexReader
from serving.answer.card_reader import CardReader
from serving.answer.click_waits import ClickPending, ClickWaits
from serving.answer.co_visit_reader import CoVisitReader
from serving.answer.deadline import Deadline
from serving.answer.explain import Explainer, Explanation
from serving.answer.fusion import Cascade, Fusion, PathResult, Recommendation
from serving.answer.seen import SeenPolicy
from serving.answer.user_reader import AfterStatus, AfterToken, UserReader
from serving.recall.base import Candidates, RecallPath, RecallRequest
from serving.recall.popularity import Popularity
from serving.rules import cursor
from serving.rules.answer_rules import AnswerRules, without_denied_terms
from serving.rules.cursor import Cursor
from serving.rules.editorial import ActiveRules
from serving.rules.limits import Limit
from serving.rules.selection import Wishes

# The paths of `nearest`.
SIMILAR, VECTOR = "similar", "vector"
# Items that are not live: so many are named.
NAMED_MAX = 4
# A shorter sum of unit vectors is rounding.
NORM_MIN = 1e-6
_UNKNOWN_USER = UserState(fence=None, history=EMPTY, applied_us=0, embedding=None, profile={})


@dataclass(frozen=True, slots=True)
class Query:
    """A checked request.

    user_id: "" for a guest, who has a session
    session: events of this visit that are not stored, newest first
    filters: every item of the answer passes them; popularity_beta: see `Popularity.debias`
    scene, arm: the caller's labels, for the record of the answer and for rules
    limits, diversity: see `Wishes`; cursor: of the pages before; None: the answer is no page
    """

    user_id: str
    k: int
    after: AfterToken | None = None
    with_cards: bool = False
    filters: Filter | None = None
    popularity_beta: float = 0.0
    session: Sequence[Entry] = ()
    scene: str = ""
    arm: str = ""
    limits: Sequence[Limit] | None = None
    diversity: float | None = None
    cursor: Cursor | None = None

    def wishes(self, impression_id: str) -> Wishes:
        """What the query asks of the rules. impression_id: of the answer, "" for none"""
        first = self.cursor is None or not len(self.cursor.keys)
        return Wishes(
            self.limits, self.diversity, self.scene, first, self.user_id, impression_id, self.arm
        )


@dataclass(frozen=True, slots=True)
class NearestQuery:
    """A checked request for the items nearest to some items, or to a vector.

    item_ids:   each once; empty if there is a vector
    vector:     float32 (d,), finite, not all 0; None if there are items
    generation: of the vector; "" if there is none
    filters, with_cards: see `Query`
    """

    k: int
    item_ids: Sequence[str] = ()
    vector: Vector | None = None
    generation: str = ""
    with_cards: bool = False
    filters: Filter | None = None


class KnownUsers(NamedTuple):
    """Stored states of users, or why they could not be read, and when they were."""

    states: Mapping[str, UserState | StoreUnavailable]
    read_us: int

    def of(self, user_id: str) -> UserState:
        """Raises StoreUnavailable."""
        found = self.states[user_id]
        if isinstance(found, StoreUnavailable):
            raise found
        return found


class ItemsNotLive(EddylineError):
    """None of the items whose neighbours are requested is live."""


@dataclass(frozen=True, slots=True)
class Stamps:
    """The worker's own clock after each step, microseconds since 1970; 0: the step did not run."""

    received_us: int
    user_read_us: int
    embedded_us: int
    searched_us: int
    answered_us: int


@dataclass(frozen=True, slots=True)
class Answer:
    """The items of an answer, where they come from, and what is missing.

    user:    the stored state that was read; an empty one if Redis is away or the user is unknown;
             None if the request names no user
    missing: what the answer had to do without, each `server: reason`
    cards:   item id -> metadata, if requested and stored
    next_cursor, generation_changed, filled, rules_version, arm: see retrieval.proto
    """

    items: Sequence[Recommendation]
    paths: Sequence[PathResult]
    user: UserState | None
    user_partition: int
    after: AfterStatus | None
    stamps: Stamps
    missing: list[str]
    short_because: str
    cards: dict[str, Item]
    next_cursor: str = ""
    generation_changed: bool = False
    filled: Sequence[str] = ()
    rules_version: str = ""
    arm: str = ""


class _Page(NamedTuple):
    """A query and what the paths are asked for it.

    unread:  what else of Redis is missing; earlier: the items of the pages before
    """

    read: _UserRead
    request: RecallRequest
    unread: str
    earlier: frozenset[str]


class _UserRead(NamedTuple):
    """The user of a query.

    stored:    an empty state if it could not be read; None for a guest
    partition: of the user's clicks; -1 for a guest
    read_us:   when it was read, microseconds since 1970; 0: it was not
    missing:   why it could not be read, else ""
    """

    stored: UserState | None
    partition: int
    after: AfterStatus | None = None
    read_us: int = 0
    missing: str = ""


_GUEST = _UserRead(None, -1)


class Retriever:
    """Answers the queries of one generation. Thread rule: any thread."""

    def __init__(
        self,
        *,
        store: StateStore,
        users: UserReader,
        popularity: Popularity,
        paths: Sequence[RecallPath],
        item_slots: int,
        fusion: Fusion | None = None,
        waits: ClickWaits | None = None,
        seen: SeenPolicy,
        rules: AnswerRules | None = None,
    ) -> None:
        """paths: in the order in which the fusion calls them; fusion: a `Cascade` by default.

        waits: where queries may wait for a click; None: none does
        rules: over the same fusion and paths; None: without editorial rules
        seen: which items answers leave out as the user had them
        """
        self.popularity = popularity
        self.waits = waits
        self._users = users
        self._paths = paths
        self._card_reader = CardReader(store, item_slots, users.outages)
        reads = frozenset().union(*(path.reads for path in paths))
        self._co_visits = CoVisitReader(store, item_slots, users.outages, reads)
        self._seen = seen
        self.rules = rules or AnswerRules(fusion or Cascade(), paths)
        self._explainer = Explainer(paths, self.rules, self._card_reader, seen)

    def read_users(self, user_ids: Iterable[str]) -> KnownUsers:
        """The stored states of these users, for `retrieve`: one round trip to each server."""
        read = self._users.read_many(user_id for user_id in user_ids if user_id)
        return KnownUsers(read, time.time_ns() // 1000)

    def retrieve(
        self,
        query: Query,
        index: IndexReader,
        deadline: Deadline,
        received_us: int = 0,
        users: KnownUsers | None = None,
        impression_id: str = "",
    ) -> Answer:
        """k items that the user has not seen, or all there are; the answer reports what is missing.

        users: read before, the query's user among them; None: the user is read now
        impression_id: of the answer; without one it has no quotas
        Raises DeadlinePassed before the step for which no time is left, and ClickPending if the
        query may wait for its click: once it has, its `wait_ms` is 0.
        """
        read, request, unread, earlier = self._request(query, index, deadline, users)
        chosen = self.rules.choose(request, index, query.wishes(impression_id))
        items, paths = chosen.items, chosen.paths
        short = ""
        if len(items) < query.k:
            short = self._short_because(query, len(items), request, earlier, index)
        cards, no_cards = self._cards(query, items, deadline, read.missing)
        degradations = [path.candidates.degradation for path in paths]
        degradations += [self.rules.fusion.degradation(), self.rules.degradation()]
        self.rules.count(items)
        next_cursor, page = "", query.cursor
        if page is not None and not short:
            next_cursor = cursor.encode(
                page,
                [one.hit.item_id for one in items],
                query.user_id,
                self._users.generation,
                request.now_ms / 1000,
            )
        deadline.check("the answer was sent")
        return Answer(
            items=items,
            paths=paths,
            user=read.stored,
            user_partition=read.partition,
            after=read.after,
            stamps=Stamps(
                received_us,
                read.read_us,
                max((path.candidates.timings.embedded_us for path in paths), default=0),
                max((path.candidates.timings.searched_us for path in paths), default=0),
                time.time_ns() // 1000,
            ),
            missing=_distinct(read.missing, unread, *no_cards, *degradations),
            short_because=short,
            cards=cards,
            next_cursor=next_cursor,
            generation_changed=page is not None and page.of_other(self._users.generation),
            filled=chosen.filled,
            rules_version=chosen.version,
            arm=chosen.arm,
        )

    def explain(
        self,
        query: Query,
        item_ids: Sequence[str],
        index: IndexReader,
        deadline: Deadline,
        most: int,
        impression_id: str = "",
    ) -> tuple[list[Explanation], Answer]:
        """(why each item is in the answer or not, the answer's own state without items).

        most: so many items of each path have a rank; impression_id: see `retrieve`
        Waits for no click. Raises DeadlinePassed.
        """
        read, request, unread, earlier = self._request(replace(query, after=None), index, deadline)
        wishes = query.wishes(impression_id)
        found = self._explainer.explain(request, item_ids, index, most, wishes, earlier)
        deadline.check("the explanation was sent")
        state = Answer(
            items=(),
            paths=(),
            user=read.stored,
            user_partition=read.partition,
            after=None,
            stamps=Stamps(0, read.read_us, 0, 0, time.time_ns() // 1000),
            missing=_distinct(read.missing, unread, *self.missing()),
            short_because="",
            cards={},
        )
        return found, state

    def nearest(
        self, query: NearestQuery, index: IndexReader, deadline: Deadline, received_us: int = 0
    ) -> Answer:
        """The k items nearest to the query's items or vector, or all that pass its filter.

        Raises ItemsNotLive, DeadlinePassed, and VectorRejected if the vector does not fit.
        """
        deadline.check("the index was searched")
        path, vector, why = VECTOR, query.vector, ""
        if vector is None:
            path = SIMILAR
            vector, why = _middle_of(query.item_ids, index)
        embedded_us = time.time_ns() // 1000
        active = self.rules.active(embedded_us // 1000, "")
        excluded = [*query.item_ids, *active.denied_items]
        filters = without_denied_terms(query.filters, active)
        hits = index.query(vector, query.k, excluded, filters)
        searched_us = time.time_ns() // 1000
        short = ""
        if len(hits) < query.k:
            other = "other items" if query.item_ids else "items"
            which = "are live" if query.filters is None else "are live and pass the filter"
            denied = ", without denied ones" if _denies(active) else ""
            short = f"{len(hits)} of {query.k}: no more {other} {which}{denied}"
        items = [Recommendation(hit, path, rank) for rank, hit in enumerate(hits, 1)]
        cards, no_cards = self._cards(query, items, deadline, "")
        deadline.check("the answer was sent")
        stamps = Stamps(received_us, 0, embedded_us, searched_us, time.time_ns() // 1000)
        return Answer(
            items=items,
            paths=[PathResult(path, Candidates(hits, why), len(hits), len(hits))],
            user=None,
            user_partition=-1,
            after=None,
            stamps=stamps,
            missing=_distinct(*no_cards, self.rules.degradation()),
            short_because=short,
            cards=cards,
            rules_version=active.version,
        )

    def missing(self) -> list[str]:
        """What answers have to do without now, each `server: reason`."""
        users = self._users.outages.missing()
        paths = [path.degradation() for path in self._paths]
        of_rules = self.rules.fusion.degradation(), self.rules.degradation()
        return _distinct(f"redis: {users}" if users else "", *of_rules, *paths)

    def _request(
        self, query: Query, index: IndexReader, deadline: Deadline, users: KnownUsers | None = None
    ) -> _Page:
        """The user, and what the paths are asked for. Raises DeadlinePassed, ClickPending."""
        deadline.check("the user was read")
        read = self._read(query, users) if query.user_id else _GUEST
        user = with_session(read.stored or _UNKNOWN_USER, query.session)
        co_visits, unread = self._co_visits.read(user, deadline)
        now_ms = time.time_ns() // 1_000_000
        hidden = self._seen.hidden(user, index, now_ms)
        excluded = hidden.ids
        earlier = frozenset[str]()
        if query.cursor is not None and len(query.cursor.keys):
            earlier = frozenset(index.live_ids(query.cursor.keys))
            excluded = excluded | earlier
        request = RecallRequest(
            user=None if read.missing and not query.session else user,
            k=query.k,
            excluded=excluded,
            filters=query.filters,
            popularity_beta=query.popularity_beta,
            deadline=deadline,
            now_ms=now_ms,
            co_visits=co_visits,
            hidden=hidden,
        )
        return _Page(read, request, unread, earlier)

    def _read(self, query: Query, users: KnownUsers | None) -> _UserRead:
        after, partition = query.after, self._users.partition_of(query.user_id)
        try:
            if users is None:
                state, read_us = self._users.read(query.user_id), time.time_ns() // 1000
            else:
                state, read_us = users.of(query.user_id), users.read_us
        except StoreUnavailable as error:
            why = "the user could not be read"
            unread = None if after is None else AfterStatus(False, after.waited_ms, why)
            return _UserRead(_UNKNOWN_USER, partition, unread, missing=f"redis: {error}")
        read = _UserRead(state, partition, None, read_us)
        if after is None:
            return read
        why = self._users.why_not_applied(state, after)
        waits = self.waits is not None and after.wait_ms > 0
        if why and waits and not self._users.of_other_log(state):
            raise ClickPending
        why = f"{after.why}; {why}" if why and after.why else why
        return read._replace(after=AfterStatus(not why, after.waited_ms, why))

    def _short_because(
        self,
        query: Query,
        found: int,
        request: RecallRequest,
        earlier: Collection[str],
        index: IndexReader,
    ) -> str:
        """Why the answer has fewer than k items."""
        seen = [item_id for item_id in request.excluded if item_id not in earlier]
        seen_live = sum(hit is not None for hit in index.describe(seen, query.filters))
        which = f"{index.stats().live} items are live"
        if query.filters is not None:
            which = f"{found + seen_live + len(earlier)} live items pass the filter"
        where = "the user's list or the session" if query.session else "the user's list"
        if request.user is not None and request.user.seen:
            where += " or beyond it"
        of = "disliked in" if self._seen.keeps_most else "in"
        more = f", {len(earlier)} were on earlier pages" if earlier else ""
        if _denies(self.rules.active(request.now_ms, query.scene)):
            more += ", and editorial rules deny some"
        return f"{found} of {query.k}: {which}, {seen_live} of them are {of} {where}{more}"

    def _cards(
        self,
        query: Query | NearestQuery,
        items: Sequence[Recommendation],
        deadline: Deadline,
        unread: str,
    ) -> tuple[dict[str, Item], list[str]]:
        """(item id -> metadata, what is missing)."""
        if not query.with_cards:
            return {}, []
        deadline.check("the cards were read")
        if unread:
            return {}, []  # Redis was away a moment ago; the answer reports that already
        return self._card_reader.read([item.hit.item_id for item in items], deadline)


def _distinct(*reasons: str) -> list[str]:
    """The reasons that are not "", each once: paths that read the same list miss the same."""
    return [reason for reason in dict.fromkeys(reasons) if reason]


def _denies(active: ActiveRules) -> bool:
    return bool(active.denied_items or active.denied_terms)


def _middle_of(item_ids: Sequence[str], index: IndexReader) -> tuple[Vector, str]:
    """(the middle of those that are live, float32 (d,) of unit norm; which are not).

    Raises ItemsNotLive if none is.
    """
    vectors, why = index.vectors_of(item_ids), ""
    if len(vectors) < len(item_ids):
        live = index.describe(item_ids)
        named = [quote(one) for one, hit in zip(item_ids, live, strict=True) if hit is None]
        more = f" and {len(named) - NAMED_MAX} more" if len(named) > NAMED_MAX else ""
        # None: they have become live since.
        why = f"not live: {', '.join(named[:NAMED_MAX])}{more}" if named else ""
    if not len(vectors):
        raise ItemsNotLive(f"item_ids: {why or 'none was live'}")
    middle = vectors.sum(axis=0, dtype=np.float64)
    norm = float(np.linalg.norm(middle))
    if norm < NORM_MIN:  # opposite vectors have no middle: the first one decides
        middle, norm = vectors[0].astype(np.float64), 1.0
    return (middle / norm).astype(np.float32), why


def with_session(user: UserState, session: Sequence[Entry]) -> UserState:
    """The user with these events, newest first, before those of the list."""
    if not session:
        return user
    history = msgspec.structs.replace(user.history, entries=(*session, *user.history.entries))
    return replace(user, history=history)
