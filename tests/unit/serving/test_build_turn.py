"""Workers that share a data folder build one graph at a time."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from eddyline.process.locks import is_locked
from eddyline.schema.item_record import ItemRecord
from eddyline.settings.loader import Settings
from index.backends.registry import make_backend
from index.live import LiveIndex
from serving.worker import build_turn
from serving.worker.build_turn import BuildTurn

HOLD = """
import sys, threading, time
from eddyline.settings.loader import Settings
from serving.worker.build_turn import BuildTurn
with BuildTurn(Settings(data_dir=sys.argv[1])).take(threading.Event()):
    print("mine", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_turn, "ASK_S", 0.02)


class Backend:
    """hnswlib, slowed; counts the builds that run at the same time."""

    def __init__(self) -> None:
        self._real = make_backend("hnswlib")
        self.now = self.most = self.done = 0
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> object:
        return getattr(self._real, name)

    def build(self, labels: np.ndarray, vectors: np.ndarray, stop: threading.Event) -> object:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(0.1)
        with self._lock:
            self.now -= 1
            self.done += 1
        return self._real.build(labels, vectors, stop)


def test_a_herd_that_is_due_at_once_builds_one_after_the_other(tmp_path: Path) -> None:
    backend, settings = Backend(), Settings(data_dir=str(tmp_path))
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(300, 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    records = [ItemRecord(f"i{n}", 0, n, n, 1, vectors[n]) for n in range(300)]
    herd = []
    for _ in range(4):
        index = LiveIndex(4, backend, breadth=10, exact_below=50, fresh_max=100)  # type: ignore[arg-type]
        index.turn = BuildTurn(settings).take
        herd.append(index)
    try:
        for index in herd:
            index.apply(records)
        deadline = time.monotonic() + 10
        while any(not index.stats().main for index in herd):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert (backend.done, backend.most) == (4, 1)
    finally:
        for index in herd:
            index.close()


def test_a_stop_ends_the_wait_for_the_turn(tmp_path: Path) -> None:
    settings, stop = Settings(data_dir=str(tmp_path)), threading.Event()
    entered = threading.Event()

    def wait() -> None:
        with BuildTurn(settings).take(stop):
            entered.set()

    with BuildTurn(settings).take(threading.Event()):
        thread = threading.Thread(target=wait)
        thread.start()
        assert not entered.wait(0.2)
        stop.set()
        thread.join(2)
        assert not thread.is_alive()


def test_the_turn_of_a_killed_process_ends(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "mine\n"
        entered = threading.Event()

        def wait() -> None:
            with BuildTurn(Settings(data_dir=str(tmp_path))).take(threading.Event()):
                entered.set()

        thread = threading.Thread(target=wait)
        thread.start()
        assert not entered.wait(0.2)
    finally:
        holder.kill()
        holder.communicate()
    assert entered.wait(5)
    thread.join(5)


def test_the_wait_for_the_turn_has_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A process that is stopped in its turn must not stop all others."""
    monkeypatch.setattr(build_turn, "WAIT_S_MAX", 0.3)
    settings, begun = Settings(data_dir=str(tmp_path)), time.monotonic()
    with BuildTurn(settings).take(threading.Event()):
        with BuildTurn(settings).take(threading.Event()):
            assert 0.3 <= time.monotonic() - begun
        assert is_locked(tmp_path / "index-build.lock")  # by the first one, as before
    assert "out of turn" in caplog.text


def test_without_a_folder_to_lock_in_graphs_are_built(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with BuildTurn(Settings(data_dir=str(tmp_path / "file"))).take(threading.Event()):
        pass
