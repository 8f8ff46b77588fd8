"""One user sends 1,250 events a second: do others wait? `make bench-bot`; N=10000 events.

On the demo's running system: real Kafka and Redis, one ingest, one worker. Neighbours are new users
of the bot's partition of `clicks`: one click each, and a query that waits for it.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
import uuid
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks.report import report, row
from cli.demo.bring_up import bring_up
from eddyline.kafka import producers
from eddyline.kafka.producers import now_ms, sent_to
from eddyline.schema.events import Click
from eddyline.schema.partitioning import partition_of
from eddyline.settings.loader import load
from serving.rpc.client import Client

EVENTS = int(os.environ.get("N", "10000"))
PER_S = 1_250
BOT = "a-bot"
PAUSE_S = 0.1


def main() -> int:
    """Run and report; the exit code."""
    settings = load()
    data = os.environ.get("DATA", "generated")
    with bring_up(settings, data, Console()) as system, ExitStack() as closes:
        live, items = system.deployment.settings, [i.item_id for i in system.dataset.items[:100]]
        producer = producers.make_producer(live)
        closes.callback(producer.close, timeout=5)

        def send(user: str, n: int) -> object:
            click = Click(
                user_id=user, item_id=items[n % 100], at_ms=now_ms(), event_id=uuid.uuid4().hex
            )
            return producers.send_click(producer, live, click)

        def behave() -> None:
            begun = time.monotonic()
            for n in range(EVENTS):
                if n % 50 == 0:
                    time.sleep(max(0.0, begun + n / PER_S - time.monotonic()))
                send(BOT, n)
            producer.flush(timeout=30)

        partition = partition_of(BOT, live.clicks_partitions)
        names = (f"neighbour-{n}" for n in itertools.count())
        neighbours = (u for u in names if partition_of(u, live.clicks_partitions) == partition)
        acting, took_ms = threading.Thread(target=behave, daemon=True), list[float]()
        with Client(system.address) as client:
            acting.start()
            while acting.is_alive():
                user, begun = next(neighbours), time.perf_counter()
                token = sent_to(send(user, 5), live)
                while not client.retrieve(
                    user, 10, after=token, wait_ms=live.wait_ms_max
                ).freshness.after.applied:
                    pass
                took_ms.append((time.perf_counter() - begun) * 1_000)
                time.sleep(PAUSE_S)
    p50, p90, p99 = np.percentile(took_ms, [50, 90, 99])
    rows = [
        row("neighbour's click in an answer, p50", p50, "ms"),
        row("neighbour's click in an answer, p90", p90, "ms", "< 1,000", bool(p90 < 1_000)),
        row("neighbour's click in an answer, p99", p99, "ms"),
    ]
    folder = Path(settings.data_dir) / "bench"
    return report("bot", rows, folder, events=EVENTS, per_s=PER_S, neighbours=len(took_ms))


if __name__ == "__main__":
    sys.exit(main())
