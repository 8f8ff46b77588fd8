"""The protocol: every event is ranked with what was known strictly before it, then applied.

All events are sorted by (time, user, position). Events of one time are scored before any of them is
applied, so those of a user at one time are a basket. An item or a profile counts from the first
event after its own time on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evaluation.engine import BATCH_RECORDS
from evaluation.event_files import Ints
from evaluation.event_log import DISLIKE, EventLog
from evaluation.feed import Feed
from evaluation.prequential import Prequential
from evaluation.product import Product
from evaluation.rows import Results, Row

# The first items of at most so many events are kept, spread evenly over all.
LISTS_MAX = 2_000

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Scored:
    """The events to score, in their order: those after the split that are no dislikes.

    events:        int64 (n,), numbers in the log
    user_before:   int64 (n,), events of the user strictly before
    item_before:   int64 (n,), events of the item strictly before
    seen_user:     bool (n,), whether the user has an event before the split
    live:          bool (n,), whether the item was live just before; if not, every rank is `NEVER`
    repeat:        bool (n,), whether a worker would hide the item; left out unless repeats count
    """

    events: Ints
    user_before: Ints
    item_before: Ints
    seen_user: npt.NDArray[np.bool_]
    live: npt.NDArray[np.bool_]
    repeat: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What every row found.

    kept:    bool (n,), of `scored`: the events that count
    lists_of: numbers whose first items were kept
    live_at_end: live items after the last event
    """

    scored: Scored
    kept: npt.NDArray[np.bool_]
    rows: dict[str, Results]
    lists_of: Ints
    live_at_end: int

    def take(self, other: Outcome, mine: npt.NDArray[np.bool_]) -> None:
        """Take what another outcome has for some of the events. mine: bool (n,), of `scored`"""
        for name in ("user_before", "item_before", "live", "repeat"):
            getattr(self.scored, name)[mine] = getattr(other.scored, name)[mine]
        self.kept[mine] = other.kept[mine]
        for row, results in self.rows.items():
            results.ranks[mine] = other.rows[row].ranks[mine]
            lists = {**results.lists, **other.rows[row].lists}
            results.lists = dict(sorted(lists.items()))


def run(
    log: EventLog,
    product: Product,
    rows: Sequence[Row],
    first: int,
    *,
    keeps_repeats: bool,
    on_progress: OnProgress = lambda done, total: None,
    mine: npt.NDArray[np.bool_] | None = None,
) -> Outcome:
    """Apply the events before `first`, then score and apply the others.

    keeps_repeats: whether items of the user's list compete, and count as targets; if not, they are
                   removed as the product removes them
    on_progress:   called with (events done, events) every now and then
    mine:          bool (n,): which of the events to score are scored; default: all
    """
    replay = _Replay(log, product, rows, first, keeps_repeats, mine)
    replay.replay(on_progress)
    scored = replay.scored
    kept = np.ones(len(scored.events), bool) if keeps_repeats else ~scored.repeat
    return Outcome(
        scored=scored,
        kept=kept,
        rows={name: found for row in rows for name, found in row.results.items()},
        lists_of=replay.lists_of,
        live_at_end=len(product.items.ids),
    )


def scorable(log: EventLog, first: int) -> Ints:
    """Numbers of the events after the split that are no dislikes."""
    found: Ints = first + np.flatnonzero(log.kinds[first:] != DISLIKE)
    return found


def moments(log: EventLog, first: int) -> Iterator[tuple[int, int, int]]:
    """(time, begin, end): batches of the events before `first`, then the events of each time.

    The time of the batches is that after their last event.
    """
    for begin in range(0, first, BATCH_RECORDS):
        end = min(begin + BATCH_RECORDS, first)
        yield int(log.at_ms[first - 1]) + 1, begin, end
    begin = first
    while begin < len(log):
        now_ms = int(log.at_ms[begin])
        end = int(np.searchsorted(log.at_ms, now_ms, side="right"))
        yield now_ms, begin, end
        begin = end


class _Replay:
    def __init__(
        self,
        log: EventLog,
        product: Product,
        rows: Sequence[Row],
        first: int,
        keeps_repeats: bool,
        mine: npt.NDArray[np.bool_] | None,
    ) -> None:
        self._log, self._rows, self._first = log, rows, first
        self._prequential = Prequential(product, rows, keeps_repeats=keeps_repeats)
        self._feed = Feed(log, product)
        self._user_events, self._item_events = [0] * len(log.user_ids), [0] * len(log.item_ids)
        events = scorable(log, first)
        n = len(events)
        self._mine = np.ones(n, bool) if mine is None else mine
        seen = log.counts(log.users, len(log.user_ids), first) > 0
        self.scored = Scored(
            events=events,
            user_before=np.zeros(n, np.int64),
            item_before=np.zeros(n, np.int64),
            seen_user=seen[log.users[events]],
            live=np.zeros(n, bool),
            repeat=np.zeros(n, bool),
        )
        every = -(-n // LISTS_MAX) if n else 1
        self.lists_of: Ints = np.arange(0, n, every)
        self._every = every

    def replay(self, on_progress: OnProgress) -> None:
        """Apply all events; score those after the split before any of their time is applied."""
        number, events = 0, self.scored.events
        for now_ms, begin, end in moments(self._log, self._first):
            if self._feed.changes_items(now_ms):
                self._prequential.flush()
            self._feed.advance(now_ms)
            while number < len(events) and events[number] < end:
                if self._mine[number]:
                    self._score(number)
                number += 1
            self._apply(begin, end)
            on_progress(end, len(self._log))
        self._prequential.flush()

    def _score(self, number: int) -> None:
        log, scored = self._log, self.scored
        event = int(scored.events[number])
        user, item = int(log.users[event]), int(log.items[event])
        scored.user_before[number] = self._user_events[user]
        scored.item_before[number] = self._item_events[item]
        target = self._prequential.score(
            number,
            log.user_ids[user],
            log.item_ids[item],
            int(log.at_ms[event]),
            wants_list=number % self._every == 0,
        )
        scored.live[number], scored.repeat[number] = target.live, target.repeat

    def _apply(self, begin: int, end: int) -> None:
        self._feed.apply(begin, end)
        for counts, column in (
            (self._user_events, self._log.users),
            (self._item_events, self._log.items),
        ):
            for number in column[begin:end].tolist():
                counts[number] += 1
        for row in self._rows:
            row.learn(begin, end)
