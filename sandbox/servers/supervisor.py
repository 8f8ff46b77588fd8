"""Keep a set of child processes alive, and leave none behind.

    supervisor = Supervisor(Path(".eddyline/logs"))
    supervisor.start(kafka, valkey)      # both at once; returns when both are ready, else LocalServerError
    supervisor.start(worker)
    supervisor.pids()                    # {"kafka": 4711, …}
    supervisor.stop()                    # worker, valkey, kafka; safe to call twice

A child that ends is started again, after a back-off that doubles and is forgotten once the child has been
ready for a while. Children run in process groups of their own, so Ctrl-C in the terminal reaches only the
supervisor, which then stops them in order. If the supervisor itself is killed with -9, the kernel kills its
children (exec_with_parent.py); what *they* started is their business.

Thread rule: every method from any thread. One thread of the supervisor forks, probes and reaps; it ends only
in stop().
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

# A child's first restart comes at once for a human, the later ones do not eat the machine.
BACKOFF_S_FIRST = 0.2
BACKOFF_S_MAX = 10.0
# Ready for so long, and a crash counts as the first one again.
HEALTHY_S = 10.0
# How often ends are looked for: short while somebody waits for a start, else short against a restart.
TICK_S_STARTING = 0.05
TICK_S_READY = 0.2
# So often a child may end before it was ever ready; then the set-up is wrong, and trying on hides it.
FIRST_TRIES = 3
# A log above this is put aside (`.1`, one is kept) when its child starts.
LOG_BYTES_MAX = 8 * 1024 * 1024
LOG_LINES_SHOWN = 8

SHIM = Path(__file__).with_name("exec_with_parent.py")


@dataclass(frozen=True, kw_only=True)
class Child:
    """What to run and how to tell that it works.

    name:            also the log's name, `<log_dir>/<name>.log`
    argv:            the program and its arguments
    ready:           asked every 50 ms until it is True; takes a second at most; an error counts as False
    env:             added to the supervisor's own environment
    cwd:             by default the supervisor's
    ready_timeout_s: not ready after this long: killed; given up at its first start, later like a crash
    stop_signal:     what stop() sends first
    stop_timeout_s:  still there after this long: SIGKILL to its whole process group
    final_codes:     exit codes after which a restart is no use: the child has failed, and `check` says so
    """

    name: str
    argv: Sequence[str]
    ready: Callable[[], bool]
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: Path | None = None
    ready_timeout_s: float = 30.0
    stop_signal: signal.Signals = signal.SIGTERM
    stop_timeout_s: float = 10.0
    final_codes: frozenset[int] = frozenset()


@dataclass
class _Run:
    """One child's present life; changed by the supervisor's thread only, under its lock."""

    child: Child
    state: State = "starting"
    process: subprocess.Popen[bytes] | None = None
    since: float = 0.0
    ends: int = 0  # in a row, without having been ready for HEALTHY_S
    restarts: int = 0
    was_ready: bool = False
    why: str = ""


class Supervisor:
    """Starts children, restarts those that end, stops all in reverse order."""

    def __init__(self, log_dir: Path) -> None:
        """log_dir: is made; every child appends what it prints to `<log_dir>/<name>.log`."""
        self.log_dir = log_dir.absolute()
        self.log_dir.mkdir(parents=True, exist_ok=True)
        self._runs: dict[str, _Run] = {}
        self._changed = threading.Condition()
        self._listeners: list[Callable[[], None]] = []
        self._stopping = False
        self._thread = threading.Thread(target=self._keep, name="supervisor", daemon=True)
        self._thread.start()

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, *children: Child) -> None:
        """Start all at once and return when every one is ready.

        Raises LocalServerError, with the last lines of the log, for a child that was not ready in time or
        ended three times before it was ever ready. The others keep running: call stop().
        """
        with self._changed:
            if self._stopping:
                raise LocalServerError("the supervisor has been stopped")
            for child in children:
                if child.name in self._runs:
                    raise ValueError(f"there is a child {child.name!r} already")
                self._runs[child.name] = _Run(child)
            self._changed.notify_all()
        if not children:
            return
        longest = max(c.ready_timeout_s + BACKOFF_S_MAX for c in children) * FIRST_TRIES
        self.wait(*(child.name for child in children), timeout_s=longest)

    def wait(self, *names: str, timeout_s: float) -> None:
        """Return when the named children are ready (again).

        Raises LocalServerError when one is not in time.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while True:
                runs = [self._runs[name] for name in names]
                for run in runs:
                    if run.state in ("failed", "stopped"):
                        raise LocalServerError(self._told(run, run.why))
                if all(run.state == "ready" for run in runs):
                    return
                left = deadline - time.monotonic()
                if left <= 0:
                    late = next(run for run in runs if run.state != "ready")
                    raise LocalServerError(
                        self._told(late, f"was not ready within {timeout_s:g} s")
                    )
                self._changed.wait(left)

    def check(self) -> None:
        """Raise LocalServerError, with the last lines of its log, where a child has failed for good."""
        with self._changed:
            failed = [run for run in self._runs.values() if run.state == "failed"]
        if failed:
            raise LocalServerError(self._told(failed[0], failed[0].why))

    def pids(self) -> dict[str, int]:
        """Process ids by name, of the children that run now."""
        with self._changed:
            return {
                name: run.process.pid for name, run in self._runs.items() if run.process is not None
            }

    def states(self) -> dict[str, tuple[State, int]]:
        """(state, number of restarts so far) by name."""
        with self._changed:
            return {name: (run.state, run.restarts) for name, run in self._runs.items()}

    def listen(self, callback: Callable[[], None]) -> None:
        """Call back, from the supervisor's thread, whenever a child has become ready or has ended."""
        with self._changed:
            self._listeners.append(callback)

    def log_file(self, name: str) -> Path:
        """Where the child's output goes."""
        return self.log_dir / f"{name}.log"

    def stop(self) -> None:
        """Stop all, the last started first, each within its stop_timeout_s and then by SIGKILL.

        Never raises; may be called twice.
        """
        with self._changed:
            self._stopping = True
            longest = sum(run.child.stop_timeout_s + 5 for run in self._runs.values()) + 5
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(longest)

    # ---- the supervisor's own thread

    def _keep(self) -> None:
        while True:
            with self._changed:
                if self._stopping:
                    break
                waiting = any(run.state in ("starting", "waiting") for run in self._runs.values())
                self._changed.wait(TICK_S_STARTING if waiting else TICK_S_READY)
                runs = [] if self._stopping else list(self._runs.values())
            if any([self._tend(run) for run in runs]):
                self._tell()
        for run in reversed(self._runs.values()):
            self._end(run)

    def _tend(self, run: _Run) -> bool:
        """Take one child one step further; True where listeners should know."""
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
            if _answers(run.child):
                self._set(run, "ready")
                run.was_ready = True
                log.info("child is ready", extra={"child": run.child.name, "pid": run.process.pid})
                return True
            if now - run.since > run.child.ready_timeout_s:
                _kill(run.process)
                late = f"was not ready within {run.child.ready_timeout_s:g} s"
                self._ended(run, late, give_up=not run.was_ready)
                return True
        elif run.ends and now - run.since > HEALTHY_S:
            run.ends = 0
        return False

    def _launch(self, run: _Run) -> None:
        child = run.child
        try:
            with open_log(self.log_file(child.name)) as output:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", str(SHIM), str(os.getpid()), *child.argv],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env={**os.environ, **child.env},
                    cwd=child.cwd,
                    # Out of the terminal's reach, but of our session: where the kernel groups by session
                    # (sched_autogroup), a niced thread gives way to processes of its own session only.
                    process_group=0,
                )
        except OSError as error:
            self._ended(run, f"cannot be started: {error}")
            return
        with self._changed:
            run.process = process
        self._set(run, "starting")

    def _ended(self, run: _Run, why: str, give_up: bool = False) -> None:
        """Note an end and when to try again, or give up: it never was ready, or said that it is no use."""
        run.ends += 1
        backoff_s = min(BACKOFF_S_FIRST * 2 ** (run.ends - 1), BACKOFF_S_MAX)
        with self._changed:
            run.process = None
            run.why = why
        if give_up or (not run.was_ready and run.ends >= FIRST_TRIES):
            self._set(run, "failed")
            return
        log.warning(
            "%s %s and is started again in %.1f s; its log is %s",
            run.child.name,
            why,
            backoff_s,
            self.log_file(run.child.name),
        )
        with self._changed:
            run.restarts += 1
        self._set(run, "waiting", time.monotonic() + backoff_s)

    def _end(self, run: _Run) -> None:
        process = run.process
        if process is not None and process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(run.child.stop_signal)
            try:
                process.wait(run.child.stop_timeout_s)
            except subprocess.TimeoutExpired:
                log.warning("child does not stop, killing it", extra={"child": run.child.name})
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

    def _tell(self) -> None:
        with self._changed:
            listeners = list(self._listeners)
        for listener in listeners:
            try:
                listener()
            except (
                Exception
            ):  # a listener's fault must not end the thread that keeps the children alive
                log.exception("a listener failed")

    def _told(self, run: _Run, why: str) -> str:
        path = self.log_file(run.child.name)
        lines = tail(path, LOG_LINES_SHOWN)
        shown = "\n".join(f"    {line}" for line in lines) or "    (it printed nothing)"
        return f"{run.child.name} {why}. The end of its log, {path}:\n{shown}"


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a text file, [] where there is none; reads 64 KB at most."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 65_536))
            return file.read(65_536).decode(errors="replace").splitlines()[-lines:]
    except FileNotFoundError:
        return []


def open_log(path: Path) -> IO[bytes]:
    """A log to append to; one above LOG_BYTES_MAX is put aside first."""
    if path.exists() and path.stat().st_size > LOG_BYTES_MAX:
        path.replace(path.with_name(path.name + ".1"))
    return path.open("ab", buffering=0)


def _answers(child: Child) -> bool:
    try:
        return child.ready()
    except Exception as error:  # whatever a half-started server answers must not end the supervisor
        log.debug("not ready", extra={"child": child.name, "reason": str(error)})
        return False


def _kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the child's whole group, which it leads, then reap it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)


def _exit_text(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name
