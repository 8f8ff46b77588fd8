"""The popular lists of a worker or coordinator: decayed by time and by events, refreshed."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from eddyline.errors import EddylineError
from eddyline.process.retry import Backoff
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import StateStore
from index.port import Hit, IndexReader
from serving.recall.click_totals import ClickTotals
from serving.recall.trend import Pace, Trend, TrendList

log = logging.getLogger(__name__)

CLOSE_S = 5.0
# After a query that found too few live items, or needed a search for them, it goes on for so long.
LOOK_S = 60.0


class _Clicks(NamedTuple):
    """Decayed clicks of the items on the list, and the denominator of `ln_p`."""

    of_item: dict[str, float]
    total: float

    def ln_p(self, item_id: str) -> float:
        """ln p(item), p = (clicks + 1) / (all clicks + items + 1).

        >>> _Clicks({"a": 2.0}, 4.0).ln_p("a") == math.log(3 / 4)
        True
        """
        return math.log((self.of_item.get(item_id, 0.0) + 1) / self.total)


class Popularity:
    """A list that its own thread refreshes; while Redis is away the last list stays in use.

    Thread rule: any thread may read; readers take no lock.
    """

    def __init__(
        self,
        settings: Settings,
        store: StateStore,
        index: IndexReader | None = None,
        trend_limit: int | None = None,
    ) -> None:
        """An empty list; `start` or `refresh` reads it.

        index: knows which items are live; None: every item of the list counts as live
        trend_limit: items of a list by events; default: `popular_limit`
        """
        self._index = index
        self._look_until = float("-inf")
        self._settings = settings
        self._store = store
        self._totals = ClickTotals(
            bucket_s=settings.popular_bucket_s,
            half_life_s=settings.popular_half_life_s,
            limit=settings.popular_limit,
        )
        # Read once `follow` was called.
        self._trend = Trend(settings, store, trend_limit or settings.popular_limit)
        self._follows = False
        self._ranked: list[tuple[str, float]] = []
        self._clicks = _Clicks({}, 1.0)
        self._read_at: float | None = None
        self._away = ""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to refresh in the background."""
        self._thread = threading.Thread(target=self._run, name="popular", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop refreshing; the list stays as it is."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(CLOSE_S)

    def refresh(self) -> bool:
        """Read what changed of the list now; False if the store did not answer.

        A slot that does not answer keeps its clicks of before; the others are read. Thread rule:
        one thread at a time.
        """
        failed = self.read()
        if failed < self._settings.item_slots:
            self._ranked = self._rank()
            of_item = dict(self._ranked)
            self._clicks = _Clicks(of_item, sum(of_item.values()) + len(of_item) + 1)
            self._trend.rank()
            if not failed or self._read_at is None:
                self._read_at = time.monotonic()
        return not failed

    def read(self) -> int:
        """Read what changed of the clicks, without making the list of it; how many slots failed.

        Thread rule: as `refresh`.
        """
        slots, failed = self._settings.item_slots, dict[str, str]()
        for slot in (f"i{n}" for n in range(slots)):
            try:
                self._read(slot)
            except Exception as error:
                if not isinstance(error, EddylineError):
                    log.exception("the popular list cannot be used")
                failed[slot] = str(error)
        away = "; ".join(dict.fromkeys(failed.values()))
        if away and not self._away:
            more = {"reason": away, "slots": ", ".join(failed)}
            log.warning("the popular list cannot be read", extra=more)
        self._away = away
        return len(failed)

    def scores(self, place_of: Mapping[str, int]) -> NDArray[np.float64]:
        """Decayed clicks of the items of the list that `refresh` would make of the clicks read.

        place_of: item id -> its place in the result, 0 … n − 1; must not change
        Returns float64 (n,), -inf for items that are not on the list. Thread rule: as `refresh`.
        """
        return self._totals.scores(place_of)

    def follow(self, pace: Pace) -> TrendList:
        """The list of popularity decayed by events; it is refreshed from now on. Any thread."""
        self._follows = True
        return self._trend.lists[pace]

    def look_for_live(self) -> None:
        """For a while, have live items replace dead ones where those are most of the list.

        A query calls this that found too few live ones, or that found some while `replaces` was
        set: without the search the dead ones come back. Thread rule: any thread.
        """
        self._look_until = time.monotonic() + LOOK_S

    @property
    def replaces(self) -> bool:
        """Whether live items replace dead ones now."""
        return self._totals.replaces

    def _rank(self) -> list[tuple[str, float]]:
        index = self._index
        if index is None or time.monotonic() > self._look_until:
            return self._totals.ranked()
        need = min((self._settings.popular_limit + 1) // 2, index.stats().live)
        return self._totals.ranked_live(
            lambda ids: [hit is not None for hit in index.describe(ids)], need
        )

    def _read(self, slot: str) -> None:
        known = self._totals.known(slot)
        found = self._store.popular_buckets(slot, self._totals.depth, known)
        self._totals.update(slot, found)
        if self._follows:
            self._trend.read(slot)

    @property
    def ranked(self) -> Sequence[tuple[str, float]]:
        """(item id, decayed clicks), most first."""
        return self._ranked

    def debias(self, hits: Sequence[Hit], k: int, beta: float) -> list[Hit]:
        """The k best of some hits by score − beta · ln p(item), best first, equal ones by id.

        p(item) is its share of all decayed clicks, see `_Clicks.ln_p`.
        """
        ln_p = self._clicks.ln_p
        debiased = [hit._replace(score=hit.score - beta * ln_p(hit.item_id)) for hit in hits]
        return sorted(debiased, key=lambda hit: (-hit.score, hit.item_id))[:k]

    def clicks_at_most(self, item_ids: Sequence[str]) -> list[float]:
        """The decayed clicks of each item; of one beyond the list as many as its last item has."""
        of_item, beyond = self._clicks.of_item, self.beyond()
        return [of_item.get(item_id, beyond) for item_id in item_ids]

    def beyond(self) -> float:
        """The most decayed clicks that an item beyond the list can have; 0 if all are on it."""
        ranked = self._ranked
        return ranked[-1][1] if len(ranked) >= self._settings.popular_limit else 0.0

    def age_ms(self) -> int:
        """Milliseconds since the list was last read; -1 for never."""
        read_at = self._read_at
        return -1 if read_at is None else int((time.monotonic() - read_at) * 1000)

    def empty_because(self, items: int) -> str:
        """Why this list, or one by events, has no items; "" if it has some. items: of the list"""
        if self._read_at is None:
            return f"the list was never read: {self._away or 'not yet'}"
        return "" if items else "nothing was clicked yet"

    def missing(self) -> str:
        """Why the list is not fresh; "" if it is."""
        if not self._away:
            return ""
        age = self.age_ms()
        which = (
            f"the popular list is {age / 1000:.1f} s old"
            if age >= 0
            else "there is no popular list"
        )
        return f"{which}: {self._away}"

    def _run(self) -> None:
        refresh_s = self._settings.popular_refresh_ms / 1000
        backoff = Backoff(refresh_s, max(refresh_s, self._settings.backoff_ms_max / 1000))
        while not self._stop.is_set():
            if self.refresh():
                backoff.reset()
            self._stop.wait(backoff.next_s())
