"""Worker processes forked from a keeper that has loaded the index, so that they share its memory.

The keeper opens the index and forks the workers, which scan it exactly at first. Then it builds the
graph and replaces the workers one by one with workers that share the graph copy-on-write. A worker
that rebuilds has its own graph from then on; so the keeper opens the newest snapshot, builds and
replaces again every `worker_renew_s`. A forked process asks Kafka what to open and waits for it: a
failed connection leaves a thread behind, with which the keeper could not fork. A failed renewal is
logged and tried again, and the workers go on serving.
All workers listen on one port; the kernel spreads connections. The keeper has no other thread and
no gRPC: a fork copies memory, but only the thread that forks.
"""

from __future__ import annotations

import gc
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NoReturn, Protocol, TypeVar

from eddyline.errors import EddylineError, SettingsError
from eddyline.process import lifecycle
from eddyline.process.retry import Backoff, Stopped
from eddyline.settings.loader import Settings

log = logging.getLogger(__name__)
_T = TypeVar("_T")

POLL_S = 0.1
# First pause before a worker that ended is replaced; doubles up to `backoff_ms_max`.
BACKOFF_S = 0.1
# After this run time a worker ended for a new reason: the pauses start again.
SETTLED_S = 60.0
# A worker reads the topic to its end before it serves; the keeper gives up on a slower one.
READY_S = 120.0
# After SIGTERM running calls end within seconds, and the last snapshot is written.
END_S = 40.0
TERM_AGAIN_S = 1.0
ONE_THREAD_S = 1.0
# First pause before a failed renewal is tried again; doubles up to RENEW_AGAIN_S_MAX.
RENEW_AGAIN_S, RENEW_AGAIN_S_MAX = 1.0, 300.0
# The check of a renewal waits for Kafka this long; then it starts anew.
CHECK_S = 600.0
# Exit codes that a restart does not heal.
FINAL = (2, 3)
# Exit code of a worker that cannot go on with what the keeper holds: it has to open anew.
RENEW = 4


@dataclass
class Child:
    """A forked process. ready: the reading end of a pipe; a worker writes to it once it serves."""

    pid: int
    ready: int
    since: float
    code: int | None = None
    # Whether it has reported that it serves.
    serves: bool = False

    def ended(self) -> int | None:
        """The exit code, minus the signal's number if a signal ended it; None while it runs."""
        if self.code is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                self.code = os.waitstatus_to_exitcode(status)
                os.close(self.ready)
        return self.code

    def terminate(self) -> None:
        """Send SIGTERM."""
        if self.ended() is None:
            os.kill(self.pid, signal.SIGTERM)

    def wait_ready(self, timeout_s: float) -> bool:
        """Whether it serves; False after the time-out, and at once if it ended before."""
        readable = not self.serves and self.code is None
        if readable and select.select([self.ready], [], [], timeout_s)[0]:
            self.serves = os.read(self.ready, 1) != b""  # empty: it ended
        return self.serves

    def end(self, deadline: float | None = None) -> None:
        """Terminate it and wait; kill it at the deadline (monotonic; default: in `END_S`)."""
        deadline, again_at = deadline or time.monotonic() + END_S, 0.0
        while self.ended() is None:
            if time.monotonic() >= again_at:
                # More than once: Python drops a signal that comes while the child is being forked.
                self.terminate()
                again_at = time.monotonic() + TERM_AGAIN_S
            if time.monotonic() > deadline:
                log.warning(
                    "a worker process did not end in time and was killed", extra={"pid": self.pid}
                )
                os.kill(self.pid, signal.SIGKILL)
                deadline = time.monotonic() + END_S
            time.sleep(POLL_S / 10)


class ForkedWork(Protocol[_T]):
    """What the keeper and its forked workers do."""

    def check(self) -> bytes:
        """What `open` needs to know from servers; waits for them. Runs in a fork of its own."""

    def open(self, checked: bytes) -> _T:
        """What the workers share, without a graph. Runs in the keeper; starts no thread.

        checked: the result of `check`
        """

    def build(self, shared: _T) -> bool | None:
        """Build the graph of it in the keeper; False on failure, None if there is none to build."""

    def serve(self, shared: _T, place: int, ready: Callable[[], None], *, may_build: bool) -> int:
        """Serve in a fork, call `ready` once it does. Returns the exit code.

        may_build: False while the keeper's graph is still to come; the worker builds none itself
        """


class Prefork(Generic[_T]):
    """The keeper of a worker's processes, each at its place, 0 … `worker_processes` - 1.

    Every `worker_renew_s` it opens and builds again what they share.
    Thread rule: the main thread of a process without other threads.
    """

    def __init__(self, settings: Settings, work: ForkedWork[_T], stop: threading.Event) -> None:
        """Raises SettingsError on a platform other than Linux."""
        processes = settings.worker_processes
        if sys.platform != "linux":
            raise SettingsError(f"worker_processes = {processes}: above 1 it needs Linux")
        self._work, self._stop = work, stop
        self._renew_s = settings.worker_renew_s
        self._due = dict.fromkeys(range(processes), 0.0)  # place -> when a worker may start there
        self._backoff = [
            Backoff(BACKOFF_S, settings.backoff_ms_max / 1000) for _ in range(processes)
        ]
        self._children: dict[int, Child] = {}
        self._check: Child | None = None
        self._may_build = False
        self._outdated = False
        self._code = 0

    def run(self) -> int:
        """Keep the workers running until `stop`, or until one ends with a code of `FINAL` and no
        other serves.

        Returns the exit code.
        """
        try:
            checked = self._checked_first()
            if checked is not None:
                self._keep(self._work.open(checked))
            return self._code
        except Stopped:
            return self._code
        finally:
            children = [*self._children.values(), *([self._check] if self._check else [])]
            for child in children:
                child.terminate()
            deadline = time.monotonic() + END_S
            for child in children:
                child.end(deadline)

    def _keep(self, held: _T) -> None:
        renew_at = time.monotonic() + self._renew_s
        again = Backoff(RENEW_AGAIN_S, RENEW_AGAIN_S_MAX)
        while self._keep_running():
            self._fill(held)
            if not self._may_build:
                built = self._work.build(held)
                self._may_build = True
                if built is False:
                    log.warning("the keeper could not build the graph; each worker builds its own")
                if built is not None:
                    self._replace_all(held)
            elif self._outdated or time.monotonic() >= renew_at:
                renewed = self._renewed()
                if renewed is not None:
                    held = renewed
                    self._work.build(held)
                    self._outdated = False
                    self._replace_all(held)
                    again.reset()
                    renew_at = time.monotonic() + self._renew_s
                elif self._check is None:
                    self._outdated = False  # until a worker says so again
                    renew_at = time.monotonic() + again.next_s()
            self._stop.wait(POLL_S)

    def _checked_first(self) -> bytes | None:
        """The result of the first check; None after a stop, or if it failed (`_code`)."""
        while not self._stop.is_set():
            checked, code = self._poll_check()
            if checked is not None or code:
                self._code = code
                return checked
            self._stop.wait(POLL_S)
        return None

    def _renewed(self) -> _T | None:
        """What the workers share next; None while the check runs, and if the renewal failed."""
        checked, code = self._poll_check()
        if code:
            what = {"exit_code": code}
            log.warning("the workers are not renewed: the check failed; they go on", extra=what)
        if checked is None:
            return None
        try:
            return self._work.open(checked)
        except (EddylineError, OSError, ValueError, MemoryError) as error:
            log.warning(
                "the workers are not renewed; they go on",
                extra={"reason": f"{type(error).__name__}: {error}"},
            )
            return None

    def _poll_check(self) -> tuple[bytes | None, int]:
        """(the result of the check once it has one, its exit code if it failed, else 0)."""
        if self._check is None:
            self._check = self._fork(self._run_check)
        check = self._check
        if not select.select([check.ready], [], [], 0)[0]:
            if time.monotonic() - check.since > CHECK_S:
                log.warning("the check of what to open does not end and starts anew")
                check.end()
                self._check = None
            return None, 0
        found = b"".join(iter(lambda: os.read(check.ready, 65_536), b""))
        self._check = None
        check.end()
        return (found, 0) if found else (None, check.code or 1)

    def _run_check(self, pipe: int) -> int:
        try:
            os.write(pipe, self._work.check())
        except Stopped:
            return 1
        except EddylineError as error:
            log.error(str(error))
            return lifecycle.exit_code(error)
        return 0

    def _keep_running(self) -> bool:
        """Note which workers ended. False if the keeper has to end."""
        for place, child in list(self._children.items()):
            code = child.ended()
            if code is None:
                continue
            del self._children[place]
            self._outdated |= code == RENEW
            if code in FINAL and not any(c.wait_ready(0) for c in self._children.values()):
                self._code = code
                continue
            if time.monotonic() - child.since > SETTLED_S:
                self._backoff[place].reset()
            pause_s = self._backoff[place].next_s()
            self._due[place] = time.monotonic() + pause_s
            if not self._stop.is_set():
                what = {"pid": child.pid, "exit_code": code, "again_in_s": round(pause_s, 2)}
                log.warning("a worker process ended; another takes its place", extra=what)
        # `_code` stays set: seen during a replacement, it ends that and the keeper.
        return not self._code and not self._stop.is_set()

    def _fill(self, held: _T) -> None:
        """Start a worker at every place that has none and is due."""
        for place, at in list(self._due.items()):
            if time.monotonic() >= at:
                del self._due[place]
                self._children[place] = self._fork_worker(held, place)

    def _replace_all(self, held: _T) -> None:
        """Replace worker by worker; the old one ends once the new one serves."""
        for place in list(self._children):
            if not self._keep_running() or place not in self._children:
                continue
            new, old = self._fork_worker(held, place), self._children[place]
            if self._wait_ready(new):
                self._children[place] = new
                old.end()
            else:
                log.warning(
                    "a new worker process is not ready; the old one stays", extra={"pid": new.pid}
                )
                new.end()

    def _wait_ready(self, child: Child) -> bool:
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline and not self._stop.is_set():
            if child.wait_ready(POLL_S):
                return True
            if child.ended() is not None:
                return False
        return False

    def _fork_worker(self, held: _T, place: int) -> Child:
        may_build = self._may_build
        return self._fork(
            lambda pipe: self._work.serve(
                held, place, lambda: _report_ready(pipe), may_build=may_build
            )
        )

    def _fork(self, main: Callable[[int], int]) -> Child:
        """main: called in the fork with the writing end of the pipe; returns the exit code."""
        _require_one_thread()
        reading, writing = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        # Otherwise a worker's first garbage collection writes to every object and copies its page.
        gc.freeze()
        keeper, pid = os.getpid(), os.fork()
        if pid:
            os.close(writing)
            return Child(pid, reading, time.monotonic())
        os.close(reading)
        self._be_child(main, writing, keeper)

    def _be_child(self, main: Callable[[int], int], writing: int, keeper: int) -> NoReturn:
        code = 1
        try:
            # The inherited handlers belong to the keeper.
            lifecycle.stop_on_signals(self._stop)
            threading.Thread(
                target=self._stop_with_keeper, args=(keeper,), name="keeper", daemon=True
            ).start()
            code = main(writing)
        except BaseException:
            log.exception("a forked process failed")
        finally:
            logging.shutdown()
            sys.stdout.flush()
            os._exit(code)

    def _stop_with_keeper(self, keeper: int) -> None:
        """Stop if the keeper was killed."""
        while os.getppid() == keeper and not self._stop.wait(1.0):
            pass
        self._stop.set()


def _report_ready(pipe: int) -> None:
    os.write(pipe, b"1")


def _require_one_thread() -> None:
    """Raise RuntimeError if there are other threads: a fork copies their locks, but not them."""
    deadline = time.monotonic() + ONE_THREAD_S
    # The kernel may list a joined thread for a moment.
    while (
        tasks := len(list(Path("/proc/self/task").iterdir()))
    ) > 1 and time.monotonic() < deadline:
        time.sleep(0.001)
    if tasks > 1:
        named = ", ".join(thread.name for thread in threading.enumerate()[1:]) or "of a library"
        raise RuntimeError(f"the keeper of forked workers has {tasks - 1} other threads: {named}")
