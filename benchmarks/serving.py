"""What does a query cost beside the wire? `make bench-serving`; SECONDS=5 a phase, ROUNDS=3.

On the demo's running system: a worker that answers by the towers, and one that blends all paths of
`BLENDED`. An *echo worker* is the same gRPC server in a process of its own; it returns a ready
answer of the same size. Load comes from a third process: closed (each connection has one call open)
or open (calls start at fixed times, whether earlier ones were answered or not, and a call's time
counts from when it was due). Echo and worker are measured in turns, so that both see the same
machine. The rows compare the phases of a round, and tell the median over the rounds.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import grpc.aio
import msgspec
import numpy as np
from rich.console import Console

from benchmarks.report import report, row
from cli.demo.bring_up import bring_up
from eddyline.settings.loader import Settings, load
from serving.proto import retrieval_pb2 as pb
from serving.rpc.client import Client, is_ready
from serving.rpc.retrieval_service import NAME, RetrievalService
from serving.rpc.server import WorkerServer

SECONDS = float(os.environ.get("SECONDS", "5"))
ROUNDS = int(os.environ.get("ROUNDS", "3"))
K, SEED, MANY = 10, 5, 8
METHOD = f"/{NAME}/Retrieve"
TOWERS = {"recall_paths": "towers,popular,newest", "fusion": "cascade"}
BLENDED = {
    "recall_paths": "towers,co_visits,co_visits_both,next,popular,popular_fast,popular_slow,newest",
    "fusion": "blend",
}
# Worker -> how many times the echo worker's p50 at one connection it may have, and what share of
# its throughput at many it must have.
LIMITS = {"worker": (1.8, 0.5), "blended worker": (3.0, 0.3)}
# The open loop has this share of what one connection reached.
OPEN_SHARE = 0.5


class Found(NamedTuple):
    """What one phase of load saw. ms: of each call; wall_s: of the phase; failed: calls."""

    ms: list[float]
    wall_s: float
    failed: int

    @property
    def a_second(self) -> float:
        """Answers a second."""
        return len(self.ms) / self.wall_s

    def percentile(self, percent: float) -> float:
        """Milliseconds."""
        return float(np.percentile(self.ms, percent))


def main() -> int:
    """Run and report; the exit code."""
    if sys.argv[1:2] == ["echo"]:
        return echo()
    if sys.argv[1:2] == ["load"]:
        return asyncio.run(load_worker(*sys.argv[2:]))
    # Ingest keeps the state of the paths of its settings.
    settings = msgspec.structs.replace(load(), **BLENDED)
    with bring_up(settings, os.environ.get("DATA", "movielens"), Console()) as system:
        deployment, users = system.deployment, sorted(system.dataset.profiles)
        path = Path(settings.data_dir) / "bench-requests"
        rng = random.Random(SEED)
        requests = [pb.RetrieveRequest(user_id=rng.choice(users), k=K) for _ in range(1_000)]
        path.write_bytes(b"\n".join(base64.b64encode(r.SerializeToString()) for r in requests))
        child, by_towers = deployment.worker_child(is_ready, "worker-2", **TOWERS)
        deployment.supervisor.start(child)
        workers = {"worker": by_towers, "blended worker": system.address}
        with ExitStack() as stack:
            addresses = {}
            for name, address in workers.items():
                with Client(address) as client:
                    ready = client.retrieve(requests[0].user_id, K)
                addresses[_echo_of(name)] = stack.enter_context(echo_worker(ready))
                addresses[name] = address
            found = measure(addresses, path)
            rate = OPEN_SHARE * float(np.median([one.a_second for one in found["worker", 1]]))
            loop = generate(by_towers, path, rate=rate)
            child, forked = deployment.worker_child(
                is_ready, "worker-3", worker_processes=str(os.cpu_count()), **TOWERS
            )
            deployment.supervisor.start(child)
            processes = measure({"worker": by_towers, "processes": forked}, path)
        data = system.dataset.name
    rows = [*rows_of(found), *open_rows(loop, rate), *process_rows(processes)]
    folder = Path(settings.data_dir) / "bench"
    return report("serving", rows, folder, data=data, rounds=ROUNDS, seconds=SECONDS, k=K)


def _echo_of(worker: str) -> str:
    return worker.replace("worker", "echo")


def measure(addresses: dict[str, str], path: Path) -> dict[tuple[str, int], list[Found]]:
    """(name, connections) -> a phase in each round, all of them in turns."""
    found: dict[tuple[str, int], list[Found]] = {}
    for _ in range(ROUNDS):
        for connections in (1, MANY):
            for name, address in addresses.items():
                phase = generate(address, path, connections=connections)
                found.setdefault((name, connections), []).append(phase)
    return found


def rows_of(found: dict[tuple[str, int], list[Found]]) -> list[dict[str, Any]]:
    """The workers beside their echo workers."""
    rows = []
    for (name, connections), phases in found.items():
        for percent in (50, 99):
            ms = float(np.median([phase.percentile(percent) for phase in phases]))
            rows.append(row(f"{name}, {connections} connections, p{percent}", ms, "ms"))
        a_second = float(np.median([phase.a_second for phase in phases]))
        rows.append(row(f"{name}, {connections} connections", a_second, "q/s"))
    for name, (most, least) in LIMITS.items():
        echo = _echo_of(name)
        p50 = ratio(found[name, 1], found[echo, 1], lambda phase: phase.percentile(50))
        many = ratio(found[name, MANY], found[echo, MANY], lambda phase: phase.a_second)
        both = f"{name} : {echo}"
        rows.append(row(f"p50 at one connection, {both}", p50, "×", f"≤ {most}", p50 <= most))
        rows.append(
            row(f"throughput at {MANY} connections, {both}", many, "×", f"≥ {least}", many >= least)
        )
    failed = sum(phase.failed for phases in found.values() for phase in phases)
    rows.append(row("calls that failed", failed, "", "0", not failed))
    return rows


def open_rows(found: Found, rate: float) -> list[dict[str, Any]]:
    """The open loop."""
    return [
        row("open loop, calls due", rate, "a second"),
        row("open loop, p50 from when a call was due", found.percentile(50), "ms"),
        row("open loop, p99", found.percentile(99), "ms"),
        row("open loop, calls that failed", found.failed, "", "0", not found.failed),
    ]


def process_rows(found: dict[tuple[str, int], list[Found]]) -> list[dict[str, Any]]:
    """As many processes as cores beside one; the load needs a core, too."""
    times = ratio(found["processes", MANY], found["worker", MANY], lambda phase: phase.a_second)
    cores = os.cpu_count()
    name = f"throughput at {MANY} connections, {cores} processes : one"
    return [row(name, times, "×", "≥ 1.7", times >= 1.7)]


def ratio(of: list[Found], to: list[Found], figure: Callable[[Found], float]) -> float:
    """The median over the rounds of one figure, in relation to the other's of the same round."""
    return float(np.median([figure(a) / figure(b) for a, b in zip(of, to, strict=True)]))


@contextmanager
def echo_worker(answer: pb.RetrieveResponse) -> Iterator[str]:
    """Its address."""
    argv = [sys.executable, "-m", "benchmarks.serving", "echo"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(base64.b64encode(answer.SerializeToString()).decode() + "\n")
        server.stdin.flush()
        yield server.stdout.readline().strip()
        server.stdin.close()


def echo() -> int:
    """Serve the answer that stdin gives until stdin ends; the address goes to stdout."""
    ready = pb.RetrieveResponse.FromString(base64.b64decode(sys.stdin.readline()))
    settings = Settings(worker_port=0)
    service = RetrievalService(settings)

    def answer(request: object, context: object, send: Callable[[Any], None]) -> None:
        send(ready)

    service.answer = answer  # type: ignore[method-assign]
    server = WorkerServer(settings, service)
    print(server.address, flush=True)
    sys.stdin.read()
    server.stop(0)
    return 0


def generate(address: str, path: Path, *, connections: int = 0, rate: float = 0.0) -> Found:
    """A phase of load by a process of its own, closed or open."""
    argv = [sys.executable, "-m", "benchmarks.serving", "load", address, str(path)]
    done = subprocess.run(
        [*argv, str(connections), str(rate)], check=True, capture_output=True, timeout=600
    )
    return Found(**json.loads(done.stdout))


async def load_worker(address: str, path: str, connections: str, rate: str) -> int:
    """Generate load for `SECONDS` after a warm-up; what was seen goes to stdout as JSON."""
    requests = [base64.b64decode(line) for line in Path(path).read_bytes().splitlines()]
    count = int(connections) or MANY
    channels = [
        grpc.aio.insecure_channel(
            address, options=[("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
        )
        for _ in range(count)
    ]
    calls = [channel.unary_unary(METHOD) for channel in channels]
    rng, ms, failed = random.Random(SEED), list[float](), 0

    async def ask(call: Callable[..., Awaitable[bytes]], due_s: float) -> None:
        nonlocal failed
        try:
            await call(rng.choice(requests), timeout=10)
            ms.append((time.perf_counter() - due_s) * 1000)
        except grpc.RpcError:
            failed += 1

    async def one_after_the_other(call: Callable[..., Awaitable[bytes]], until_s: float) -> None:
        while (now_s := time.perf_counter()) < until_s:
            await ask(call, now_s)

    async def at_their_times(until_s: float) -> None:
        due_s, running = time.perf_counter(), set[asyncio.Task[None]]()
        while due_s < until_s:
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            task = asyncio.create_task(ask(rng.choice(calls), due_s))
            running.add(task)
            task.add_done_callback(running.discard)
            due_s += rng.expovariate(float(rate))
        await asyncio.gather(*running)

    begun = time.perf_counter()
    for seconds in (min(1.0, SECONDS / 4), SECONDS):
        ms.clear()
        begun = time.perf_counter()
        if int(connections):
            until_s = begun + seconds
            await asyncio.gather(*(one_after_the_other(call, until_s) for call in calls))
        else:
            await at_their_times(begun + seconds)
    print(json.dumps({"ms": ms, "wall_s": time.perf_counter() - begun, "failed": failed}))
    for channel in channels:
        await channel.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
