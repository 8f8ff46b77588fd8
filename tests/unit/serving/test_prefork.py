"""Forked workers: one that ends is replaced, a final code ends all, none outlives the keeper."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
# The keeper may have no other thread, so it runs in its own process. A test gives `built(held)` and
# `serve(held, place, ready, stop) -> exit code`; every start is a line of the file `log`.
KEEPER = """
import os, signal, sys, threading, time
from pathlib import Path
from eddyline.process import lifecycle
from eddyline.settings.loader import Settings
from serving.worker import prefork
log, stop = Path(sys.argv[1]), threading.Event()
lifecycle.stop_on_signals(stop)
def note(what):
    with log.open("a") as file:
        file.write(what + "\\n")

{body}

class Work(prefork.ForkedWork):
    opened = 0

    def open(self):
        self.opened += 1
        return self.opened

    def build(self, held):
        return built(held)

    def serve(self, held, place, ready):
        note(f"start {{held}} {{place}} {{os.getpid()}}")
        return serve(held, place, ready, stop)

settings = Settings(worker_processes=2, worker_renew_s={renew_s}, backoff_ms_max=200)
kept = prefork.Prefork(settings, Work(), stop)
sys.exit(kept.run())
"""
SERVE = """
def serve(held, place, ready, stop):
    ready()
    stop.wait(30)
    note(f"end {place}")
    return 0
"""
NOTHING_BUILT = "def built(held): return False\n"


class Keeper:
    def __init__(self, tmp_path: Path, body: str, renew_s: float = 1_000) -> None:
        self.log = tmp_path / "log"
        code = KEEPER.format(body=textwrap.dedent(body), renew_s=renew_s)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(self.log)], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )

    def lines(self, word: str) -> list[list[str]]:
        found = self.log.read_text(encoding="utf-8").split("\n") if self.log.exists() else []
        return [line.split()[1:] for line in found if line.startswith(word)]

    def started(self, count: int) -> list[list[str]]:
        deadline = time.monotonic() + 20
        while len(found := self.lines("start")) < count:
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < deadline, found
            time.sleep(0.01)
        return found

    def ends(self, timeout_s: float = 20) -> tuple[int, str]:
        _, log_text = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, log_text


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").split()[2] == "Z"


def wait_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 15
    while not all(map(gone, pids)):
        assert time.monotonic() < deadline, pids
        time.sleep(0.02)


Make = Callable[..., Keeper]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[Keeper] = []

    def start(body: str, renew_s: float = 1_000) -> Keeper:
        made.append(Keeper(tmp_path, body, renew_s))
        return made[-1]

    yield start
    for keeper in made:
        keeper.process.kill()
        keeper.process.communicate(timeout=20)


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forked workers need Linux")


BUILT_ONCE_TWO_STARTED = """
def built(held):
    while not log.exists() or len(log.read_text().split("start")) < 3:
        time.sleep(0.01)
    return True
"""


def test_a_killed_worker_is_replaced_in_its_place_and_all_end_with_the_keeper(make: Make) -> None:
    keeper = make(SERVE + NOTHING_BUILT)
    first = keeper.started(2)
    assert sorted(place for _, place, _ in first) == ["0", "1"]
    os.kill(int(first[1][2]), signal.SIGKILL)
    again = keeper.started(3)[2]
    assert again[1] == first[1][1] and again[2] != first[1][2]
    keeper.process.terminate()
    assert keeper.ends()[0] == 0
    assert sorted(keeper.lines("end")) == [["0"], ["1"]]
    wait_gone([int(pid) for _, _, pid in keeper.lines("start")])


def test_one_that_ends_again_and_again_waits_longer_and_longer(make: Make) -> None:
    body = (
        NOTHING_BUILT
        + """
    def serve(held, place, ready, stop):
        if place == 0:
            stop.wait(30)
            return 0
        return 1
    """.replace("\n    ", "\n")
    )
    keeper = make(body)
    time.sleep(0.5)
    begun = time.monotonic()
    count = len(keeper.started(3))
    keeper.started(count + 5)
    assert time.monotonic() - begun > 4 * 0.2, "the pauses grow to 0.2 s"
    keeper.process.terminate()
    assert keeper.ends()[0] == 0


@pytest.mark.parametrize("code", [2, 3])
def test_what_a_restart_does_not_heal_ends_all(make: Make, code: int) -> None:
    body = (
        NOTHING_BUILT
        + f"""
def serve(held, place, ready, stop):
    if place == 1:
        return {code}
    stop.wait(30)
    return 0
"""
    )
    keeper = make(body)
    assert keeper.ends()[0] == code
    wait_gone([int(pid) for _, _, pid in keeper.lines("start")])


def test_once_the_graph_is_built_every_worker_is_replaced_by_one_that_shares_it(make: Make) -> None:
    body = SERVE + "def built(held):\n    note('built')\n    return True\n"
    keeper = make(body, renew_s=1.0)
    started = keeper.started(8)  # exact, with the graph, and both again from what was opened later
    assert [held for held, _, _ in started[:6]] == ["1"] * 4 + ["2"] * 2
    keeper.process.terminate()
    assert keeper.ends()[0] == 0
    wait_gone([int(pid) for _, _, pid in keeper.lines("start")])


def test_an_old_worker_stays_where_the_new_one_does_not_get_ready(make: Make) -> None:
    body = (
        BUILT_ONCE_TWO_STARTED
        + """
def serve(held, place, ready, stop):
    if len(log.read_text().split("start")) > 3:
        return 1  # the third and the fourth one
    ready()
    stop.wait(30)
    note(f"end {place}")
    return 0
"""
    )
    keeper = make(body)
    keeper.started(4)
    time.sleep(0.5)
    assert keeper.lines("end") == []
    keeper.process.terminate()
    code, log_text = keeper.ends()
    assert code == 0 and log_text.count("is not ready; the old one stays") == 2
    assert len(keeper.lines("end")) == 2


def test_one_that_ends_for_good_while_the_others_are_replaced_ends_all(make: Make) -> None:
    body = (
        BUILT_ONCE_TWO_STARTED
        + """
def serve(held, place, ready, stop):
    if len(log.read_text().split("start")) > 3:
        stop.wait(2)  # not ready yet when the old one of the other place ends
    elif place == 1:
        stop.wait(1)
        return 3
    ready()
    stop.wait(30)
    return 0
"""
    )
    keeper = make(body)
    assert keeper.ends()[0] == 3
    wait_gone([int(pid) for _, _, pid in keeper.lines("start")])


def test_workers_do_not_outlive_a_keeper_that_was_killed(make: Make) -> None:
    keeper = make(SERVE + NOTHING_BUILT)
    pids = [int(pid) for _, _, pid in keeper.started(2)]
    keeper.process.kill()
    wait_gone(pids)
    keeper.ends()


def test_a_keeper_with_another_thread_does_not_fork(make: Make) -> None:
    body = (
        SERVE
        + NOTHING_BUILT
        + "threading.Thread(target=time.sleep, args=(9,), name='lost', daemon=True).start()\n"
    )
    code, log_text = make(body).ends()
    assert code == 1
    assert "1 other threads: lost" in log_text
