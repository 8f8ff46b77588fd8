"""A name in the consumer group that outlives a crash.

A process that was killed and is started again takes the same name, so Kafka hands it its partitions at once
instead of waiting until the dead member's session is over. The names lie in the data folder, one file each,
locked for as long as a process lives: the first free one is taken, and two processes never share one.
"""

from __future__ import annotations

import fcntl
import uuid
from pathlib import Path
from typing import IO

# More ingest processes than this on one data folder are no setup that anybody runs.
MEMBERS_MAX = 256


class StaticMembership:
    """A held name. Keep the object for as long as the process is a member.

    name: the consumer group's `group.instance.id`
    """

    def __init__(self, name: str, file: IO[str]) -> None:
        self.name = name
        self._file = file

    def close(self) -> None:
        """Give the name back."""
        self._file.close()


def take(folder: Path) -> StaticMembership:
    """Take the first free name of this folder, making one where all are taken. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(MEMBERS_MAX):
        file = (folder / f"member-{number}").open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            continue
        file.seek(0)
        name = file.read().strip()
        if not name:
            name = f"ingest-{uuid.uuid4()}"
            file.write(name)
            file.flush()
        return StaticMembership(name, file)
    raise OSError(f"{folder}: all of {MEMBERS_MAX} member names are taken")
