"""One topic's lane: its ingest function, whose turn it is to run it, and what it has done so far."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from eddyline.errors import FenceMoved, Unavailable
from streams.chunk import Outcome, Part, PartitionLost, Record
from streams.positions import Positions

log = logging.getLogger(__name__)
_R = TypeVar("_R")

BACKOFF_S = 0.05


class Ingest(Protocol):
    """An ingest function and the positions it works from."""

    positions: Positions

    def ingest(self, partition: int, records: Sequence[Record], read_us: int) -> Outcome:
        """Apply a chunk."""


class Deferred(Protocol):
    """Effects of chunks that wait for those of more, behind fences of their own. Thread rule: the lane's."""

    def due(self) -> list[int]:
        """The partitions whose effects have waited long enough. Any thread may ask."""

    def write(self, partition: int) -> None:
        """Write them now. Raises FenceMoved, Unavailable."""

    def opened(self, partition: int) -> None:
        """Forget them: the partition is read again from its lowest fence."""


@dataclass
class Lane:
    """One topic: its function, the thread it runs in, and what it has done so far.

    before_open: called with each partition before its fences are read
    deferred:    effects that may wait for those of more chunks
    quick:       small chunks take some milliseconds, so they may run in the event loop itself
    many:        applies chunks of several partitions together; what `ingest` would raise is in its place
    in_loop:     `many` for small chunks in the event loop, where it has to wait for more than Redis; those of
                 different partitions may be under way at once
    part_max:    so many records of one partition are applied at once at most; None: as many as a chunk has
    seconds:     spent on applying; waits: how often a server was waited for, wait_s: how long next time
    queued:      chunks that wait for this lane's turn
    """

    topic: str
    ingest: Ingest
    executor: ThreadPoolExecutor
    before_open: Callable[[int], None] | None = None
    deferred: Deferred | None = None
    quick: bool = False
    many: Callable[[Sequence[Part]], list[Outcome | Exception]] | None = None
    in_loop: Callable[[Sequence[Part]], Coroutine[Any, Any, list[Outcome | Exception]]] | None = None
    part_max: int | None = None
    outcome: Outcome = field(default_factory=Outcome)
    chunks: int = 0
    rewinds: int = 0
    seconds: float = 0.0
    waits: int = 0
    wait_s: float = BACKOFF_S
    queued: Callable[[], int] = lambda: 0
    _told: tuple[int, int, float, Outcome] = field(default_factory=lambda: (0, 0, 0.0, Outcome()))

    def begin(self) -> None:
        """From here on `since_begin` counts."""
        total = Outcome()
        total.add(self.outcome)
        self._told = self.chunks, self.rewinds, self.seconds, total

    def since_begin(self) -> tuple[int, int, float, Outcome]:
        """(chunks, rewinds, seconds, outcome) since `begin`."""
        chunks, rewinds, seconds, outcome = self._told
        more = self.outcome.less(outcome)
        return self.chunks - chunks, self.rewinds - rewinds, self.seconds - seconds, more

    def open(self, bounds: Mapping[int, tuple[int, int]], committed: Mapping[int, int]) -> dict[int, int]:
        """Where to read on, by partition, see `Positions.open`. Runs in the lane's thread."""
        if self.before_open is not None:
            for partition in bounds:
                self.before_open(partition)
        return self.ingest.positions.open(bounds, committed)

    def apply(self, parts: Sequence[Part]) -> list[Outcome | Exception]:
        """Apply one chunk each of different partitions."""
        if self.many is not None:
            return self.many(parts)
        ends: list[Outcome | Exception] = []
        for part in parts:
            try:
                ends.append(self.ingest.ingest(part.partition, part.records, part.read_us))
            except (FenceMoved, Unavailable, PartitionLost) as error:
                ends.append(error)
        return ends

    def settle(self) -> int | None:
        """Write what has waited long enough. A partition where that was refused, to be read again."""
        if self.deferred is not None:
            for partition in self.deferred.due():
                try:
                    self.deferred.write(partition)
                except (FenceMoved, Unavailable) as error:
                    told = {"partition": partition, "reason": str(error)}
                    log.info("what had waited was not written", extra=told)
                    # A chunk that is applied before the partition is read again must not go beyond these.
                    self.deferred.opened(partition)
                    self.ingest.positions.doubt(partition)
                    return partition
        return None

    def moved_elsewhere(self, mine: set[int]) -> list[int]:
        """Which of these partitions have other fences than expected. Runs in the lane's thread."""
        return self.ingest.positions.moved_elsewhere(mine)


class Turn:
    """Who works for the lanes of an executor: its one thread, or the app's loop in its place.

    The loop may work on several chunks at once, while they wait for Kafka. Once the thread wants its turn no
    further one joins them, so it does not wait for ever.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted = 0
        self._joined = 0

    def __enter__(self) -> None:
        """In the thread: wait for the loop's chunks, and keep it out."""
        self._wanted += 1
        self._lock.acquire()
        self._wanted -= 1

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def join(self) -> bool:
        """In the loop: work in the thread's place, until `leave`; False where it is or wants its turn."""
        free = not self._wanted if self._joined else self._lock.acquire(blocking=False)
        self._joined += free
        return free

    def leave(self) -> None:
        """The other end of `join`."""
        self._joined -= 1
        if not self._joined:
            self._lock.release()


async def in_thread(turn: Turn, executor: ThreadPoolExecutor, call: Callable[..., _R], *arguments: Any) -> _R:
    """Run in a lane's thread. Whoever applies a chunk or reads fences holds its executor's turn."""

    def run() -> _R:
        with turn:
            return call(*arguments)

    return await asyncio.get_running_loop().run_in_executor(executor, run)
