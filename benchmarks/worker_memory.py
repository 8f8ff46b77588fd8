"""What does one more query process cost in memory? `make bench-worker_memory`; N=100000 items by
default.

Real query workers, gRPC and tail included, from one snapshot, each with a graph: WORKERS of their
own, then the WORKERS processes of one (`worker_processes`), which share it. Told is what a process
has for itself alone (the mean), which is what one more costs, before and after QUERIES answers
each, and its PSS, where a shared page counts by its share.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import item_catalogue
from benchmarks.report import report, row
from eddyline.generations import Manifest
from eddyline.kafka.producers import now_ms
from eddyline.settings.loader import Settings, load
from sandbox.processes import Deployment
from sandbox.servers.local_servers import local_servers, log_dir
from sandbox.servers.supervisor import Supervisor
from serving import running_workers
from serving.proto import retrieval_pb2 as pb
from serving.proto.retrieval_pb2_grpc import RetrievalStub
from serving.rpc.client import is_ready, open_channel

N = int(os.environ.get("N", "100000"))
WORKERS, QUERIES, K, ANCHORS = 3, 2_000, 100, 50
BUILT_S = 900.0


def memory_mb(pids: list[int]) -> np.ndarray:
    """(private, PSS) of these processes in MB, the mean."""
    found = []
    for pid in pids:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()[1:]
        kb = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        found.append((kb["Private_Clean"] + kb["Private_Dirty"], kb["Pss"]))
    return np.mean(found, axis=0) * 1.024e-3


def stubs(addresses: list[str], each: int) -> list[Any]:
    """Stubs with connections of their own: the kernel spreads connections over the processes."""
    own = [("grpc.use_local_subchannel_pool", 1)]
    channels = (open_channel(a, own) for a in addresses for _ in range(each))
    return [RetrievalStub(channel) for channel in channels]  # type: ignore[no-untyped-call]


def until(what: str, check: Callable[[], bool]) -> None:
    """Return once it is so. Raises RuntimeError where that takes too long."""
    deadline = time.monotonic() + BUILT_S
    while not check():
        if time.monotonic() > deadline:
            raise RuntimeError(f"not within {BUILT_S:.0f} s: {what}")
        time.sleep(0.5)


def measured(
    settings: Settings, addresses: list[str], each: int, name: str
) -> list[dict[str, Any]]:
    """The rows of these workers, once all have a graph."""

    def ready() -> bool:
        found = running_workers.running(settings)
        return len(found) == WORKERS and all(
            stub.Stats(pb.StatsRequest(), timeout=5).index.main >= 0.9 * N
            for stub in stubs(addresses, each)
        )

    until(f"{WORKERS} workers with a graph", ready)
    time.sleep(2)  # the memory of the build is freed
    pids = [worker.pid for worker in running_workers.running(settings)]
    before = memory_mb(pids)
    workers = stubs(addresses, each)
    for n in range(WORKERS * QUERIES):
        request = pb.RetrieveRequest(user_id=f"user-{n % ANCHORS}", k=K)
        workers[n % len(workers)].Retrieve(request, timeout=5)
    after = memory_mb(pids)
    return [
        row(f"{name}: its own", float(before[0]), "MB"),
        row("  PSS", float(before[1]), "MB"),
        row(f"  its own after {QUERIES:,} queries of {K} items each", float(after[0]), "MB"),
        row("  PSS", float(after[1]), "MB"),
    ]


def main() -> int:
    """Run and report; the exit code."""
    folder, begun = Path(load().data_dir) / "bench", time.monotonic()
    with tempfile.TemporaryDirectory(prefix="eddyline-bench-") as home:
        base = Settings(data_dir=home, worker_port=0, namespace="memory")
        item_catalogue.write(base.bundles / "1", N, ANCHORS)
        with (
            Supervisor(log_dir(base)) as servers,
            local_servers(base, servers, owner="bench") as live,
        ):
            with Supervisor(log_dir(base)) as first:  # its last act is a snapshot
                deployment = Deployment(live, first)
                deployment.prepare(
                    Manifest(
                        generation="1", bundle="1", dimension=item_catalogue.D, created_ms=now_ms()
                    )
                )
                first.start(deployment.worker_child(is_ready)[0])
            with Supervisor(log_dir(base)) as several:
                made = [
                    Deployment(live, several).worker_child(is_ready, f"worker-{n}")
                    for n in range(WORKERS)
                ]
                several.start(*(child for child, _ in made))
                rows = measured(live, [address for _, address in made], 1, "a worker of its own")
            with Supervisor(log_dir(base)) as forked:
                child, address = Deployment(live, forked).worker_child(
                    is_ready, worker_processes=str(WORKERS)
                )
                forked.start(child)
                rows += measured(live, [address], 8 * WORKERS, "a process of a forked worker")
    return report(
        "worker_memory",
        rows,
        folder,
        items=N,
        workers=WORKERS,
        seconds=round(time.monotonic() - begun),
    )


if __name__ == "__main__":
    sys.exit(main())
