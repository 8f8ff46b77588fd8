"""Does ingest grow? `make bench-ingest_memory`: ten million events, micro-steps and all; some 15
minutes.

More users than the cache of users has room for, so that it is full from the first tenth on.
N is the number of events.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.ingest_measures import Ingest, Running, Watch, load, rss_mb
from benchmarks.report import report, row
from eddyline.generations import Manifest
from eddyline.kafka.producers import now_ms
from eddyline.settings.loader import Settings
from eddyline.settings.loader import load as load_settings
from sandbox.processes import Deployment
from sandbox.servers.local_servers import local_servers, log_dir
from sandbox.servers.supervisor import Supervisor

N = int(os.environ.get("N", "10000000"))
USERS = int(os.environ.get("USERS", "100000"))
SHARES = 20
WAIT_S = 7_200.0
GROWTH_MAX = 5.0


def grown(live: Settings) -> list[float]:
    """Resident MB of ingest after each twentieth of the events."""
    filling = load(live, tag="memory", count=N, users=USERS, item_prefix="f")
    ingest, watch = Ingest(live), Watch(live)
    seen: list[float] = []

    def look(applied: int) -> None:
        while len(seen) < SHARES and applied >= (len(seen) + 1) * N // SHARES:
            seen.append(rss_mb(ingest.pid))
            print(f"{applied:>12,} events  {seen[-1]:7.1f} MB", flush=True)

    watch.until(N, look)
    filling.result(WAIT_S)
    watch.close()
    ingest.stop()
    return seen


def main() -> int:
    """Run and report; the exit code."""
    folder, begun = Path(load_settings().data_dir) / "bench", time.monotonic()
    with tempfile.TemporaryDirectory(prefix="eddyline-bench-") as home:
        base = Settings(data_dir=home, worker_port=0, namespace="memory")
        Running(base, "benchmarks.ingest_micro", str(base.bundles)).result(300)
        with (
            Supervisor(log_dir(base)) as supervisor,
            local_servers(base, supervisor, owner="bench") as live,
        ):
            Deployment(live, supervisor).prepare(
                Manifest(generation="1", bundle="1", dimension=64, created_ms=now_ms())
            )
            seen = grown(live)
    growth = 100 * (seen[-1] / seen[SHARES // 2 - 1] - 1)
    rows = [
        row(
            f"growth over the second half of {N:,} events", growth, "%", "≤ 5", growth <= GROWTH_MAX
        )
    ]
    rows.append(
        row(
            "  highest of the second half over its beginning",
            100 * (float(np.max(seen[SHARES // 2 :])) / seen[SHARES // 2 - 1] - 1),
            "%",
        )
    )
    rows += [row(f"  after {(n + 1) * N // SHARES:,}", seen[n], "MB") for n in range(1, SHARES, 2)]
    took = time.monotonic() - begun
    return report("ingest_memory", rows, folder, events=N, users=USERS, seconds=round(took))


if __name__ == "__main__":
    sys.exit(main())
