"""What every process does before it works: wait for servers, agree on the layout, find the generation."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from eddyline import generations
from eddyline.errors import (
    BundleError,
    KafkaRefused,
    LogMismatch,
    SettingsError,
    StoreRefused,
    Unavailable,
)
from eddyline.generations import Manifest
from eddyline.ports import Layout
from eddyline.settings import Settings

log = logging.getLogger(__name__)

# Counts up when keys in Redis or records in our topics change their meaning.
LAYOUT_VERSION = 2
_BACKOFF_S = 0.05
_TELL_S = 10.0
_T = TypeVar("_T")


class Stopped(Exception):
    """A stop was asked for while a process waited for a server."""


class NoGeneration(Unavailable):
    """There is no active generation yet; training makes one."""


def stop_on_signals(stop: threading.Event, also: Callable[[], None] = lambda: None) -> None:
    """Set `stop` at SIGTERM or SIGINT; the main thread calls it. also: done first, at the first signal."""
    asked = False

    def on_signal(*_: object) -> None:
        nonlocal asked
        if not asked:
            asked = True
            also()
            # In a thread of its own: the signal may have interrupted this handler, or a wait of the main
            # thread, while it held the event's lock.
            threading.Thread(target=stop.set, name="stop", daemon=True).start()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)


def ended(run: Callable[[], int | None]) -> int:
    """Run a process until it is to stop, log what ends it otherwise, and return the exit code.

    0 a wanted stop · 1 an error that a restart may heal · 2 a bad setting · 3 a person has to decide
    """
    code = 0
    try:
        code = run() or 0
    except (Stopped, KeyboardInterrupt):
        pass
    except (LogMismatch, StoreRefused, KafkaRefused) as error:
        log.error(str(error))
        return 3
    except SettingsError as error:
        log.error(str(error))
        return 2
    except BundleError as error:
        log.error(str(error))
        return 1
    log.info("stopped")
    return code


class Patience:
    """Waits for servers, with growing pauses, until they answer or a stop is asked for.

    stop:    ends every wait; waiting: told what is waited for, before each wait begins
    """

    def __init__(
        self,
        settings: Settings,
        stop: threading.Event | None = None,
        waiting: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._wait_s_max = settings.backoff_ms_max / 1000
        self._stop = stop or threading.Event()
        self._waiting = waiting

    def until(self, what: str, call: Callable[[], _T]) -> _T:
        """What the call returns once it raises Unavailable no more. Raises Stopped."""
        self._waiting(what)
        wait_s, told = _BACKOFF_S, float("-inf")
        while True:
            try:
                return call()
            except Unavailable as error:
                if time.monotonic() - told > _TELL_S:
                    log.warning("waiting", extra={"for": what, "reason": str(error)})
                    told = time.monotonic()
            if self._stop.wait(wait_s):
                raise Stopped
            wait_s = min(2 * wait_s, self._wait_s_max)


def layout(settings: Settings) -> Layout:
    """How these settings cut the state."""
    return Layout(LAYOUT_VERSION, settings.clicks_partitions, settings.items_partitions, settings.item_slots)


def active_generation(settings: Settings) -> Manifest:
    """The active generation's manifest. Raises NoGeneration, KafkaUnavailable, BundleError."""
    manifest = generations.active(settings)
    if manifest is None:
        raise NoGeneration("there is no active generation yet; `eddyline train` makes one")
    return manifest
