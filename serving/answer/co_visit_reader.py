"""Reads the co-visitation rows of a query, if a recall path needs them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from eddyline.errors import EddylineError
from eddyline.schema import co_visits
from eddyline.schema.co_visits import CoVisits
from eddyline.schema.partitioning import item_slot
from eddyline.schema.user_history import positive_events
from eddyline.stores.state_store import StateStore, UserState
from serving.answer.deadline import Deadline
from serving.answer.outages import Outages
from serving.recall.base import AFTER, BEFORE, QueryCoVisits

# Rows are read of so many of the user's items.
ITEMS_MAX = 20


class CoVisitReader:
    """Reads rows of items. Thread rule: any thread."""

    def __init__(
        self, store: StateStore, item_slots: int, outages: Outages, reads: Collection[str]
    ) -> None:
        """reads: which rows the recall paths need, see `RecallPath.reads`"""
        self._store = store
        self._item_slots = item_slots
        self._outages = outages
        self._reads = frozenset(reads)

    def read(self, user: UserState, deadline: Deadline) -> tuple[QueryCoVisits | None, str]:
        """(the rows of the user's newest items, what is missing).

        One round trip to each server of Redis; none if no path needs the rows. Rows are empty if
        their server is away, or if half of the query's time passed before they were read. The
        result is None if no row could be read, or none is needed. Raises DeadlinePassed.
        """
        if not self._reads:
            return None, ""
        items = newest_items(user, ITEMS_MAX)
        found = {AFTER: [co_visits.EMPTY] * len(items), BEFORE: [co_visits.EMPTY] * len(items)}
        why, read = "", not items
        for places in self._by_server(items):
            deadline.check("the co-visits were read")
            if deadline.half_passed():
                # A server that hangs may take the other half.
                why = why or "redis: no co-visits: half of the query's time has passed"
                break
            try:
                self._read(items, places, found)
                read = True
            except EddylineError as error:
                why = why or f"redis: no co-visits: {error}"
        return QueryCoVisits(items, found[AFTER], found[BEFORE]) if read else None, why

    def _read(
        self, items: Sequence[str], places: Sequence[int], found: dict[str, list[CoVisits]]
    ) -> None:
        mine = [items[place] for place in places]
        after, before = (mine if kind in self._reads else () for kind in (AFTER, BEFORE))
        with self._outages.guard({item_slot(item_id, self._item_slots) for item_id in mine}):
            rows = self._store.read_co_visits(after, before, self._item_slots)
        for kind, of_kind in zip((AFTER, BEFORE), rows, strict=True):
            for place, row in zip(places, of_kind, strict=False):
                found[kind][place] = row

    def _by_server(self, items: Sequence[str]) -> list[list[int]]:
        """Places of the items, by server."""
        found: dict[str, list[int]] = {}
        for place, item_id in enumerate(items):
            server = self._store.server_of(item_slot(item_id, self._item_slots))
            found.setdefault(server, []).append(place)
        return list(found.values())


def newest_items(user: UserState, most: int) -> list[str]:
    """Ids of the newest distinct items with a positive event, newest first."""
    found: dict[str, None] = {}
    for event in positive_events(user.history.entries):
        found.setdefault(event.item_id)
        if len(found) == most:
            break
    return [*found]
