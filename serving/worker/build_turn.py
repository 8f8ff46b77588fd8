"""One graph at a time: worker processes on one machine share its cores.

They read the same topic, so without turns all cross the limit of fresh items at the same record.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eddyline.process.locks import try_lock
from eddyline.settings.loader import Settings

log = logging.getLogger(__name__)

ASK_S = 0.5


class BuildTurn:
    """The turn of a process among those of one data folder; it ends with the process."""

    def __init__(self, settings: Settings) -> None:
        self._path = Path(settings.data_dir) / "index-build.lock"

    @contextmanager
    def take(self, stop: threading.Event) -> Iterator[None]:
        """Wait for the turn, or until `stop` is set. Without a folder to lock in, do not wait."""
        lock = None
        try:
            while (lock := try_lock(self._path)) is None and not stop.wait(ASK_S):
                pass
        except OSError as error:
            log.warning("graphs are built without turns", extra={"reason": str(error)})
        try:
            yield
        finally:
            if lock is not None:
                lock.release()
