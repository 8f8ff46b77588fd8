"""Notices that the generation of a running worker or coordinator has ended."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from eddyline import generations
from eddyline.errors import EddylineError, GenerationEnded
from eddyline.settings.loader import Settings

log = logging.getLogger(__name__)

CLOSE_S = 5.0


class GenerationWatch:
    """Ends the process before what it serves from is removed. Thread rule: any thread.

    on_end: called once, where the generation must not be used any more
    """

    def __init__(self, settings: Settings, generation: str, on_end: Callable[[], None]) -> None:
        self._settings = settings
        self._generation = generation
        self._on_end = on_end
        self._error: GenerationEnded | None = None
        self._reported = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="generation-watch", daemon=True)

    def start(self) -> None:
        """Look in the background: now, and every `generations.CHECK_S`."""
        self._thread.start()

    def close(self) -> None:
        """Stop looking."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(CLOSE_S)

    def raise_ended(self) -> None:
        """Raise GenerationEnded where `on_end` was called."""
        if self._error is not None:
            raise self._error

    def check(self, now_ms: int | None = None) -> None:
        """Look now. Raises GenerationEnded, KafkaUnavailable, KafkaRefused, BundleError."""
        found = generations.read(self._settings)
        found.check_usable(
            [self._generation], time.time_ns() // 1_000_000 if now_ms is None else now_ms
        )
        end = found.ended.get(self._generation)
        if end is not None and not self._reported:
            self._reported = True
            log.warning(
                "the generation of this process has ended: restart it before it has to end",
                extra={"generation": self._generation, "ends": generations.utc(end.leave_ms)},
            )

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.check()
            except GenerationEnded as error:
                self._error = error
                self._on_end()
                return
            except EddylineError:
                pass  # the tail reports that Kafka is away
            except Exception:
                log.exception("the end of the generation could not be looked for")
            self._stop.wait(generations.CHECK_S)
