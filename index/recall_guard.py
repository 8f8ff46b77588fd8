"""The recall guard: samples real queries, compares with the exact answer, raises what is too low.

A thread of its own compares a share of the answers from segments with the exact answer of the same
IndexVersion, filtered queries too. Recall@k is the share of the exact answer that was found. A
query that repeats counts once, so that one user decides nothing for the others. Recall is also
estimated by stratum (`index.strata`: clusters of items, and filtered queries), and rare strata are
sampled more often, so that a bad cluster does not hide behind a good mean. While the recall of all
queries or of a stratum is surely below the floor, each query does more work, one step at a time:
more candidates (twice as many each time), then a rebuild of the main segment, then exact answers
only. Once recall is surely good again, the guard steps back. While answers are exact it compares
segment searches with them.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from typing_extensions import override

from eddyline.statistics import ConfidenceSequence
from index.arrays import Vector
from index.live import LiveIndex, RecallMonitor
from index.port import RecallEstimate, SearchResult
from index.search.nearest import NearestSearch
from index.strata import FILTERED, STRATA, clusters_of, stratum_of

log = logging.getLogger(__name__)

# Time between two steps back, and until a bad index is rebuilt again. It doubles, up to the
# maximum, when a step back has to be undone or a rebuild did not help, to prevent oscillation.
HOLD_S = 60.0
HOLD_S_MAX = 3_600.0
# Pause after an error of the guard itself.
PAUSE_S = 60.0
# Queries wake the thread; this bounds how long it takes to notice `close`.
POLL_S = 5.0
# The probability that no interval of a sequence ever misses the truth is 1 minus this. The strata
# share it.
ALPHA = 0.05
# Estimates begin anew after so many times `samples`: an index that changes is noticed.
BLOCK = 10
# The smallest share of the samples of a frequent stratum that is compared.
SHARE_MIN = 0.25


class Sample(NamedTuple):
    """One answered query to compare; epoch: number of steps at that time."""

    search: NearestSearch
    result: SearchResult
    epoch: int


class Stratum(NamedTuple):
    """The estimate of one stratum or of all, and the queries behind it, by hash."""

    recall: ConfidenceSequence
    queries: set[int]

    @classmethod
    def empty(cls, alpha: float) -> Stratum:
        """Without samples. alpha: see `ConfidenceSequence`."""
        return cls(ConfidenceSequence(alpha), set())

    def add(self, query: int, recall: float) -> None:
        """Count a query; one that is counted already changes nothing."""
        if query not in self.queries:
            self.queries.add(query)
            self.recall.add(recall)


class RecallGuard(RecallMonitor):
    """Watches one live index.

    Thread rule: any thread; `offer` returns at once. The guard compares one sample at a time and
    spends at most `cpu_share` of one core.
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
        """A guard of this index; set it as `index.guard`, and the index closes it.

        share:       of the queries to sample, 0 … 1; cpu_share: of one core, above 0, at most 1
        floor:       recall to hold, 0 … 1; samples: fewest compared queries to decide by
        breadth_max: most candidates to request
        """
        if not (0 <= share <= 1 and 0 <= floor <= 1 and samples >= 2 and 0 < cpu_share <= 1):
            raise ValueError(
                f"share {share} and floor {floor} must be within 0 … 1, samples {samples} at "
                f"least 2, cpu_share {cpu_share} above 0 and at most 1"
            )
        self._index = index
        self._share = share
        self._floor = floor
        self._samples = samples
        self._cpu_share = cpu_share
        self._breadths = [index.breadth]
        while self._breadths[-1] < breadth_max:
            self._breadths.append(min(breadth_max, 2 * self._breadths[-1]))
        self._clock = clock
        self._random = random.Random(seed).random
        # Held from the offer of a sample until the thread has compared it.
        self._busy = threading.Lock()
        self._sample: Sample | None = None
        self._wake, self._stop = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._not_before = -math.inf
        # Below: written by the guard's thread alone, `_skipped` excepted.
        self._clusters: Vector | None = None
        self._all = Stratum.empty(ALPHA)
        self._strata: dict[int, Stratum] = {}
        self._epoch = 0
        self._width = 0  # position in `_breadths`
        self._rebuilt = self._lowered_last = False
        self._awaited: int | None = None  # number of finished rebuilds to wait for
        self._hold_s_min = self._hold_s = hold_s
        self._since = clock()
        self._shadowed = self._skipped = self._raised = self._lowered = 0
        self._recall = self._estimate()

    @override
    def offer(self, search: NearestSearch, result: SearchResult) -> None:
        if self._random() >= self._share or not len(result):
            return
        if (
            self._clock() < self._not_before
            or self._stop.is_set()
            or not self._busy.acquire(blocking=False)
        ):
            self._skipped += 1
            return
        if not self._is_wanted(search):
            self._skipped += 1
            self._busy.release()
            return
        self._sample = Sample(search.detached(), result, self._epoch)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="recall-guard", daemon=True)
            self._thread.start()
        self._wake.set()

    def _is_wanted(self, search: NearestSearch) -> bool:
        """Whether to compare a query: it is new, and no rarer stratum needs it more.

        The caller holds `_busy`.
        """
        strata = self._strata
        mine = strata.get(stratum_of(search, self._clusters))
        if mine is None:
            return True
        key = _key(search)
        if key in mine.queries and key in self._all.queries:
            return False
        fewest = min(one.recall.samples for one in strata.values())
        return self._random() < max(SHARE_MIN, (fewest + 1) / (mine.recall.samples + 1))

    @override
    def recall(self) -> RecallEstimate:
        return self._recall._replace(shadowed=self._shadowed, skipped=self._skipped)

    @override
    def close(self) -> None:
        self._stop.set()
        self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(2 * POLL_S)

    # ------------------------------------------------------------------ comparing

    def _run(self) -> None:
        while not self._stop.is_set():
            if not self._wake.wait(POLL_S):
                continue
            self._wake.clear()
            sample, self._sample = self._sample, None
            if sample is None:
                continue
            started, pause = self._clock(), 0.0
            try:
                self._compare(sample)
            except Exception:
                pause = PAUSE_S
                log.exception("the recall guard could not compare a query; it pauses")
            finally:
                # The reference would keep a replaced IndexVersion alive until the next sample.
                del sample
                took = self._clock() - started
                self._not_before = started + max(pause, took / self._cpu_share)
                self._busy.release()

    def _compare(self, sample: Sample) -> None:
        """Compare one answer with the exact one, then adapt the breadth."""
        if self._awaited is not None:
            self._check_rebuild()
        # An answer from before the last step does not count.
        if self._awaited is not None or sample.epoch != self._epoch:
            return
        search = sample.search
        found = exact = sample.result
        if self._index.exact_only:
            # The scan answers if a search finds too few, so such a query loses no recall.
            found = search.by_segments(self._index.breadth) or found
        else:
            exact = search.scan()
        self._shadowed += 1
        if len(exact):
            # By scores, not by ids: of equal scores any item is right.
            good = int((found.scores >= exact.scores[-1]).sum())
            self._add(search, min(1.0, good / len(exact)))
            self._adapt_breadth(search.need)

    def _add(self, search: NearestSearch, recall: float) -> None:
        """Count a sample in all estimates; each begins anew once it has many samples."""
        if self._clusters is None:
            self._clusters = clusters_of(search.version)
        if self._all.recall.samples >= BLOCK * self._samples:
            self._all = Stratum.empty(ALPHA)
        number = stratum_of(search, self._clusters)
        mine = self._strata.get(number)
        if mine is None or mine.recall.samples >= BLOCK * self._samples:
            mine = Stratum.empty(ALPHA / (STRATA + 1))
            self._strata = {**self._strata, number: mine}  # queries read it meanwhile
        for one in (self._all, mine):
            one.add(_key(search), recall)

    def _adapt_breadth(self, need: int) -> None:
        """Take a step if recall, or that of a stratum, is surely below or above the floor."""
        if self._all.recall.samples < self._samples:
            if self._recall.samples < self._samples:  # the first block since the last step
                self._recall = self._estimate()
            return
        recall = self._recall = self._estimate()
        strata = [one.recall for one in self._strata.values()]
        if recall.high < self._floor or any(one.high < self._floor for one in strata):
            self._raise(need)
        elif (
            recall.low >= self._floor
            and all(one.mean >= self._floor for one in strata)
            and self._clock() - self._since >= self._hold_s
        ):
            if self._width or self._index.exact_only:
                self._lower()
            else:
                self._hold_s = self._hold_s_min

    # ------------------------------------------------------------------ steps

    def _raise(self, need: int) -> None:
        """Take the next step towards more work per query. need: candidates of a query anyway."""
        index = self._index
        if index.exact_only:
            if self._clock() - self._since < self._hold_s:
                return
            self._hold_s = min(HOLD_S_MAX, 2 * self._hold_s)
            self._request_rebuild()
        elif self._width + 1 < len(self._breadths):
            self._width += 1
            while self._width + 1 < len(self._breadths) and self._breadths[self._width] <= need:
                self._width += 1
            index.breadth = self._breadths[self._width]
        elif not self._rebuilt:
            self._rebuilt = True
            self._request_rebuild()
        else:
            index.exact_only = True
        if self._lowered_last:
            self._hold_s = min(HOLD_S_MAX, 2 * self._hold_s)
        self._lowered_last = False
        self._raised += 1
        self._restart("recall is below its floor: more work for each query", logging.WARNING)

    def _lower(self) -> None:
        """Take one step back."""
        if self._index.exact_only:
            self._index.exact_only = False
        else:
            self._width -= 1
            self._index.breadth = self._breadths[self._width]
        self._rebuilt = False
        self._lowered_last = True
        self._lowered += 1
        self._restart("recall is good again: one step back", logging.INFO)

    def _request_rebuild(self) -> None:
        """Request a rebuild and wait for it; a running one started too early to count."""
        stats = self._index.stats()
        self._awaited = stats.rebuilds + stats.rebuilds_failed + (2 if stats.rebuilding else 1)
        self._index.request_rebuild()

    def _check_rebuild(self) -> None:
        stats = self._index.stats()
        if self._awaited is not None and stats.rebuilds + stats.rebuilds_failed >= self._awaited:
            self._awaited = None
            if stats.rebuild_error:
                self._index.exact_only = True
            outcome = stats.rebuild_error or "done"
            self._restart(f"rebuild because of low recall: {outcome}", logging.WARNING)

    def _restart(self, message: str, level: int) -> None:
        """Log the step and start a new window of samples."""
        before, worst = self._recall, self._worst()
        self._all, self._strata, self._clusters = Stratum.empty(ALPHA), {}, None
        self._epoch += 1
        self._since = self._clock()
        self._recall = self._estimate()
        log.log(
            level,
            message,
            extra={
                "step": self._recall.step,
                "breadth": self._index.breadth,
                "recall": round(before.estimate, 4),
                "recall_low": round(before.low, 4),
                "recall_high": round(before.high, 4),
                "recall_floor": self._floor,
                "samples": before.samples,
                **worst,
            },
        )

    def _worst(self) -> dict[str, object]:
        """Of the stratum with the lowest upper end: its recall and samples; {} without samples."""
        if not self._strata:
            return {}
        sequences = {number: one.recall for number, one in self._strata.items()}
        number, worst = min(sequences.items(), key=lambda found: found[1].high)
        return {
            "stratum": "filtered" if number == FILTERED else f"cluster {number}",
            "stratum_recall": round(worst.mean, 4),
            "stratum_recall_high": round(worst.high, 4),
            "stratum_samples": worst.samples,
        }

    def _estimate(self) -> RecallEstimate:
        if self._awaited is not None:
            step = "rebuild"
        elif self._index.exact_only:
            step = "exact"
        else:
            step = "wider" if self._width else "normal"
        return RecallEstimate(
            step,
            self._all.recall.samples,
            self._all.recall.mean,
            self._all.recall.low,
            self._all.recall.high,
            self._shadowed,
            self._skipped,
            self._raised,
            self._lowered,
        )


def _key(search: NearestSearch) -> int:
    return hash(search.query.tobytes())
