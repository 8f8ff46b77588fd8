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
from eddyline.errors import BundleError, KafkaRefused, KafkaUnavailable
from eddyline.process import lifecycle
from eddyline.settings.loader import Settings
from serving.worker import prefork
log, stop = Path(sys.argv[1]), threading.Event()
lifecycle.stop_on_signals(stop)
def note(what):
    with log.open("a") as file:
        file.write(what + "\\n")

def check():
    pass

def opened(number):
    return number

def renewing():
    return log.exists() and "start" in log.read_text()

{body}

class Work(prefork.ForkedWork):
    opened = 0

    def check(self):
        check()
        return b"checked"

    def open(self, checked):
        assert checked == b"checked"
        self.opened += 1
        return opened(self.opened)

    def build(self, held):
        return built(held)

    def serve(self, held, place, ready, *, may_build):
        note(f"start {{held}} {{place}} {{os.getpid()}}")
        note(f"may_build {{may_build}}")
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
NOTHING_BUILT = "def built(held): return None\n"


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

    def ends(self, timeout_s: float = 60) -> tuple[int, str]:
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
        note(f"at {time.monotonic()}")
        return 1
    """.replace("\n    ", "\n")
    )
    keeper = make(body)
    keeper.started(12)
    times_s = [float(line[0]) for line in keeper.lines("at")]
    # By the clocks of those that end; the first pauses are shorter.
    assert times_s[9] - times_s[4] > 4 * 0.2, "the pauses grow to 0.2 s"
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


def test_one_that_ends_for_good_while_others_serve_leaves_them_serving(make: Make) -> None:
    """A worker that serves goes on when Kafka or Redis refuses a new one; see docs/security.md."""
    body = (
        NOTHING_BUILT
        + """
def serve(held, place, ready, stop):
    if place == 1:
        while not log.exists() or "serves 0" not in log.read_text():
            time.sleep(0.01)
        return 3
    ready()
    note("serves 0")
    stop.wait(2)
    if not stop.is_set():
        os._exit(1)  # the last one that serves crashes
    return 0
"""
    )
    keeper = make(body)
    keeper.started(4)  # the refused one is tried again
    assert keeper.process.poll() is None
    keeper.process.terminate()
    assert keeper.ends()[0] == 0
    wait_gone([int(pid) for _, _, pid in keeper.lines("start")])


def test_once_none_serves_a_final_code_ends_the_keeper(make: Make) -> None:
    body = (
        BUILT_ONCE_TWO_STARTED
        + """
def serve(held, place, ready, stop):
    if len(log.read_text().split("start")) > 3:
        return 3
    if place == 1:
        stop.wait(1)
        return 3
    ready()
    stop.wait(2)
    os._exit(1)
"""
    )
    keeper = make(body)
    assert keeper.ends()[0] == 3
    wait_gone([int(pid) for _, _, pid in keeper.lines("start")])


FAILED_RENEWALS = {
    "Kafka refuses": """
def check():
    if renewing():
        raise KafkaRefused('topic generations: no right to read')
""",
    "the bundle is damaged": """
def check():
    if renewing():
        raise BundleError('b: checksum of items.npy')
""",
    "the check crashes": """
def check():
    if renewing():
        os._exit(9)
""",
    "the bundle goes between check and load": """
def opened(number):
    if number > 1:
        raise BundleError("there is no bundle")
    return number
""",
    "Kafka goes between check and load": """
def opened(number):
    if number > 1:
        raise KafkaUnavailable("no answer")
    return number
""",
}


@pytest.mark.parametrize("what", FAILED_RENEWALS)
def test_a_failed_renewal_ends_no_worker_and_is_tried_again(make: Make, what: str) -> None:
    keeper = make(
        SERVE + NOTHING_BUILT + FAILED_RENEWALS[what] + "\nprefork.RENEW_AGAIN_S = 0.1\n",
        renew_s=0.2,
    )
    pids = [int(pid) for _, _, pid in keeper.started(2)]
    time.sleep(2.5)
    assert keeper.process.poll() is None, keeper.process.communicate()[1]
    assert not any(map(gone, pids)) and len(keeper.lines("start")) == 2
    os.kill(pids[0], signal.SIGKILL)
    assert keeper.started(3)[2][0] == "1", "supervised as before, from what is held"
    keeper.process.terminate()
    code, log_text = keeper.ends()
    assert code == 0 and log_text.count("the workers are not renewed") >= 2


def test_a_renewal_that_succeeds_later_replaces_the_workers(make: Make) -> None:
    body = """
def check():
    if not renewing():
        return
    note("check")
    if len(log.read_text().split("check")) < 4:
        raise KafkaUnavailable("away")
prefork.RENEW_AGAIN_S = 0.1
"""
    keeper = make(SERVE + NOTHING_BUILT + body, renew_s=0.2)
    assert [held for held, _, _ in keeper.started(4)[:4]] == ["1", "1", "2", "2"]
    assert len(keeper.lines("check")) == 3


def test_a_worker_that_cannot_go_on_with_what_is_held_has_it_opened_anew(make: Make) -> None:
    """Its generation has ended: another worker of the same generation would end as well."""
    keeper = make(
        NOTHING_BUILT
        + """
def serve(held, place, ready, stop):
    ready()
    if held == 1:
        return prefork.RENEW
    stop.wait(30)
    return 0
"""
    )
    deadline = time.monotonic() + 20
    while {place for held, place, _ in keeper.lines("start") if held == "2"} < {"0", "1"}:
        assert keeper.process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    keeper.process.send_signal(signal.SIGTERM)
    assert keeper.ends()[0] == 0


def test_a_worker_is_replaced_within_seconds_while_a_renewal_waits_for_kafka(make: Make) -> None:
    body = """
def check():
    if renewing():
        note("check")
        stop.wait(60)
"""
    keeper = make(SERVE + NOTHING_BUILT + body, renew_s=0.1)
    pids = [int(pid) for _, _, pid in keeper.started(2)]
    deadline = time.monotonic() + 10
    while not keeper.lines("check"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    begun = time.monotonic()
    os.kill(pids[1], signal.SIGKILL)
    keeper.started(3)
    assert time.monotonic() - begun < 3
    keeper.process.terminate()
    assert keeper.ends()[0] == 0


def test_a_check_that_hangs_starts_anew(make: Make) -> None:
    body = """
prefork.CHECK_S = 0.2
prefork.RENEW_AGAIN_S = 0.1
def check():
    if renewing():
        note("check")
        time.sleep(60)
"""
    keeper = make(SERVE + NOTHING_BUILT + body + "prefork.END_S = 0.5\n", renew_s=0.1)
    deadline = time.monotonic() + 15
    while len(keeper.lines("check")) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(keeper.lines("start")) == 2 and keeper.process.poll() is None
    keeper.process.terminate()
    assert keeper.ends()[0] == 0


REAL_INDEX = """
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # as `python -m serving` does: no thread of BLAS
import numpy as np
from eddyline.schema.item_record import ItemRecord
from index.factory import HnswIndex

def opened(number):
    index = HnswIndex(8, exact_below=10)
    index.background = False
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(2_000, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index.apply([ItemRecord(f"i{n}", 0, n, 0, 1, v) for n, v in enumerate(vectors)])
    return index

class Real(prefork.ForkedWork):
    def check(self):
        return b"1"

    def open(self, checked):
        return opened(1)

    def build(self, index):
        while not log.exists() or log.read_text().count("ready") < 2:
            time.sleep(0.01)
        time.sleep(1)  # a worker that builds would be done by then
        return {build}

    def serve(self, index, place, ready, *, may_build):
        if may_build:
            index.begin()
        ready()
        note("ready")
        stop.wait(0.7)
        until = time.monotonic() + 15
        while may_build and not index.stats().rebuilds and time.monotonic() < until:
            time.sleep(0.01)
        stats = index.stats()
        note(f"stats {may_build} {stats.main} {stats.rebuilds} {stats.rebuilding}")
        stop.wait(30)
        index.close()
        return 0

settings = Settings(worker_processes=2, worker_renew_s=1_000, backoff_ms_max=200)
sys.exit(prefork.Prefork(settings, Real(), stop).run())
"""


@pytest.mark.parametrize(
    ("build", "later"), [("index.rebuild()", "2000 1 False"), ("False", "2000 1 False")]
)
def test_no_worker_builds_a_graph_before_the_keeper_has_tried(
    make: Make, build: str, later: str
) -> None:
    """Once the keeper built, workers share its graph; if it cannot, each builds its own."""
    keeper = make(REAL_INDEX.replace("{build}", build))
    deadline = time.monotonic() + 20
    while len(found := keeper.lines("stats")) < 4:
        assert keeper.process.poll() is None, keeper.process.communicate()[1]
        assert time.monotonic() < deadline, found
        time.sleep(0.01)
    lines = [" ".join(line) for line in found]
    assert lines[:2] == ["False 0 0 False"] * 2
    assert lines[2:4] == [f"True {later}"] * 2
    keeper.process.terminate()
    assert keeper.ends()[0] == 0


@pytest.mark.parametrize(("error", "code"), [("KafkaRefused", 3), ("BundleError", 1)])
def test_a_failed_check_at_the_start_ends_the_keeper(make: Make, error: str, code: int) -> None:
    keeper = make(SERVE + NOTHING_BUILT + f"def check(): raise {error}('why')\n")
    assert keeper.ends()[0] == code
    assert keeper.lines("start") == []


def test_the_keeper_waits_for_kafka_without_a_thread_of_its_client(tmp_path: Path) -> None:
    """The real opener: kafka-python's thread stays after a failed connection and forbids forks."""
    environ = {
        "EDDYLINE_DATA_DIR": str(tmp_path),
        "EDDYLINE_KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1",
        "EDDYLINE_REDIS_URL": "redis://127.0.0.1:1/0",
        "EDDYLINE_KAFKA_TIMEOUT_MS": "500",
        "EDDYLINE_BACKOFF_MS_MAX": "200",
        "EDDYLINE_WORKER_PORT": "0",
        "EDDYLINE_WORKER_PROCESSES": "2",
    }
    keeper = subprocess.Popen(
        [sys.executable, "-m", "serving"],
        cwd=ROOT,
        env=os.environ | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert keeper.stdout is not None
        assert "worker processes listen" in keeper.stdout.readline()
        time.sleep(4)  # several attempts
        assert len(os.listdir(f"/proc/{keeper.pid}/task")) == 1
        keeper.terminate()
        _, errors = keeper.communicate(timeout=20)
    finally:
        keeper.kill()
        keeper.communicate(timeout=20)
    assert keeper.returncode == 0 and "waiting" in errors, errors


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
