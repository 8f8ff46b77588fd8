"""The shape of every process: settings, logs, signals, its work, and the exit code of an error."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable

from eddyline.errors import EddylineError, KafkaRefused, LogMismatch, SettingsError, StoreRefused
from eddyline.process import discovery, files, logs
from eddyline.process.retry import Stopped
from eddyline.settings import loader
from eddyline.settings.loader import Settings

log = logging.getLogger(__name__)


def stop_on_signals(stop: threading.Event, also: Callable[[], None] = lambda: None) -> None:
    """Set `stop` at SIGTERM or SIGINT. The main thread calls this.

    also: called before, at the first signal only
    """
    requested = False

    def on_signal(*_: object) -> None:
        nonlocal requested
        if not requested:
            requested = True
            also()
            # In a thread of its own: the signal may have interrupted this handler, or a wait of the
            # main thread, while it held the event's lock.
            threading.Thread(target=stop.set, name="stop", daemon=True).start()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)


def run(
    process: str,
    main: Callable[[Settings, threading.Event], int | None],
    *,
    needs_kafka: bool = True,
    needs_redis: bool = True,
    stops_in_order: bool = True,
    stop_limit_s: float | Callable[[], float] | None = None,
) -> int:
    """Run a process from its settings to its exit code. The main thread calls this.

    process:        its name in log lines
    main:           called with the settings and an event that SIGTERM and SIGINT set
    needs_kafka:    False: the process uses neither server, and no address is looked up
    needs_redis:    False: the address of Redis may be empty
    stops_in_order: False for a job that a signal may end at any point; it leaves the event unset
    stop_limit_s:   the process ends this long after the signal, with code 0, in whatever call it
                    is; a function is asked at the signal

    Returns the exit code of `run_until_exit`.
    """
    stop = threading.Event()
    if stops_in_order:
        stop_on_signals(stop, lambda: _end_after(stop_limit_s))
    try:
        settings = loader.load()
        logs.configure(settings, process)
        files.check_writable("data_dir", settings.data_dir)
        if needs_kafka:
            settings = discovery.resolve(settings, redis=needs_redis)
    except SettingsError as error:
        logs.refuse(process, str(error))
        return 2
    return run_until_exit(lambda: main(settings, stop))


def _end_after(limit_s: float | Callable[[], float] | None) -> None:
    if limit_s is not None:
        seconds = limit_s() if callable(limit_s) else limit_s
        timer = threading.Timer(seconds, os._exit, (0,))
        timer.daemon = True
        timer.start()


def exit_code(error: EddylineError) -> int:
    """3: an operator has to decide · 2: a bad setting · 1: a restart may heal it."""
    if isinstance(error, LogMismatch | StoreRefused | KafkaRefused):
        return 3
    return 2 if isinstance(error, SettingsError) else 1


def run_until_exit(main: Callable[[], int | None]) -> int:
    """Call `main`, log the error that ends it, and return the exit code of the process.

    0 a requested stop · 1 an error that a restart may heal · 2 a bad setting · 3 an operator has to
    decide. Other exceptions than Eddyline's own pass through.
    """
    try:
        code = main() or 0
    except (Stopped, KeyboardInterrupt):
        code = 0
    except EddylineError as error:
        log.error(str(error))
        return exit_code(error)
    log.info("stopped")
    return code
