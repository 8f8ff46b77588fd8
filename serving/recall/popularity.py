"""The popular list of a worker or coordinator: decayed clicks of items, refreshed all the time."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence

from eddyline.errors import EddylineError
from eddyline.process.retry import Backoff
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import StateStore
from index.port import Hit

log = logging.getLogger(__name__)

CLOSE_S = 5.0


def rank(
    buckets: Mapping[int, Mapping[str, int]], *, bucket_s: int, half_life_s: int, limit: int
) -> list[tuple[str, float]]:
    """(item id, decayed clicks), most first, equal ones by id; at most `limit`.

    buckets: bucket number -> item id -> clicks in thousandths. A click loses half its weight every
             `half_life_s`, measured against the newest bucket, never against the local clock.

    >>> rank({7: {"a": 1000}, 8: {"b": 600}}, bucket_s=10, half_life_s=10, limit=9)
    [('b', 0.6), ('a', 0.5)]
    """
    newest = max(buckets, default=0)
    totals: dict[str, float] = {}
    # In the order of the buckets: every worker adds in the same order and gets the same bits.
    for bucket in sorted(buckets):
        weight = 0.5 ** ((newest - bucket) * bucket_s / half_life_s) / 1000
        for item_id, count in buckets[bucket].items():
            totals[item_id] = totals.get(item_id, 0.0) + weight * count
    return sorted(totals.items(), key=lambda pair: (-pair[1], pair[0]))[:limit]


def log_probabilities(ranked: Sequence[tuple[str, float]]) -> tuple[dict[str, float], float]:
    """(item id -> ln p, ln p of an item off the list); p = (clicks + 1) / (all + items + 1).

    >>> log_probabilities([("a", 2.0)])[0]["a"] == math.log(3 / 4)
    True
    """
    total = sum(count for _, count in ranked) + len(ranked) + 1
    known = {item_id: math.log((count + 1) / total) for item_id, count in ranked}
    return known, math.log(1 / total)


class Popularity:
    """A list that its own thread refreshes; while Redis is away the last list stays in use.

    Thread rule: any thread may read; readers take no lock.
    """

    def __init__(self, settings: Settings, store: StateStore) -> None:
        """An empty list; `start` or `refresh` reads it."""
        self._settings = settings
        self._store = store
        self._ranked: list[tuple[str, float]] = []
        self._log_p: tuple[dict[str, float], float] = ({}, 0.0)
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
        """Read the list now; False if the store did not answer."""
        settings = self._settings
        try:
            buckets: dict[int, dict[str, int]] = {}
            for n in range(settings.item_slots):
                for bucket, counts in self._store.popular(f"i{n}", settings.popular_limit).items():
                    buckets.setdefault(bucket, {}).update(counts)
        except Exception as error:
            if not isinstance(error, EddylineError):
                log.exception("the popular list cannot be used")
            if not self._away:
                log.warning("the popular list cannot be read", extra={"reason": str(error)})
            self._away = str(error)
            return False
        self._ranked = rank(
            buckets,
            bucket_s=settings.popular_bucket_s,
            half_life_s=settings.popular_half_life_s,
            limit=settings.popular_limit,
        )
        self._log_p = log_probabilities(self._ranked)
        self._read_at = time.monotonic()
        self._away = ""
        return True

    @property
    def ranked(self) -> Sequence[tuple[str, float]]:
        """(item id, decayed clicks), most first."""
        return self._ranked

    def debias(self, hits: Sequence[Hit], k: int, beta: float) -> list[Hit]:
        """The k best of some hits by score − beta · ln p(item), best first, equal ones by id.

        p(item) is its share of all decayed clicks, see `log_probabilities`.
        """
        log_p, floor = self._log_p
        debiased = [
            hit._replace(score=hit.score - beta * log_p.get(hit.item_id, floor)) for hit in hits
        ]
        return sorted(debiased, key=lambda hit: (-hit.score, hit.item_id))[:k]

    def age_ms(self) -> int:
        """Milliseconds since the list was last read; -1 for never."""
        read_at = self._read_at
        return -1 if read_at is None else int((time.monotonic() - read_at) * 1000)

    def empty_because(self) -> str:
        """Why the list has no items; "" if it has some."""
        if self._read_at is None:
            return f"the list was never read: {self._away or 'not yet'}"
        return "" if self._ranked else "nothing was clicked yet"

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
