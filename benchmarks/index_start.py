"""How soon does a worker answer rightly? `make bench-index_start`: a snapshot of N items, then
5,000 records.

With the imports behind it: load and check the snapshot, restore the index, one exact query against
the answer of the index that was written; then 5,000 records as the topic has them, decoded and
applied. Kafka's part, which the broker decides, is not in it.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.report import report, row
from eddyline.schema.item_record import ItemRecord, decode_record, encode_record
from eddyline.settings.loader import load
from index.factory import HnswIndex
from index.snapshot import format
from index.snapshot.format import Origin
from serving.worker.replica import APPLY_RECORDS

N = int(os.environ.get("N", "100000"))
BEHIND, D, SEED, TURNS = 5_000, 64, 7, 7
ORIGIN = Origin(generation="1", dimension=D, bundle_ms=1, log="cluster/topic")


def items(first: int, n: int, rng: np.random.Generator, first_offset: int) -> list[ItemRecord]:
    """Records with a category, two tags and a year."""
    vectors = rng.normal(size=(n, D)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return [
        ItemRecord(
            f"item-{at}",
            0,
            first_offset + at - first,
            at,
            0,
            vector,
            {
                "categories": [f"c{at % 20}"],
                "tags": [f"t{at % 1_000}", f"t{at % 997}"],
                "attributes": {"year": at % 60},
            },
        )
        for at, vector in enumerate(vectors, first)
    ]


def main() -> int:
    """Run and report; the exit code."""
    rng = np.random.default_rng(SEED)
    index = HnswIndex(D, exact_below=10**9)
    index.apply(items(0, N, rng, 0))
    query = rng.normal(size=D).astype(np.float32)
    expected = index.query(query, 10)
    # Half of them new vectors of known items, half new items.
    behind = items(0, BEHIND // 2, rng, N) + items(N, BEHIND // 2, rng, N + BEHIND)
    raw = [(record.item_id.encode(), encode_record(record)) for record in behind]
    first, caught_up, writes = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.snapshot"
        for _ in range(TURNS):
            begun = time.perf_counter()
            format.write(path, index.contents(), ORIGIN, {0: N}, 1)
            writes.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            contents, _ = format.load(path, ORIGIN, 0)
            fresh = HnswIndex(D, exact_below=10**9)
            fresh.restore(contents)
            assert fresh.query(query, 10) == expected
            first.append(time.perf_counter() - begun)
            for at in range(0, BEHIND, APPLY_RECORDS):
                fresh.apply(
                    [decode_record(key, value) for key, value in raw[at : at + APPLY_RECORDS]]
                )
            assert fresh.describe([behind[-1].item_id])[0] is not None
            caught_up.append(time.perf_counter() - begun)
        size = path.stat().st_size
    answer, all_ = 1e3 * statistics.median(first), 1e3 * statistics.median(caught_up)
    rows = [
        row(f"start to first correct answer, {N:,} items", answer, "ms", "≤ 300", answer <= 300),
        row(f"  and {BEHIND:,} records behind it applied", all_, "ms", "≤ 1000", all_ <= 1_000),
        row("write a snapshot, synced", 1e3 * statistics.median(writes), "ms"),
        row("snapshot, an item", size / N, "bytes"),
    ]
    return report("index_start", rows, Path(load().data_dir) / "bench", n=N, seed=SEED)


if __name__ == "__main__":
    sys.exit(main())
