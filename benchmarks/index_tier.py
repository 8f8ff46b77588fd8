"""From how many fresh items on does a second tier pay? `make bench-index_tier`.

N items in the main graph, of which more and more go somewhere else; the same State is asked as it is, with
the plain fresh buffer, and with a tier built of that buffer, in turns. Where the index would answer by an
exact scan (over 35% of the rows fresh) the scan is timed. CPU of the query thread, because the median of it
is worth something on busy cores, too; recall@100 beside it. N sets the size, FRESH the steps.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import copy
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.index import EF, JUDGED, K, World, recall_of
from benchmarks.report import report, row
from eddyline.settings import load
from index.state import State

N = int(os.environ.get("N", "100000"))
FRESH = [int(n) for n in os.environ.get("FRESH", "4000,8000,16000,32000,48000,64000").split(",")]
TURNS, BLOCK = 12, 40


def answer(state: State, query: np.ndarray) -> Any:
    """As the live index answers."""
    found = None
    if state.searchable(K, EF):
        found = state.search(query, K, frozenset(), EF)
    return found or state.scan(query, K, frozenset())


def cpu_us(states: tuple[State, State], queries: np.ndarray) -> list[float]:
    """The median CPU time of a query of each, asked in turns."""
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


def recall(state: State, world: World) -> float:
    queries = world.queries[:JUDGED]
    found = [[int(name[1:]) for name in answer(state, query).ids] for query in queries]
    return recall_of(found, world.vectors, queries)


def main() -> int:
    """Run and report; the exit code."""
    world = World(N)
    order = world.rng.permutation(N)
    rows, moved, crossing = [], 0, 0
    for fresh in FRESH:
        for at in range(moved, fresh, 500):
            world.index.apply(world.update(0, small=False, at=order[at : min(fresh, at + 500)]))
        moved = fresh
        plain = world.index._state
        placement = copy.deepcopy(world.index._placement)
        begun = time.thread_time()
        assert world.index.build_tier()
        built_s = time.thread_time() - begun
        tiered = world.index._state
        buffer_us, tier_us = cpu_us((plain, tiered), world.queries)
        rows += [
            row(f"{fresh:,} fresh of {N:,}: tier against plain buffer", tier_us / buffer_us, "×"),
            row("  plain buffer, CPU of a query", buffer_us, "µs"),
            row("  tier, CPU of a query", tier_us, "µs"),
            row("  building the tier, CPU", built_s, "s"),
            row("  recall@100, plain", recall(plain, world), ""),
            row("  recall@100, tier", recall(tiered, world), ""),
        ]
        print(f"{fresh:,}: {buffer_us:.0f} µs plain, {tier_us:.0f} µs with a tier", flush=True)
        if tier_us < buffer_us and not crossing:
            crossing = fresh
        # Back to the plain buffer; nobody wrote meanwhile.
        world.index._state, world.index._placement = plain, placement
    world.index.close()
    rows.append(row("the first step at which the tier was cheaper", crossing, "fresh items"))
    return report("index_tier", rows, Path(load().data_dir) / "bench", n=N, fresh=FRESH)


if __name__ == "__main__":
    sys.exit(main())
