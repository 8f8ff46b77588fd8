"""What do impressions cost a query? `make bench-impressions`: CPU time of one thread, in pairs.

The service, retriever, fusion, towers of random weights and a live index of 2,000 items, without
sockets and with the user in memory. Each query runs in four services in turn, in changing order:
without impressions, with ids alone, with the default sample, with all users sampled. Reported is
the mean of the paired differences without a tenth of the pairs at each end; and the CPU time that
the sending thread takes to encode one answer. The bound is of a query's time at a worker, which
`make bench-serving` measures: 2.77 ms at one connection.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from typing_extensions import override

from benchmarks.report import report, row
from eddyline.schema.answers import encode_answer
from eddyline.schema.events import KINDS
from eddyline.schema.partitioning import partition_of, user_slot
from eddyline.schema.user_history import Entry, UserHistory
from eddyline.settings.loader import Settings, load
from eddyline.stores.memory import MemoryStore
from eddyline.stores.state_store import Fence, LogId, Source, UserEffects
from index.factory import ann_backend, live_index
from sandbox.datasets import synthetic
from serving.answer.impressions import Impressions
from serving.answer.retriever import Answer, Retriever
from serving.answer.seen import SeenPolicy
from serving.answer.user_reader import UserReader
from serving.proto import retrieval_pb2 as pb
from serving.recall.base import RecallContext
from serving.recall.popularity import Popularity
from serving.recall.registry import make_paths
from serving.rpc.backends import LocalIndex, WorkerBackend
from serving.rpc.retrieval_service import RetrievalService
from serving.sharding import ALL
from serving.worker.replica import load_bundle
from tests.unit.evaluation.small import make_bundle
from tests.unit.serving.direct_call import DirectCall

K, ROUNDS = 10, int(os.environ.get("ROUNDS", "8"))
SHARE_MAX = 0.01
# Median of a query at a worker with one connection, on two busy cores: docs/benchmarks.md.
QUERY_US = 2_770
LOG = LogId("benchmark", "clicks")


class NoImpressions(Impressions):
    """A service as it was before there were impressions."""

    @override
    def record(self, query: Any, answer: Answer, generation: str, missing: Any = ()) -> str:
        return ""


class Current:
    """A replica that has everything."""

    def missing(self) -> str:
        return ""


def services(
    settings: Settings, folder: Path, closing: ExitStack
) -> tuple[list[str], Callable[[Impressions], RetrievalService]]:
    """(the users, what makes a service of the same backend with other impressions)."""
    dataset = synthetic.generate(seed=3, items=2_000, users=500, clicks=12_000)
    loaded = make_bundle(folder, dataset.items, dimension=64, history_max=20)
    index = live_index(settings, ann_backend(settings), loaded.dimension)
    index.background = False
    closing.callback(index.close)
    load_bundle(index, loaded, ALL)
    index.rebuild()
    store = MemoryStore()
    users = write_users(settings, store, dataset.clicks)
    popularity = Popularity(settings, store, index)
    context = RecallContext(settings, store, loaded.user_tower, popularity, closing)
    retriever = Retriever(
        store=store,
        users=UserReader(
            store, clicks_partitions=settings.clicks_partitions, generation="1", log=LOG
        ),
        popularity=popularity,
        paths=make_paths(context),
        item_slots=1,
        seen=SeenPolicy(settings),
    )
    held = LocalIndex("1", index, Current())  # type: ignore[arg-type]

    def make(impressions: Impressions) -> RetrievalService:
        service = RetrievalService(settings)
        service.serve(WorkerBackend(held, retriever, impressions))
        return service

    return users, make


def write_users(settings: Settings, store: MemoryStore, clicks: Any) -> list[str]:
    """Write the history of every user; returns their ids."""
    by_user: dict[str, list[Entry]] = {}
    for click in clicks:
        entry = Entry(click.item_id, click.at_ms, KINDS.index(click.kind))
        by_user.setdefault(click.user_id, []).insert(0, entry)
    for offset, (user, entries) in enumerate(by_user.items()):
        partition = partition_of(user, settings.clicks_partitions)
        slot, source = user_slot(partition), Source("clicks", partition)
        history = UserHistory(partition=partition, offset=offset, entries=tuple(entries[:50]))
        expected = store.fences(source, [slot])[slot]
        effects = UserEffects(histories={user: history})
        store.write_users(slot, source, expected, Fence(offset, LOG), effects)
    return list(by_user)


def cpu_ns(service: RetrievalService, user: str) -> int:
    """CPU time of one query in this thread, serialized response included."""
    sent: list[Any] = []
    request = pb.RetrieveRequest(user_id=user, k=K)
    begun = time.thread_time_ns()
    service.answer(request, DirectCall(), sent.append)  # type: ignore[arg-type]
    sent[0].SerializeToString()
    return time.thread_time_ns() - begun


def trimmed_mean(values: np.ndarray) -> float:
    ordered = np.sort(values)
    cut = len(ordered) // 10
    return float(ordered[cut : len(ordered) - cut].mean())


def measured(users: list[str], make: Callable[[Impressions], RetrievalService]) -> np.ndarray:
    """CPU time, µs (queries, services)."""
    impressions = [NoImpressions(0.0), *(Impressions(share) for share in (0.0, SHARE_MAX, 1.0))]
    made = [make(one) for one in impressions]
    for one in made:
        for user in users[:200]:
            cpu_ns(one, user)
    rng = np.random.default_rng(5)
    times = np.zeros((ROUNDS * len(users), len(made)))
    for number in range(len(times)):
        user = users[number % len(users)]
        for at in rng.permutation(len(made)):
            times[number, at] = cpu_ns(made[at], user)
        for one in impressions:
            one.take(10)
    return times / 1_000


def encode_us(users: list[str], make: Callable[[Impressions], RetrievalService]) -> float:
    """CPU time to encode one recorded answer, the least of several runs, µs."""
    impressions = Impressions(1.0)
    service = make(impressions)
    for user in users[:500]:
        cpu_ns(service, user)
    queued, best = impressions.take(500), float("inf")
    for _ in range(10):
        begun = time.thread_time_ns()
        for answer in queued:
            encode_answer(answer.recorded())
        best = min(best, (time.thread_time_ns() - begun) / len(queued) / 1_000)
    return best


def main() -> int:
    """Run and report; the exit code."""
    settings = msgspec.structs.replace(load(), clicks_partitions=8, index_recall_share=0.0)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as closing:
        users, make = services(settings, Path(folder), closing)
        times = measured(users, make)
        encoding = encode_us(users, make)
    p50 = float(np.median(times[:, 0]))
    rows = [row("CPU time of a query without impressions, p50", p50, "µs")]
    names = ("ids alone", f"{SHARE_MAX:.0%} of the users recorded", "every user recorded")
    for at, name in enumerate(names, 1):
        more = trimmed_mean(times[:, at] - times[:, 0])
        share, default = 100 * more / QUERY_US, at == 2
        rows.append(row(f"{name}: more CPU time a query", more, "µs"))
        rows.append(row("  of the CPU time above", 100 * more / p50, "%"))
        must = "≤ 1" if default else ""
        what = f"  of a query's {QUERY_US / 1_000:g} ms at a worker"
        rows.append(row(what, share, "%", must, not default or share <= 1))
    rows.append(row("the sending thread: encode one answer", encoding, "µs"))
    return report("impressions", rows, Path(load().data_dir) / "bench", k=K, queries=len(times))


if __name__ == "__main__":
    sys.exit(main())
