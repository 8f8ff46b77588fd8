"""Removal of state that has no effect any more, in the background of an ingest process."""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator

from eddyline.process.periodic import Periodic

log = logging.getLogger(__name__)

# A scan passes all keys of the store.
_INTERVAL_S_MAX = 21_600
# A broker's clock may go back by so much, where another one becomes the leader.
_SLACK_S_MAX = 3_600
# Of the time that removal takes, the server has this share free.
_IDLE_SHARE = 0.8


def paced(pages: Iterator[int], stop: threading.Event) -> Iterator[int]:
    """Pages of a removal, with pauses between them. Ends early once `stop` is set."""
    begun = time.perf_counter()
    for count in pages:
        yield count
        busy_s = time.perf_counter() - begun
        if stop.wait(busy_s * _IDLE_SHARE / (1 - _IDLE_SHARE)):
            return
        begun = time.perf_counter()


class BackgroundRemoval(ABC):
    """Removes what has ended from the store, page by page. Thread rule: `check` in one thread.

    removed: removed so far
    """

    def __init__(self, what: str, kept_s: int) -> None:
        """what: is removed, for log lines; kept_s: how long it is kept, 0 for ever"""
        self.removed = 0
        self._what = what
        # State of before may end, whatever the setting is now.
        quarter_s = (kept_s or 4 * _INTERVAL_S_MAX) / 4
        self._slack_ms = round(1_000 * min(quarter_s, _SLACK_S_MAX))
        self._checks = Periodic(
            what.replace(" ", "-"),
            self.check,
            max(1.0, min(quarter_s, _INTERVAL_S_MAX)),
            f"{what} are not removed",
        )

    @abstractmethod
    def pages(self, slack_ms: int) -> Iterator[int]:
        """Remove page by page; how many each page had. Raises StoreUnavailable.

        slack_ms: what ended within this time stays
        """

    def start(self) -> None:
        """Remove in the background, several times while something ends."""
        self._checks.start()

    def close(self) -> None:
        """Stop; a removal begins anew at the next start."""
        self._checks.close()

    def check(self) -> None:
        """Remove now. Raises StoreUnavailable."""
        before = self.removed
        for count in paced(self.pages(self._slack_ms), self._checks.stop):
            self.removed += count
        if self.removed > before:
            log.info("%s were removed", self._what, extra={"count": self.removed - before})
