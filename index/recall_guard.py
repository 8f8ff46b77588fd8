"""The recall guard: a few real queries are answered exactly as well, and what is too low is raised.

A share of the queries that the main index answered is compared, on a thread of its own, with the exact
answer on the very State they read. Recall@k is the share of the exact answer that was found. Where it is
surely below the floor, each query does more work, one step at a time: more candidates (twice as many each
time), then a new main index, then exact answers only. Where it is surely good again, the steps are gone back.
While answers are exact the main index is measured in their shadow, so that the way back is seen.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, NamedTuple

from eddyline.statistics import interval
from index.arrays import Vector
from index.port import RecallEstimate, SearchResult
from index.storage.state import IndexVersion

if TYPE_CHECKING:
    from index.live import LiveIndex

log = logging.getLogger(__name__)

# So long between two steps back, and until an index that stays bad is rebuilt again: twice as long each time
# that a step back had to be undone or a rebuild did not help, so that nothing swings.
HOLD_S = 60.0
HOLD_S_MAX = 3_600.0
# After an error in the guard itself.
PAUSE_S = 60.0
# The thread is woken by queries; this only bounds how long it takes to see that it was closed.
LOOK_S = 5.0


class Shadow(NamedTuple):
    """One query to compare: what it read, what it asked, what it was told, and under which step."""

    state: IndexVersion
    vector: Vector
    wanted: int
    excluded: Collection[str]
    found: SearchResult
    epoch: int


class RecallGuard:
    """Watches one live index. Thread rule: any thread; `offer` returns at once.

    One shadow query at a time, and of the guard's time at most `cpu_share` is spent in them.
    """

    def __init__(
        self,
        index: LiveIndex,
        *,
        share: float,
        floor: float,
        samples: int,
        breadth_max: int,
        cpu_share: float = 0.02,
        hold_s: float = HOLD_S,
        clock: Callable[[], float] = time.monotonic,
        seed: int | None = None,
    ) -> None:
        """Begin to watch; the index closes it.

        share:       of the queries to compare, 0 … 1; cpu_share: of one core, above 0 and at most 1
        floor:       the recall to hold, 0 … 1; samples: the fewest queries to judge by
        breadth_max: the most candidates to ask for
        """
        if not (0 <= share <= 1 and 0 <= floor <= 1 and samples >= 2 and 0 < cpu_share <= 1):
            raise ValueError(
                f"share {share} and floor {floor} must be within 0 … 1, samples {samples} at least 2, "
                f"cpu_share {cpu_share} above 0 and at most 1"
            )
        self._index = index
        self._share, self._floor, self._samples, self._cpu_share = share, floor, samples, cpu_share
        self._breadths = [index.breadth]
        while self._breadths[-1] < breadth_max:
            self._breadths.append(min(breadth_max, 2 * self._breadths[-1]))
        self._clock = clock
        self._draw = random.Random(seed).random
        self._busy = threading.Lock()
        self._job: Shadow | None = None
        self._wake, self._stop = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._not_before = -math.inf
        # From here on the guard's thread alone writes.
        self._window: deque[tuple[float, int]] = deque(maxlen=2 * samples)
        self._epoch = self._width = 0
        self._rebuilt = self._lowered_last = False
        self._awaited: int | None = None
        self._hold_s_min = self._hold_s = hold_s
        self._since = clock()
        self._shadowed = self._skipped = self._raised = self._lowered = 0
        self._recall = self._told(0, 0.0, 0.0, 1.0)
        index.guard = self

    def offer(
        self,
        state: IndexVersion,
        vector: Vector,
        wanted: int,
        excluded: Collection[str],
        found: SearchResult,
    ) -> None:
        """Perhaps compare one query that was just answered, later; see `LiveIndex.query`."""
        if self._draw() >= self._share or not len(found):
            return
        if (
            self._clock() < self._not_before
            or self._stop.is_set()
            or not self._busy.acquire(blocking=False)
        ):
            self._skipped += 1
            return
        # Who holds `busy` is alone here until the thread lets go of it.
        self._job = Shadow(state, vector.copy(), wanted, excluded, found, self._epoch)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="recall-guard", daemon=True)
            self._thread.start()
        self._wake.set()

    def recall(self) -> RecallEstimate:
        """What was found so far."""
        return self._recall._replace(shadowed=self._shadowed, skipped=self._skipped)

    def close(self) -> None:
        """Stop watching; what was raised stays raised."""
        self._stop.set()
        self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(2 * LOOK_S)

    # ------------------------------------------------------------------ comparing

    def _run(self) -> None:
        while not self._stop.is_set():
            if not self._wake.wait(LOOK_S):
                continue
            self._wake.clear()
            job, self._job = self._job, None
            if job is None:
                continue
            begun, pause = self._clock(), 0.0
            try:
                self._one(job)
            except Exception:
                pause = PAUSE_S
                log.exception("the recall guard could not compare a query; it pauses")
            finally:
                # Without the reference a State that was replaced can go while nothing is sampled.
                del job
                took = self._clock() - begun
                self._not_before = begun + max(pause, took / self._cpu_share)
                self._busy.release()

    def _one(self, job: Shadow) -> None:
        """Compare one query, then judge."""
        if self._awaited is not None:
            self._look_at_rebuild()
        # An answer from before the last step says nothing about what is now.
        if self._awaited is not None or job.epoch != self._epoch:
            return
        found, exact = job.found, job.found
        if self._index.exact_only:
            breadth = self._index.breadth
            # A search that finds too little is answered by the scan, and so is none the worse.
            found = job.state.search(job.vector, job.wanted, job.excluded, breadth) or job.found
        else:
            exact = job.state.scan(job.vector, job.wanted, job.excluded)
        self._shadowed += 1
        if len(exact):
            # By scores, not by names: of equal ones any is right.
            good = int((found.scores >= exact.scores[-1]).sum())
            self._window.append((min(1.0, good / len(exact)), len(exact)))
            self._judge(job.wanted + len(job.excluded))

    def _judge(self, need: int) -> None:
        estimate, low, high = interval(self._window)
        now, count = self._clock(), len(self._window)
        self._recall = self._told(count, estimate, low, high)
        if count < self._samples:
            return
        if high < self._floor:
            self._raise(need)
        elif low >= self._floor and now - self._since >= self._hold_s:
            if self._width or self._index.exact_only:
                self._lower()
            else:
                self._hold_s = self._hold_s_min

    # ------------------------------------------------------------------ steps

    def _raise(self, need: int) -> None:
        """The next step towards more work for each query; need: what the queries ask for anyway."""
        index = self._index
        if index.exact_only:
            if self._clock() - self._since < self._hold_s:
                return
            self._hold_s = min(HOLD_S_MAX, 2 * self._hold_s)
            self._await_rebuild()
        elif self._width + 1 < len(self._breadths):
            self._width += 1
            while self._width + 1 < len(self._breadths) and self._breadths[self._width] <= need:
                self._width += 1
            index.breadth = self._breadths[self._width]
        elif not self._rebuilt:
            self._rebuilt = True
            self._await_rebuild()
        else:
            index.exact_only = True
        if self._lowered_last:
            self._hold_s = min(HOLD_S_MAX, 2 * self._hold_s)
        self._lowered_last = False
        self._raised += 1
        self._stepped("recall is below its floor: more work for each query", logging.WARNING)

    def _lower(self) -> None:
        """One step back."""
        if self._index.exact_only:
            self._index.exact_only = False
        else:
            self._width -= 1
            self._index.breadth = self._breadths[self._width]
        self._rebuilt = False
        self._lowered_last = True
        self._lowered += 1
        self._stepped("recall is good again: one step back", logging.INFO)

    def _await_rebuild(self) -> None:
        """Ask for a rebuild. One that runs already began with what is there now, so it does not count."""
        stats = self._index.stats()
        self._awaited = stats.rebuilds + stats.rebuilds_failed + (2 if stats.rebuilding else 1)
        self._index.rebuild_soon()

    def _look_at_rebuild(self) -> None:
        stats = self._index.stats()
        if self._awaited is not None and stats.rebuilds + stats.rebuilds_failed >= self._awaited:
            self._awaited = None
            if stats.rebuild_error:
                self._index.exact_only = True
            self._stepped(
                f"rebuilt for recall's sake: {stats.rebuild_error or 'done'}", logging.WARNING
            )

    def _stepped(self, what: str, level: int) -> None:
        """Log the step; judge by new samples only."""
        before = self._recall
        self._window.clear()
        self._epoch += 1
        self._since = self._clock()
        self._recall = self._told(0, 0.0, 0.0, 1.0)
        log.log(
            level,
            what,
            extra={
                "step": self._recall.step,
                "breadth": self._index.breadth,
                "recall": round(before.estimate, 4),
                "recall_low": round(before.low, 4),
                "recall_high": round(before.high, 4),
                "recall_floor": self._floor,
                "samples": before.samples,
            },
        )

    def _told(self, count: int, estimate: float, low: float, high: float) -> RecallEstimate:
        if self._awaited is not None:
            step = "rebuild"
        elif self._index.exact_only:
            step = "exact"
        else:
            step = "wider" if self._width else "normal"
        return RecallEstimate(
            step,
            count,
            estimate,
            low,
            high,
            self._shadowed,
            self._skipped,
            self._raised,
            self._lowered,
        )
