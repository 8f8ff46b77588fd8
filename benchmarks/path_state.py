"""What the state of the recall paths costs ingest: `make bench-path_state`, N events a run.

The handler of clicks in this process, without Kafka and micro-steps, writes to a real Valkey. Runs
without that state, with the sums by events, and with the co-visitation rows too take turns, REPEATS
times. CPU of this process and of Valkey, after a fifth of the events.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.report import report, row
from eddyline.kafka.topics import CLICKS, SOURCES
from eddyline.schema import events
from eddyline.schema.events import Click
from eddyline.schema.partitioning import partition_of
from eddyline.settings.loader import Settings
from eddyline.settings.loader import load as load_settings
from eddyline.stores.redis import RedisStore
from eddyline.stores.state_store import LogId
from sandbox.servers.local_servers import local_servers, log_dir
from sandbox.servers.supervisor import Supervisor
from streams.handlers import Handlers, Outputs
from streams.ports import RecordBatch

N = int(os.environ.get("N", "40000"))
REPEATS = int(os.environ.get("REPEATS", "3"))
# Popular items come more often, and most users have a history of ten and more.
USERS, ITEMS = 2_000, 2_000
BATCH = 32
PATHS = {
    "none": "towers,popular,newest",
    "sums by events": "towers,popular_fast,popular_slow",
    "all": "towers,popular_fast,popular_slow,co_visits,co_visits_both,next",
}
LOG = LogId("bench", "bench")


@dataclass(slots=True)
class _Record:
    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes
    value: bytes
    headers: tuple[tuple[str, bytes | None], ...] = ()


class _NoSink:
    """Nothing is refused or forwarded here."""

    def __getattr__(self, name: str) -> Any:
        raise LookupError(f"a record went to {name}")


def batches(settings: Settings) -> Iterator[list[RecordBatch]]:
    """One batch of each partition at a time; the same for every run."""
    draw, at_ms = random.Random(7), time.time_ns() // 1_000_000
    partitions = settings.clicks_partitions
    offsets, waiting = [0] * partitions, [list[_Record]() for _ in range(partitions)]
    for n in range(N):
        user = f"u{int(USERS * draw.random() ** 1.5)}"
        partition = partition_of(user, partitions)
        item = f"x{int(ITEMS * draw.random() ** 3)}"
        value = events.encode(
            Click(user_id=user, item_id=item, at_ms=at_ms + n, kind="click", event_id=f"e{n}")
        )
        of = waiting[partition]
        of.append(_Record(CLICKS, partition, offsets[partition], at_ms + n, user.encode(), value))
        offsets[partition] += 1
        if len(of) == BATCH:
            full = [number for number, records in enumerate(waiting) if len(records) >= BATCH // 2]
            yield [RecordBatch(CLICKS, number, waiting[number], 0, 0) for number in full]
            for number in full:
                waiting[number] = []


def measure(settings: Settings) -> tuple[float, float]:
    """(CPU of this process, of Valkey), µs an event."""
    calls = list(batches(settings))
    with closing(RedisStore(settings)) as store:
        outputs = Outputs.to_sink(_NoSink())  # type: ignore[arg-type]
        clicks = Handlers(settings, store, dict.fromkeys(SOURCES, LOG), [], outputs, []).clicks
        partitions = range(settings.clicks_partitions)
        for partition in partitions:
            clicks.open(partition)
        clicks.fences.open(dict.fromkeys(partitions, (0, 10**9)))
        clicks.prepare(partitions)

        def theirs_s() -> float:
            cpu = store._redis.info("cpu")
            return float(cpu["used_cpu_user"] + cpu["used_cpu_sys"])  # type: ignore[index]

        own, theirs, counted = 0.0, 0.0, 0
        for number, call in enumerate(calls):
            if number == len(calls) // 5:
                own, theirs, counted = time.process_time(), theirs_s(), 0
            for outcome in clicks.apply(call):
                if isinstance(outcome, Exception):
                    raise outcome
            clicks.write_behind.flush_due(set(partitions))
            counted += sum(len(one.records) for one in call)
        clicks.write_behind.flush()
        own, theirs = time.process_time() - own, theirs_s() - theirs
    return 1e6 * own / counted, 1e6 * theirs / counted


def main() -> int:
    """Run and report; the exit code."""
    folder = Path(load_settings().data_dir) / "bench"
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in PATHS}
    with tempfile.TemporaryDirectory(prefix="eddyline-bench-") as home:
        base = Settings(data_dir=home, worker_port=0)
        with (
            Supervisor(log_dir(base)) as supervisor,
            local_servers(base, supervisor, owner="bench") as servers,
        ):
            for turn in range(REPEATS):
                for name, paths in PATHS.items():
                    settings = msgspec.structs.replace(
                        servers, namespace=f"{turn}-{list(PATHS).index(name)}", recall_paths=paths
                    )
                    found[name].append(measure(settings))
    rows = []
    middle = {name: np.median(np.array(runs), axis=0) for name, runs in found.items()}
    for name, (own, theirs) in middle.items():
        rows.append(row(f"state: {name}", float(own + theirs), "µs/event"))
        rows.append(row("  own CPU", float(own), "µs/event"))
        rows.append(row("  Valkey's", float(theirs), "µs/event"))
    for name in [*PATHS][1:]:
        ratio = float(middle["none"].sum() / middle[name].sum())
        least = 0.6 if name == "all" else 0.0
        rows.append(
            row(
                f"events per CPU second, {name} against none",
                ratio,
                "×",
                f"≥ {least}" if least else "",
                ratio >= least,
            )
        )
    return report("path_state", rows, folder, events=N, repeats=REPEATS)


if __name__ == "__main__":
    sys.exit(main())
