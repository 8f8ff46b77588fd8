"""The supervisor of the local servers as a process; `eddyline up` starts it.

    python -m sandbox.servers              run Kafka and Valkey until SIGTERM or SIGINT
    python -m sandbox.servers --with ingest,worker   run these processes, too
    python -m sandbox.servers --fetch      only download Apache Kafka's jars (a step of the set-up)
    python -m sandbox.servers --lock       rewrite kafka.lock and connect.lock

Exit code 0 after a clean stop, 1 with one sentence on stderr otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from eddyline.errors import EddylineError, LocalServerError
from eddyline.process.discovery import run_dir
from eddyline.process.logs import configure
from eddyline.settings.loader import Settings, load
from sandbox.processes import Deployment
from sandbox.servers import kafka_jars
from sandbox.servers.local_servers import local_servers, log_dir
from sandbox.servers.supervisor import Supervisor

log = logging.getLogger("sandbox.servers")

# Eddyline's own processes that can run with the servers, and their modules.
PROCESSES = {
    "ingest": "streams",
    "worker": "serving",
    "archive": "streams.archive",
    "judge": "evaluation.judge",
}
# How often the supervisor checks whether its data folder was deleted, and then stops.
WATCH_S = 1.0


def run(
    settings: Settings,
    *,
    on_step: Callable[[str], None],
    owner: str = "eddyline up",
    processes: Sequence[str] = (),
) -> None:
    """Run the servers that the settings do not name until SIGTERM or SIGINT.

    Also ends when the data folder is deleted. Thread rule: the main thread.
    on_step:   called before every step of the start, and once with "ready"
    processes: names of `PROCESSES` to run as well; one that fails for good does not end the others
    Raises LocalServerError.
    """
    stop = threading.Event()
    up = threading.Event()
    with (
        contextlib.suppress(_Stopped),
        _signals(stop, up),
        Supervisor(log_dir(settings)) as supervisor,
        local_servers(settings, supervisor, owner=owner, on_step=on_step) as made,
    ):
        deployment = Deployment(made, supervisor)
        supervisor.start(
            *(deployment.child(name, PROCESSES[name], lambda: True) for name in processes)
        )
        up.set()
        on_step("ready")
        lock = run_dir(settings) / "lock"
        inode = _inode(lock)  # 0: the folder is gone already
        failed = ""
        while inode and not stop.wait(WATCH_S) and _inode(lock) == inode:
            try:
                supervisor.check()
            except LocalServerError as error:
                if str(error) != failed:
                    failed = str(error)
                    log.error(failed)


class _Stopped(BaseException):
    """A signal came during the start: unwind it, so that started servers are stopped in order."""


@contextlib.contextmanager
def _signals(stop: threading.Event, up: threading.Event) -> Iterator[None]:
    def on_signal(_number: int, _frame: FrameType | None) -> None:
        first = not stop.is_set()
        stop.set()
        # Once up, the loop sees the event; a second signal must not interrupt the orderly stop.
        if first and not up.is_set():
            raise _Stopped

    before = {
        number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return 0


def _fetch(out: IO[str]) -> None:
    def progress(done: int, total: int) -> None:
        end = "\n" if done == total else ""
        if out.isatty():
            out.write(f"\rApache Kafka {kafka_jars.VERSION}: {done} of {total} jars{end}")
        elif end:
            out.write(f"Apache Kafka {kafka_jars.VERSION}: {total} jars{end}")
        out.flush()

    kafka_jars.fetch(progress)


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m sandbox.servers", description=__doc__.split("\n", 1)[0]
    )
    parser.add_argument("--with", dest="processes", default="", help="run these, too: a,b")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--fetch", action="store_true", help="only download Apache Kafka's jars")
    choice.add_argument("--lock", action="store_true", help="rewrite both lock files")
    arguments = parser.parse_args()
    try:
        settings = load()
        configure(settings, "local")
        if arguments.fetch:
            _fetch(sys.stderr)
        elif arguments.lock:
            kafka_jars.write_locks()
        else:
            names = [name for name in arguments.processes.split(",") if name]
            run(settings, on_step=log.info, processes=names)
    except EddylineError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
