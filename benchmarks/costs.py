"""Costs that must not grow: `make bench-costs`. CPU time of one thread, no server.

* the newest 100 items after a write of 64, of a million items: without and with a filter that
  passes one item in a hundred; against one selection from a plain array of times
* a refresh of the popular list after clicks into one of 28 full buckets; against the first
  refresh, which reads all
* 10,000 events of one user; against as many of 2,000 users

The tests of the same count work instead of time: `tests/unit/index/test_newest.py`,
`tests/integration/test_popular_list.py`, `tests/unit/streams/test_ingest_rules.py`.
"""

from __future__ import annotations

import os

# As in the worker: a product is too small to be worth more threads.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import report, row
from eddyline.schema.item_record import ItemRecord
from eddyline.schema.partitioning import partition_of
from eddyline.settings.loader import Settings, load
from eddyline.stores.redis import RedisStore
from eddyline.stores.state_store import Fence, LogId, Source
from index.filters import Filter
from sandbox.processes import free_port
from serving.recall.popularity import Popularity
from tests.integration.redis_servers import Server
from tests.unit.index.item_records import units
from tests.unit.index.test_newest import restored
from tests.unit.streams.test_ingest_rules import ANA, HERE, Rig, click, ingest

ITEMS = int(os.environ.get("N", "1000000"))
STEPS, WRITES = 30, 64
BUCKETS, IN_BUCKET = 28, 4_000
EVENTS = 10_000


def cpu_s(call: Callable[[], object]) -> float:
    """CPU time of this thread, s."""
    begun = time.thread_time()
    call()
    return time.thread_time() - begun


def newest(equal: bool) -> list[dict[str, Any]]:
    """Calls after each of STEPS writes. equal: all items have the same time."""
    times = np.full(ITEMS, 5_000) if equal else np.random.default_rng(1).permutation(ITEMS) + 1_000
    index, rare = restored(ITEMS, times), Filter(tags=frozenset({"rare"}))
    selection = min(
        cpu_s(lambda: np.partition(times + np.arange(ITEMS) % 2, ITEMS - 100)) for _ in range(5)
    )
    version = index._version
    mask = min(
        cpu_s(
            lambda: (
                version.columns.mask(rare, version.used) & (version.table.died_at[:-1] > 0)[:ITEMS]
            )
        )
        for _ in range(5)
    )
    index.newest(100)
    plain, filtered, vectors = list[float](), list[float](), units(WRITES, 2, 1)
    for step in range(STEPS):
        at_ms = 5_000 if equal else ITEMS // 2 + 20_000 * step
        first = ITEMS - 2_000 if step % 2 else 0
        records = [
            ItemRecord(f"item-{first + 7 * step + n:07}", 0, 10 + step * WRITES + n, at_ms, 0, v)
            for n, v in enumerate(vectors)
        ]
        index.apply(records)
        plain.append(cpu_s(lambda: index.newest(100)))
        filtered.append(cpu_s(lambda: index.newest(100, (), rare)))
    index.close()
    what = f"newest 100 of {ITEMS:,}" + (", equal times" if equal else "")
    found, passing = float(np.median(plain)), float(np.median(filtered))
    return [
        row(f"{what}: one selection", 1e3 * selection, "ms"),
        row(what, 1e3 * found, "ms", "< half a selection", found < selection / 2),
        row(
            f"{what}, filtered",
            1e3 * passing,
            "ms",
            "< half a selection + a mask",
            passing < selection / 2 + mask,
        ),
    ]


def popular() -> list[dict[str, Any]]:
    """A refresh of all buckets and refreshes of one, of a real server."""
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        server = Server(Path(folder) / "valkey", port, {})
        server.start()
        try:
            settings = Settings(redis_url=f"redis://127.0.0.1:{port}/0")
            return _popular(settings, RedisStore(settings))
        finally:
            server.kill()


def _popular(settings: Settings, store: RedisStore) -> list[dict[str, Any]]:
    rng, fence = random.Random(5), None
    clicks, log = Source("clicks", 0), LogId("cluster", "topic")
    popularity = Popularity(settings, store)
    names = [f"item-{n:06d}-{rng.randrange(1 << 60):015x}" for n in range(20_000)]
    for bucket in range(BUCKETS):
        counts = {item: rng.randrange(1, 1 << 20) for item in rng.sample(names, IN_BUCKET)}
        after = Fence(bucket, log)
        store.count_clicks("i0", clicks, fence, after, {bucket: counts}, BUCKETS)
        fence = after
    whole, took = cpu_s(popularity.refresh), list[float]()
    for offset in range(BUCKETS, BUCKETS + 200):
        counts = dict.fromkeys(rng.sample(names, 60), 1_000)
        after = Fence(offset, log)
        store.count_clicks("i0", clicks, fence, after, {BUCKETS - 1: counts}, BUCKETS)
        fence = after
        took.append(cpu_s(popularity.refresh))
    one = 1e3 * float(np.median(took))
    return [
        row("popular list, all buckets", 1e3 * whole, "ms"),
        row("popular list, one bucket, least", 1e3 * min(took), "ms"),
        row("popular list, one bucket, median", one, "ms", "≤ 5", one <= 5),
    ]


def one_user() -> list[dict[str, Any]]:
    """EVENTS events in batches of 250: all of one user, and of 2,000 users in turn."""
    here = [n for n in range(1, 4_000) if partition_of(f"u{n}", 2) == HERE]
    took = []
    for users in ([ANA], [f"u{n}" for n in here]):
        rig = Rig(
            end=1 << 20, history_length_max=100, dedupe_window_events=1_000, popular_items_max=50
        )
        log = [
            click(n, f"i{n % 2_000}", user_id=users[n % len(users)], event_id=f"e{n}")
            for n in range(EVENTS)
        ]

        def apply(rig: Any = rig, log: Any = log) -> None:
            for first in range(0, len(log), 250):
                ingest(rig.clicks, HERE, log[first : first + 250], 0)
            rig.clicks.popularity.write(HERE)

        took.append(cpu_s(apply))
    one, many = took
    return [
        row(f"{EVENTS:,} events of 2,000 users", many, "s"),
        row(f"{EVENTS:,} events of one user", one, "s", "< twice as much", one < 2 * many),
    ]


def main() -> int:
    """Run and report; the exit code."""
    rows = newest(False) + newest(True) + popular() + one_user()
    return report("costs", rows, Path(load().data_dir) / "bench")


if __name__ == "__main__":
    sys.exit(main())
