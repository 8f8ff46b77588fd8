"""The workers and coordinators on this data folder: one `<data_dir>/run/worker-<pid>.json` each."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from eddyline.process.files import write_atomically
from eddyline.settings.loader import Settings


class RegisteredWorker(msgspec.Struct, frozen=True, kw_only=True):
    """A serving worker.

    answers: whether it answers users; a worker of one shard does not
    """

    address: str
    pid: int
    generation: str
    started_ms: int
    answers: bool = True


def announce(settings: Settings, worker: RegisteredWorker) -> Path:
    """Write this worker's file; remove the files of killed workers. Returns the path."""
    folder = Path(settings.data_dir) / "run"
    _read(folder, remove=True)
    path = folder / f"worker-{worker.pid}.json"
    write_atomically(path, msgspec.json.encode(worker), mode=0o644)
    return path


def running(settings: Settings) -> list[RegisteredWorker]:
    """The workers that serve now, by start time."""
    found = _read(Path(settings.data_dir) / "run", remove=False)
    return sorted(found, key=lambda worker: (worker.started_ms, worker.pid))


def _read(folder: Path, *, remove: bool) -> list[RegisteredWorker]:
    found = []
    for path in folder.glob("worker-*.json"):
        try:
            worker = msgspec.json.decode(path.read_bytes(), type=RegisteredWorker)
        except (OSError, msgspec.DecodeError):
            continue  # the worker ended just now
        if _alive(worker.pid):
            found.append(worker)
        elif remove:
            path.unlink(missing_ok=True)
    return found


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
