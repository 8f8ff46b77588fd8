"""`eddyline up` and `eddyline down`: the local Kafka and Valkey, run in the background."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from eddyline.errors import LocalServerError, SettingsError
from eddyline.process.discovery import LocalServers, is_held, running, servers_file
from eddyline.settings.loader import Settings
from sandbox.servers import kafka_jars
from sandbox.servers.__main__ import PROCESSES, run
from sandbox.servers.local_servers import log_dir, needed
from sandbox.servers.status import server_status
from sandbox.servers.supervisor import open_log, tail

OWNER = "eddyline up"
# A broker may have to recover a large log after a power cut.
UP_TIMEOUT_S = 240.0
# More than the time that both servers and three processes may take to stop.
DOWN_TIMEOUT_S = 90.0
# A process that was started ends within this time if its settings are wrong.
STEADY_S = 3.0
PROCESSES_TIMEOUT_S = 60.0
POLL_S = 0.05


def up(
    settings: Settings,
    foreground: bool = False,
    *,
    processes: Sequence[str] = (),
    console: Console | None = None,
) -> None:
    """Start the servers that the settings do not name, wait until they answer, print their
    addresses.

    foreground: run them in this process until Ctrl-C; otherwise they run in the background until
                `down`
    processes:  names of `PROCESSES`, which run with the servers and are restarted if they end
    Raises LocalServerError with the step, the reason and what to do, SettingsError.
    """
    console = console or Console()
    for name in processes:
        if name not in PROCESSES:
            raise SettingsError(f"--with {name!r}: expected some of {', '.join(PROCESSES)}")
    if not any(needed(settings)) and not processes:
        console.print("Nothing to start: the settings name Kafka and Redis.")
        show(settings, console)
        return
    if is_held(settings) and (found := _wait_ready(settings, console, None)):
        if lacking := [name for name in processes if name not in found.processes]:
            raise LocalServerError(
                f"`{found.owner}` (pid {found.pid}) is up without {', '.join(lacking)}: stop it, "
                "and start it again (`eddyline down`)"
            )
        console.print(f"Already up (`{found.owner}`, pid {found.pid}).")
        show(settings, console)
        return
    if needed(settings)[0]:
        _fetch(console)
    if foreground:
        run(settings, owner=OWNER, on_step=console.print, processes=processes)
        return
    process = _spawn(settings, processes)
    _wait_ready(settings, console, process)
    _wait_processes(settings, processes)
    show(settings, console)


def down(settings: Settings, *, console: Console | None = None) -> None:
    """Stop the servers that `up` started and wait until they are gone.

    Raises LocalServerError if another command than `eddyline up` runs them, or if they do not stop.
    """
    console = console or Console()
    if not is_held(settings):
        console.print("Nothing is up here.")
        return
    deadline = time.monotonic() + DOWN_TIMEOUT_S
    servers = running(settings)
    # Right after its start the supervisor holds the lock and has no servers.json yet.
    while servers is None and is_held(settings) and time.monotonic() < deadline:
        time.sleep(POLL_S)
        servers = running(settings)
    if servers is not None:
        if servers.owner != OWNER:
            raise LocalServerError(
                f"the servers belong to `{servers.owner}` (pid {servers.pid}); stop that instead"
            )
        os.kill(servers.pid, signal.SIGTERM)
    with console.status("stopping"):
        while is_held(settings):
            if time.monotonic() > deadline:
                pid = servers.pid if servers else "unknown"
                raise LocalServerError(
                    f"stopping: the supervisor (pid {pid}) is still there after {DOWN_TIMEOUT_S:g} "
                    f"s; see {_log(settings)}; `kill -9 {pid}` ends it and its servers, without "
                    "data loss"
                )
            time.sleep(POLL_S)
    console.print("Down. The data are kept.")


def show(settings: Settings, console: Console) -> None:
    """Print version, address and reason of both servers; of local ones also log, pid and data."""
    table = Table(box=None, pad_edge=False)
    for heading in ("server", "address", "why"):
        table.add_column(heading, overflow="fold")
    for row in server_status(settings):
        table.add_row(row.version, row.address, row.why)
    console.print(table)
    local = running(settings)
    if local is None:
        return
    for server in (local.kafka, local.redis):
        if server is not None:
            console.print(
                f"log of {server.version}: {server.log} (pid {server.pid})", soft_wrap=True
            )
    for name, pid in local.processes.items():
        path = log_dir(settings) / f"{name}.log"
        console.print(f"log of {name}: {path} (pid {pid})", soft_wrap=True)
    console.print(f"data: {local.data_dir}", soft_wrap=True)


def _fetch(console: Console) -> None:
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("fetching Apache Kafka's jars", total=None, visible=False)
        kafka_jars.fetch(
            lambda done, total: progress.update(task, completed=done, total=total, visible=True)
        )


def _wait_processes(settings: Settings, names: Sequence[str]) -> None:
    """Return when the processes run, and have not ended at once for a wrong setting."""
    deadline, steady_s = time.monotonic() + PROCESSES_TIMEOUT_S, 0.0
    pids: dict[str, int] = {}
    while names:
        servers = running(settings)
        found = servers.processes if servers else {}
        now = time.monotonic()
        if found != pids or not found.keys() >= set(names):
            pids, steady_s = found, now
        elif now - steady_s > STEADY_S:
            return
        if now > deadline:
            lacking = next((name for name in names if name not in found), names[0])
            path = log_dir(settings) / f"{lacking}.log"
            last = "\n".join(tail(path, 12))
            raise LocalServerError(
                f"{lacking} does not run; `eddyline down` stops the rest. The end of {path}:\n"
                f"{last}"
            )
        time.sleep(POLL_S)


def _spawn(settings: Settings, processes: Sequence[str]) -> subprocess.Popen[bytes]:
    """The supervisor in its own session: neither Ctrl-C nor a closed terminal reaches it."""
    path = _log(settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "EDDYLINE_DATA_DIR": str(Path(settings.data_dir).absolute()),
        "EDDYLINE_KAFKA_BOOTSTRAP_SERVERS": settings.kafka_bootstrap_servers,
        "EDDYLINE_REDIS_URL": settings.redis_url,
    }
    with open_log(path) as output:
        return subprocess.Popen(
            [sys.executable, "-m", "sandbox.servers", "--with", ",".join(processes)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )


def _wait_ready(
    settings: Settings, console: Console, process: subprocess.Popen[bytes] | None
) -> LocalServers | None:
    """Wait for the servers and show each step.

    process: the supervisor that we started; None: another command's. Returns None if that one
             ended.
    """
    deadline = time.monotonic() + UP_TIMEOUT_S
    with console.status("starting") as status:
        while time.monotonic() < deadline:
            ended = process is not None and process.poll() is not None
            servers = running(settings)
            if servers is not None and servers.state == "ready":
                if process is not None:
                    process.returncode = 0  # it outlives us on purpose: without this Popen warns
                return servers
            # Held although ours ended: another `up` was faster, and its servers will do.
            if ended and not is_held(settings):
                last = "\n".join(tail(_log(settings), 12))
                raise LocalServerError(
                    f"starting the local servers failed. The end of {_log(settings)}:\n{last}"
                )
            if process is None and not is_held(settings):
                return None
            status.update(servers.step if servers and servers.step else "starting")
            time.sleep(POLL_S)
    raise LocalServerError(
        f"starting: the servers were not ready within {UP_TIMEOUT_S:g} s; see {_log(settings)} and "
        f"{servers_file(settings)}; `eddyline down` stops the attempt"
    )


def _log(settings: Settings) -> Path:
    return log_dir(settings) / "supervisor.log"
