"""Ranks of targets from what was known strictly before them: one rule for `evaluate` and `judge`.

The caller scores all targets of one time before it applies any of them; items and profiles of that
time are applied after them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from eddyline.schema.records import Record
from evaluation.engine import Engine
from evaluation.rows import NO_ROWS, Query, Row
from serving.answer.seen import SeenPolicy


class Target(NamedTuple):
    """What was known of a target just before it.

    live:   whether the item was live; if not, no row ranks it
    repeat: whether a worker would hide the item, as the user had it
    listed: events in the user's list
    """

    live: bool
    repeat: bool
    listed: int


class Prequential:
    """Has rows rank targets, and keeps them in step with the engine. Thread rule: one thread.

    keeps_repeats: whether items that the user had compete, and count as targets; if not, they are
                   removed as the product removes them
    """

    def __init__(self, engine: Engine, rows: Sequence[Row], *, keeps_repeats: bool) -> None:
        self._engine, self._rows = engine, rows
        self._keeps_repeats = keeps_repeats
        self._seen = SeenPolicy(engine.settings, hides=True)

    def score(
        self, number: int, user_id: str, item_id: str, at_ms: int, *, wants_list: bool = False
    ) -> Target:
        """Rank the item for the user, now or at the next `flush`.

        number: of the target in the rows' results
        A target that is not live is left out, and a repeat unless repeats count.
        """
        engine = self._engine
        state, items = engine.user(user_id), engine.items
        seen = self._seen.hidden(state, engine.index, at_ms).ids
        place = items.place_of.get(item_id)
        target = Target(place is not None, item_id in seen, len(state.history.entries))
        if place is None or (target.repeat and not self._keeps_repeats):
            return target
        excluded = NO_ROWS
        if seen and not self._keeps_repeats:
            places = map(items.place_of.get, seen)
            excluded = np.array([at for at in places if at is not None], np.int64)
        query = Query(number, user_id, at_ms, place, state, excluded, wants_list)
        for row in self._rows:
            row.score(query)
        return target

    def apply_items(self, records: Sequence[Record]) -> None:
        """Apply records of `items`, after what waits is ranked among the items of before."""
        self.flush()
        self._engine.apply_item_records(records)

    def flush(self) -> None:
        """Have the rows rank what waits."""
        for row in self._rows:
            row.flush()
