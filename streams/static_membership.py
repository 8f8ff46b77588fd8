"""A name in the consumer group that outlives a crash.

A process that was killed and is started again takes the same name, so Kafka hands it its partitions at once
instead of waiting until the dead member's session is over. The names lie in the data folder, one file each,
locked for as long as a process lives: the first free one is taken, and two processes never share one.
"""

from __future__ import annotations

import uuid
from pathlib import Path

from filelock import FileLock

from eddyline.process.locks import try_lock

# More ingest processes than this on one data folder are no setup that anybody runs.
MEMBERS_MAX = 256


class StaticMembership:
    """A held name. Keep the object for as long as the process is a member.

    name: the consumer group's `group.instance.id`
    """

    def __init__(self, name: str, lock: FileLock) -> None:
        self.name = name
        self._lock = lock

    def close(self) -> None:
        """Give the name back."""
        self._lock.release()


def take(folder: Path) -> StaticMembership:
    """Take the first free name of this folder, making one where all are taken. Raises OSError."""
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
