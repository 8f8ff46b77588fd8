"""A name in the consumer group that outlives a crash.

A process that restarts after a crash uses the same name, so Kafka assigns its partitions at once
instead of waiting for the end of the dead member's session. The data folder has one file for each
name. A process locks the first free one for its lifetime, so two processes never share a name.
"""

from __future__ import annotations

import uuid
from pathlib import Path

from filelock import FileLock

from eddyline.process.locks import try_lock

# No installation runs more ingest processes on one data folder.
MEMBERS_MAX = 256


class StaticMembership:
    """A locked name. Keep the object while the process is a member.

    name: the consumer group's `group.instance.id`
    """

    def __init__(self, name: str, lock: FileLock) -> None:
        self.name = name
        self._lock = lock

    def close(self) -> None:
        """Release the name."""
        self._lock.release()


def take(folder: Path) -> StaticMembership:
    """Lock the first free name of this folder; make one where none is free. Raises OSError."""
    for number in range(MEMBERS_MAX):
        path = folder / f"member-{number}"
        lock = try_lock(path)
        if lock is None:
            continue
        name = path.read_text(encoding="utf-8").strip()
        if not name:
            name = f"ingest-{uuid.uuid4()}"
            path.write_text(name, encoding="utf-8")
        return StaticMembership(name, lock)
    raise OSError(f"{folder}: all of {MEMBERS_MAX} member names are taken")
