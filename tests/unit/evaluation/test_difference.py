"""The first query that two configurations answer differently, against answers made one by one."""

from __future__ import annotations

import pytest

from eddyline.settings.loader import Settings
from embeddings.bundle.bundle import Bundle
from evaluation import difference, protocol
from evaluation.difference import Entry, Queries
from evaluation.event_log import EventLog
from evaluation.product import Product
from tests.unit.evaluation.small import make_log

LONG, SHORT = Settings(history_length_max=12), Settings(history_length_max=3)
FIRST = 4


def find(log: EventLog, bundle: Bundle, other: Settings, **more: bool) -> Queries:
    keeps = more.get("keeps", False)
    return difference.find(
        ["long", "short"], [LONG, other], log, bundle, FIRST, keeps_repeats=keeps
    )


def answers_before(log: EventLog, bundle: Bundle, event: int) -> list[list[Entry]]:
    """Both answers just before an event, by products that were made for it."""
    found = []
    for settings in (LONG, SHORT):
        product = Product(settings, bundle)
        now_ms = log.at_ms[event]
        product.apply_items([item for item in log.changes if item.at_ms < now_ms])
        for number in range(len(log)):
            if log.at_ms[number] < now_ms:
                product.apply_events([log.click(number)])
                product.write()
        found.append(difference.answer(product, log.user_ids[log.users[event]], int(now_ms), False))
        product.close()
    return found


def test_the_first_query_that_differs_is_named(bundle: Bundle) -> None:
    log = make_log(3)
    found = find(log, bundle, SHORT)
    one = found.first_difference
    assert one is not None and (found.left, found.right) == ("long", "short")
    events = protocol.scorable(log, FIRST).tolist()
    assert events[one.query - 1] == one.event and found.queries == one.query > 3
    for event in events[: one.query]:
        left, right = answers_before(log, bundle, event)
        alike = [one.item_id for one in left] == [one.item_id for one in right]
        assert alike == (event != one.event)
    assert (one.left, one.right) == (left, right)
    assert one.user_id == log.click(one.event).user_id
    assert one.at_ms == log.at_ms[one.event]
    before, at = one.first_position - 1, one.first_position
    ids = [[one.item_id for one in answer] for answer in (left, right)]
    assert ids[0][:before] == ids[1][:before] and ids[0][before:at] != ids[1][before:at]


def test_equal_configurations_do_not_differ(bundle: Bundle) -> None:
    log = make_log(3)
    found = find(log, bundle, LONG, keeps=True)
    assert found.first_difference is None and found.queries == len(protocol.scorable(log, FIRST))


@pytest.mark.parametrize(
    ("left", "right", "place"),
    [("abc", "abc", 0), ("", "", 0), ("abc", "abd", 3), ("abc", "ab", 3), ("", "a", 1)],
)
def test_the_first_place_that_differs(left: str, right: str, place: int) -> None:
    first, second = ([Entry(one, "p", n) for n, one in enumerate(s)] for s in (left, right))
    assert difference._first_position(first, second) == place
