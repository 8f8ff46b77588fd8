"""Idle users in an ingest process: their histories and embeddings are removed from its slots.

The rule is applied where a user is read: an idle user's next event starts afresh, and a query finds
nothing. So it makes no difference when, and whether, what they left is removed (ADR 29).
"""

from __future__ import annotations

import logging
import threading
import time

from eddyline.process.periodic import Periodic
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import StateStore
from streams.clicks.user_cache import UserCache

log = logging.getLogger(__name__)

# A scan passes all keys of the store.
_INTERVAL_S_MAX = 21_600
# A broker's clock may go back by so much, where another one becomes the leader.
_SLACK_S_MAX = 3_600
# Of the time that removal takes, the server has this share free.
_IDLE_SHARE = 0.8


class IdleUsers:
    """Removes what idle users left in the store. Thread rule: `check` in one thread.

    cache:   has the owned slots; used under `lock`
    removed: users removed so far
    """

    def __init__(
        self, settings: Settings, store: StateStore, cache: UserCache, lock: threading.Lock
    ) -> None:
        self.removed = 0
        self._store = store
        self._cache = cache
        self._lock = lock
        # State of before may end, whatever the setting is now.
        quarter_s = (settings.user_idle_s_max or 4 * _INTERVAL_S_MAX) / 4
        self._slack_ms = round(1_000 * min(quarter_s, _SLACK_S_MAX))
        self._checks = Periodic(
            "idle-users",
            self.check,
            max(1.0, min(quarter_s, _INTERVAL_S_MAX)),
            "idle users are not removed",
        )

    def start(self) -> None:
        """Remove in the background, several times while a user becomes idle."""
        self._checks.start()

    def close(self) -> None:
        """Stop; a removal begins anew at the next start."""
        self._checks.close()

    def check(self) -> None:
        """Remove now. Raises StoreUnavailable."""
        with self._lock:
            slots = self._cache.slot_names()
        if not slots:
            return
        before, begun = self.removed, time.perf_counter()
        for count in self._store.remove_idle_users(slots, self._slack_ms):
            self.removed += count
            busy_s = time.perf_counter() - begun
            if self._checks.stop.wait(busy_s * _IDLE_SHARE / (1 - _IDLE_SHARE)):
                break
            begun = time.perf_counter()
        if self.removed > before:
            log.info("idle users were removed", extra={"users": self.removed - before})
