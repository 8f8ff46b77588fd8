"""Idle users in an ingest process: their histories and embeddings are removed from its slots.

The rule is applied where a user is read: an idle user's next event starts afresh, and a query finds
nothing. So it makes no difference when, and whether, what they left is removed (ADR 29).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

from typing_extensions import override

from eddyline.settings.loader import Settings
from eddyline.stores.state_store import StateStore
from streams.background_removal import BackgroundRemoval
from streams.clicks.user_cache import UserCache


class IdleUsers(BackgroundRemoval):
    """Removes what idle users left in the store. Thread rule: `check` in one thread.

    cache: has the owned slots; used under `lock`
    """

    def __init__(
        self, settings: Settings, store: StateStore, cache: UserCache, lock: threading.Lock
    ) -> None:
        super().__init__("idle users", settings.user_idle_s_max)
        self._store = store
        self._cache = cache
        self._lock = lock

    @override
    def pages(self, slack_ms: int) -> Iterator[int]:
        with self._lock:
            slots = self._cache.slot_names()
        return self._store.remove_idle_users(slots, slack_ms) if slots else iter(())
