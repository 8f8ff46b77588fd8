"""Run child processes: restart those that end, and leave none behind.

    supervisor = Supervisor(Path(".eddyline/logs"))
    supervisor.start(kafka, valkey)  # returns when both are ready, else LocalServerError
    supervisor.start(worker)
    supervisor.pids()  # {"kafka": 4711, …}
    supervisor.stop()  # worker, valkey, kafka; safe to call twice

A child that ends is restarted after a back-off that doubles, and starts over once the child has
been ready for a while. Children run in process groups of their own, so Ctrl-C in the terminal
reaches only the supervisor, which then stops them in order. If the supervisor itself is killed with
-9, the kernel kills its children (exec_with_parent.py), but not the children's own children.

Thread rule: every method from any thread. One thread of the supervisor forks, checks and reaps; it
ends only in stop().
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from eddyline.errors import LocalServerError

log = logging.getLogger(__name__)

State = Literal["starting", "ready", "waiting", "failed", "stopped"]

# The first restart is at once for a person; later ones leave the machine idle.
BACKOFF_S_FIRST = 0.2
BACKOFF_S_MAX = 10.0
# Ready for this long: the next crash counts as the first one again.
HEALTHY_S = 10.0
# How often children are checked: short while a start is awaited, else short against a restart.
TICK_S_STARTING = 0.05
TICK_S_READY = 0.2
# Ends before a child was ever ready: after this many the set-up is wrong, and retries would hide
# it.
FIRST_TRIES = 3
# A larger log is renamed (`.1`, one is kept) when its child starts.
LOG_BYTES_MAX = 8 * 1024 * 1024
LOG_LINES_SHOWN = 8

SHIM = Path(__file__).with_name("exec_with_parent.py")


@dataclass(frozen=True, kw_only=True)
class Child:
    """A program to run, and the check that says whether it is ready.

    name:            also the log's name, `<log_dir>/<name>.log`
    argv:            the program and its arguments
    ready:           called every 50 ms until True; takes a second at most; an error counts as False
    env:             added to the supervisor's own environment
    cwd:             default: the supervisor's
    user:            (user id, group id) to run as; only root can. None: the supervisor's own
    ready_timeout_s: a child that is not ready by then is killed; at its first start it has failed,
                     later it counts as a crash
    stop_signal:     the first signal of stop()
    stop_timeout_s:  after this time its whole process group gets SIGKILL
    final_codes:     exit codes that no restart heals: the child has failed, and `check` raises
    """

    name: str
    argv: Sequence[str]
    ready: Callable[[], bool]
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: Path | None = None
    user: tuple[int, int] | None = None
    ready_timeout_s: float = 30.0
    stop_signal: signal.Signals = signal.SIGTERM
    stop_timeout_s: float = 10.0
    final_codes: frozenset[int] = frozenset()


@dataclass
class _Run:
    """A child's present state; only the supervisor's thread changes it, under the lock."""

    child: Child
    state: State = "starting"
    process: subprocess.Popen[bytes] | None = None
    since: float = 0.0
    ends_in_a_row: int = 0  # without having been ready for HEALTHY_S
    restarts: int = 0
    was_ready: bool = False
    why: str = ""


class Supervisor:
    """Starts children, restarts those that end, and stops all in reverse order."""

    def __init__(self, log_dir: Path) -> None:
        """log_dir: created here; every child appends its output to `<log_dir>/<name>.log`."""
        self.log_dir = log_dir.absolute()
        self.log_dir.mkdir(parents=True, exist_ok=True)
        self._runs: dict[str, _Run] = {}
        self._changed = threading.Condition()
        self._listeners: list[Callable[[], None]] = []
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)
        self._thread.start()

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, *children: Child) -> None:
        """Start all at once and return when all are ready.

        Raises LocalServerError, with the last lines of the log, for a child that was not ready in
        time or ended three times before it was ever ready. The others keep running: call stop().
        """
        with self._changed:
            if self._stopping:
                raise LocalServerError("the supervisor has been stopped")
            for child in children:
                if child.name in self._runs:
                    raise ValueError(f"a child {child.name!r} exists already")
                self._runs[child.name] = _Run(child)
            self._changed.notify_all()
        if not children:
            return
        longest = max(c.ready_timeout_s + BACKOFF_S_MAX for c in children) * FIRST_TRIES
        self.wait(*(child.name for child in children), timeout_s=longest)

    def wait(self, *names: str, timeout_s: float) -> None:
        """Return when the named children are ready (again).

        Raises LocalServerError if one is late.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while True:
                runs = [self._runs[name] for name in names]
                for run in runs:
                    if run.state in ("failed", "stopped"):
                        raise LocalServerError(self._failure(run, run.why))
                if all(run.state == "ready" for run in runs):
                    return
                left = deadline - time.monotonic()
                if left <= 0:
                    late = next(run for run in runs if run.state != "ready")
                    raise LocalServerError(
                        self._failure(late, f"was not ready within {timeout_s:g} s")
                    )
                self._changed.wait(left)

    def check(self) -> None:
        """Raise LocalServerError, with the end of the log, if a child has failed for good."""
        with self._changed:
            failed = [run for run in self._runs.values() if run.state == "failed"]
        if failed:
            raise LocalServerError(self._failure(failed[0], failed[0].why))

    def pids(self) -> dict[str, int]:
        """Process ids of the running children, by name."""
        with self._changed:
            return {
                name: run.process.pid for name, run in self._runs.items() if run.process is not None
            }

    def states(self) -> dict[str, tuple[State, int]]:
        """(state, restarts so far) by name."""
        with self._changed:
            return {name: (run.state, run.restarts) for name, run in self._runs.items()}

    def listen(self, callback: Callable[[], None]) -> None:
        """Call `callback`, in the supervisor's thread, when a child becomes ready or ends."""
        with self._changed:
            self._listeners.append(callback)

    def log_file(self, name: str) -> Path:
        """The file of the child's output."""
        return self.log_dir / f"{name}.log"

    def stop(self) -> None:
        """Stop all, the last started first; after its stop_timeout_s a child gets SIGKILL.

        Never raises; safe to call twice.
        """
        with self._changed:
            self._stopping = True
            longest = sum(run.child.stop_timeout_s + 5 for run in self._runs.values()) + 5
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(longest)

    # ---- the supervisor's own thread

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._stopping:
                    break
                waiting = any(run.state in ("starting", "waiting") for run in self._runs.values())
                self._changed.wait(TICK_S_STARTING if waiting else TICK_S_READY)
                runs = [] if self._stopping else list(self._runs.values())
            if any([self._step(run) for run in runs]):
                self._notify_listeners()
        for run in reversed(self._runs.values()):
            self._stop_child(run)

    def _step(self, run: _Run) -> bool:
        """Check one child and act on its state; True if it became ready or ended."""
        now = time.monotonic()
        if run.state == "failed":
            return False
        if run.process is None:
            if now >= run.since:
                self._launch(run)
            return False
        code = run.process.poll()
        if code is not None:
            final = code in run.child.final_codes
            self._ended(run, f"ended with {_exit_text(code)}", give_up=final)
            return True
        if run.state == "starting":
            if _is_ready(run.child):
                self._set(run, "ready")
                run.was_ready = True
                log.info("child is ready", extra={"child": run.child.name, "pid": run.process.pid})
                return True
            if now - run.since > run.child.ready_timeout_s:
                _kill(run.process)
                late = f"was not ready within {run.child.ready_timeout_s:g} s"
                self._ended(run, late, give_up=not run.was_ready)
                return True
        elif run.ends_in_a_row and now - run.since > HEALTHY_S:
            run.ends_in_a_row = 0
        return False

    def _launch(self, run: _Run) -> None:
        child = run.child
        user = ["--user", f"{child.user[0]}:{child.user[1]}"] if child.user else []
        try:
            with open_log(self.log_file(child.name)) as output:
                process = subprocess.Popen(
                    [
                        *(sys.executable, "-I", "-S", str(SHIM), str(os.getpid())),
                        *user,
                        *child.argv,
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env={**os.environ, **child.env},
                    cwd=child.cwd,
                    # Out of the terminal's reach, but in our session: if the kernel schedules by
                    # session (sched_autogroup), a niced thread yields only within its own session.
                    process_group=0,
                )
        except OSError as error:
            self._ended(run, f"cannot be started: {error}")
            return
        with self._changed:
            run.process = process
        self._set(run, "starting")

    def _ended(self, run: _Run, why: str, give_up: bool = False) -> None:
        """Schedule a restart; give up a child that never was ready or had a final exit code."""
        run.ends_in_a_row += 1
        backoff_s = min(BACKOFF_S_FIRST * 2 ** (run.ends_in_a_row - 1), BACKOFF_S_MAX)
        with self._changed:
            run.process = None
            run.why = why
        if give_up or (not run.was_ready and run.ends_in_a_row >= FIRST_TRIES):
            self._set(run, "failed")
            return
        log.warning(
            "%s %s and is restarted in %.1f s; its log is %s",
            run.child.name,
            why,
            backoff_s,
            self.log_file(run.child.name),
        )
        with self._changed:
            run.restarts += 1
        self._set(run, "waiting", time.monotonic() + backoff_s)

    def _stop_child(self, run: _Run) -> None:
        process = run.process
        if process is not None and process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(run.child.stop_signal)
            try:
                process.wait(run.child.stop_timeout_s)
            except subprocess.TimeoutExpired:
                log.warning("child does not stop and is killed", extra={"child": run.child.name})
                _kill(process)
        with self._changed:
            run.process = None
        run.why = "was stopped"
        self._set(run, "stopped")

    def _set(self, run: _Run, state: State, since: float | None = None) -> None:
        with self._changed:
            run.state = state
            run.since = time.monotonic() if since is None else since
            self._changed.notify_all()

    def _notify_listeners(self) -> None:
        with self._changed:
            listeners = list(self._listeners)
        for listener in listeners:
            try:
                listener()
            except Exception:  # must not end the thread that keeps the children running
                log.exception("a listener failed")

    def _failure(self, run: _Run, why: str) -> str:
        path = self.log_file(run.child.name)
        lines = tail(path, LOG_LINES_SHOWN)
        shown = "\n".join(f"    {line}" for line in lines) or "    (it printed nothing)"
        return f"{run.child.name} {why}. The end of its log, {path}:\n{shown}"


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a text file, [] if there is none; reads 64 KB at most."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 65_536))
            return file.read(65_536).decode(errors="replace").splitlines()[-lines:]
    except FileNotFoundError:
        return []


def open_log(path: Path) -> IO[bytes]:
    """A log to append to; one above LOG_BYTES_MAX is renamed first."""
    if path.exists() and path.stat().st_size > LOG_BYTES_MAX:
        path.replace(path.with_name(path.name + ".1"))
    return path.open("ab", buffering=0)


def _is_ready(child: Child) -> bool:
    try:
        return child.ready()
    except Exception as error:  # of any kind: the server is only half started
        log.debug("not ready", extra={"child": child.name, "reason": str(error)})
        return False


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Send SIGKILL to the child's process group, then reap the child."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)


def _exit_text(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name
