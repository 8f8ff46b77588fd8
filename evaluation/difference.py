"""The first query that two configurations answer differently, on one pass over a log."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import msgspec
import numpy as np

from eddyline.settings.loader import Settings
from embeddings.bundle.bundle import Bundle
from evaluation import protocol
from evaluation.event_log import EventLog
from evaluation.feed import Feed
from evaluation.product import Product
from evaluation.protocol import OnProgress
from serving.answer.seen import SeenPolicy

ANSWER_ITEMS = 10


class Entry(msgspec.Struct, frozen=True):
    """An item of an answer, its path and the path's score."""

    item_id: str
    path: str
    score: float


class FirstDifference(msgspec.Struct, frozen=True, kw_only=True):
    """Two answers that differ.

    event:       number in the log; the query is made just before it
    query:       number among the queries, from 1 on
    left, right: the answers; first_position: the first position with different items, from 1 on
    """

    event: int
    query: int
    user_id: str
    at_ms: int
    left: list[Entry]
    right: list[Entry]
    first_position: int


class Queries(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome. queries: that were compared; first_difference: the last of them if it differs"""

    left: str
    right: str
    queries: int
    first_difference: FirstDifference | None


def find(
    names: Sequence[str],
    settings: Sequence[Settings],
    log: EventLog,
    bundle: Bundle,
    first: int,
    *,
    keeps_repeats: bool,
    on_progress: OnProgress = lambda done, total: None,
) -> Queries:
    """Query both before each event that would be scored, until the answers have different items.

    names, settings: of the two configurations
    """
    events = protocol.scorable(log, first)
    users = {log.user_ids[user] for user in np.unique(log.users[events]).tolist()}
    with ExitStack() as closing:
        products = [Product(one, bundle, users.__contains__) for one in settings]
        for product in products:
            closing.callback(product.close)
        query = 0
        feeds = [Feed(log, product) for product in products]
        for now_ms, begin, end in protocol.moments(log, first):
            for feed in feeds:
                feed.advance(now_ms)
            of_moment = slice(*np.searchsorted(events, (begin, end)))
            for event in events[of_moment].tolist():
                user_id = log.user_ids[log.users[event]]
                query += 1
                left, right = (answer(one, user_id, now_ms, keeps_repeats) for one in products)
                if position := _first_position(left, right):
                    found = FirstDifference(
                        event=event,
                        query=query,
                        user_id=user_id,
                        at_ms=now_ms,
                        left=left,
                        right=right,
                        first_position=position,
                    )
                    return Queries(
                        left=names[0], right=names[1], queries=query, first_difference=found
                    )
            for feed in feeds:
                feed.apply(begin, end)
            on_progress(end, len(log))
    return Queries(left=names[0], right=names[1], queries=query, first_difference=None)


def answer(product: Product, user_id: str, now_ms: int, keeps_repeats: bool) -> list[Entry]:
    """What a worker would answer now. now_ms: the time of the query"""
    user = product.user(user_id)
    product.list_popularity()
    request = product.request(user, ANSWER_ITEMS)
    if not keeps_repeats:
        hidden = SeenPolicy(product.settings, hides=True).hidden(user, product.index, now_ms)
        request = request._replace(excluded=hidden.ids, hidden=hidden)
    items, _ = product.fusion.fuse([*product.paths.values()], request, product.index)
    return [Entry(one.hit.item_id, one.path, float(one.hit.score)) for one in items]


def _first_position(left: Sequence[Entry], right: Sequence[Entry]) -> int:
    """The first position with different items, from 1 on; 0 if there is none."""
    for position, (one, other) in enumerate(zip(left, right, strict=False), 1):
        if one.item_id != other.item_id:
            return position
    return 0 if len(left) == len(right) else min(len(left), len(right)) + 1
