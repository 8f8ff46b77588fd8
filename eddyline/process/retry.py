"""Wait for servers, with growing pauses."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from eddyline.errors import Unavailable
from eddyline.settings.loader import Settings

log = logging.getLogger(__name__)


_BACKOFF_S = 0.05


_TELL_S = 10.0


_T = TypeVar("_T")


class Stopped(Exception):
    """A stop was asked for while a process waited for a server."""


class Patience:
    """Waits for servers, with growing pauses, until they answer or a stop is asked for.

    stop:    ends every wait; waiting: told what is waited for, before each wait begins
    """

    def __init__(
        self,
        settings: Settings,
        stop: threading.Event | None = None,
        waiting: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._wait_s_max = settings.backoff_ms_max / 1000
        self._stop = stop or threading.Event()
        self._waiting = waiting

    def until(self, what: str, call: Callable[[], _T]) -> _T:
        """What the call returns once it raises Unavailable no more. Raises Stopped."""
        self._waiting(what)
        wait_s, told = _BACKOFF_S, float("-inf")
        while True:
            try:
                return call()
            except Unavailable as error:
                if time.monotonic() - told > _TELL_S:
                    log.warning("waiting", extra={"for": what, "reason": str(error)})
                    told = time.monotonic()
            if self._stop.wait(wait_s):
                raise Stopped
            wait_s = min(2 * wait_s, self._wait_s_max)
