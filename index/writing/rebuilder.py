"""The thread that rebuilds the main index in the background, and what became of its rebuilds."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

# After a rebuild that failed the next try waits 1 s, then twice as long each time, up to a minute: a cause
# that stays (no memory) must not eat a core.
BACKOFF_S = 1.0
BACKOFF_S_MAX = 60.0
# The thread is woken by the writer; this only bounds how long a lost wake-up could go unseen.
LOOK_S = 30.0
CLOSE_S = 30.0
# Where cores are short, queries and writes come first: a niceness of 10 is about a tenth of their weight.
NICE = 10


class Rebuilder:
    """Calls `rebuild(stop)` on its own thread whenever it is woken and `due()`.

    rebuild: runs off the lock, looks at `stop` now and then, publishes its result itself
    Thread rule: any thread. The thread starts with the first `wake` and ends with `close`.
    """

    def __init__(
        self,
        due: Callable[[], bool],
        rebuild: Callable[[threading.Event], None],
        name: str = "index-rebuild",
    ) -> None:
        """Nothing runs yet. name: of the thread."""
        self._name = name
        self._due = due
        self._rebuild = rebuild
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._asked = threading.Event()
        self._one_at_a_time = threading.Lock()
        self._thread: threading.Thread | None = None
        self._failed_in_a_row = 0
        self.running = False
        self.done = 0
        self.failed = 0
        self.last_s = 0.0
        self.last_error = ""

    def wake(self) -> None:
        """Look soon whether a rebuild is due. The caller holds the write lock."""
        if self._thread is None and not self._stop.is_set():
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        self._wake.set()

    def ask(self) -> None:
        """Rebuild soon, due or not; one that runs already does not count. The caller holds the write lock."""
        self._asked.set()
        self.wake()

    def now(self) -> bool:
        """Rebuild on the calling thread, due or not; False where it failed (see `last_error`)."""
        with self._one_at_a_time:
            self.running = True
            self._asked.clear()
            begun = time.monotonic()
            try:
                self._rebuild(self._stop)
            except Exception as error:
                self.failed += 1
                self._failed_in_a_row += 1
                self.last_error = f"{type(error).__name__}: {error}"
                log.exception("the index could not be rebuilt; the old graph goes on serving")
                return False
            finally:
                self.running = False
                self.last_s = time.monotonic() - begun
            self.done += 1
            self._failed_in_a_row = 0
            self.last_error = ""
            return True

    def close(self) -> None:
        """Stop; a rebuild in progress is given up at its next look at `stop`."""
        self._stop.set()
        self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(CLOSE_S)

    def _run(self) -> None:
        if sys.platform == "linux":  # elsewhere the niceness is the process's
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        while not self._stop.is_set():
            self._wake.wait(LOOK_S)
            self._wake.clear()
            while not self._stop.is_set() and (self._asked.is_set() or self._due()):
                if not self.now():
                    pause = min(BACKOFF_S_MAX, BACKOFF_S * 2.0 ** (self._failed_in_a_row - 1))
                    self._stop.wait(pause)
