"""One answer: read the user, ask the paths, fuse, say how fresh it is. Knows no gRPC."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import msgspec

from eddyline.errors import EddylineError, StoreUnavailable
from eddyline.schema.events import Item
from eddyline.schema.user_history import EMPTY
from eddyline.stores.state_store import StateStore, UserState
from index.filters import Filter
from index.port import Hit
from serving.answer.deadline import Deadline
from serving.answer.fusion import PathSummary, Recommendation, cascade
from serving.answer.user_reader import AfterStatus, AfterToken, UserReader
from serving.recall import newest, popular, towers
from serving.recall.base import Candidates, RecallPath
from serving.recall.index_reader import IndexReader
from serving.recall.popular import PopularPath
from serving.recall.towers import StageTimings, TowersPath

_NOBODY = UserState(fence=None, history=EMPTY, applied_us=0, embedding=None, profile={})
_card = msgspec.json.Decoder(Item)


@dataclass(frozen=True, slots=True)
class Query:
    """A request, checked.

    asked: the filter that every item of the answer passes; popularity_beta: see `PopularPath.correct`
    """

    user_id: str
    k: int
    after: AfterToken | None = None
    with_cards: bool = False
    filters: Filter | None = None
    popularity_beta: float = 0.0


@dataclass(frozen=True, slots=True)
class Stamps:
    """The worker's own clock after each step, microseconds since 1970; 0 where it was not taken."""

    received_us: int
    user_read_us: int
    embedded_us: int
    searched_us: int
    answered_us: int


@dataclass(frozen=True, slots=True)
class Answer:
    """All that an answer says.

    user:    as he was read; nobody's state where Redis is away or he is unknown
    missing: what it had to do without, each `server: reason`
    cards:   item id -> card, where asked for and there is one
    """

    items: Sequence[Recommendation]
    paths: Sequence[PathSummary]
    user: UserState
    user_partition: int
    after: AfterStatus | None
    stamps: Stamps
    missing: Sequence[str]
    short_because: str
    cards: dict[str, Item] = field(default_factory=dict)


class Retriever:
    """Answers queries of one generation: towers, then the popular list, then what is newest.

    Thread rule: any thread.
    """

    def __init__(
        self,
        *,
        store: StateStore,
        index: IndexReader,
        users: UserReader,
        by_towers: TowersPath,
        by_popularity: PopularPath,
        item_slots: int,
        index_missing: Callable[[], str],
    ) -> None:
        """index_missing: why the index may lag behind the items topic, "" where it does not."""
        self._store = store
        self._index = index
        self._users = users
        self._towers = by_towers
        self._popular = by_popularity
        self._item_slots = item_slots
        self._index_missing = index_missing

    def retrieve(self, query: Query, deadline: Deadline, received_us: int = 0) -> Answer:
        """k items the user has not seen, as long as there are k; what is missing is said, not raised.

        Raises DeadlinePassed, before the step for which there was no time left.
        """
        missing: list[str] = []
        deadline.check("the user was read")
        user, after = self._read(query, deadline, missing)
        user_read_us = 0 if missing else time.time_ns() // 1000
        marks = StageTimings()
        seen = {entry.item_id for entry in user.history.entries}

        def by_towers(k: int, exclude: Collection[str]) -> Candidates:
            deadline.check("the index was searched")
            if missing:
                return Candidates((), "the user could not be read")
            return self._towers.ask(
                self._index,
                user,
                k,
                exclude,
                marks,
                filters=query.filters,
                correct=correct if query.popularity_beta else None,
            )

        def correct(hits: Sequence[Hit], k: int) -> Sequence[Hit]:
            return self._popular.correct(hits, k, query.popularity_beta)

        def by_popularity(k: int, exclude: Collection[str]) -> Candidates:
            deadline.check("the popular list was asked")
            return self._popular.ask(self._index, k, exclude, query.filters)

        items, paths = cascade(
            (
                RecallPath(towers.NAME, by_towers),
                RecallPath(popular.NAME, by_popularity),
                RecallPath(
                    newest.NAME,
                    lambda k, exclude: newest.recall(self._index, k, exclude, query.filters),
                ),
            ),
            query.k,
            seen,
        )
        short = "" if len(items) == query.k else self._short(query, len(items), seen)
        cards = self._cards(items, deadline, missing) if query.with_cards else {}
        if any(summary.path == popular.NAME for summary in paths) and self._popular.missing():
            missing.append(f"redis: {self._popular.missing()}")
        if self._index_missing():
            missing.append(f"kafka: {self._index_missing()}")
        deadline.check("the answer was sent")
        return Answer(
            items=items,
            paths=paths,
            user=user,
            user_partition=self._users.partition_of(query.user_id),
            after=after,
            stamps=Stamps(
                received_us,
                user_read_us,
                marks.embedded_us,
                marks.searched_us,
                time.time_ns() // 1000,
            ),
            missing=missing,
            short_because=short,
            cards=cards,
        )

    def missing(self) -> list[str]:
        """What answers have to do without right now."""
        found = (("redis", self._users.missing()), ("redis", self._popular.missing()))
        return [
            f"{server}: {why}" for server, why in (*found, ("kafka", self._index_missing())) if why
        ]

    def _read(
        self, query: Query, deadline: Deadline, missing: list[str]
    ) -> tuple[UserState, AfterStatus | None]:
        try:
            if query.after is None:
                return self._users.read(query.user_id), None
            return self._users.read_after(query.user_id, query.after, deadline)
        except StoreUnavailable as error:
            missing.append(f"redis: {error}")
            unread = AfterStatus(False, 0, "the user could not be read")
            return _NOBODY, unread if query.after else None

    def _short(self, query: Query, found: int, seen: set[str]) -> str:
        seen_live = sum(hit is not None for hit in self._index.describe(list(seen), query.filters))
        which = f"{self._index.stats().live} items are live"
        if query.filters is not None:
            which = f"{found + seen_live} live items pass the filter"
        return f"{found} of {query.k}: {which}, {seen_live} of them are in the user's list"

    def _cards(
        self, items: Sequence[Recommendation], deadline: Deadline, missing: list[str]
    ) -> dict[str, Item]:
        deadline.check("the cards were read")
        if missing:
            return {}  # Redis was away a moment ago; the answer says so already
        try:
            stored = self._store.read_item_metadata(
                [item.hit.item_id for item in items], self._item_slots
            )
            return {
                item_id: _card.decode(card.body) for item_id, card in stored.items() if card.body
            }
        except (EddylineError, msgspec.MsgspecError) as error:
            missing.append(f"redis: no cards: {error}")
            return {}
