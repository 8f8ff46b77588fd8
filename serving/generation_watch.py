"""Notices that the generation of a running worker or coordinator has ended."""

from __future__ import annotations

from collections.abc import Callable

from eddyline import generations
from eddyline.errors import GenerationEnded
from eddyline.process.periodic import Periodic
from eddyline.settings.loader import Settings


class GenerationWatch:
    """Ends the process before what it serves from is removed. Thread rule: any thread.

    on_end: called once, where the generation must not be used any more
    """

    def __init__(self, settings: Settings, generation: str, on_end: Callable[[], None]) -> None:
        self._used = generations.UsedGenerations(settings, [generation])
        self._on_end = on_end
        self._error: GenerationEnded | None = None
        self._checks = Periodic(
            "generation-watch",
            self._check,
            generations.CHECK_S,
            "the end of the generation could not be looked for",
            at_once=True,
        )

    def start(self) -> None:
        """Look in the background: now, and every `generations.CHECK_S`."""
        self._checks.start()

    def close(self) -> None:
        """Stop looking."""
        self._checks.close()

    def raise_ended(self) -> None:
        """Raise GenerationEnded where `on_end` was called."""
        if self._error is not None:
            raise self._error

    def check(self, now_ms: int | None = None) -> None:
        """Look now. Raises GenerationEnded, KafkaUnavailable, KafkaRefused, BundleError."""
        self._used.check(now_ms)

    def _check(self) -> None:
        try:
            self.check()
        except GenerationEnded as error:
            self._error = error
            self._checks.stop.set()
            self._on_end()
