"""The thread that builds segments in the background, and the outcomes of its builds."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

log = logging.getLogger(__name__)

# Pause after a failed build, doubled up to the maximum: a lasting cause (no memory) must not take
# a core.
BACKOFF_S = 1.0
BACKOFF_S_MAX = 60.0
# The writer wakes the thread; this bounds how long a lost wake-up goes unnoticed.
POLL_S = 30.0
CLOSE_S = 30.0
# Queries and writes come first on busy cores: niceness 10 has about a tenth of their weight.
NICE = 10
_T = TypeVar("_T")


def run_niced(call: Callable[[], _T]) -> _T:
    """The result of the call, made in a thread of low priority that has ended on return.

    For the graph's construction alone: a thread of low priority that holds the write lock or the
    interpreter lock makes every other thread wait for the cores that it does not get.
    """
    found: list[_T] = []
    errors: list[BaseException] = []

    def run() -> None:
        if sys.platform == "linux":  # elsewhere niceness belongs to the process
            thread_id = threading.get_native_id()
            # Relative: a process of a lower priority must not raise it.
            nice = min(19, os.getpriority(os.PRIO_PROCESS, thread_id) + NICE)
            os.setpriority(os.PRIO_PROCESS, thread_id, nice)
        try:
            found.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name=f"{threading.current_thread().name}-niced")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return found[0]


class Rebuilder:
    """Calls `rebuild(stop)` on its own thread when woken, for as long as `due()`.

    rebuild: runs without the write lock, checks `stop` regularly, publishes its result itself
    Thread rule: any thread. The first `wake` starts the thread, `close` ends it.
    """

    def __init__(
        self,
        due: Callable[[], bool],
        rebuild: Callable[[threading.Event], None],
        name: str = "index-rebuild",
    ) -> None:
        """name: of the thread, which does not run yet."""
        self._name = name
        self._due = due
        self._rebuild = rebuild
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._requested = threading.Event()
        self._one_at_a_time = threading.Lock()
        self._thread: threading.Thread | None = None
        self._failed_in_a_row = 0
        self.running = False
        self.done = 0
        self.failed = 0
        self.last_s = 0.0
        self.last_error = ""

    def wake(self) -> None:
        """Check soon whether a rebuild is due. The caller holds the write lock."""
        if self._thread is None and not self._stop.is_set():
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        self._wake.set()

    def request(self) -> None:
        """Rebuild soon, due or not, even if a rebuild runs. The caller holds the write lock."""
        self._requested.set()
        self.wake()

    def run_now(self) -> bool:
        """Rebuild on the calling thread, due or not; False on failure (see `last_error`)."""
        with self._one_at_a_time:
            self.running = True
            self._requested.clear()
            started = time.monotonic()
            try:
                self._rebuild(self._stop)
            except Exception as error:
                self.failed += 1
                self._failed_in_a_row += 1
                self.last_error = f"{type(error).__name__}: {error}"
                log.exception("building an index segment failed; the old segments go on serving")
                return False
            finally:
                self.running = False
                self.last_s = time.monotonic() - started
            self.done += 1
            self._failed_in_a_row = 0
            self.last_error = ""
            return True

    def close(self) -> None:
        """Stop; a running rebuild ends at its next check of `stop`."""
        self._stop.set()
        self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.wait(POLL_S)
            self._wake.clear()
            while not self._stop.is_set() and (self._requested.is_set() or self._due()):
                if not self.run_now():
                    pause = min(BACKOFF_S_MAX, BACKOFF_S * 2.0 ** (self._failed_in_a_row - 1))
                    self._stop.wait(pause)
