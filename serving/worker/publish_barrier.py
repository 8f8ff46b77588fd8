"""A worker that starts waits until ingest has published all item changes since the bundle's cut.

The bundle holds the items as of its cut, later deleted ones included; they leave the index only by
the records that ingest publishes. So the worker waits until the fences of the generation have
reached the present ends of `items`; for a limited time, because ingest may be down. After that it
serves, and answers say how many records are missing until there are none.
"""

from __future__ import annotations

import logging
import threading
import time

from eddyline.errors import EddylineError
from eddyline.kafka import topics
from eddyline.process.periodic import Periodic
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import Source, StateStore
from serving.worker.replica import Replica

log = logging.getLogger(__name__)

# Encoding and publishing 100,000 items takes about this long.
WAIT_S = 20.0
POLL_S = 0.05
# While something is missing, answers say so, and this often it is asked for again.
AGAIN_S = 1.0


class PublishBarrier:
    """How many records of `items` from before the start ingest has still to publish.

    Thread rule: any thread; `wait`, then `start`, once each.
    """

    def __init__(self, settings: Settings, store: StateStore, generation: str) -> None:
        self._settings = settings
        self._store = store
        self._generation = generation
        self._ends: dict[int, int] | None = None
        self._missing = ""
        self._published_s: float | None = None
        self._checks: Periodic | None = None

    def wait(self, stop: threading.Event, limit_s: float = WAIT_S) -> int:
        """Wait until all present records of `items` are published. Returns how many are missing.

        Returns early if `stop` is set or a server is away, and after `limit_s`.
        """
        deadline = time.monotonic() + limit_s
        behind, self._missing = self._ask()
        while behind and time.monotonic() <= deadline and not stop.wait(POLL_S):
            behind, self._missing = self._ask()
        if self._missing:
            log.warning("serving starts without all items", extra={"reason": self._missing})
        return behind or 0

    def start(self, replica: Replica) -> None:
        """Ask again once a second until nothing is missing and the replica has read it."""
        if self._missing:
            self._checks = Periodic(
                "publish-barrier",
                lambda: self._check(replica),
                AGAIN_S,
                "what ingest has still to publish could not be read",
            )
            self._checks.start()

    def missing(self) -> str:
        """What ingest has still to publish; "" if nothing."""
        return self._missing

    def close(self) -> None:
        """Stop asking."""
        if self._checks is not None:
            self._checks.close()

    def _check(self, replica: Replica) -> None:
        if self._published_s is None:
            behind, why = self._ask()
            if behind != 0:
                self._missing = why
                return
            self._published_s = time.monotonic()
        if replica.reached_s > self._published_s:
            self._missing = ""
            log.info("ingest has published all changes of items from before the start")
            assert self._checks is not None
            self._checks.stop.set()

    def _ask(self) -> tuple[int | None, str]:
        """(how many records are missing, None if that is unknown; the same in words, "" for 0)."""
        try:
            if self._ends is None:
                ends = topics.end_offsets(self._settings, topics.ITEMS)
                self._ends = {p: end for p, end in ends.items() if end}
            behind = _behind(self._store, self._generation, self._ends)
        except EddylineError as error:
            return None, f"it is unknown which items ingest has still to publish: {error}"
        if not behind:
            return 0, ""
        return behind, (
            f"ingest has not published {behind} records of items; changed and deleted items are "
            "served as before"
        )


def _behind(store: StateStore, generation: str, ends: dict[int, int]) -> int:
    """Number of records of `items` between the fences of the generation and these ends."""
    total = 0
    for partition, end in ends.items():
        fence = store.fences(Source(f"{topics.ITEMS}@{generation}", partition), ["i0"])["i0"]
        total += max(0, end - 1 - (fence.offset if fence else -1))
    return total
