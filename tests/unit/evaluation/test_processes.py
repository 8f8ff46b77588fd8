"""Several processes find what one finds, to the bit, and end with their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest

from eddyline.errors import EddylineError
from eddyline.settings.loader import Settings
from embeddings.bundle.bundle import Bundle
from evaluation import offline, processes, protocol
from evaluation.event_log import EventLog
from evaluation.protocol import OnProgress, Outcome
from evaluation.report import Report
from tests.unit.evaluation.small import make_log

USERS = 6


def evaluate(
    log: EventLog, bundle: Bundle, wanted: int, rows: Sequence[str]
) -> tuple[Report, Outcome]:
    return offline.evaluate(
        Settings(popular_limit=9, history_length_max=12, seen_items_max=3),
        log,
        bundle,
        name="s",
        split=0.5,
        keeps_repeats=False,
        seed=3,
        rows=rows,
        wanted_processes=wanted,
    )


WITHOUT_VISITS = ("random", "als-daily", "towers-daily", "towers", "popular", "cascade", "rrf")


@pytest.mark.parametrize(
    "rows", [WITHOUT_VISITS, ("next", "towers"), ("rrf-all", "co_visits_both")]
)
def test_several_processes_find_what_one_finds(bundle: Bundle, rows: Sequence[str]) -> None:
    log = make_log(7, events=300)
    one, outcome = evaluate(log, bundle, 1, rows)
    assert outcome.rows.keys() >= {*rows} and outcome.kept.sum() > 50
    several, merged = evaluate(log, bundle, 3, rows)
    assert msgspec.json.encode(one) == msgspec.json.encode(several)
    for row, found in outcome.rows.items():
        assert np.array_equal(found.ranks, merged.rows[row].ranks), row
        assert found.lists == merged.rows[row].lists


def test_users_are_shared_out_evenly() -> None:
    log = make_log(7, events=300)
    events = protocol.scorable(log, 150)
    found = processes.share_out(log, events, 2)
    scored = {log.users[event] for event in events}
    assert {user for user in range(len(log.user_ids)) if found[user] >= 0} == scored
    loads = np.bincount(found[log.users[events]])
    assert len(loads) == 2 and abs(loads[0] - loads[1]) < 0.2 * len(events)
    assert processes.share_out(log, events[:0], 2).tolist() == [-1] * len(log.user_ids)


@pytest.mark.parametrize(
    ("wanted", "events", "cores", "number"),
    [(0, 4_999, 4, 1), (0, 5_000, 4, 2), (0, 5_000, 1, 1), (3, 10, 1, 3), (1, 10**6, 4, 1)],
)
def test_another_process_is_started_where_it_is_worth_it(
    monkeypatch: pytest.MonkeyPatch, wanted: int, events: int, cores: int, number: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    assert processes.number(wanted, events) == number


def refuse(process: int, on_progress: OnProgress) -> Outcome:
    raise EddylineError(f"process {process} refuses")


def die(process: int, on_progress: OnProgress) -> Outcome:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


class Hang:
    """Writes its process id, then goes on for ever."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, process: int, on_progress: OnProgress) -> Outcome:
        self.path.write_text(str(os.getpid()), encoding="utf-8")
        while True:
            on_progress(0, 1)
            time.sleep(0.01)


@pytest.mark.parametrize(
    ("part", "message"), [(refuse, "process 1 refuses"), (die, "ended with exit code -9")]
)
def test_the_error_of_a_child_is_that_of_the_evaluation(part: processes.Part, message: str) -> None:
    outcome = Outcome(None, np.ones(0, bool), {}, np.empty(0, np.int64), 0)  # type: ignore[arg-type]
    with pytest.raises(EddylineError, match=message):
        processes.run(part, lambda: outcome, np.empty(0, np.int16), 2)


def wait_for(check: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 60
    while not check():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def written(path: Path) -> bool:
    return path.exists() and path.read_text(encoding="utf-8") != ""


def test_a_child_ends_with_an_interrupted_parent(tmp_path: Path) -> None:
    path = tmp_path / "pid"

    def interrupted() -> Outcome:
        wait_for(lambda: written(path))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        processes.run(Hang(path), interrupted, np.empty(0, np.int16), 2)
    with pytest.raises(ProcessLookupError):
        os.kill(int(path.read_text(encoding="utf-8")), 0)


def test_a_child_ends_with_a_killed_parent(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    code = (
        "import sys, time, pathlib, numpy; from evaluation import processes; "
        "from tests.unit.evaluation.test_processes import Hang; "
        "processes.run(Hang(pathlib.Path(sys.argv[1])), lambda: time.sleep(120), "
        "numpy.empty(0, numpy.int16), 2)"
    )
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, env=environment) as parent:
        try:
            wait_for(lambda: written(path))
        finally:
            parent.kill()
    status = Path(f"/proc/{path.read_text(encoding='utf-8')}/stat")
    # Nobody may wait for it: then it stays as a zombie.
    wait_for(lambda: not status.exists() or ") Z " in status.read_text(encoding="utf-8"))
