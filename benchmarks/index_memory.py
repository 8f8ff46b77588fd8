"""What does one more worker on the same machine cost? `make bench-index_memory`: memory of real
processes.

N × 64 from one snapshot, WORKERS processes at once, each after 2,000 queries: once with vectors of
its own, once with those of the mapped file, once forked from a process that had built the graph; of
the forked ones once more after 5,000 updates, and of one after a rebuild of its own. Reported: a
worker's private memory, which is what one more worker costs, and its PSS, where a shared page
counts by its share; the mean of the WORKERS. N and REBUILD=0 make it shorter.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import gc
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import report, row
from eddyline.schema.item_record import ItemRecord
from eddyline.settings.loader import load
from index.factory import HnswIndex
from index.snapshot import format
from index.snapshot.format import Origin

N = int(os.environ.get("N", "100000"))
REBUILD = os.environ.get("REBUILD", "1") == "1"
WORKERS, QUERIES, UPDATES, D, K, SEED = 3, 2_000, 5_000, 64, 100, 7
ORIGIN = Origin(generation="1", dimension=D, bundle_ms=1, log="cluster/topic")
WAIT_S = 900.0


def items(first: int, n: int, offset: int, seed: int) -> list[ItemRecord]:
    vectors = np.random.default_rng(seed).normal(size=(n, D)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return [
        ItemRecord(f"item-{at}", 0, offset + at, at, 0, v) for at, v in enumerate(vectors, first)
    ]


def memory_mb() -> np.ndarray:
    """(private, PSS) of this process, in MB."""
    kb = {
        line.split(":")[0]: int(line.split()[1])
        for line in Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()[1:]
    }
    return np.array([kb["Private_Clean"] + kb["Private_Dirty"], kb["Pss"]]) * 1.024e-3


def restored(path: Path, copied: bool) -> HnswIndex:
    contents, _ = format.load(path, ORIGIN, 0)
    if copied:
        contents = replace(contents, vectors=np.array(contents.vectors))
    index = HnswIndex(D, exact_below=10**9)
    index.restore(contents)
    return index


def ask(index: HnswIndex) -> None:
    for query in np.random.default_rng(SEED).normal(size=(QUERIES, D)).astype(np.float32):
        index.query(query, K)


def update(index: HnswIndex) -> None:
    for at in range(0, UPDATES, 50):
        index.apply(items(at, 50, N + UPDATES, at))


def rebuild(index: HnswIndex) -> None:
    assert index.rebuild(), index.stats().rebuild_error


def worker(make: Callable[[], HnswIndex], pipe: Connection) -> None:
    """Executes the commands of the pipe; answers `memory` with its PSS."""
    index = make()
    works: dict[str, Callable[[HnswIndex], None]] = {
        "ask": ask,
        "update": update,
        "rebuild": rebuild,
    }
    while (command := pipe.recv()) != "end":
        if command == "memory":
            gc.collect()
            pipe.send(memory_mb())
        else:
            works[command](index)
            pipe.send(None)
    os._exit(0)  # as a fork of a larger program it runs no exit handler of its parent


class Pool:
    """Some workers. Every wait has a limit."""

    def __init__(self, make: Callable[[], HnswIndex]) -> None:
        # Forked: nothing else runs in this process yet.
        context = multiprocessing.get_context("fork")
        self.pipes, self.processes = [], []
        for _ in range(WORKERS):
            here, there = context.Pipe()
            process = context.Process(target=worker, args=(make, there), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def send(self, what: str, count: int = WORKERS) -> list[Any]:
        for pipe in self.pipes[:count]:
            pipe.send(what)
        answers = []
        for pipe in self.pipes[:count]:
            assert pipe.poll(WAIT_S), f"no worker answered {what!r} in time"
            answers.append(pipe.recv())
        return answers

    def mean_mb(self, count: int = WORKERS) -> np.ndarray:
        """Of one of the first ones; they have done the same."""
        return np.mean(self.send("memory", count), axis=0)

    def end(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.send("end")
            process.join(30)


def both(what: str, mb: np.ndarray) -> list[dict[str, Any]]:
    return [row(f"{what}: its own", float(mb[0]), "MB"), row("  PSS", float(mb[1]), "MB")]


def from_file(path: Path, copied: bool) -> np.ndarray:
    pool = Pool(lambda: restored(path, copied))
    pool.send("ask")
    mb = pool.mean_mb()
    pool.end()
    return mb


def forked(path: Path) -> list[dict[str, Any]]:
    """The graph built once, then forked; what stays shared after queries, updates and a rebuild."""
    before = memory_mb()[0]
    index = restored(path, copied=False)
    index._exact_below = 0
    rebuild(index)
    alone = memory_mb()[0] - before
    gc.freeze()  # or the first collection of garbage writes to every object
    pool = Pool(lambda: index)
    first = pool.mean_mb()
    pool.send("ask")
    filters = pool.mean_mb()
    pool.send("update")
    updated = pool.mean_mb()
    rows = [
        row("index with graph, one process", float(alone), "MB"),
        *both("forked after the build: a worker, before its first query", first),
        *both(f"forked, after {QUERIES:,} queries", filters),
        *both(f"forked, and {UPDATES:,} updates", updated),
    ]
    if REBUILD:
        pool.send("rebuild", 1)
        rows += both("forked, and a rebuild of its own", pool.mean_mb(1))
    pool.end()
    return rows


def main() -> int:
    """Run and report; the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.snapshot"
        index = HnswIndex(D, exact_below=10**9)
        index.apply(items(0, N, 0, SEED))
        format.write(path, index.contents(), ORIGIN, {0: N}, 1)
        index.close()
        del index
        bare = Pool(lambda: HnswIndex(D))
        none = bare.mean_mb()
        bare.end()
        copied, mapped = from_file(path, True), from_file(path, False)
        vectors = 4 * N * D / 1e6
        rows = [
            *both("a worker process without items", none),
            *both(f"vectors copied, {N:,} items, no graph", copied),
            *both("vectors mapped, no graph", mapped),
            row(
                "  mapped, of its own, less than copied by",
                float(copied[0] - mapped[0]),
                "MB",
                f"≥ 0.9 · {vectors:.1f} MB",
                bool(copied[0] - mapped[0] >= 0.9 * vectors),
            ),
            *forked(path),
        ]
    return report("index_memory", rows, Path(load().data_dir) / "bench", n=N, workers=WORKERS)


if __name__ == "__main__":
    sys.exit(main())
