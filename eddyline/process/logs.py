"""Structured logs: one line per unit of work, a sentence and its values.

    log = logging.getLogger(__name__)
    log.info("batch applied", extra={"partition": 3, "records": 256})

For people: `12:00:01.123 info  ingest  batch applied  partition=3 records=256`. For machines
(`log_format = "json"`): one JSON object a line. Values are never secrets; URLs lack their password.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from types import TracebackType

import msgspec

from eddyline.settings.loader import Settings

log = logging.getLogger(__name__)

# The attributes of every LogRecord; all others come from `extra`.
_OWN = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", "data", "stack"}
# These log every connection attempt while a server is away, kafka-python as an error. Our processes
# log once what they wait for.
_QUIET = {
    "kafka": logging.CRITICAL,
    "aiokafka": logging.CRITICAL,
    "faust": logging.WARNING,
    "mode": logging.WARNING,
    "asyncio": logging.WARNING,
}


def configure(settings: Settings, process: str) -> None:
    """Write the logs of this process to standard error, in the format of the settings."""
    root = logging.getLogger()
    root.handlers[:] = [_handler(settings.log_format, process)]
    root.setLevel(settings.log_level.upper())
    for name, level in _QUIET.items():
        logging.getLogger(name).setLevel(max(level, root.level))
    if settings.log_format == "json":
        logging.captureWarnings(True)
        sys.excepthook = _log_uncaught
        threading.excepthook = lambda args: _log_uncaught(
            args.exc_type, args.exc_value, args.exc_traceback
        )


def refuse(process: str, reason: str) -> None:
    """Say why a process cannot start, before its settings are known.

    The format is that of the environment variable `EDDYLINE_LOG_FORMAT`.
    """
    if os.environ.get("EDDYLINE_LOG_FORMAT") == "json":
        handler = _handler("json", process)
        handler.handle(log.makeRecord(__name__, logging.ERROR, "", 0, reason, (), None))
    else:
        sys.stderr.write(f"{reason}\n")


def announce(settings: Settings, sentence: str) -> None:
    """Write a sentence to standard output, or as a log line in the format for machines."""
    if settings.log_format == "json":
        log.info(sentence)
    else:
        sys.stdout.write(f"{sentence}\n")
        sys.stdout.flush()


def _handler(log_format: str, process: str) -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json(process) if log_format == "json" else _Console(process))
    return handler


def _log_uncaught(
    kind: type[BaseException], error: BaseException | None, trace: TracebackType | None
) -> None:
    log.critical("uncaught exception", exc_info=(kind, error or kind(), trace))


class _Console(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self.process = process

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        values = "".join(f" {key}={value}" for key, value in _values(record).items())
        line = f"{clock}.{int(record.msecs):03d} {record.levelname.lower():7} {self.process}  "
        line += record.getMessage() + (" " + values if values else "")
        return line + ("\n" + self.formatException(record.exc_info) if record.exc_info else "")


class _Json(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self.process = process

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "at_ms": int(record.created * 1000),
            "level": record.levelname.lower(),
            "process": self.process,
            "logger": record.name,
            "message": record.getMessage(),
            **{key: _plain(value) for key, value in _values(record).items()},
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def _values(record: logging.LogRecord) -> dict[str, object]:
    return {key: value for key, value in vars(record).items() if key not in _OWN}


def _plain(value: object) -> object:
    return value if isinstance(value, str | int | float | bool | None) else str(value)
