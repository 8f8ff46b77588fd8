"""The shape of every process: settings, logs, signals, its work, an exit code."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Callable

from eddyline.errors import BundleError, KafkaRefused, LogMismatch, SettingsError, StoreRefused
from eddyline.process import discovery, logs
from eddyline.process.retry import Stopped
from eddyline.settings import loader
from eddyline.settings.loader import Settings

log = logging.getLogger(__name__)


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


def run(
    process: str,
    main: Callable[[Settings, threading.Event], int | None],
    *,
    needs_redis: bool = True,
) -> int:
    """Run a process from settings to exit code: load, logs, signals, `main`. The main thread calls it.

    process:     its name in log lines
    main:        called with the settings and an event that SIGTERM and SIGINT set
    needs_redis: False if the process uses no Redis; its address may be empty then

    Returns the exit code of `run_until_exit`.
    """
    stop = threading.Event()
    stop_on_signals(stop)
    try:
        settings = loader.load()
        logs.configure(settings, process)
        settings = discovery.resolve(settings, redis=needs_redis)
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return run_until_exit(lambda: main(settings, stop))


def run_until_exit(run: Callable[[], int | None]) -> int:
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
