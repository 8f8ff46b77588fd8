"""Does a query feel the writes? `make bench-index`: the live index against a static graph in one
process.

Static and live are queried in turns, so that both see the same machine. The static side is the raw
`knn_query` of the very graph that the live index began with. Both answer with (id, score) of the K
best, the live index by `find`; the rescoring and the fresh buffer are on the live side. Clustered
unit vectors, d=64, M 16, efConstruction 200, ef 200, k=100, one query thread; updates by a second
thread, rebuilds one after the other on a third. N, LARGE, SECONDS, CHURN_N set the sizes; LONG=1
runs the churn at full size, and a million vectors (HUGE sets how many) quiet and with 500 updates a
second, without a rebuild, which takes too long.
"""

from __future__ import annotations

import os

# As in the worker: a product is too small to be worth more threads.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import hnswlib
import numpy as np

from benchmarks.report import report, row
from eddyline.schema.item_record import ItemRecord
from eddyline.settings.loader import load
from index.factory import HnswIndex
from index.search.nearest import NearestSearch

LONG = os.environ.get("LONG") == "1"
N = int(os.environ.get("N", "50000"))
LARGE = int(os.environ.get("LARGE", "100000"))
SECONDS = float(os.environ.get("SECONDS", "12"))
CHURN_N = int(os.environ.get("CHURN_N", "100000" if LONG else "20000"))
D, K, EF, SEED = 64, 100, 200, 7
HUGE = int(os.environ.get("HUGE", "1000000"))
CHURN = 5
# Half a second of one side, then half a second of the other.
TURN_S = 0.5
QUERIES = 2_000
JUDGED = 200
# So wide that a fresh graph of 100k finds 97 to 98% of the hundred nearest: an easier set hides
# what is lost.
SPREAD = 0.95
# The rebuild thread of a worker is as polite.
REBUILD_NICE = 10
SMALL_TURN = 0.05  # radians, 3°: far inside the gate


class Batch(NamedTuple):
    """Items, their new vectors, and the records that say so."""

    at: np.ndarray
    new: np.ndarray
    records: list[ItemRecord]


class IndexFixture:
    """Vectors around cluster centres, and the live index over them."""

    def __init__(self, n: int, **options: Any) -> None:
        self.rng = np.random.default_rng(SEED)
        self.centres = unit(self.rng.normal(size=(max(20, n // 100), D)))
        self.vectors = self.draw(n)
        self.queries = self.draw(QUERIES)
        self.offset = n
        # Built here, at the priority of this thread; after that no rebuild starts by itself either.
        self.index = HnswIndex(D, ef=EF, **({"fresh_max": 10**9, "exact_below": 0} | options))
        self.index._due = lambda: False  # type: ignore[method-assign]
        self.index.apply(
            [ItemRecord(f"i{at}", 0, at, 0, 0, v) for at, v in enumerate(self.vectors)]
        )
        assert self.index.rebuild(), self.index.stats().rebuild_error
        self.build_s = self.index.stats().rebuild_s
        main = self.index._version.main
        assert main is not None
        self.graph = main._graph  # type: ignore[attr-defined]

    def draw(self, n: int) -> np.ndarray:
        around = self.centres[self.rng.integers(len(self.centres), size=n)]
        return unit(around + self.rng.normal(size=(n, D)) * (SPREAD / np.sqrt(D)))

    @staticmethod
    def fresh_graph(vectors: np.ndarray) -> Any:
        """A graph built of these vectors by hnswlib itself."""
        graph = hnswlib.Index(space="ip", dim=D)
        graph.init_index(max_elements=len(vectors), M=16, ef_construction=200, random_seed=100)
        graph.set_ef(EF)
        graph.add_items(vectors, num_threads=1)
        return graph

    def drawn(self, count: int, small: bool, of: np.ndarray, at: np.ndarray | None = None) -> Batch:
        """An update of `count` items, or of those at these places: turned a little, or somewhere
        else.

        of: all vectors as they are, and then with these
        """
        if at is None:
            at = self.rng.choice(len(of), size=count, replace=False)
        count = len(at)
        if small:
            new = unit(of[at] + self.rng.normal(size=(count, D)) * (SMALL_TURN / np.sqrt(D)))
        else:
            new = self.draw(count)
        of[at] = new
        self.offset += count
        records = [
            ItemRecord(f"i{item}", 0, self.offset - count + n, 0, 0, vector)
            for n, (item, vector) in enumerate(zip(at.tolist(), new, strict=True))
        ]
        return Batch(at, new, records)

    def update(self, count: int, small: bool, at: np.ndarray | None = None) -> list[ItemRecord]:
        """Records of an update, see `drawn`, which counts as applied."""
        return self.drawn(count, small, self.vectors, at).records


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@contextmanager
def background(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """The work on a thread of its own; its error is raised here."""
    stop, errors = threading.Event(), list[BaseException]()

    def run() -> None:
        try:
            work(stop)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(300)
    if errors:
        raise errors[0]


def timed(
    ask: Callable[[np.ndarray], object],
    queries: np.ndarray,
    seconds: float,
    at: int,
    cpu: list[float] | None = None,
) -> list[float]:
    """Milliseconds of each call, back to back. cpu: gets this thread's CPU time of each."""
    took, end = [], time.perf_counter() + seconds
    while (begun := time.perf_counter()) < end:
        cpu_begun = time.thread_time()
        ask(queries[(at + len(took)) % len(queries)])
        if cpu is not None:
            cpu.append((time.thread_time() - cpu_begun) * 1e3)
        took.append((time.perf_counter() - begun) * 1e3)
    return took


def against_static(
    fixture: IndexFixture, per_s: int, *, small: bool, seconds: float, rebuilds: bool = True
) -> dict[str, float]:
    """p50 and p99 of live under writes and rebuilds over those of the static graph, in turns."""
    on = threading.Event()
    batch = max(1, per_s // 50)
    # Drawn before the clock runs: drawing them takes the interpreter longer than applying them, and
    # a worker does not do it.
    scratch = fixture.vectors.copy()
    waiting = [
        fixture.drawn(batch, small, scratch) for _ in range(int(1.2 * per_s * seconds) // batch)
    ]
    done: list[Batch] = []

    def write(stop: threading.Event) -> None:
        due = time.perf_counter()
        waiting.reverse()
        while not stop.is_set():
            if not waiting or not on.is_set():
                # A pause is not made up for: that would be a burst at the beginning of every turn.
                on.wait(0.1) if waiting else stop.wait(0.1)
                due = time.perf_counter()
                continue
            done.append(waiting.pop())
            fixture.index.apply(done[-1].records)
            due = max(due + batch / per_s, time.perf_counter() - 0.1)
            time.sleep(max(0.0, due - time.perf_counter()))

    def rebuild(stop: threading.Event) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), REBUILD_NICE)
        while not stop.is_set():
            if rebuilds and not small:
                assert fixture.index.rebuild()
            stop.wait(0.05)

    ids = fixture.index._version.ids

    def fixed(query: np.ndarray) -> list[tuple[str, float]]:
        labels, distances = fixture.graph.knn_query(query, k=K, num_threads=1)
        return list(
            zip(map(ids.__getitem__, labels[0].tolist()), (1 - distances[0]).tolist(), strict=True)
        )

    def found(query: np.ndarray) -> list[tuple[str, float]]:
        columns = fixture.index.find(query, K)
        return list(zip(columns.ids, columns.scores.tolist(), strict=True))

    static: list[float] = []
    live: list[float] = []
    static_cpu: list[float] = []
    live_cpu: list[float] = []
    busy_s = 0.0
    timed(found, fixture.queries, 0.3, 0)
    with background(write), background(rebuild):
        while busy_s < seconds:
            on.clear()
            static += timed(fixed, fixture.queries, TURN_S, len(static), static_cpu)
            on.set()
            live += timed(found, fixture.queries, TURN_S, len(live), live_cpu)
            busy_s += TURN_S
        on.clear()  # a rebuild may go on for a while
    for some in done:
        fixture.vectors[some.at] = some.new
    figures = {"per_s": len(done) * batch / busy_s, "fresh": fixture.index.stats().fresh}
    for q in (50, 99):
        figures[f"static_p{q}"] = float(np.percentile(static, q))
        figures[f"live_p{q}"] = float(np.percentile(live, q))
        figures[f"cpu_p{q}"] = float(np.percentile(live_cpu, q) / np.percentile(static_cpu, q))
    return figures


def recall_of(found: list[list[int]], vectors: np.ndarray, queries: np.ndarray) -> float:
    """Share of the K truly nearest that were found."""
    hits = 0
    for query, got in zip(queries, found, strict=True):
        scores = vectors @ query
        hits += len(set(got) & set(np.argpartition(scores, len(scores) - K)[-K:].tolist()))
    return hits / (K * len(queries))


def live_recall(fixture: IndexFixture) -> float:
    queries = fixture.queries[:JUDGED]
    found = [[int(hit.item_id[1:]) for hit in fixture.index.query(query, K)] for query in queries]
    return recall_of(found, fixture.vectors, queries)


def graph_recall(graph: Any, vectors: np.ndarray, queries: np.ndarray) -> float:
    found = [graph.knn_query(query, k=K, num_threads=1)[0][0].tolist() for query in queries]
    return recall_of(found, vectors, queries)


def speed(
    fixture: IndexFixture,
    name: str,
    per_s: int,
    bounds: tuple[float, float],
    *,
    small: bool = False,
    seconds: float,
) -> list[dict[str, Any]]:
    got = against_static(fixture, per_s, small=small, seconds=seconds)
    p50, p99 = got["live_p50"] / got["static_p50"], got["live_p99"] / got["static_p99"]
    return [
        row(f"{name}: p50 against static", p50, "×", f"≤ {bounds[0]}", p50 <= bounds[0]),
        row(f"{name}: p99 against static", p99, "×", f"≤ {bounds[1]}", p99 <= bounds[1]),
        row("  static p50", got["static_p50"], "ms"),
        row("  static p99", got["static_p99"], "ms"),
        row("  CPU of the query thread, p50 against static", got["cpu_p50"], "×"),
        row("  CPU of the query thread, p99 against static", got["cpu_p99"], "×"),
        row("  live p50", got["live_p50"], "ms"),
        row("  live p99", got["live_p99"], "ms"),
        row(
            "  updates applied",
            got["per_s"],
            "/s",
            f"≥ {0.9 * per_s:.0f}",
            got["per_s"] >= 0.9 * per_s,
        ),
        row("  recall@100 of the live index right after", live_recall(fixture), ""),
    ]


def apply_cost(fixture: IndexFixture) -> list[dict[str, Any]]:
    """CPU of `apply` for an item, in batches of 50."""
    rows = []
    for small, what in ((False, "somewhere else"), (True, "turned a little")):
        cost = []
        for _ in range(60):
            batch = fixture.update(50, small)
            begun = time.thread_time()
            fixture.index.apply(batch)
            cost.append((time.thread_time() - begun) / 50 * 1e6)
        at = statistics.median(cost)
        rows.append(row(f"apply, an item, batch of 50, {what}", at, "µs CPU", "≤ 5", at <= 5))
    return rows


def crossing() -> list[dict[str, Any]]:
    """Exact scan against graph by size, and filters by what they keep."""
    rows = []
    for n in (3_000, 6_000, 12_000, 24_000):
        fixture = IndexFixture(n, exact_below=0)
        version = fixture.index._version
        scan = statistics.median(
            timed(
                lambda q, v=version: NearestSearch(v, q, K, frozenset()).scan(),
                fixture.queries,
                0.7,
                0,
            )
        )
        graph = statistics.median(
            timed(
                lambda q, v=version: NearestSearch(v, q, K, frozenset()).by_segments(EF),
                fixture.queries,
                0.7,
                0,
            )
        )
        rows.append(row(f"exact scan against graph, n = {n:,}", scan / graph, "×"))
        rows.append(row("  exact", scan, "ms"))
        fixture.index.close()
    return rows


def churn() -> list[dict[str, Any]]:
    """Up to 5 changes per item: recall against a new graph of the same vectors."""
    fixture = IndexFixture(CHURN_N)
    worst = 0.0
    rows = []
    for turn in range(1, CHURN + 1):
        for part in range(4):
            for _ in range(CHURN_N // 4 // 500):
                fixture.index.apply(fixture.update(500, small=bool(part % 2)))
            if part % 2:
                assert fixture.index.rebuild()
        live = live_recall(fixture)
        fresh = IndexFixture.fresh_graph(fixture.vectors)
        fresh_recall = graph_recall(fresh, fixture.vectors, fixture.queries[:JUDGED])
        worst = max(worst, fresh_recall - live)
        rows.append(row(f"  recall@100 after {turn}× churn, n = {CHURN_N:,}", live, ""))
    fixture.index.close()
    return [
        row("recall@100 below a fresh build, at most", worst, "", "≤ 0.005", worst <= 0.005),
        *rows,
    ]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf(
        "SC_PAGE_SIZE"
    )


def huge() -> list[dict[str, Any]]:
    """A million: memory, build time, quiet and with updates that no rebuild takes in, recall."""
    before = resident_bytes()
    fixture = IndexFixture(HUGE)
    # What the benchmark itself holds of them is not the index's.
    bytes_each = (resident_bytes() - before - fixture.vectors.nbytes) / HUGE
    name = f"{HUGE:,} × {D}"
    rows = [
        row(f"{name}: memory a vector, ids and all", bytes_each, "bytes"),
        row("  of which the graph", fixture.index.stats().main_bytes / HUGE, "bytes"),
        row("  build, one core", fixture.build_s, "s"),
        row("  recall@100", live_recall(fixture), ""),
    ]
    for per_s, what in ((0, "quiet"), (500, "500 updates/s")):
        got = against_static(fixture, per_s, small=False, seconds=SECONDS, rebuilds=False)
        rows += [
            row(f"  {what}: p50", got["live_p50"], "ms"),
            row(f"  {what}: p99", got["live_p99"], "ms"),
            row(f"  {what}: p50 against static", got["live_p50"] / got["static_p50"], "×"),
            row(f"  {what}: recall@100 right after", live_recall(fixture), ""),
        ]
    fixture.index.close()
    return rows


def main() -> int:
    """Run and report; the exit code."""
    rows: list[dict[str, Any]] = []
    # First, so that no memory that was freed before is counted out.
    million = huge() if LONG else []
    fixture = IndexFixture(N)
    k = N // 1000
    print(f"n = {N:,}: graph built in {fixture.build_s:.1f} s", flush=True)
    rows += speed(fixture, f"500 updates/s, rebuilding, n = {k}k", 500, (1.4, 1.5), seconds=SECONDS)
    rows += speed(
        fixture, f"1,000 updates/s, rebuilding, n = {k}k", 1_000, (1.7, 1.8), seconds=SECONDS
    )
    fixture.index.close()
    fixture = IndexFixture(N)
    rows += speed(
        fixture,
        f"5,000 small turns/s, n = {k}k",
        5_000,
        (1.1, 1.3),
        small=True,
        seconds=SECONDS / 2,
    )
    fixture.index.close()
    fixture, k = IndexFixture(LARGE), LARGE // 1000
    print(f"n = {LARGE:,}: graph built in {fixture.build_s:.1f} s", flush=True)
    recall = live_recall(fixture)
    rows.append(row(f"recall@100, n = {k}k, ef 200", recall, "", "≥ 0.970", recall >= 0.970))
    rows.append(
        row(
            "  of the static graph",
            graph_recall(fixture.graph, fixture.vectors, fixture.queries[:JUDGED]),
            "",
        )
    )
    rows += speed(
        fixture,
        f"5,000 small turns/s, n = {k}k",
        5_000,
        (1.1, 1.3),
        small=True,
        seconds=SECONDS / 2,
    )
    rows += apply_cost(fixture)
    rows += speed(
        fixture, f"500 updates/s, rebuilding, n = {k}k", 500, (1.5, 1.7), seconds=2 * SECONDS
    )
    fixture.index.close()
    rows += churn()
    rows += crossing()
    rows += million
    folder = Path(load().data_dir) / "bench"
    return report(
        "index", rows, folder, n=N, large=LARGE, churn_n=CHURN_N, seed=SEED, spread=SPREAD
    )


if __name__ == "__main__":
    sys.exit(main())
