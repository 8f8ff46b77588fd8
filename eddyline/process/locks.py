"""Locks between processes of one machine: files that are locked while their owner lives.

The lock is the kernel's (`flock`), so it ends with its process, even after kill -9, and the file
stays. `try_lock` is for a lock that is held for long, `filelock.FileLock` for a short one.
"""

from __future__ import annotations

import fcntl
from pathlib import Path

from filelock import FileLock, Timeout


def try_lock(path: Path) -> FileLock | None:
    """The lock, held until `release()`; None if another process holds it. Makes the folder.

    Raises OSError. Thread rule: any thread may release it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    return lock


def is_locked(path: Path) -> bool:
    """Whether a living process holds the lock. Raises OSError.

    A shared look: two at once do not see each other, which an attempt to lock the file would.
    """
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
