"""Where the log of clicks ends, for calls that wait for a click that may not exist."""

from __future__ import annotations

import logging
import threading
import time
from typing import NamedTuple

from eddyline.errors import EddylineError
from eddyline.kafka.log_ends import LogEnds

log = logging.getLogger(__name__)

# Ends are read at most this often, and after an error so much later.
READ_S, AGAIN_S = 0.1, 1.0
# The connection to Kafka is closed after this time without a question.
IDLE_S = 30.0
CLOSE_S = 5.0


class _End(NamedTuple):
    """The end of a partition; read_s: when its read began, monotonic."""

    offset: int
    read_s: float


class ClickEnds:
    """Reads ends on a thread of its own while somebody looks them up. Thread rule: any thread."""

    def __init__(self, ends: LogEnds) -> None:
        """ends: of the topic `clicks`; used from the thread alone."""
        self._ends = ends
        self._known: dict[int, _End] = {}
        self._wanted: set[int] = set()
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    def look_up(self, partition: int, since_s: float) -> int | None:
        """The partition's end as it was read after `since_s` (monotonic); None if it was not yet.

        Does not wait: has it read, and a later call finds it. Without Kafka it stays None.
        """
        with self._changed:
            known = self._known.get(partition)
            if known is not None and known.read_s >= since_s:
                return known.offset
            self._wanted.add(partition)
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="click-ends", daemon=True)
                self._thread.start()
            self._changed.notify()
        return None

    def close(self) -> None:
        """Stop reading and close the connection."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(CLOSE_S)

    def _run(self) -> None:
        failed = False
        while True:
            with self._changed:
                if not self._wanted and not self._closed and not self._changed.wait(IDLE_S):
                    self._ends.close()
                wanted = sorted(self._wanted)
                self._wanted.clear()
            if self._closed:
                return self._ends.close()
            if not wanted:
                continue
            begun_s = time.monotonic()
            try:
                found = self._ends.read(wanted)
            except EddylineError as error:
                if not failed:
                    log.warning("the ends of clicks are unknown", extra={"reason": str(error)})
                failed = True
            else:
                failed = False
                with self._changed:
                    self._known |= {p: _End(end, begun_s) for p, end in found.items()}
            self._sleep(AGAIN_S if failed else READ_S)

    def _sleep(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed, seconds)
