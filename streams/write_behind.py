"""Effects of chunks that wait for those of more chunks, behind fences of their own.

Popularity counts and cards of items are such: one write for many chunks costs little more than one for each.
"""

from __future__ import annotations

import logging
from collections.abc import Set
from typing import Protocol

from eddyline.errors import FenceMoved, Unavailable
from streams.fences import PartitionFences

log = logging.getLogger(__name__)


class WriteBehind(Protocol):
    """Effects of chunks that wait for those of more, behind fences of their own. Thread rule: the lane's."""

    def due(self) -> list[int]:
        """The partitions whose effects have waited long enough. Any thread may ask."""

    def waiting(self) -> list[int]:
        """The partitions that have any."""

    def write(self, partition: int) -> None:
        """Write them now. Raises FenceMoved, Unavailable."""

    def opened(self, partition: int) -> None:
        """Forget them: the partition is read again from its lowest fence."""


def flush_due(deferred: WriteBehind, positions: PartitionFences, mine: Set[int]) -> int | None:
    """Write what has waited long enough. A partition where that was refused, to be read again.

    mine: the partitions that are ours and whose position is known; of others nothing is written any more
    """
    for partition in sorted(mine & set(deferred.due())):
        error = _refused(deferred, partition)
        if error is None:
            continue
        if isinstance(error, Unavailable):
            # Its fence may not have moved: what comes before it is read again must not go beyond these.
            positions.invalidate(partition)
        return partition
    return None


def flush(deferred: WriteBehind) -> None:
    """Write all that waits, before partitions are given up: written later it would meet their next owner.

    What is refused is forgotten, as with a process that died.
    """
    for partition in deferred.waiting():
        _refused(deferred, partition)


def _refused(deferred: WriteBehind, partition: int) -> Exception | None:
    """Write what waits of a partition. Why not, where it was not; then it is forgotten."""
    try:
        deferred.write(partition)
    except (FenceMoved, Unavailable) as error:
        log.info(
            "what had waited was not written", extra={"partition": partition, "reason": str(error)}
        )
        deferred.opened(partition)
        return error
    return None
