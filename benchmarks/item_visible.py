"""How long until a changed item is in an answer? `make bench-item_visible`; N=100000 items by
default.

A Kafka and a Valkey of its own; one ingest, one worker whose graph is built and is rebuilt as
changes come, a load process that changes RATE items a second, every other one to another vector,
and QUERIES calls a second. Beside that, five times a second, one item is put where a user's next
answer must have it: in turn a new one and one that was somewhere else. Once a consumer of
librdkafka has seen its record committed, that user's Retrieve is called until it is in (produced →
the answer is here). Then the item is deleted, and the same until it is gone. To call before the
record is committed would only take CPU from those at work on it.
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from confluent_kafka import OFFSET_END, Consumer, Producer, TopicPartition

from benchmarks import item_catalogue
from benchmarks.ingest_measures import Running, cpu_s
from benchmarks.item_load import Load
from benchmarks.report import report, row
from eddyline.generations import Manifest
from eddyline.kafka import topics
from eddyline.kafka.producers import now_ms
from eddyline.schema import events
from eddyline.schema.events import Click, Item
from eddyline.schema.item_record import decode_record
from eddyline.schema.partitioning import partition_of
from eddyline.settings.loader import Settings, load
from sandbox.processes import Deployment, wait_until_applied
from sandbox.servers.local_servers import local_servers, log_dir
from sandbox.servers.supervisor import Supervisor
from serving.rpc.client import Client, is_ready

N = int(os.environ.get("N", "100000"))
RATE = float(os.environ.get("RATE", "500"))
SECONDS = float(os.environ.get("S", "60"))
PROBES_S = 5.0
QUERIES = float(os.environ.get("QUERIES", "50"))
ANCHORS = 50
K = 10
# The partition of all items that are put and deleted.
PROBED = 0
# The first seconds of the load are a cold start: connections, caches, the first transactions.
WARM_S = 5.0
POLL_S = 0.001
# Longer than this is a fault, not a latency.
GIVE_UP_S = 10.0
BUILT_S = 900.0
BOUNDS_MS = {50: 15, 99: 50}
HOPS = ("ingest", "commit", "replica", "answer")


@dataclass
class Seen:
    """One change on its way, microseconds since 1970; 0 is not yet. written: by ingest's clock.

    offset: in `items`, the item's version
    """

    produced: int
    written: int = 0
    committed: int = 0
    received: int = 0
    answered: int = 0
    offset: int = -1

    @property
    def total_ms(self) -> float:
        """Produced to answered."""
        return (self.answered - self.produced) / 1000

    def hops(self) -> dict[str, float]:
        """Milliseconds of each step. ingest: until its record; replica: until it is found."""
        at = (self.produced, self.written, self.committed, self.received, self.answered)
        return {hop: (b - a) / 1000 for hop, a, b in zip(HOPS, at, at[1:], strict=False)}


class Tail:
    """Notes when records of `item-vectors` were committed. One thread of its own."""

    def __init__(self, settings: Settings) -> None:
        self._seen: dict[tuple[str, int], tuple[int, int]] = {}
        self._came = threading.Condition()
        self._stop = threading.Event()
        self._consumer = Consumer(
            {
                "bootstrap.servers": settings.kafka_bootstrap_servers,
                "group.id": "bench",
                "enable.auto.commit": False,
                "isolation.level": "read_committed",
                "fetch.wait.max.ms": 500,
            }
        )
        topic = settings.prefixed(topics.item_vectors("1"))
        # Nobody but this benchmark wants to know: the less it fetches, the better.
        self._consumer.assign([TopicPartition(topic, PROBED, OFFSET_END)])
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def wait(self, item_id: str, offset: int, timeout_s: float) -> tuple[int, int]:
        """(written, committed) of an item's record of this version.

        Raises RuntimeError where none comes.
        """
        with self._came:
            if not self._came.wait_for(lambda: (item_id, offset) in self._seen, timeout_s):
                raise RuntimeError(f"{item_id} was not published within {timeout_s:.0f} s")
            return self._seen[item_id, offset]

    def close(self) -> None:
        """Stop."""
        self._stop.set()
        self._thread.join(5)
        self._consumer.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            message = self._consumer.poll(0.2)
            if message is None or message.error():
                continue
            key = message.key()
            if key.startswith(b"probe-"):
                record = decode_record(key, message.value())
                with self._came:
                    self._seen[record.item_id, record.offset] = (record.written_us, _now_us())
                    self._came.notify_all()


class Prober:
    """Puts items near anchors and queries for them."""

    def __init__(self, settings: Settings, address: str) -> None:
        self._settings = settings
        self._tail = Tail(settings)
        self._client = Client(address)
        self._producer = Producer(
            {"bootstrap.servers": settings.kafka_bootstrap_servers, "linger.ms": 0}
        )
        self.paths: Counter[str] = Counter()

    def close(self) -> None:
        """Let go of the connections."""
        self._client.close()
        self._tail.close()
        self._producer.flush(1)

    def click_anchors(self) -> None:
        """One user for each anchor, who clicked nothing else."""
        topic, partitions = self._settings.prefixed(topics.CLICKS), self._settings.clicks_partitions
        for n in range(ANCHORS):
            click = Click(
                user_id=f"user-{n}", item_id=f"anchor-{n}", at_ms=now_ms(), event_id=f"click-{n}"
            )
            partition = partition_of(click.user_id, partitions)
            self._producer.produce(topic, events.encode(click), click.user_id.encode(), partition)
        self._producer.flush(30)

    def put(self, number: int, item_id: str) -> Seen:
        """Put an item near the anchor `number`; how long until the anchor's user gets it."""
        seen = self._sent(item_id, item_catalogue.near(number, item_id))
        return self._until(number, item_id, seen, found_expected=True)

    def away(self, item_id: str) -> None:
        """Put an item somewhere else, so that its next change is no first one."""
        self._sent(item_id, msgspec.structs.replace(item_catalogue.item(0), item_id=item_id))

    def delete(self, number: int, item_id: str) -> Seen:
        """Delete it, and how long until it was gone."""
        return self._until(number, item_id, self._sent(item_id, None), found_expected=False)

    def _sent(self, item_id: str, item: Item | None) -> Seen:
        value = None if item is None else events.encode(item)
        partition = partition_of(item_id, self._settings.items_partitions)
        seen = Seen(_now_us())

        def sent(error: Any, message: Any) -> None:
            if error is None:
                seen.offset = message.offset()

        self._producer.produce(
            self._settings.prefixed(topics.ITEMS), value, item_id.encode(), partition, sent
        )
        self._producer.flush(GIVE_UP_S)
        return seen

    def _until(self, number: int, item_id: str, seen: Seen, *, found_expected: bool) -> Seen:
        seen.written, seen.committed = self._tail.wait(item_id, seen.offset, GIVE_UP_S)
        deadline = time.monotonic() + GIVE_UP_S
        while True:
            answer = self._client.retrieve(f"user-{number}", K)
            now_us = _now_us()
            found = [item for item in answer.items if item.item_id == item_id]
            if bool(found) == found_expected:
                break
            if time.monotonic() > deadline:
                raise RuntimeError(f"{item_id} after {GIVE_UP_S:.0f} s: found is {bool(found)}")
            time.sleep(POLL_S)
        seen.received, seen.answered = answer.freshness.worker.received_us, now_us
        if found:
            self.paths[found[0].path] += 1
        return seen


def _now_us() -> int:
    return time.time_ns() // 1000


class Queries:
    """Calls at a steady rate, of users of the anchors. One thread of its own."""

    def __init__(self, address: str) -> None:
        self.times_ms: list[float] = []
        self._address = address
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop."""
        self._stop.set()
        self._thread.join(5)

    def _run(self) -> None:
        begun, n = time.monotonic(), 0
        with Client(self._address) as client:
            while not self._stop.wait(max(0.0, begun + n / QUERIES - time.monotonic())):
                began = time.perf_counter()
                client.retrieve(f"user-{n % ANCHORS}", K)
                self.times_ms.append(1000 * (time.perf_counter() - began))
                n += 1


def built(client: Client, items: int) -> None:
    """Return once the graph holds what the bundle brought.

    Raises RuntimeError where that takes too long.
    """
    deadline = time.monotonic() + BUILT_S
    while True:
        sizes = client.stats().index
        if (sizes.main >= 0.9 * items or items < 12_000) and not sizes.rebuilding:
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"no graph after {BUILT_S:.0f} s: {sizes}")
        time.sleep(0.5)


def probe_ids(count: int, partitions: int) -> list[str]:
    """So many ids of items of the partition that is looked at."""
    ids = (f"probe-{n}" for n in itertools.count())
    return list(itertools.islice((i for i in ids if partition_of(i, partitions) == PROBED), count))


def probe(prober: Prober, seconds: float, partitions: int) -> tuple[list[Seen], list[Seen]]:
    """(items put, items deleted), one after the other, at a steady pace."""
    put: list[Seen] = []
    gone: list[Seen] = []
    count = int(seconds * PROBES_S)
    ids = probe_ids(count + 2, partitions)
    begun = time.monotonic()
    for n in range(count):
        number, item_id = n % ANCHORS, ids[n]
        if n % 2:
            prober.away(ids[n + 2])
        time.sleep(max(0.0, begun + n / PROBES_S - time.monotonic()))
        put.append(prober.put(number, item_id))
        gone.append(prober.delete(number, item_id))
    return put, gone


def measured(
    prober: Prober, settings: Settings, pids: dict[str, int], client: Client
) -> list[dict[str, Any]]:
    """The rows: load and probes at once."""
    what = Load(rate=RATE, seconds=WARM_S + SECONDS + 5, items=N)
    sending = Running(settings, "benchmarks.item_load", msgspec.json.encode(what).decode())
    queries = Queries(client.address)
    time.sleep(WARM_S)
    before, cpu, begun = (
        client.stats().index,
        {n: cpu_s(pid) for n, pid in pids.items()},
        time.monotonic(),
    )
    put, gone = probe(prober, SECONDS, settings.items_partitions)
    took = time.monotonic() - begun
    after, share = (
        client.stats().index,
        {n: (cpu_s(pid) - cpu[n]) / took for n, pid in pids.items()},
    )
    lag = client.stats().tail.lag_records
    queries.close()
    sent = sending.result(120)
    rows = _latency_rows("item visible", put) + _latency_rows("item deleted", gone)
    named = 100 * prober.paths["towers"] / max(1, prober.paths.total())
    rows.append(row("answers by the path towers", named, "%", "100", named == 100))
    for q in (50, 99):
        rows.append(
            row(f"  a query meanwhile, p{q}", float(np.percentile(queries.times_ms, q)), "ms")
        )
    applied, least = (after.applied - before.applied) / took, 0.95 * RATE
    enough = applied >= least
    rows.append(row("  changes applied by the worker", applied, "/s", f"≥ {least:,.0f}", enough))
    rebuilds = after.rebuilds - before.rebuilds + after.rebuilding / 2
    rows.append(row("  rebuilds, one under way counts half", rebuilds, ""))
    rows.append(row("  items in the graph", after.main, f"+ {after.fresh:,} in the fresh buffer"))
    rows.append(row("  records behind at the end", lag, ""))
    rows.append(row("  load: CPU", 100 * sent["cpu_s"] / sent["seconds"], "% of a core"))
    rows += [row(f"  {name}: CPU", 100 * value, "% of a core") for name, value in share.items()]
    return rows


def _latency_rows(name: str, seen: list[Seen]) -> list[dict[str, Any]]:
    total = np.array([one.total_ms for one in seen])
    rows = []
    for q, bound in BOUNDS_MS.items():
        value = float(np.percentile(total, q))
        rows.append(row(f"{name}, p{q}", value, "ms", f"≤ {bound}", value <= bound))
    rows.append(row(f"{name}, mean", statistics.fmean(total), "ms"))
    hops = [one.hops() for one in seen]
    for hop in HOPS:
        values = [found[hop] for found in hops]
        rows += [row(f"  {hop}, p{q}", float(np.percentile(values, q)), "ms") for q in (50, 99)]
    return rows


def main() -> int:
    """Run and report; the exit code."""
    folder, begun = Path(load().data_dir) / "bench", time.monotonic()
    with tempfile.TemporaryDirectory(prefix="eddyline-bench-") as home:
        base = Settings(data_dir=home, worker_port=0, namespace="item")
        item_catalogue.write(base.bundles / "1", N, ANCHORS)
        with (
            Supervisor(log_dir(base)) as supervisor,
            local_servers(base, supervisor, owner="bench") as live,
        ):
            deployment = Deployment(live, supervisor)
            deployment.prepare(
                Manifest(
                    generation="1", bundle="1", dimension=item_catalogue.D, created_ms=now_ms()
                )
            )
            worker, address = deployment.worker_child(is_ready, snapshot_interval_s="0")
            supervisor.start(deployment.ingest_child(), worker)
            supervisor.wait("worker", timeout_s=120)
            prober = Prober(live, address)
            with Client(address) as client:
                prober.click_anchors()
                wait_until_applied(live, timeout_s=60)
                built(client, N)
                rows = measured(prober, live, supervisor.pids() | {"bench": os.getpid()}, client)
            prober.close()
    more = {"items": N, "rate": RATE, "seconds": round(time.monotonic() - begun)}
    return report("item_visible", rows, folder, **more)


if __name__ == "__main__":
    sys.exit(main())
