"""What does a coordinator cost? `make bench-shards`; N=400 queries of each by default, SHARDS=4.

On the demo's living system: one worker with all items, and the same items cut into shards with a
coordinator, on the same Kafka and Redis. The two are queried in turn, one query at a time, for the
same user; an answer that differs in an item, its place, its score or its path counts against it.
"""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks.report import report, row
from cli.demo.bring_up import bring_up
from eddyline.settings.loader import load
from serving.proto.retrieval_pb2 import RetrieveResponse
from serving.rpc.client import Client, is_ready

QUERIES = int(os.environ.get("N", "400"))
SHARDS = int(os.environ.get("SHARDS", "4"))
SEED = 7
WARM_UP = 40


def said(answer: RetrieveResponse) -> list[tuple[str, float, str]]:
    return [(item.item_id, item.score, item.path) for item in answer.items]


def main() -> int:
    """Run and report; the exit code."""
    settings, rng = load(), random.Random(SEED)
    rows, same, queries = [], 0, 0
    with bring_up(settings, os.environ.get("DATA", "movielens"), Console()) as system:
        children, _, address = system.deployment.sharded_children(SHARDS, is_ready)
        system.deployment.supervisor.start(*children)
        users = sorted(system.dataset.profiles)
        data = system.dataset.name
        with Client(system.address) as one, Client(address) as many:
            for k in (10, 100):
                took: dict[str, list[float]] = {"one worker": [], "coordinator": []}
                for n in range(QUERIES + WARM_UP):
                    user = rng.choice(users)
                    answers = []
                    for name, client in (("one worker", one), ("coordinator", many)):
                        began = time.perf_counter()
                        answers.append(client.retrieve(user, k))
                        if n >= WARM_UP:
                            took[name].append(1_000 * (time.perf_counter() - began))
                    same += said(answers[0]) == said(answers[1])
                    queries += 1
                p50 = {name: float(np.percentile(values, 50)) for name, values in took.items()}
                for name, values in took.items():
                    rows.append(row(f"k = {k}, {name}, p50", p50[name], "ms"))
                    rows.append(
                        row(f"k = {k}, {name}, p99", float(np.percentile(values, 99)), "ms")
                    )
                rows.append(
                    row(f"k = {k}, added, p50", p50["coordinator"] - p50["one worker"], "ms")
                )
    rows.append(row("answers that are the same", 100 * same / queries, "%", "100", same == queries))
    folder = Path(settings.data_dir) / "bench"
    return report("shards", rows, folder, data=data, queries=QUERIES, shards=SHARDS, seed=SEED)


if __name__ == "__main__":
    sys.exit(main())
