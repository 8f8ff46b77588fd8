"""How long does a click take to change an answer? `make bench-visible`; N=200 clicks by default.

On the demo's running system: real Kafka and Redis, one ingest, one worker, with the data set's
history. Every click is of a user of the data set on an item of the user's present answer; the next
query names it (read your click) and is answered as soon as the click is in. Each process stamps its
own hops.
"""

from __future__ import annotations

import os
import random
import sys
import time
import uuid
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks.report import report, row
from cli.demo.bring_up import bring_up
from cli.demo.trace import HOPS, trace
from eddyline.kafka import producers
from eddyline.kafka.producers import now_ms, sent_to
from eddyline.schema.events import Click
from eddyline.settings.loader import load
from serving.rpc.client import Client

CLICKS = int(os.environ.get("N", "200"))
SEED = 7
# Clicks come one at a time, as one person makes them; so the figure is latency, not throughput.
PAUSE_S = 0.05
WARM_UP = 10


def main() -> int:
    """Run and report; the exit code."""
    settings = load()
    with bring_up(settings, os.environ.get("DATA", "movielens"), Console()) as system:
        live, rng = system.deployment.settings, random.Random(SEED)
        users = rng.choices(sorted(system.dataset.profiles), k=CLICKS + WARM_UP)
        producer = producers.make_producer(live)
        traces, changed = [], 0
        with Client(system.address) as client:
            for n, user in enumerate(users):
                before = [item.item_id for item in client.retrieve(user, 10).items]
                click = Click(
                    event_id=uuid.uuid4().hex,
                    user_id=user,
                    item_id=rng.choice(before),
                    at_ms=now_ms(),
                    kind="like",
                )
                token = sent_to(producers.send_click(producer, live, click), live)
                answer = client.retrieve(user, 10, after=token, wait_ms=2_000)
                received_us = time.time_ns() // 1_000
                if n >= WARM_UP:
                    traces.append(trace(answer, received_us))
                    changed += [item.item_id for item in answer.items] != before
                time.sleep(PAUSE_S)
        producer.close(timeout=5)
        data = system.dataset.name
    total = np.array([t.total_ms for t in traces])
    p50, p99 = np.percentile(total, [50, 99])
    rows = [
        row("click visible, p50", p50, "ms", "< 100", bool(p50 < 100)),
        row("click visible, p99", p99, "ms"),
        row(
            "answers that changed", 100 * changed / len(traces), "%", "100", changed == len(traces)
        ),
    ]
    for hop in HOPS:
        values = [t.hops[hop] for t in traces]
        rows.append(row(f"  {hop}, p50", float(np.percentile(values, 50)), "ms"))
        rows.append(row(f"  {hop}, p99", float(np.percentile(values, 99)), "ms"))
    folder = Path(settings.data_dir) / "bench"
    return report("visible", rows, folder, data=data, clicks=len(traces), seed=SEED)


if __name__ == "__main__":
    sys.exit(main())
