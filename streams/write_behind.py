"""Write-behind effects: written together with those of later batches, behind fences of their own.

Popularity counts, co-visits and item metadata are such: one write for many batches costs little
more than one for each.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Set
from typing import Any, Generic, Protocol, TypeVar

from eddyline.errors import FenceMoved, Unavailable
from streams.fences import PartitionFences

log = logging.getLogger(__name__)


class _Pending(Protocol):
    """Effects of one partition. since_s: when the first of them was added."""

    since_s: float


_P = TypeVar("_P", bound=_Pending)


class WriteBehind(ABC, Generic[_P]):
    """Pending effects by partition.

    wait_s:  how long effects wait for those of more batches, 0 for not at all
    clock_s: decides only when effects are due; no effect depends on it
    Thread rule: the thread that applies the topic's batches, but for `due` and `pending`.
    """

    def __init__(
        self, fences: PartitionFences, wait_s: float, clock_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._fences = fences
        self._wait_s = wait_s
        self._clock_s = clock_s
        self._pending: dict[int, _P] = {}

    @abstractmethod
    def write(self, partition: int) -> None:
        """Write the partition's pending effects now. Raises FenceMoved, Unavailable."""

    def due(self) -> list[int]:
        """The partitions whose effects have waited `wait_s`. Any thread."""
        return [p for p, one in list(self._pending.items()) if self._has_waited(one)]

    def pending(self) -> list[int]:
        """The partitions that have pending effects. Any thread."""
        return list(self._pending)

    def reset(self, partition: int) -> None:
        """Discard the pending effects: the partition is read again from its lowest fence."""
        self._pending.pop(partition, None)

    def flush_due(self, owned: Set[int]) -> int | None:
        """Write the due effects. Returns a partition whose write was refused: read it again.

        owned: the partitions that are assigned to this process and positioned; others are skipped
        """
        for partition in sorted(owned & set(self.due())):
            error = self._flush(partition)
            if error is None:
                continue
            if isinstance(error, Unavailable):
                # Its fence may not have moved: until the next `open` no batch may move it beyond
                # these.
                self._fences.invalidate(partition)
            return partition
        return None

    def flush(self) -> None:
        """Write all pending effects, before partitions are revoked; refused ones are discarded.

        A later write would meet the next owner's. Discarding is what a crash does.
        """
        for partition in self.pending():
            self._flush(partition)

    def _has_waited(self, pending: _P) -> bool:
        return self._clock_s() - pending.since_s >= self._wait_s

    def _flush(self, partition: int) -> Exception | None:
        """Write, and discard what was refused. Returns the error."""
        try:
            self.write(partition)
        except (FenceMoved, Unavailable) as error:
            log.info(
                "pending effects were not written",
                extra={"partition": partition, "reason": str(error)},
            )
            self.reset(partition)
            return error
        return None


class WriteBehindGroup:
    """Several kinds of pending effects of the same partitions, as one. Thread rule: as theirs."""

    def __init__(self, *parts: WriteBehind[Any]) -> None:
        self._parts = parts

    def write(self, partition: int) -> None:
        """See `WriteBehind.write`."""
        for part in self._parts:
            part.write(partition)

    def due(self) -> list[int]:
        """See `WriteBehind.due`."""
        return [*{p for part in self._parts for p in part.due()}]

    def pending(self) -> list[int]:
        """See `WriteBehind.pending`."""
        return [*{p for part in self._parts for p in part.pending()}]

    def reset(self, partition: int) -> None:
        """See `WriteBehind.reset`."""
        for part in self._parts:
            part.reset(partition)

    def flush_due(self, owned: Set[int]) -> int | None:
        """See `WriteBehind.flush_due`."""
        refused = (part.flush_due(owned) for part in self._parts)
        return next((partition for partition in refused if partition is not None), None)

    def flush(self) -> None:
        """See `WriteBehind.flush`."""
        for part in self._parts:
            part.flush()
