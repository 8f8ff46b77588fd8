"""A process' sign of life for whoever watches it from outside: a file that it touches as it works.

A process without a port of its own (ingest) calls `beat` from the loop that does its work, so
a loop that hangs stops beating. `python -m eddyline.process.heartbeat ingest` exits with 0 where a beat of this kind of
process is fresh, with 1 and a sentence otherwise; it is the health check of docker-compose.yml.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from eddyline.settings.loader import Settings, load

# Beats come every two seconds, and may wait for a Redis that takes its time to fail.
FRESH_S = 30.0
# Files of processes that ended long ago are removed by the next one that starts beating.
FORGOTTEN_S = 3_600.0


def beat(settings: Settings, process: str) -> None:
    """Say that this process is alive; call it every second or two. Costs some 20 µs.

    process: its kind, as "ingest"; the file is `run/<process>-<pid>.alive` in `data_dir`
    """
    path = _folder(settings) / f"{process}-{os.getpid()}.alive"
    try:
        os.utime(path)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        _forget_the_dead(path.parent)
        path.touch()


def end(settings: Settings, process: str) -> None:
    """Take this process' sign of life away, after a stop in good order."""
    (_folder(settings) / f"{process}-{os.getpid()}.alive").unlink(missing_ok=True)


def last_beat_s(settings: Settings, process: str) -> float | None:
    """Seconds since the last beat of any process of this kind on this machine; None where there is none."""
    times = [
        beaten for path in _folder(settings).glob(f"{process}-*.alive") if (beaten := _beaten(path))
    ]
    return max(0.0, time.time() - max(times)) if times else None


def main(arguments: list[str]) -> int:
    """Check one kind of process; the exit code."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m eddyline.process.heartbeat PROCESS\n")
        return 2
    ago_s = last_beat_s(load(), arguments[0])
    if ago_s is not None and ago_s <= FRESH_S:
        return 0
    found = "no sign of life" if ago_s is None else f"last sign of life {ago_s:.0f} s ago"
    sys.stderr.write(f"{arguments[0]}: {found}\n")
    return 1


def _folder(settings: Settings) -> Path:
    return Path(settings.data_dir) / "run"


def _beaten(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # its process removed it just now
        return None


def _forget_the_dead(folder: Path) -> None:
    for path in folder.glob("*.alive"):
        beaten = _beaten(path)
        if beaten is not None and time.time() - beaten > FORGOTTEN_S:
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
