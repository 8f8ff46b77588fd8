"""8 readers and 2 writers race with rebuilds and flushes: no error, wrong id or retired item.

5 s here; `make soak` runs it for SOAK_S seconds, 60 by default there.
"""

import os
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from eddyline.schema.item_record import ItemRecord
from index.factory import HnswIndex
from index.port import Hit
from tests.unit.index.item_records import records, units

SECONDS = float(os.environ.get("SOAK_S", "5"))
READERS, WRITERS = 8, 2
N, D, K = 1_500, 16, 30


def wrong(
    hits: list[Hit], k: int, exclude: frozenset[str], gone_since: dict[str, float], begun: float
) -> list[str]:
    names, scores = [hit.item_id for hit in hits], [hit.score for hit in hits]
    found = [
        f"{name} after its retire was acknowledged"
        for name in names
        if gone_since.get(name, begun) < begun
    ]
    if len(set(names)) != k:
        found.append(f"{len(set(names))} different items of {k}")
    if exclude & set(names):
        found.append("an excluded item")
    if scores != sorted(scores, reverse=True):
        found.append("not best first")
    return found


class Race:
    """One index and the threads that use it. Writer w owns the items n with n % WRITERS == w.

    gone_since: item id -> when its retire was acknowledged; offsets: the last one of each item
    """

    def __init__(self) -> None:
        self.vectors = units(N, D, 12)
        self.index = HnswIndex(
            D, m=8, ef_construction=40, ef=60, exact_below=200, fresh_max=60, flush_above=100
        )
        self.index.upsert(records(self.vectors))
        self.stop = threading.Event()
        self.queries, self.small_segments = [0] * READERS, 0
        self.failures: list[str] = []
        self.gone_since: dict[str, float] = {}
        self.offsets = list(range(N))

    def write(self, mine: int) -> None:
        rng = np.random.default_rng(mine)
        offset = N
        while not self.stop.is_set():
            offset += 1
            chosen = [int(c) for c in rng.choice(np.arange(mine, N, WRITERS), 20, replace=False)]
            upserted, retired = chosen[:15], chosen[15:17]
            # Some vectors turn a lot, some a little, and some items were retired before.
            turned = units(15, D, offset * 2 + mine)
            turned[:5] = self.vectors[upserted[:5]] + 0.1 * turned[:5]
            turned /= np.linalg.norm(turned, axis=1, keepdims=True)
            for c in upserted:
                self.offsets[c] = offset
                self.gone_since.pop(f"i{c}", None)
            self.index.upsert(
                [
                    ItemRecord(f"i{c}", mine, offset, 0, 0, v)
                    for c, v in zip(upserted, turned, strict=True)
                ]
            )
            self.index.retire([ItemRecord(f"i{c}", mine, offset + 1, 0, 0, None) for c in retired])
            for c in retired:
                self.gone_since[f"i{c}"] = time.monotonic()
            offset += 1
            time.sleep(0.001)

    def read(self, seed: int) -> None:
        queries, at = units(200, D, 1_000 + seed), 0
        while not self.stop.is_set():
            at += 1
            begun = time.monotonic()
            exclude = frozenset(f"i{(at * 7 + e) % N}" for e in range(10))
            hits = self.index.query(queries[at % 200], K, exclude)
            self.failures.extend(wrong(hits, K, exclude, self.gone_since, begun))
            name = f"i{(at * 13 + seed) % N}"
            found = self.index.describe([name])[0]
            if found is not None and self.gone_since.get(name, begun) < begun:
                self.failures.append(f"{name} described after its retire was acknowledged")
            self.queries[seed] = at

    def rebuild(self, _: int) -> None:
        while not self.stop.is_set():
            assert self.index.rebuild(), self.index.stats().rebuild_error

    def flush(self, _: int) -> None:
        while not self.stop.wait(0.01):
            assert self.index.flush()
            found = self.index.stats().small_segments
            self.small_segments = max(self.small_segments, found)

    def catching_errors(self, run: Callable[[int], None], number: int) -> None:
        try:
            run(number)
        except BaseException as error:
            self.failures.append(f"{type(error).__name__}: {error}")


@pytest.mark.timeout(SECONDS + 120)
def test_race_of_readers_writers_rebuilds_and_tiers() -> None:
    race = Race()
    roles = [(race.read, READERS), (race.write, WRITERS), (race.rebuild, 1), (race.flush, 1)]
    threads = [
        threading.Thread(target=race.catching_errors, args=(run, n))
        for run, count in roles
        for n in range(count)
    ]
    try:
        for thread in threads:
            thread.start()
        end = time.monotonic() + SECONDS
        while time.monotonic() < end and not race.failures:
            time.sleep(0.1)
    finally:
        race.stop.set()
        for thread in threads:
            thread.join(30)
        stats = race.index.stats()
        race.index.close()
    assert not race.failures, race.failures[:5]
    assert not any(thread.is_alive() for thread in threads)
    # Every reader read; main and small segments came and went.
    assert min(race.queries) > 2 and stats.rebuilds >= 2 and race.small_segments >= 1
    assert stats.rebuilds_failed == stats.rejected == 0
    # Live are all items but those retired last, each with its last offset.
    hits = race.index.query(race.vectors[0], N)
    assert {hit.item_id for hit in hits} == {f"i{c}" for c in range(N)} - set(race.gone_since)
    assert all(hit.offset == race.offsets[int(hit.item_id[1:])] for hit in hits)
