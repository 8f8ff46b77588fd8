"""The scored users are shared out among processes: each replays all events, but scores its own.

A process keeps the state of its own users only; the events of others count for the items. So half
the users are about half the work, and every rank is that of one process. A child is started anew,
without the threads of its parent; it maps the files of the log, and ends with its parent.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import numpy as np
import numpy.typing as npt

from eddyline.errors import EddylineError
from evaluation.event_files import Ints
from evaluation.event_log import EventLog
from evaluation.protocol import OnProgress, Outcome

# With fewer events to score another process is not worth its start.
EVENTS_MIN = 5_000
DEFAULT = 2

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
    context = multiprocessing.get_context("spawn")
    results, to_parent = context.Pipe(duplex=False)
    child = context.Process(target=_run_part, args=(part, process, to_parent))
    with results:
        with to_parent:
            child.start()
        try:
            yield lambda: _result(child, results)
        finally:
            child.kill()
            child.join()


def _result(child: BaseProcess, results: Connection) -> Outcome:
    """Wait as long as the child lives, as it works until its end."""
    try:
        found = results.recv()
    except EOFError:
        child.join()
        raise EddylineError(
            f"a process of the evaluation ended with exit code {child.exitcode}"
        ) from None
    if isinstance(found, str):
        raise EddylineError(found)
    assert isinstance(found, Outcome)
    return found


def _run_part(part: Part, process: int, to_parent: Connection) -> None:
    """The whole life of a child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt from the terminal is for the parent
    parent = multiprocessing.parent_process()
    assert parent is not None

    def on_progress(done: int, total: int) -> None:
        if os.getppid() != parent.pid:
            os._exit(1)  # nobody waits for the result

    try:
        found: Outcome | str = part(process, on_progress)
    except EddylineError as error:
        found = str(error)
    to_parent.send(found)
