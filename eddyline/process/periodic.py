"""A call that a thread of its own repeats for as long as the process runs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from eddyline.errors import EddylineError, Unavailable

log = logging.getLogger(__name__)

CLOSE_S = 5.0


class Periodic:
    """Repeats a call at an interval. Thread rule: `start`, then `close`, once each.

    stop: set by `close`. The call may set it too, to be the last one, and ends its waits with it.
    """

    def __init__(
        self,
        name: str,
        call: Callable[[], None],
        interval_s: float,
        failure: str,
        *,
        at_once: bool = False,
    ) -> None:
        """name: of the thread; failure: the log line of an error of the call.

        An error is logged once until the call succeeds or another error comes; the calls go on.
        interval_s: between the end of a call and the next one; at_once: the first call is at start
        """
        self.stop = threading.Event()
        self._name = name
        self._call = call
        self._interval_s = interval_s
        self._failure = failure
        self._first_s = 0.0 if at_once else interval_s
        self._logged = ""
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin in the background."""
        # Made here: Python counts a thread from before a fork as stopped, even if it never ran.
        self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop; a call that runs has `CLOSE_S` to end."""
        self.stop.set()
        if self._thread is not None:
            self._thread.join(CLOSE_S)

    def _run(self) -> None:
        pause_s = self._first_s
        while not self.stop.wait(pause_s):
            pause_s = self._interval_s
            try:
                self._call()
                self._logged = ""
            except Exception as error:
                self._report(error)

    def _report(self, error: Exception) -> None:
        kind = type(error).__name__
        # The text of an absent server may differ every time.
        text = kind if isinstance(error, Unavailable) else f"{kind}: {error}"
        if text != self._logged:
            trace = None if isinstance(error, EddylineError) else error
            level = logging.WARNING if trace is None else logging.ERROR
            log.log(level, self._failure, exc_info=trace, extra={"reason": str(error)})
        self._logged = text
