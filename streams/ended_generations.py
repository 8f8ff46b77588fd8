"""Ended generations in an ingest process: their embeddings go, and the process itself in time.

A thread of its own looks at the topic `generations`. Where a generation of this process has ended
and its time is over, ingest ends; a restart loads the active one. Where the time of another one is
over, its embeddings are removed from the slots that this process owns.

Behind the fences: a slot names the generations of which it may have embeddings, and the name goes
with the next fenced write after all of them are removed. A process that still wrote such an
embedding meanwhile moved the fence, so that write is refused, the slot is read again, and it has
the name. The same holds after a crash (ADR 22).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from eddyline import generations
from eddyline.errors import GenerationEnded
from eddyline.process.periodic import Periodic
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import StateStore
from streams.background_removal import paced
from streams.clicks.user_cache import UserCache
from streams.fences import PUBLISHED_SLOT, published_source

log = logging.getLogger(__name__)


class EndedGenerations:
    """Removes what ended generations left in the store. Thread rule: `check` in one thread.

    live:    the generations that this process uses
    cache:   has the owned slots; used under `lock`
    on_end:  called with the error that has to end the process
    removed: embeddings removed so far
    """

    def __init__(
        self,
        settings: Settings,
        store: StateStore,
        cache: UserCache,
        lock: threading.Lock,
        live: Sequence[str],
        on_end: Callable[[Exception], None],
    ) -> None:
        self.removed = 0
        self._settings = settings
        self._store = store
        self._cache = cache
        self._lock = lock
        self._live = live
        self._on_end = on_end
        self._used = generations.UsedGenerations(settings, live)
        self._without_fences = set[str]()
        self._checks = Periodic(
            "ended-generations",
            self._check,
            generations.CHECK_S,
            "ended generations are not removed",
            at_once=True,
        )

    def start(self) -> None:
        """Look in the background, every `generations.CHECK_S`."""
        self._checks.start()

    def close(self) -> None:
        """Stop; a removal goes on at the next start."""
        self._checks.close()

    def check(self, now_ms: int | None = None) -> None:
        """Look now, and remove what is due.

        Raises GenerationEnded where this process must not go on, Unavailable, KafkaRefused,
        StoreRefused, BundleError.
        """
        now_ms = time.time_ns() // 1_000_000 if now_ms is None else now_ms
        found = self._used.check(now_ms)
        for name in found.removable(now_ms):
            if name not in self._live:
                self._remove(name)

    def _remove(self, name: str) -> None:
        if name not in self._without_fences:
            partitions = range(self._settings.items_partitions)
            self._store.drop_fences(PUBLISHED_SLOT, [published_source(name, p) for p in partitions])
            self._without_fences.add(name)
        with self._lock:
            slots = self._cache.slots_of(name)
        if not slots:
            return
        before = self.removed
        for count in paced(self._store.remove_embeddings(name, slots.keys()), self._checks.stop):
            self.removed += count
        if self._checks.stop.is_set():
            return
        with self._lock:
            self._cache.remove_generation(name, slots)
        log.info(
            "embeddings of an ended generation were removed",
            extra={"generation": name, "embeddings": self.removed - before, "slots": len(slots)},
        )

    def _check(self) -> None:
        try:
            self.check()
        except GenerationEnded as error:
            self._checks.stop.set()
            self._on_end(error)
