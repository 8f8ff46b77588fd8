"""How long does a partition wait when ingest processes come and go? `make bench-rebalance`.

A Kafka and a Valkey of its own, a load at a steady rate; 1 ingest process, then 4, then 2
(SIGTERM), then one of them killed with -9. A partition's pause is the longest time in which records
waited and none was applied, by its fence, looked at every 20 ms. At the end the tests' oracle
recomputes all state from the topics: nothing lost, nothing doubled.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition
from kafka.errors import KafkaError

from benchmarks.ingest_measures import Ingest, load
from benchmarks.report import report, row
from cli.commands import replay_file
from eddyline.errors import Unavailable
from eddyline.kafka import clients, topics
from eddyline.settings.loader import Settings
from eddyline.settings.loader import load as load_settings
from eddyline.stores.redis import RedisStore
from eddyline.stores.state_store import Source
from sandbox.datasets import synthetic
from sandbox.processes import Deployment, wait_until_applied
from sandbox.servers.local_servers import local_servers, log_dir
from sandbox.servers.supervisor import Supervisor
from tests import oracle
from tests.chaos.scene import small_generation

RATE = int(os.environ.get("RATE", "800"))
PHASE_S = float(os.environ.get("PHASE_S", "15"))
LOOK_S = 0.02
# (name, "start", "term" or "kill", how many processes)
Steps = list[tuple[str, str, int]]
SHARED_S = 60.0
APPLIED_S = 120.0
USERS = 2_000


@dataclass
class Looks:
    """Observations of the clicks: time, and per partition the last applied offset and the end."""

    times: list[float] = field(default_factory=list)
    fences: list[list[int]] = field(default_factory=list)
    ends: list[list[int]] = field(default_factory=list)

    def pauses_ms(self, begin: float, end: float) -> list[float]:
        """The longest pause of each partition between two times."""
        chosen = [n for n, at in enumerate(self.times) if begin <= at <= end]
        return [self._pause_ms(chosen, p) for p in range(len(self.fences[0]))]

    def _pause_ms(self, chosen: list[int], partition: int) -> float:
        longest, since, last = 0.0, None, None
        for n in chosen:
            at, fence = self.times[n], self.fences[n][partition]
            if fence != last and since is not None:
                longest = max(longest, at - since)
            if fence != last or self.ends[n][partition] <= fence + 1:
                since = None
            if since is None and self.ends[n][partition] > fence + 1:
                since = at
            last = fence
        if since is not None and chosen:
            longest = max(longest, self.times[chosen[-1]] - since)
        return longest * 1_000


class Watcher:
    """Reads fences and ends of `clicks` every 20 ms, in a thread of its own."""

    def __init__(self, settings: Settings) -> None:
        self.looks = Looks()
        self._settings = settings
        self._stop = threading.Event()
        self._failed: list[Exception] = []
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look no more. Raises what ended the watch before."""
        self._stop.set()
        self._thread.join(10)
        if self._failed:
            raise self._failed[0]

    def _run(self) -> None:
        store, looks = RedisStore(self._settings), self.looks
        partitions = range(self._settings.clicks_partitions)
        consumer = KafkaConsumer(**clients.client_options(self._settings), group_id=None)
        at = [TopicPartition(self._settings.prefixed(topics.CLICKS), p) for p in partitions]
        try:
            while not self._stop.wait(LOOK_S):
                ends = consumer.end_offsets(at)
                found = [
                    store.fences(Source(topics.CLICKS, p), [f"u{p}"])[f"u{p}"] for p in partitions
                ]
                looks.times.append(time.monotonic())
                looks.fences.append([-1 if fence is None else fence.offset for fence in found])
                looks.ends.append([ends[one] for one in at])
        except Exception as error:
            self._failed.append(error)
        finally:
            consumer.close()
            store.close()


def owners(settings: Settings, admin: KafkaAdminClient) -> list[int]:
    """How many partitions of clicks each member of ingest's group owns now; not members without."""
    group, topic = settings.prefixed("eddyline-ingest"), settings.prefixed(topics.CLICKS)
    try:
        members = admin.describe_groups([group])[group]["members"]
    except KafkaError:  # the group is being made
        return []
    counts = [
        len(assigned["partitions"])
        for member in members
        for assigned in (member["member_assignment"] or {}).get("assigned_partitions", ())
        if assigned["topic"] == topic
    ]
    return sorted(n for n in counts if n)


def until_shared(settings: Settings, processes: int) -> float:
    """Return once so many processes own all the partitions; the seconds it took."""
    begun = time.monotonic()
    admin = KafkaAdminClient(**clients.client_options(settings))
    try:
        while True:
            counts = owners(settings, admin)
            if len(counts) == processes and sum(counts) == settings.clicks_partitions:
                return time.monotonic() - begun
            if time.monotonic() - begun > SHARED_S:
                raise RuntimeError(
                    f"{processes} processes ought to share the partitions, it is {counts}"
                )
            time.sleep(0.1)
    finally:
        admin.close()


@dataclass(frozen=True)
class Phase:
    """One change and what followed. shared_s: until the new members owned everything."""

    name: str
    pauses_ms: list[float]
    shared_s: float


def change_hands(settings: Settings, steps: Steps, rate: int, phase_s: float) -> list[Phase]:
    """Run the steps under load, and return when all is applied.

    steps: the first one starts processes, and the load once they own all partitions
    """
    running: list[Ingest] = []
    phases: list[tuple[str, float, float]] = []
    shared: list[float] = []
    count = int(rate * phase_s * (len(steps) + 1))
    sending: Any = None
    watcher: Watcher | None = None
    try:
        for name, what, how_many in steps:
            begun = time.monotonic()
            if what == "start":
                running += [Ingest(settings) for _ in range(how_many)]
            else:
                leaving, running = running[:how_many], running[how_many:]
                number = signal.SIGTERM if what == "term" else signal.SIGKILL
                for ingest in leaving:
                    os.kill(ingest.pid, number)
            shared.append(until_shared(settings, len(running)))
            if sending is None:
                sending = load(
                    settings,
                    tag="hands",
                    count=count,
                    rate=rate,
                    users=USERS,
                    item_prefix="f",
                    items=300,
                )
                watcher = Watcher(settings)
                time.sleep(2)  # the generator starts
                begun = time.monotonic()
            time.sleep(max(0.0, begun + phase_s - time.monotonic()))
            phases.append((name, begun, time.monotonic()))
        sending.result(phase_s * 4 + 60)
        _applied(settings)
    finally:
        if watcher is not None:
            watcher.stop()
        for ingest in running:
            ingest.stop()
    looks = watcher.looks if watcher is not None else Looks()
    return [
        Phase(name, looks.pauses_ms(begun, ended), took)
        for (name, begun, ended), took in zip(phases, shared, strict=True)
    ]


def _applied(settings: Settings) -> None:
    deadline = time.monotonic() + APPLIED_S
    while True:
        try:
            wait_until_applied(settings, timeout_s=APPLIED_S)
            return
        except Unavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


STEPS = [
    ("1 process", "start", 1),
    ("1 → 4", "start", 3),
    ("4 → 2 (SIGTERM)", "term", 2),
    ("2 → 1 (kill -9)", "kill", 1),
]


def main() -> int:
    """Run and report; the exit code."""
    folder = Path(load_settings().data_dir) / "bench"
    dataset = synthetic.generate(items=300, users=120, clicks=6_000, seed=7)
    with tempfile.TemporaryDirectory(prefix="eddyline-bench-") as home:
        base = Settings(data_dir=home, worker_port=0)
        manifest = small_generation(base.bundles, dataset)
        with (
            Supervisor(log_dir(base)) as supervisor,
            local_servers(base, supervisor, owner="bench") as servers,
        ):
            settings = msgspec.structs.replace(servers, namespace="hands")
            Deployment(settings, supervisor).prepare(manifest)
            replay_file.send(settings, dataset.items)
            phases = change_hands(settings, STEPS, RATE, PHASE_S)
            found = oracle.compare(settings)
    rows = []
    for phase in phases:
        rows.append(row(f"{phase.name}: longest pause of a partition", max(phase.pauses_ms), "ms"))
        rows.append(row("  median of the partitions", float(np.median(phase.pauses_ms)), "ms"))
        rows.append(row("  until the partitions had their new owners", phase.shared_s, "s"))
    wrong = len(found.differences)
    rows.append(
        row(
            "lists, counts, embeddings, … that differ from the oracle's",
            wrong,
            "",
            "= 0",
            not wrong,
        )
    )
    rows.append(row("  compared", sum(found.counts.values()), "values"))
    for line in found.differences[:20]:
        print(line)
    return report("rebalance", rows, folder, rate=RATE, phase_s=PHASE_S)


if __name__ == "__main__":
    sys.exit(main())
