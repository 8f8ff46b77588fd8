"""The popular path: what is clicked most, decayed by its age in event time, read anew every moment."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Collection, Mapping, Sequence

from eddyline.errors import EddylineError
from eddyline.stores.state_store import StateStore
from index.filters import Filter
from index.port import Hit
from serving.recall.base import Candidates
from serving.recall.index_reader import IndexReader

log = logging.getLogger(__name__)

NAME = "popular"
CLOSE_S = 5.0
# Most of the list is live and unseen, so about as many are looked up as are still open; where they are not,
# twice as many each time, up to this many, for each look-up may be a call to other processes.
PIECE_MIN, PIECE_MAX = 16, 1_024


def rank(
    buckets: Mapping[int, Mapping[str, int]], *, bucket_s: int, half_life_s: int, limit: int
) -> list[tuple[str, float]]:
    """(item id, decayed clicks), most first, equal ones by id; at most `limit`.

    buckets: bucket number -> item id -> milli_counts of a click. A click loses half its weight every
             `half_life_s`, measured against the newest bucket and never against this machine's clock.

    >>> rank({7: {"a": 1000}, 8: {"b": 600}}, bucket_s=10, half_life_s=10, limit=9)
    [('b', 0.6), ('a', 0.5)]
    """
    newest = max(buckets, default=0)
    totals: dict[str, float] = {}
    # In the order of the buckets, so that every worker adds in the same order and gets the same bits.
    for bucket in sorted(buckets):
        weight = 0.5 ** ((newest - bucket) * bucket_s / half_life_s) / 1000
        for item_id, count in buckets[bucket].items():
            totals[item_id] = totals.get(item_id, 0.0) + weight * count
    return sorted(totals.items(), key=lambda pair: (-pair[1], pair[0]))[:limit]


def log_shares(ranked: Sequence[tuple[str, float]]) -> tuple[dict[str, float], float]:
    """(item id -> ln p of it, ln p of an item that is not on the list); p = (clicks + 1) / (all + items + 1).

    >>> log_shares([("a", 2.0)])[0]["a"] == math.log(3 / 4)
    True
    """
    total = sum(count for _, count in ranked) + len(ranked) + 1
    return {item_id: math.log((count + 1) / total) for item_id, count in ranked}, math.log(
        1 / total
    )


class PopularPath:
    """A list that a thread of its own keeps fresh; while Redis is away the last one known goes on serving.

    Thread rule: any thread may ask; readers take no lock.
    """

    def __init__(
        self,
        store: StateStore,
        *,
        slots: Sequence[str],
        bucket_s: int,
        half_life_s: int,
        limit: int,
        refresh_ms: int,
        backoff_ms_max: int,
    ) -> None:
        """slots: the item slots whose counts are added up; limit: the most items on the list."""
        self._store = store
        self._slots = slots
        self._bucket_s = bucket_s
        self._half_life_s = half_life_s
        self._limit = limit
        self._refresh_s = refresh_ms / 1000
        self._backoff_s_max = max(backoff_ms_max, refresh_ms) / 1000
        self._ranked: list[tuple[str, float]] = []
        self._shares: tuple[dict[str, float], float] = ({}, 0.0)
        self._read_at: float | None = None
        self._away = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="popular", daemon=True)

    def start(self) -> None:
        """Begin to refresh in the background."""
        self._thread.start()

    def close(self) -> None:
        """Stop refreshing; the list stays as it is."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(CLOSE_S)

    def refresh(self) -> bool:
        """Read the list now; False where the store did not answer."""
        try:
            buckets: dict[int, dict[str, int]] = {}
            for slot in self._slots:
                for bucket, counts in self._store.popular(slot, self._limit).items():
                    buckets.setdefault(bucket, {}).update(counts)
        except Exception as error:
            if not isinstance(error, EddylineError):
                log.exception("the popular list cannot be used")
            if not self._away:
                log.warning("the popular list cannot be read", extra={"reason": str(error)})
            self._away = str(error)
            return False
        self._ranked = rank(
            buckets, bucket_s=self._bucket_s, half_life_s=self._half_life_s, limit=self._limit
        )
        self._shares = log_shares(self._ranked)
        self._read_at = time.monotonic()
        self._away = ""
        return True

    def ask(
        self, items: IndexReader, k: int, exclude: Collection[str], filters: Filter | None = None
    ) -> Candidates:
        """The k most popular live items that pass the filter and are not excluded; fewer, with the reason."""
        ranked, found, at = self._ranked, list[Hit](), 0
        size = k + PIECE_MIN
        while len(found) < k and at < len(ranked):
            piece = ranked[at : at + size]
            at += len(piece)
            size = max(size, min(2 * size, PIECE_MAX))
            piece = [pair for pair in piece if pair[0] not in exclude]
            live = items.describe([item_id for item_id, _ in piece], filters) if piece else []
            found += [hit._replace(score=n) for hit, (_, n) in zip(live, piece, strict=True) if hit]
        if len(found) >= k:
            return Candidates(found[:k])
        if self._read_at is None:
            return Candidates(found, f"the list was never read: {self._away or 'not yet'}")
        if not ranked:
            return Candidates(found, "nothing was clicked yet")
        which = "live and unseen" if filters is None else "live, unseen and pass the filter"
        return Candidates(found, f"of {len(ranked)} popular items {len(found)} are {which}")

    def correct(self, hits: Sequence[Hit], k: int, beta: float) -> list[Hit]:
        """The k best of some hits by score − beta · ln p(item), best first, equal ones by id.

        p(item) is its share of the decayed clicks of the list, each item having one click more than it has,
        so that one that nobody clicked has a share as well.
        """
        share, floor = self._shares
        corrected = [
            hit._replace(score=hit.score - beta * share.get(hit.item_id, floor)) for hit in hits
        ]
        return sorted(corrected, key=lambda hit: (-hit.score, hit.item_id))[:k]

    def size(self) -> int:
        """How many items are on the list."""
        return len(self._ranked)

    def age_ms(self) -> int:
        """Since the list was last read; -1 for never."""
        read_at = self._read_at
        return -1 if read_at is None else int((time.monotonic() - read_at) * 1000)

    def missing(self) -> str:
        """Why the list is not fresh, "" where it is."""
        if not self._away:
            return ""
        age = self.age_ms()
        which = (
            "there is no popular list" if age < 0 else f"the popular list is {age / 1000:.1f} s old"
        )
        return f"{which}: {self._away}"

    def _run(self) -> None:
        wait_s = self._refresh_s
        while not self._stop.is_set():
            wait_s = self._refresh_s if self.refresh() else min(2 * wait_s, self._backoff_s_max)
            self._stop.wait(wait_s)
