"""Heartbeats of processes without a port: a file that the process touches as it works.

Such a process (ingest, archive) calls `beat` from its main loop: a loop that hangs stops beating.
`python -m eddyline.process.heartbeat ingest` exits with 0 if a heartbeat of this kind of process is
fresh, else with 1 and a sentence. It is the health check of docker-compose.yml.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from eddyline.settings.loader import Settings, load

# A process beats every two seconds, or later if a call to Redis fails slowly.
FRESH_S = 30.0
# The next process that starts to beat removes files older than this.
FORGOTTEN_S = 3_600.0


def beat(settings: Settings, process: str) -> None:
    """Show that this process is alive; call it every second or two. Takes about 20 µs.

    process: its kind, such as "ingest"; the file is `run/<process>-<pid>.alive` in `data_dir`
    """
    path = _folder(settings) / f"{process}-{os.getpid()}.alive"
    try:
        os.utime(path)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_old(path.parent)
        path.touch()


def end(settings: Settings, process: str) -> None:
    """Remove this process' heartbeat, after an orderly stop."""
    (_folder(settings) / f"{process}-{os.getpid()}.alive").unlink(missing_ok=True)


def last_beat_s(settings: Settings, process: str) -> float | None:
    """Seconds since the last heartbeat of this kind of process, on this machine; None without."""
    files = _folder(settings).glob(f"{process}-*.alive")
    times = [time_s for path in files if (time_s := _modified_s(path))]
    return max(0.0, time.time() - max(times)) if times else None


def main(arguments: list[str]) -> int:
    """Check one kind of process; the exit code."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m eddyline.process.heartbeat PROCESS\n")
        return 2
    ago_s = last_beat_s(load(), arguments[0])
    if ago_s is not None and ago_s <= FRESH_S:
        return 0
    found = "no heartbeat" if ago_s is None else f"last heartbeat {ago_s:.0f} s ago"
    sys.stderr.write(f"{arguments[0]}: {found}\n")
    return 1


def _folder(settings: Settings) -> Path:
    return Path(settings.data_dir) / "run"


def _modified_s(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # its process just removed it
        return None


def _remove_old(folder: Path) -> None:
    for path in folder.glob("*.alive"):
        time_s = _modified_s(path)
        if time_s is not None and time.time() - time_s > FORGOTTEN_S:
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
