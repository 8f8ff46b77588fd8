"""Retry with back-off: growing pauses between attempts, and waits for servers that are away."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from eddyline.errors import Unavailable
from eddyline.settings.loader import Settings

log = logging.getLogger(__name__)

_FIRST_S = 0.05
# A wait is logged at its first failure and then at this interval.
_LOG_S = 10.0

_T = TypeVar("_T")


class Stopped(Exception):
    """A stop was requested while a process waited for a server."""


class Backoff:
    """The pauses between attempts, in seconds: `first_s`, then twice the last one, up to `max_s`.

    >>> backoff = Backoff(0.5, 1.5)
    >>> [backoff.next_s() for _ in range(4)]
    [0.5, 1.0, 1.5, 1.5]
    >>> backoff.reset()
    >>> backoff.next_s()
    0.5

    It does not sleep: an event loop, a thread with a stop event and a deadline wait differently.
    Thread rule: one thread.
    """

    def __init__(self, first_s: float, max_s: float) -> None:
        self._first_s, self._max_s = min(first_s, max_s), max_s
        self._pause_s = self._first_s

    def next_s(self) -> float:
        """The pause before the next attempt; the one after it is longer."""
        pause_s = self._pause_s
        self._pause_s = min(2 * pause_s, self._max_s)
        return pause_s

    def reset(self) -> None:
        """Start again with the first pause, after a success."""
        self._pause_s = self._first_s


class Retry:
    """Waits for servers until they answer or a stop is requested. Thread rule: one thread.

    stop:    ends every wait
    on_wait: called with the name of what is waited for, before each attempt
    """

    def __init__(
        self,
        settings: Settings,
        stop: threading.Event | None = None,
        on_wait: Callable[[str], None] = lambda what: None,
    ) -> None:
        self._max_s = settings.backoff_ms_max / 1000
        self._stop = stop or threading.Event()
        self._on_wait = on_wait

    def wait_for(self, what: str, call: Callable[[], _T]) -> _T:
        """The result of the call, tried again while it raises Unavailable. Raises Stopped."""
        backoff, logged_s = Backoff(_FIRST_S, self._max_s), float("-inf")
        while True:
            self._on_wait(what)
            try:
                return call()
            except Unavailable as error:
                if time.monotonic() - logged_s > _LOG_S:
                    log.warning("waiting", extra={"for": what, "reason": str(error)})
                    logged_s = time.monotonic()
            if self._stop.wait(backoff.next_s()):
                raise Stopped
