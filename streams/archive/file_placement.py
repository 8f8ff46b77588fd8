"""Place complete files into the archive, under a lock.

A file is placed once: a later process with the same file finds it there, perhaps rewritten, and
leaves it. Files are rewritten under the archive's lock, so that two erasures at once do not undo
each other. The lock works between the processes of one machine; in an object store, a file that
another machine changed meanwhile is read again.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from eddyline.archive import Archive
from eddyline.process.files import move

# A partial file of another machine is abandoned after this time without a write.
_ABANDONED_S = 2 * 86_400
# The lock is held while one file is written, of at most a few hundred thousand rows: seconds.
LOCK_S_MAX = 60.0
_LOCK_POLL_S = 0.01


def partial_path(archive: Archive, name: str) -> Path:
    """Where this process may write an incomplete file. Makes the folder."""
    folder = archive.partials()
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{socket.gethostname()}@{os.getpid()}@{name}"


def remove_abandoned(archive: Archive) -> int:
    """Remove partial files of dead processes; how many.

    Call it before the first file is written.
    """
    removed, host = 0, socket.gethostname()
    for path in archive.partials().glob("*@*@*"):
        owner, pid, _ = path.name.split("@", 2)
        try:
            abandoned = time.time() - path.stat().st_mtime > _ABANDONED_S
            if abandoned or (owner == host and not _is_running(int(pid))):
                path.unlink()
                removed += 1
        except (FileNotFoundError, ValueError):
            continue
    return removed


@contextmanager
def locked(archive: Archive, timeout_s: float = LOCK_S_MAX) -> Iterator[None]:
    """Hold the archive's lock on this machine, to place or rewrite files.

    Raises TimeoutError (an OSError).
    """
    path = archive.lock_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout_s, poll_interval=_LOCK_POLL_S, fallback_to_soft=False)
    try:
        held = lock.acquire()
    except Timeout:
        raise TimeoutError(f"{path}: held by another process for {timeout_s:g} s") from None
    with held:
        yield


def place(archive: Archive, partial: Path, path: str) -> None:
    """Move a complete file to its path, unless a file is there. The caller holds the lock.

    Returns once the file is on disk (or stored). Raises OSError; then the path is as it was.
    """
    if archive.fs.exists(path):
        # Another process was faster, with the same rows less those of users forgotten since.
        partial.unlink()
        return
    replace(archive, partial, path)


def replace(archive: Archive, partial: Path, path: str) -> None:
    """Put a file in the place of another in one step: a rename, or one upload."""
    if archive.is_local:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        move(partial, Path(path))
    else:
        archive.fs.put_file(str(partial), path)
        partial.unlink()


def _is_running(pid: int) -> bool:
    """Whether another process has this id; our own id in an old file is that of a dead process."""
    return pid != os.getpid() and Path("/proc", str(pid)).exists()
