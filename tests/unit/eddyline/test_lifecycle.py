"""Signals that ask a process to stop: any number of them, at any moment, and it stops once."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

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
