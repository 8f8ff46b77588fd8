"""Does a worker stay on the air while callers and servers misbehave? `make soak-starve`.

One worker on a real Kafka and a Redis Cluster of three nodes, with 28 full popularity buckets that
change all the time. SOAK_S=180 seconds of this at once: ingest stands still and 16 callers wait for
clicks that it has not applied; four reflection and four health streams are open; one Redis node is
dead (NODE=hang: it hangs), and some of its users ask. A process of its own sends plain queries of
users whose node lives, before, meanwhile and afterwards, and checks the health ten times a second.
A longer soak has a quiet time after every ten minutes, so that both see the same machine.
It checks an idle health server of its own process in the same way: what that one needs is the
machine's doing.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import HealthServicer
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from benchmarks.report import report, row
from cli.commands import replay_file
from eddyline.kafka import producers
from eddyline.kafka.producers import now_ms, sent_to
from eddyline.schema.events import Click, shifted_to_now
from eddyline.schema.partitioning import partition_of, user_slot
from eddyline.settings.loader import Settings, load
from eddyline.stores.redis import RedisStore
from eddyline.stores.state_store import Fence, LogId, Source
from sandbox.datasets import synthetic
from sandbox.processes import Deployment, wait_until_applied
from sandbox.servers.local_servers import local_servers
from sandbox.servers.supervisor import Supervisor
from serving.rpc.client import CallFailed, Client, is_ready, open_channel
from tests.chaos.scene import small_generation
from tests.integration.redis_servers import RealCluster, Server, real_cluster

SOAK_S = float(os.environ.get("SOAK_S", "180"))
# The soak in parts, with a quiet time before the first one and after each.
ROUNDS = max(1, round(SOAK_S / 600))
QUIET_S = min(60.0, max(20.0, SOAK_S / 4))
WAITERS, REFLECTIONS, WATCHES = 16, 4, 4
QUERIES_S, HEALTH_S = 0.02, 0.1
HEALTH_MS_MAX = 200
BUCKETS = 28
PARTITIONS = 6
SEED = 11
HANG = os.environ.get("NODE", "kill") == "hang"


def main() -> int:
    """Run and report; the exit code."""
    if sys.argv[1:2] == ["probe"]:
        print(json.dumps(probe(sys.argv[2], sys.argv[3].split(","), float(sys.argv[4]))))
        return 0
    if sys.argv[1:2] == ["idle"]:
        return serve_idle()
    folder = load().data_dir
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cluster = stack.enter_context(
            real_cluster(work / "redis", cluster_require_full_coverage="no")
        )
        quiet, starved, events = run(work, cluster, stack)
    limits = {name: float(np.percentile(quiet["queries"], p)) for name, p in PERCENTILES.items()}
    rows = [row("plain queries, quiet", len(quiet["queries"]), "")]
    rows.append(row("plain queries, starved", len(starved["queries"]), ""))
    for name, percent in PERCENTILES.items():
        took = float(np.percentile(starved["queries"], percent))
        ratio = took / limits[name]
        rows.append(row(f"plain query, {name}, quiet", limits[name], "ms"))
        rows.append(row(f"plain query, {name}, starved", took, "ms"))
        if name == "p99":
            rows.append(row("p99, starved : quiet", ratio, "×", "≤ 2", ratio <= 2))
    failed = starved["failed"] + quiet["failed"]
    rows.append(row("plain queries that failed", len(failed), "", "0", not failed))
    rows.append(row("health checks, starved", len(starved["health"]), ""))
    rows.append(row("slowest health check, quiet", max(quiet["health"]), "ms"))
    slowest = max(starved["health"])
    rows.append(
        row(
            "slowest health check, starved",
            slowest,
            "ms",
            f"≤ {HEALTH_MS_MAX}",
            slowest <= HEALTH_MS_MAX,
        )
    )
    for name, found in (
        ("health checks", starved["health"]),
        ("of an idle server", starved["idle"]),
    ):
        rows.append(row(f"{name}, p99.9", float(np.percentile(found, 99.9)), "ms"))
        rows.append(
            row(f"{name}, above {HEALTH_MS_MAX} ms", sum(ms > HEALTH_MS_MAX for ms in found), "")
        )
    rows.append(row("slowest check of an idle server", max(starved["idle"]), "ms"))
    rows += [row(name, count, "") for name, count in sorted(events.items())]
    return report("starve", rows, Path(folder) / "bench", failed=failed[:10])


PERCENTILES = {"p50": 50, "p99": 99}


def run(
    work: Path, cluster: RealCluster, stack: ExitStack
) -> tuple[dict[str, Any], dict[str, Any], dict[str, int]]:
    """(figures of the quiet time, of the soak, what else happened)."""
    dataset = synthetic.generate(items=2_000, users=600, clicks=12_000, seed=SEED)
    (work / "bundles").mkdir()
    manifest = small_generation(work / "bundles", dataset)
    settings = Settings(
        redis_url=cluster.url,
        redis_cluster=True,
        clicks_partitions=PARTITIONS,
        items_partitions=2,
        data_dir=str(work / "data"),
        bundle_dir=str(work / "bundles"),
        namespace="starve",
    )
    supervisor = Supervisor(work / "data" / "logs")
    live = stack.enter_context(local_servers(settings, supervisor, owner="the soak"))
    deployment = Deployment(live, supervisor)
    deployment.prepare(manifest)
    more = {"clicks_partitions": str(PARTITIONS), "items_partitions": "2"}
    worker, address = deployment.worker_child(is_ready, **more)
    supervisor.start(deployment.ingest_child(**more), worker)
    replay_file.send(live, dataset.items)
    replay_file.send(live, shifted_to_now(dataset.clicks, now_ms()))
    wait_until_applied(live, timeout_s=120)
    dead = next(s for s in cluster.servers if s.port != cluster.owner("i0").port)
    users = sorted(dataset.profiles)
    slots = {f"u{p}": cluster.owner(f"u{p}").port for p in range(PARTITIONS)}
    lost = [u for u in users if slots[user_slot(partition_of(u, PARTITIONS))] == dead.port]
    plain = [user for user in users if user not in lost]
    starved: dict[str, Any] = {}
    events: dict[str, int] = {}
    with counting(live):
        quiet = probing(address, plain, QUIET_S)
        for _ in range(ROUNDS):
            ingest = supervisor.pids()["ingest"]
            os.kill(ingest, signal.SIGSTOP)
            try:
                clicked = dataset.items[0].item_id
                tokens = {user: click(live, user, clicked) for user in plain[:WAITERS]}
                break_down(dead)
                time.sleep(1.0)
                with misbehaving(address, tokens, lost) as found:
                    add(starved, probing(address, plain, SOAK_S / ROUNDS))
                for what, count in found.items():
                    events[what] = events.get(what, 0) + count
            finally:
                os.kill(ingest, signal.SIGCONT)
                repair(dead)
            cluster.wait_ok()
            wait_until_applied(live, timeout_s=120)
            time.sleep(2.0)
            add(quiet, probing(address, plain, QUIET_S))
    return quiet, starved, events


def probe(address: str, users: list[str], seconds: float) -> dict[str, Any]:
    """Plain queries and health checks at a steady rate.

    queries, health, idle: milliseconds of each, `idle` of an idle server; failed: sentences
    """
    found: dict[str, Any] = {"queries": [], "health": [], "idle": [], "failed": []}
    stop = threading.Event()

    def check(name: str, address: str) -> None:
        with open_channel(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            while not stop.wait(HEALTH_S):
                begun = time.perf_counter()
                try:
                    stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
                except grpc.RpcError as error:
                    found["failed"].append(f"{name}: {error.code().name}")
                found[name].append((time.perf_counter() - begun) * 1000)

    with idle_server() as idle:
        targets = {"health": address, "idle": idle}
        threads = [threading.Thread(target=check, args=pair) for pair in targets.items()]
        for thread in threads:
            thread.start()
        rng, until = random.Random(SEED), time.monotonic() + seconds
        with Client(address) as client:
            while (now := time.monotonic()) < until:
                begun = time.perf_counter()
                try:
                    client.retrieve(rng.choice(users), 10)
                    found["queries"].append((time.perf_counter() - begun) * 1000)
                except CallFailed as error:
                    found["failed"].append(str(error))
                time.sleep(max(0.0, now + QUERIES_S - time.monotonic()))
        stop.set()
        for thread in threads:
            thread.join(10)
    return found


@contextmanager
def idle_server() -> Iterator[str]:
    """The address of a health server in a process that does nothing else."""
    argv = [sys.executable, "-m", "benchmarks.starve", "idle"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None and server.stdout is not None
        yield server.stdout.readline().strip()
        server.stdin.close()


def serve_idle() -> int:
    """Serve health checks until stdin ends; the address goes to stdout."""
    server = grpc.server(ThreadPoolExecutor(2))
    health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(), server)
    print(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}", flush=True)
    server.start()
    sys.stdin.read()
    server.stop(0)
    return 0


def probing(address: str, users: list[str], seconds: float) -> dict[str, Any]:
    """`probe` in a process of its own: the callers of this one do not slow its clock."""
    argv = [sys.executable, "-m", "benchmarks.starve", "probe", address, ",".join(users)]
    done = subprocess.run(
        [*argv, str(seconds)], check=True, capture_output=True, timeout=seconds + 60
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def add(to: dict[str, Any], found: dict[str, Any]) -> None:
    """Append every list of what a probe found."""
    for name, values in found.items():
        to[name] = to.get(name, []) + values


def break_down(server: Server) -> None:
    """Kill it, or have it hang."""
    if HANG:
        server.signal(signal.SIGSTOP)
    else:
        server.kill()


def repair(server: Server) -> None:
    """Undo `break_down`."""
    if HANG:
        server.signal(signal.SIGCONT)
    else:
        server.start()


def click(settings: Settings, user: str, item: str) -> tuple[int, int]:
    """Send one click; its partition and offset."""
    producer = producers.make_producer(settings)
    try:
        event = Click(event_id=uuid.uuid4().hex, user_id=user, item_id=item, at_ms=now_ms())
        return sent_to(producers.send_click(producer, settings, event), settings)
    finally:
        producer.close(timeout=5)


@contextmanager
def counting(settings: Settings) -> Iterator[None]:
    """28 full buckets; the newest changes four times a second, under a fence of its own."""
    store, source, log = RedisStore(settings), Source("soak", 0), LogId("soak", "soak")
    newest = now_ms() // (1_000 * settings.popular_bucket_s)
    rng, fence = random.Random(SEED), None
    names = [f"popular-{n:06d}" for n in range(10_000)]
    for offset in range(BUCKETS):
        counts = {name: rng.randrange(1, 10_000) for name in rng.sample(names, 4_000)}
        after, bucket = Fence(offset, log), newest - offset
        store.count_clicks("i0", source, fence, after, {bucket: counts}, BUCKETS)
        fence = after
    stop, written = threading.Event(), fence

    def write() -> None:
        nonlocal written
        while not stop.wait(0.25):
            after = Fence(written.offset + 1 if written else 0, log)
            counts = dict.fromkeys(rng.sample(names, 20), 1_000)
            store.count_clicks("i0", source, written, after, {newest: counts}, BUCKETS)
            written = after

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(10)
        store.close()


@contextmanager
def misbehaving(
    address: str, tokens: dict[str, tuple[int, int]], lost: list[str]
) -> Iterator[dict[str, int]]:
    """All of it at once; counts what the callers saw."""
    stop, events, lock = threading.Event(), dict[str, int](), threading.Lock()

    def note(what: str) -> None:
        with lock:
            events[what] = events.get(what, 0) + 1

    def wait(user: str, token: tuple[int, int]) -> None:
        with Client(address) as client:
            while not stop.is_set():
                try:
                    answer = client.retrieve(user, 10, after=token, wait_ms=2_000)
                    note("waits" if answer.freshness.after.waited_ms > 1_500 else "short waits")
                except CallFailed as error:
                    note(f"waiter: {error.code}")

    def ask_dead() -> None:
        rng = random.Random(SEED)
        with Client(address) as client:
            while not stop.wait(0.2):
                try:
                    answer = client.retrieve(rng.choice(lost), 10)
                    note("answers without Redis" if answer.missing else "answers with Redis")
                except CallFailed as error:
                    note(f"user of the dead node: {error.code}")

    def reflect() -> None:
        def ask() -> Iterator[Any]:
            yield reflection_pb2.ServerReflectionRequest(list_services="")
            stop.wait(300)

        keep_open(lambda c: reflection_pb2_grpc.ServerReflectionStub(c).ServerReflectionInfo(ask()))

    def watch() -> None:
        request = health_pb2.HealthCheckRequest()
        keep_open(lambda c: health_pb2_grpc.HealthStub(c).Watch(request))

    def keep_open(call: Callable[[grpc.Channel], Any]) -> None:
        with open_channel(address) as channel:
            while not stop.is_set():
                stream = call(channel)
                calls.append(stream)
                with suppress(grpc.RpcError):
                    for _ in stream:
                        pass
                note("streams that the worker ended")
                stop.wait(0.1)

    calls: list[Any] = []
    targets: list[Callable[[], None]] = [ask_dead, *[reflect] * REFLECTIONS, *[watch] * WATCHES]
    threads = [threading.Thread(target=target, daemon=True) for target in targets]
    threads += [threading.Thread(target=wait, args=pair, daemon=True) for pair in tokens.items()]
    for thread in threads:
        thread.start()
    try:
        yield events
    finally:
        stop.set()
        for stream in calls:
            stream.cancel()
        for thread in threads:
            thread.join(10)


if __name__ == "__main__":
    sys.exit(main())
