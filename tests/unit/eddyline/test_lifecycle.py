"""The shape of a process: its settings, signals that stop it once, its exit code."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eddyline.errors import (
    BundleError,
    KafkaRefused,
    KafkaUnavailable,
    LogMismatch,
    SettingsError,
    StoreRefused,
)
from eddyline.process import lifecycle
from eddyline.process.retry import Stopped

CODE = """
import threading, time
from eddyline.process import lifecycle
stop = threading.Event()
lifecycle.stop_on_signals(stop, lambda: print("also", flush=True))
print("ready", flush=True)
while not stop.wait(0.0002):
    pass
print("stopped", flush=True)
time.sleep(0.5)  # the last signals still come
"""


def test_many_signals_at_once_stop_it_once() -> None:
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", CODE], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        for number in 20 * [signal.SIGTERM, signal.SIGINT]:
            child.send_signal(number)
            time.sleep(0.0001)
        out, _ = child.communicate(timeout=20)
        assert (child.returncode, out) == (0, "also\nstopped\n")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Stopped(), 0),
        (BundleError("torn"), 1),
        (KafkaUnavailable("away"), 1),
        (SettingsError("k_max"), 2),
        (StoreRefused("layout"), 3),
        (KafkaRefused("password"), 3),
        (LogMismatch("another log"), 3),
    ],
)
def test_an_error_is_one_log_line_and_an_exit_code(
    error: Exception, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    def main() -> None:
        raise error

    with caplog.at_level(logging.INFO):
        assert lifecycle.run_until_exit(main) == code
    (line,) = caplog.records
    assert line.getMessage() == (str(error) if code else "stopped") and not line.exc_info


@pytest.mark.parametrize("returned", [None, 0, 5])
def test_the_exit_code_of_a_process_that_ends_by_itself(returned: int | None) -> None:
    assert lifecycle.run_until_exit(lambda: returned) == (returned or 0)


RUN = """
import sys
from eddyline.process import lifecycle
def main(settings, stop):
    print(settings.redis_url, settings.log_level, flush=True)
    stop.wait(20)
sys.exit(lifecycle.run("test", main))
"""


def started(**environ: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", RUN],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environ,
    )


def test_a_process_has_its_settings_and_stops_at_a_signal(tmp_path: Path) -> None:
    servers = {"KAFKA_BOOTSTRAP_SERVERS": "k:1", "REDIS_URL": "redis://r:1/0"}
    with started(**servers, EDDYLINE_LOG_LEVEL="info") as child:
        assert child.stdout is not None and child.stdout.readline() == "redis://r:1/0 info\n"
        child.terminate()
        _, logged = child.communicate(timeout=20)
        assert child.returncode == 0 and "info    test  stopped" in logged


def test_a_bad_setting_is_a_sentence_on_standard_error(tmp_path: Path) -> None:
    with started(EDDYLINE_K_MAX="many") as child:
        out, stderr = child.communicate(timeout=20)
    assert (child.returncode, out) == (2, "") and "k_max = 'many'" in stderr
    assert "Traceback" not in stderr


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with started(EDDYLINE_DATA_DIR=str(file / "data")) as child:
        out, stderr = child.communicate(timeout=20)
    assert (child.returncode, out) == (2, "")
    assert f"data_dir = '{file / 'data'}': cannot be written: Not a directory" in stderr
    assert "Traceback" not in stderr


BREAKS = """
import sys, threading, warnings
from eddyline.process import lifecycle, logs
def main(settings, stop):
    logs.announce(settings, "listens")
    warnings.warn("old")
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    raise RuntimeError("broken")
sys.exit(lifecycle.run("test", main))
"""


@pytest.mark.parametrize("fails_at", ["settings", "work"])
def test_each_line_for_machines_is_json(fails_at: str, tmp_path: Path) -> None:
    """Also what Python itself says: of a bad setting, a warning, an uncaught exception."""
    environ = {"EDDYLINE_LOG_FORMAT": "json", "EDDYLINE_DATA_DIR": str(tmp_path)}
    environ |= {"KAFKA_BOOTSTRAP_SERVERS": "k:1", "REDIS_URL": "redis://r:1/0"}
    if fails_at == "settings":
        environ["EDDYLINE_K_MAX"] = "many"
    done = subprocess.run(
        [sys.executable, "-c", BREAKS],
        capture_output=True,
        text=True,
        timeout=30,
        env=os.environ | environ,
    )
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert done.stdout == "" and all(line["process"] == "test" for line in lines)
    if fails_at == "settings":
        [line] = lines
        assert done.returncode == 2
        assert line["level"] == "error" and "k_max = 'many'" in line["message"]
        return
    assert done.returncode == 1
    announced, warned, thread, main = lines
    assert announced["message"] == "listens" and "old" in warned["message"]
    assert "ZeroDivisionError" in thread["exception"]
    assert main["level"] == "critical" and "RuntimeError: broken" in main["exception"]


def test_a_stop_that_hangs_ends_at_its_limit(tmp_path: Path) -> None:
    """The limit may depend on what the process does when the signal comes."""
    code = """
import sys, time
from eddyline.process import lifecycle
def main(settings, stop):
    print("ready", flush=True)
    while True:
        time.sleep(60)
sys.exit(lifecycle.run("test", main, stop_limit_s=lambda: 0.3))
"""
    servers = {"KAFKA_BOOTSTRAP_SERVERS": "k:1", "REDIS_URL": "redis://r:1/0"}
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | servers | {"EDDYLINE_DATA_DIR": str(tmp_path)},
    )
    with child:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        child.terminate()
        assert child.wait(20) == 0
