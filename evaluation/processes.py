"""The scored users are shared out among processes: each replays all events, but scores its own.

A process keeps the state of its own users only; the events of others count for the items. So half
the users are about half the work, and every rank is that of one process. A child is started anew,
without the threads of its parent; it maps the files of the log, and ends with its parent.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt

from eddyline.errors import EddylineError
from evaluation.event_files import Ints
from evaluation.event_log import EventLog
from evaluation.protocol import OnProgress, Outcome

# With fewer events to score another process is not worth its start.
EVENTS_MIN = 5_000
DEFAULT = 2
_POLL_S, _END_S = 0.1, 10.0
_CHILD = "from evaluation import processes; processes.child()"

# (number of the process, progress) -> what it found; can be pickled.
Part = Callable[[int, OnProgress], Outcome]


def number(wanted: int, events: int) -> int:
    """The processes to use. wanted: 0 for as many as are worth it; events: to score"""
    if wanted:
        return wanted
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(DEFAULT, cores or 1) if events >= EVENTS_MIN else 1


def share_out(log: EventLog, events: Ints, processes: int) -> npt.NDArray[np.int16]:
    """int16 (users,): the process of each user, -1 if none of the events is theirs.

    Users with the most events first, each to the process that has the fewest.
    """
    counts = np.bincount(log.users[events], minlength=len(log.user_ids))
    found = np.full(len(counts), -1, np.int16)
    loads = [0] * processes
    for user in np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)].tolist():
        process = loads.index(min(loads))
        found[user] = process
        loads[process] += int(counts[user])
    return found


def run(
    part: Part, own: Callable[[], Outcome], process_of: npt.NDArray[np.int16], processes: int
) -> Outcome:
    """Run the parts of all processes, `own` in this one, and put the results together.

    part:       of the others, from number 1 on
    process_of: int16 (n,), the process of each event to score
    Raises EddylineError, also if a child ends without a result.
    """
    with ExitStack() as children:
        results = [children.enter_context(_child(part, n)) for n in range(1, processes)]
        outcome = own()
        for process, result in enumerate(results, 1):
            outcome.take(result(), process_of == process)
    return outcome


@contextmanager
def _child(part: Part, process: int) -> Iterator[Callable[[], Outcome]]:
    """Start a child that runs a part; yields what waits for its result."""
    with TemporaryDirectory(prefix="eddyline-evaluate-child-") as folder:
        out = Path(folder) / "result"
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "OPENBLAS_NUM_THREADS": "1",
        }
        # A session of its own: an interrupt from the terminal is for the parent.
        started = subprocess.Popen(
            [sys.executable, "-P", "-c", _CHILD],
            stdin=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        with started as child:
            try:
                assert child.stdin is not None
                pickle.dump((part, process, out, os.getpid()), child.stdin)
                child.stdin.close()
                yield lambda: _result(child, out)
            finally:
                child.kill()


def _result(child: subprocess.Popen[bytes], out: Path) -> Outcome:
    """Wait as long as the child lives, as it works until its end."""
    while (code := child.poll()) is None:
        time.sleep(_POLL_S)
    if code or not out.exists():
        raise EddylineError(f"a process of the evaluation ended with exit code {code}")
    found = pickle.loads(out.read_bytes())
    if isinstance(found, str):
        raise EddylineError(found)
    assert isinstance(found, Outcome)
    return found


def child() -> None:
    """The whole life of a child."""
    part, process, out, parent = pickle.load(sys.stdin.buffer)

    def on_progress(done: int, total: int) -> None:
        if os.getppid() != parent:
            os._exit(1)  # nobody waits for the result

    try:
        found = part(process, on_progress)
    except EddylineError as error:
        found = str(error)
    out.write_bytes(pickle.dumps(found))
