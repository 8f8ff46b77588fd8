"""Worker processes forked from a keeper that has loaded the index, so that they share its memory.

The keeper opens the index and forks the workers, which scan it exactly at first. Then it builds the
graph and replaces the workers one by one with workers that share the graph copy-on-write. A worker
that rebuilds has its own graph from then on; so the keeper opens the newest snapshot, builds and
replaces again every `worker_renew_s`. All workers listen on one port; the kernel spreads
connections. The keeper has no other thread and no gRPC: a fork copies memory, but only the thread
that forks.
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

from eddyline.errors import SettingsError
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
# As a rebuild in a worker: if cores are short, queries come first.
NICE = 10
# Exit codes that a restart does not heal.
FINAL = (2, 3)


@dataclass
class Child:
    """A forked worker. ready: the reading end of a pipe; the worker writes to it once it serves."""

    pid: int
    ready: int
    since: float
    code: int | None = None

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

    def end(self) -> None:
        """Terminate it and wait; kill it if that takes too long."""
        deadline, again_at = time.monotonic() + END_S, 0.0
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

    def open(self) -> _T:
        """What the workers share, without a graph. Runs in the keeper; starts no thread."""

    def build(self, shared: _T) -> bool:
        """Build the graph of it in the keeper; False if there is none to build."""

    def serve(self, shared: _T, place: int, ready: Callable[[], None]) -> int:
        """Serve in a fork, call `ready` once it does. Returns the exit code."""


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
        self._code = 0

    def run(self) -> int:
        """Keep the workers running until `stop`, or until one ends with a code of `FINAL`.

        Returns the exit code.
        """
        try:
            held, since, shared = self._work.open(), time.monotonic(), False
            while self._keep_running():
                self._fill(held)
                if not shared:
                    shared = True
                    if self._work.build(held):
                        self._replace_all(held)
                elif time.monotonic() - since > self._renew_s:
                    held, since = self._work.open(), time.monotonic()
                    self._work.build(held)
                    self._replace_all(held)
                self._stop.wait(POLL_S)
            return self._code
        except Stopped:
            return self._code
        finally:
            for child in self._children.values():
                child.terminate()
            for child in self._children.values():
                child.end()

    def _keep_running(self) -> bool:
        """Note which workers ended. False if the keeper has to end."""
        for place, child in list(self._children.items()):
            code = child.ended()
            if code is None:
                continue
            del self._children[place]
            if code in FINAL:
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
                self._children[place] = self._fork(held, place)

    def _replace_all(self, held: _T) -> None:
        """Replace worker by worker; the old one ends once the new one serves."""
        for place in list(self._children):
            if not self._keep_running() or place not in self._children:
                continue
            new, old = self._fork(held, place), self._children[place]
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
            if select.select([child.ready], [], [], POLL_S)[0]:
                return os.read(child.ready, 1) != b""  # empty: the worker ended
        return False

    def _fork(self, held: _T, place: int) -> Child:
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
        self._be_child(held, place, writing, keeper)

    def _be_child(self, held: _T, place: int, writing: int, keeper: int) -> NoReturn:
        code = 1
        try:
            # The inherited handlers belong to the keeper.
            lifecycle.stop_on_signals(self._stop)
            threading.Thread(
                target=self._stop_with_keeper, args=(keeper,), name="keeper", daemon=True
            ).start()
            code = self._work.serve(held, place, lambda: _report_ready(writing))
        except BaseException:
            log.exception("a worker process failed")
        finally:
            logging.shutdown()
            sys.stdout.flush()
            os._exit(code)

    def _stop_with_keeper(self, keeper: int) -> None:
        """Stop if the keeper was killed."""
        while os.getppid() == keeper and not self._stop.wait(1.0):
            pass
        self._stop.set()


def run_niced(call: Callable[[], bool]) -> bool:
    """The result of the call, made in a thread of low priority that has ended on return."""
    found = False

    def run() -> None:
        nonlocal found
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        found = call()

    thread = threading.Thread(target=run, name="keeper-build")
    thread.start()
    thread.join()
    return found


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
