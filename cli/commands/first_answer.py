"""From imported events to the first answer: train, and wait until ingest and worker are ready."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import closing
from itertools import islice

from cli.commands.query import worker_address
from cli.console import console
from eddyline.errors import EddylineError
from eddyline.kafka import reading, topics
from eddyline.process import discovery
from eddyline.schema import validation
from eddyline.schema.events import Click
from eddyline.settings.loader import Settings
from sandbox import processes
from serving.rpc.client import is_ready

# Ingest applies nothing for this long: it is broken, not slow. It looks for a generation every ten
# seconds.
STALLED_S = 120.0
WORKER_READY_S = 120.0
_POLL_S = 0.5


def prepare(settings: Settings) -> None:
    """Train a generation, wait for the processes of `eddyline up --with`, name the next command.

    settings: with the addresses of Kafka and Redis
    Raises EddylineError (exit code 1) if the training fails, LocalServerError.
    """
    user = _user(settings)
    code = subprocess.run([sys.executable, "-m", "embeddings.training"], check=False).returncode
    if code:
        raise EddylineError(f"the training ended with exit code {code}; the import is complete")
    local = discovery.running(settings)
    running = local.processes if local else {}
    if "ingest" in running:
        with console.status("ingest") as status:
            processes.wait_until_applied(
                settings,
                timeout_s=STALLED_S,
                on_progress=lambda done, total: status.update(
                    f"ingest has applied {done:,} of {total:,} records"
                ),
            )
    if "worker" in running:
        _wait_for_worker(settings)
    missing = [name for name in ("ingest", "worker") if name not in running]
    if missing:
        console.print(f"then run: {', '.join(f'eddyline {name}' for name in missing)}")
    console.print(f"then: eddyline query {user}")


def _user(settings: Settings) -> str:
    """A user who has events."""
    with closing(reading.read(settings, topics.CLICKS)) as records:
        for record in islice(records, 100):
            try:
                for _, event, _ in validation.user_events(settings, record):
                    if isinstance(event, Click):
                        return event.user_id
            except EddylineError:
                continue
    return "USER"


def _wait_for_worker(settings: Settings) -> None:
    deadline = time.monotonic() + WORKER_READY_S
    with console.status("the worker reads the items"):
        while not is_ready(worker_address(settings)):
            if time.monotonic() > deadline:
                raise EddylineError(
                    f"the worker is not ready after {WORKER_READY_S:g} s; see its log"
                )
            time.sleep(_POLL_S)
