"""Joins clicks that carry an `impression_id` with the recorded answers that led to them.

Answers and clicks come from two topics, in the order of the merged log. An answer is appended up to
a second after it was given, so a click may come first: it waits for its answer.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from eddyline.schema import events
from eddyline.schema.answers import RecordedAnswer
from eddyline.schema.events import Click
from evaluation.judge.click_rates import POSITIONS, ClickRates, Origin

# An answer is kept for clicks this long after its append, a click waits for its answer this long.
KEPT_MS = 6 * 3_600_000
WAIT_MS = 5 * 60_000
# Where more come in that time, the oldest go: 20,000 answers of ten items take about 40 MB.
ANSWERS_MAX = 20_000
WAITING_MAX = 10_000


class JoinCounts(msgspec.Struct):
    """Counts since the first start.

    answers:    recorded answers, each id once
    joined:     clicks on one of the first `POSITIONS` items of their answer; further clicks of one
                item count as `repeated`
    elsewhere:  clicks on another item; other_user: of another user than the answer's
    unmatched:  clicks whose answer did not come in time, or is kept no longer
    """

    answers: int = 0
    joined: int = 0
    repeated: int = 0
    elsewhere: int = 0
    other_user: int = 0
    unmatched: int = 0


class _Shown(msgspec.Struct, array_like=True):
    """The first items of an answer. at_ms: log time; clicked: places that were clicked"""

    at_ms: int
    user_id: str
    origin: Origin
    items: list[str]
    paths: list[str]
    clicked: set[int]


class _Waiting(msgspec.Struct, array_like=True):
    """Clicks without their answer. at_ms: log time of the first one; clicks: (user, item)"""

    at_ms: int
    clicks: list[tuple[str, str]]


class _State(msgspec.Struct):
    now_ms: int
    counts: JoinCounts
    answers: dict[str, _Shown]
    waiting: dict[str, _Waiting]
    rates: bytes


class ImpressionJoin:
    """The join, and its rates. Thread rule: one thread.

    Times are those of the merged log; nothing here reads a clock.
    """

    def __init__(self, is_recorded: Callable[[str], bool]) -> None:
        """is_recorded: whether a user's answers are recorded; clicks of others do not wait."""
        self.rates = ClickRates()
        self.counts = JoinCounts()
        self._is_recorded = is_recorded
        self._now_ms = 0
        # By impression id, both in the order in which they came.
        self._answers: dict[str, _Shown] = {}
        self._waiting: dict[str, _Waiting] = {}
        self._waiting_clicks = 0

    def add_answer(self, answer: RecordedAnswer, at_ms: int) -> None:
        """Count an answer, and the clicks that waited for it. at_ms: log time."""
        if answer.impression_id in self._answers:
            return  # sent twice
        shown = answer.items[:POSITIONS]
        one = _Shown(
            at_ms,
            answer.user_id,
            Origin(answer.generation, answer.scene, answer.arm),
            [item.item_id for item in shown],
            [item.path for item in shown],
            set(),
        )
        self.counts.answers += 1
        self._answers[answer.impression_id] = one
        self.rates.add_answer(at_ms, one.origin, one.paths)
        waited = self._waiting.pop(answer.impression_id, None)
        if waited is not None:
            self._waiting_clicks -= len(waited.clicks)
            for user_id, item_id in waited.clicks:
                self._join(one, user_id, item_id)
        self._expire(at_ms)

    def add_click(self, click: Click, at_ms: int) -> None:
        """Join a click, or have it wait. Dislikes and moved events do not count.

        at_ms: log time
        """
        if click.impression_id is None or click.kind == "dislike" or events.is_moved(click):
            return
        shown = self._answers.get(click.impression_id)
        if shown is not None:
            self._join(shown, click.user_id, click.item_id)
        elif self._is_recorded(click.user_id):
            waiting = self._waiting.setdefault(click.impression_id, _Waiting(at_ms, []))
            waiting.clicks.append((click.user_id, click.item_id))
            self._waiting_clicks += 1
        self._expire(at_ms)

    def forget(self, user_id: str) -> None:
        """Drop what is kept of a user; the counts stay."""
        self._answers = {i: one for i, one in self._answers.items() if one.user_id != user_id}
        for waiting in self._waiting.values():
            waiting.clicks = [click for click in waiting.clicks if click[0] != user_id]
        self._waiting = {i: one for i, one in self._waiting.items() if one.clicks}
        self._waiting_clicks = sum(len(one.clicks) for one in self._waiting.values())

    def export(self) -> bytes:
        """The whole state, for `load`."""
        state = _State(self._now_ms, self.counts, self._answers, self._waiting, self.rates.export())
        return msgspec.msgpack.encode(state)

    @classmethod
    def load(cls, exported: bytes, is_recorded: Callable[[str], bool]) -> ImpressionJoin:
        """The join that `export` returned. Raises msgspec.MsgspecError."""
        state, join = msgspec.msgpack.decode(exported, type=_State), cls(is_recorded)
        join._now_ms, join.counts = state.now_ms, state.counts
        join._answers, join._waiting = state.answers, state.waiting
        join._waiting_clicks = sum(len(one.clicks) for one in state.waiting.values())
        join.rates = ClickRates.load(state.rates)
        return join

    def _join(self, shown: _Shown, user_id: str, item_id: str) -> None:
        """Count a click on an answer, each item of it once."""
        if user_id != shown.user_id:
            self.counts.other_user += 1
        elif item_id not in shown.items:
            self.counts.elsewhere += 1
        elif (place := shown.items.index(item_id)) in shown.clicked:
            self.counts.repeated += 1
        else:
            shown.clicked.add(place)
            self.counts.joined += 1
            self.rates.add_click(shown.at_ms, shown.origin, shown.paths[place], place + 1)

    def _expire(self, at_ms: int) -> None:
        """Drop what is too old or too much, the oldest first."""
        self._now_ms = max(self._now_ms, at_ms)
        while self._answers:
            impression_id, shown = next(iter(self._answers.items()))
            if len(self._answers) <= ANSWERS_MAX and shown.at_ms > self._now_ms - KEPT_MS:
                break
            del self._answers[impression_id]
        while self._waiting:
            impression_id, waiting = next(iter(self._waiting.items()))
            if self._waiting_clicks <= WAITING_MAX and waiting.at_ms > self._now_ms - WAIT_MS:
                break
            del self._waiting[impression_id]
            self._waiting_clicks -= len(waiting.clicks)
            self.counts.unmatched += len(waiting.clicks)
