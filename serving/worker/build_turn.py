"""One graph at a time: worker processes on one machine share its cores.

They read the same topic, so without turns all cross the limit of fresh items at the same record.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eddyline.process.locks import try_lock
from eddyline.settings.loader import Settings

log = logging.getLogger(__name__)

ASK_S = 0.5
# A build of ten million items takes less; a process that is stopped in its turn holds it for ever.
WAIT_S_MAX = 900.0


class BuildTurn:
    """The turn of a process among those of one data folder; it ends with the process."""

    def __init__(self, settings: Settings) -> None:
        self._path = Path(settings.data_dir) / "index-build.lock"

    @contextmanager
    def take(self, stop: threading.Event) -> Iterator[None]:
        """Wait for the turn, at most `WAIT_S_MAX` and until `stop` is set.

        Without a folder to lock in there is no wait.
        """
        lock, until = None, time.monotonic() + WAIT_S_MAX
        try:
            while (lock := try_lock(self._path)) is None and not stop.wait(ASK_S):
                if time.monotonic() > until:
                    log.warning("a graph is built out of turn", extra={"waited_s": WAIT_S_MAX})
                    break
        except OSError as error:
            log.warning("graphs are built without turns", extra={"reason": str(error)})
        try:
            yield
        finally:
            if lock is not None:
                lock.release()
