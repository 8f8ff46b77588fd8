"""From how many fresh items on does a second tier pay? `make bench-index_tier`.

N items in the main graph, of which more and more go somewhere else; the same IndexVersion is
queried as it is, with the plain fresh buffer, and with a tier built of that buffer, in turns. Where
the index would answer by an exact scan (over 35% of the rows fresh) the scan is timed. CPU of the
query thread, because the median of it is worth something on busy cores, too; recall@100 beside it.
N sets the size, FRESH the steps.

LIVE=1 measures it live instead: LIVE_FRESH items have moved and no rebuild has taken them in yet,
UPDATES a second go on moving, and one query thread asks for SECONDS, with the tier off and then on,
built meanwhile by a thread of its own at the priority of a worker's.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import copy
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.index import EF, JUDGED, REBUILD_NICE, IndexFixture, K, background, recall_of, timed
from benchmarks.report import report, row
from eddyline.settings.loader import load
from index.search.nearest import NearestSearch
from index.storage.index_version import IndexVersion

N = int(os.environ.get("N", "100000"))
FRESH = [int(n) for n in os.environ.get("FRESH", "4000,8000,16000,32000,48000,64000").split(",")]
TURNS, BLOCK = 12, 40
LIVE = os.environ.get("LIVE") == "1"
LIVE_FRESH = int(os.environ.get("LIVE_FRESH", "32768"))
UPDATES = int(os.environ.get("UPDATES", "1000"))
SECONDS = float(os.environ.get("SECONDS", "20"))


def answer(state: IndexVersion, query: np.ndarray) -> Any:
    """As the live index answers."""
    search = NearestSearch(state, query, K, frozenset())
    found = search.by_segments(EF) if search.segments_pay(EF) else None
    return found or search.scan()


def cpu_us(states: tuple[IndexVersion, IndexVersion], queries: np.ndarray) -> list[float]:
    """The median CPU time of a query of each, in turns."""
    took: list[list[float]] = [[], []]
    at = 0
    for _ in range(TURNS):
        for state, some in zip(states, took, strict=True):
            for _ in range(BLOCK):
                at += 1
                begun = time.thread_time()
                answer(state, queries[at % len(queries)])
                some.append((time.thread_time() - begun) * 1e6)
    return [float(np.median(some)) for some in took]


def recall(state: IndexVersion, fixture: IndexFixture) -> float:
    queries = fixture.queries[:JUDGED]
    found = [[int(name[1:]) for name in answer(state, query).ids] for query in queries]
    return recall_of(found, fixture.vectors, queries)


def under_updates(
    fixture: IndexFixture, tier: bool
) -> tuple[list[float], list[float], float, float]:
    """(ms of each query before the tier, and with it, seconds to build it, updates a second)."""
    batch = max(1, UPDATES // 50)
    scratch = fixture.vectors.copy()
    waiting = [fixture.drawn(batch, False, scratch) for _ in range(int(SECONDS * UPDATES) // batch)]
    done = 0
    begun = time.perf_counter()

    def write(stop: threading.Event) -> None:
        nonlocal done
        while not stop.is_set() and done < len(waiting):
            fixture.index.apply(waiting[done].records)
            done += 1
            time.sleep(max(0.0, begun + done * batch / UPDATES - time.perf_counter()))

    def build(stop: threading.Event) -> None:
        nonlocal built_s
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), REBUILD_NICE)
        if tier:
            assert fixture.index.flush()
            built_s = time.perf_counter() - begun

    built_s = 0.0
    before, after = list[float](), list[float]()
    timed(lambda query: fixture.index.find(query, K), fixture.queries, 0.3, 0)
    with background(write), background(build):
        while time.perf_counter() - begun < SECONDS:
            some = before if tier and not built_s else after
            some += timed(
                lambda query: fixture.index.find(query, K), fixture.queries, 0.1, len(some)
            )
    per_s = done * batch / (time.perf_counter() - begun)
    for batch_ in waiting[:done]:
        fixture.vectors[batch_.at] = batch_.new
    return before, after, built_s, per_s


def live() -> int:
    """Tier off, then on, with as many fresh items at the beginning; the exit code."""
    rows = []
    for tier in (False, True):
        fixture = IndexFixture(N)
        order = fixture.rng.permutation(N)
        for at in range(0, LIVE_FRESH, 500):
            fixture.index.apply(
                fixture.update(0, small=False, at=order[at : min(LIVE_FRESH, at + 500)])
            )
        before, after, built_s, per_s = under_updates(fixture, tier)
        stats = fixture.index.stats()
        name = "tier on" if tier else "tier off"
        if tier:
            rows.append(
                row("  while the tier is built: p50", float(np.percentile(before, 50)), "ms")
            )
            rows.append(
                row("  while the tier is built: p99", float(np.percentile(before, 99)), "ms")
            )
            rows.append(row("  building it took", built_s, "s"))
        rows += [
            row(f"{name}, {UPDATES:,} updates/s: p50", float(np.percentile(after, 50)), "ms"),
            row(f"{name}: p99", float(np.percentile(after, 99)), "ms"),
            row("  updates applied", per_s, "/s"),
            row("  in the buffer at the end", stats.fresh, "entries"),
            row("  in tiers at the end", stats.small_segment_items, "items"),
            row("  recall@100 right after", recall(fixture.index._version, fixture), ""),
        ]
        fixture.index.close()
    return report(
        "index_tier_live",
        rows,
        Path(load().data_dir) / "bench",
        n=N,
        fresh=LIVE_FRESH,
        updates=UPDATES,
    )


def main() -> int:
    """Run and report; the exit code."""
    if LIVE:
        return live()
    fixture = IndexFixture(N)
    order = fixture.rng.permutation(N)
    rows, moved, crossing = [], 0, 0
    for fresh in FRESH:
        for at in range(moved, fresh, 500):
            fixture.index.apply(fixture.update(0, small=False, at=order[at : min(fresh, at + 500)]))
        moved = fresh
        plain = fixture.index._version
        placement = copy.deepcopy(fixture.index._placement)
        begun = time.thread_time()
        assert fixture.index.flush()
        built_s = time.thread_time() - begun
        flushed = fixture.index._version
        buffer_us, tier_us = cpu_us((plain, flushed), fixture.queries)
        rows += [
            row(f"{fresh:,} fresh of {N:,}: tier against plain buffer", tier_us / buffer_us, "×"),
            row("  plain buffer, CPU of a query", buffer_us, "µs"),
            row("  tier, CPU of a query", tier_us, "µs"),
            row("  building the tier, CPU", built_s, "s"),
            row("  recall@100, plain", recall(plain, fixture), ""),
            row("  recall@100, tier", recall(flushed, fixture), ""),
        ]
        print(f"{fresh:,}: {buffer_us:.0f} µs plain, {tier_us:.0f} µs with a tier", flush=True)
        if tier_us < buffer_us and not crossing:
            crossing = fresh
        # Back to the plain buffer; nobody wrote meanwhile.
        fixture.index._version, fixture.index._placement = plain, placement
    fixture.index.close()
    rows.append(row("the first step at which the tier was cheaper", crossing, "fresh items"))
    return report("index_tier", rows, Path(load().data_dir) / "bench", n=N, fresh=FRESH)


if __name__ == "__main__":
    sys.exit(main())
