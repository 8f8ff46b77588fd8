"""The judge, wired together: `python -m evaluation.judge`, `eddyline judge`.

Exit codes: 0 a requested stop · 1 an error that a restart may heal · 2 a bad setting, or another
judge runs on the data folder · 3 an operator has to decide (Kafka refuses us, or lost records).
"""

from __future__ import annotations

import os

# Before numpy: one thread scores, and what it scores is too small for more.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import gc
import logging
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

from eddyline.errors import SettingsError
from eddyline.process import heartbeat, lifecycle
from eddyline.process.locks import try_lock
from eddyline.settings.loader import Settings
from evaluation.judge import drift, metrics
from evaluation.judge.process import JudgeProcess

log = logging.getLogger(__name__)

# A stop writes the last checkpoint.
STOP_S_MAX = 30.0
# The state consists of many small objects without cycles; by default the collector runs often.
_GARBAGE = (50_000, 20, 100)


def main() -> int:
    """Judge until SIGTERM or SIGINT. Returns the exit code."""
    return lifecycle.run("judge", _run, needs_redis=False, stop_limit_s=STOP_S_MAX)


def _run(settings: Settings, stop: threading.Event) -> None:
    with ExitStack() as closing:
        folder = Path(settings.data_dir) / "judge"
        lock = try_lock(folder / "lock")
        if lock is None:
            raise SettingsError(f"data_dir = {settings.data_dir!r}: another judge runs there")
        closing.callback(lock.release)
        closing.callback(heartbeat.end, settings, "judge")
        if drift.make_adwin() is None:
            log.warning("river is missing: no drift is detected; install eddyline[judge]")
        gc.set_threshold(*_GARBAGE)
        process = JudgeProcess(settings, stop)
        closing.callback(metrics.serve(settings, process))
        process.run()


if __name__ == "__main__":
    sys.exit(main())
