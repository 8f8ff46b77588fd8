"""`make mutations`: bugs that were once found here are planted again; the tests must catch each.

make mutations                       all of them
make mutations ARGS="forget merge"   those with a word in their name
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from eddyline.settings.loader import Settings
from sandbox.servers.local_servers import local_servers, log_dir
from sandbox.servers.supervisor import Supervisor
from tests.mutations.planted import MUTATIONS
from tests.mutations.runner import Mutation, PatchError, Verdict, run

console = Console(soft_wrap=True, highlight=False)
ROOT = Path(__file__).resolve().parents[2]


def main(words: list[str]) -> int:
    """Run and print; 0 where every bug is caught."""
    chosen = [m for m in MUTATIONS if not words or any(word in m.name for word in words)]
    if not chosen:
        console.print(f"no mutation has {words} in its name")
        return 2
    begun, scratch = time.monotonic(), Path(tempfile.mkdtemp(prefix="eddyline-mutations-"))
    try:
        with servers(chosen, scratch):
            verdicts = run(ROOT, chosen, scratch, show)
    except PatchError as error:
        console.print(error)
        return 2
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    missed = [verdict for verdict in verdicts if not verdict.caught]
    console.print(
        f"{len(verdicts) - len(missed)} of {len(verdicts)} bugs caught in "
        f"{time.monotonic() - begun:.0f} s"
    )
    for verdict in missed:
        console.print(f"NOT CAUGHT: {verdict.mutation.name}: {verdict.why}", markup=False)
    return 1 if missed else 0


@contextlib.contextmanager
def servers(chosen: Sequence[Mutation], scratch: Path) -> Iterator[None]:
    """One Kafka and one Redis for all runs, where any needs them, named in the environment."""
    folders = {test.split("/")[1] for mutation in chosen for test in mutation.tests}
    base = Settings(
        data_dir=str(scratch / "servers"),
        kafka_bootstrap_servers=os.environ.get("KAFKA_BOOTSTRAP_SERVERS", ""),
        redis_url=os.environ.get("REDIS_URL", ""),
    )
    if not folders & {"contract", "integration"}:
        yield
        return
    with (
        Supervisor(log_dir(base)) as supervisor,
        local_servers(base, supervisor, owner="make mutations") as found,
    ):
        os.environ["KAFKA_BOOTSTRAP_SERVERS"] = found.kafka_bootstrap_servers
        os.environ["REDIS_URL"] = found.redis_url
        yield


def show(verdict: Verdict) -> None:
    """Print one line."""
    word = "caught" if verdict.caught else "NOT CAUGHT"
    by = f" | {verdict.test}" if verdict.test else ""
    console.print(f"{word:10s} {verdict.seconds:5.1f} s  {verdict.mutation.name}{by}", markup=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
