"""What a refresh of the popular list reads, with a real Redis and 28 full buckets.

`make bench-costs` has the time of a refresh.
"""

from __future__ import annotations

import random

import pytest

from eddyline.settings.loader import Settings
from eddyline.stores.redis import RedisStore
from eddyline.stores.state_store import Fence, LogId, Source
from serving.recall import click_totals
from serving.recall.popularity import Popularity
from tests.unit.serving.test_click_totals import rank

BUCKETS, ITEMS = 28, 4_000
CLICKS, LOG = Source("clicks", 0), LogId("cluster", "topic")


def test_a_refresh_costs_one_bucket_and_not_all(
    fresh_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bucket changes between two refreshes, as it is while users click."""
    monkeypatch.setattr(click_totals, "REREAD_S", 3_600)
    rng, store, fence = random.Random(5), RedisStore(fresh_settings), None
    names = [f"item-{n:06d}-{rng.randrange(1 << 60):015x}" for n in range(20_000)]
    popularity, reads = Popularity(fresh_settings, store), list[dict[int, int]]()
    read = store.popular_buckets

    def counted(*arguments):
        found = read(*arguments)
        reads.append({b: len(of.counted[0]) for b, of in found.items() if of.counted is not None})
        return found

    monkeypatch.setattr(store, "popular_buckets", counted)
    try:
        for bucket in range(BUCKETS):
            counts = {item: rng.randrange(1, 1 << 20) for item in rng.sample(names, ITEMS)}
            after = Fence(bucket, LOG)
            store.count_clicks("i0", CLICKS, fence, after, {bucket: counts}, BUCKETS)
            fence = after
        assert popularity.refresh()
        newest, limit = BUCKETS - 1, fresh_settings.popular_limit
        assert reads == [dict.fromkeys(range(BUCKETS), limit)] and limit <= ITEMS
        for offset in range(BUCKETS, BUCKETS + 20):
            counts = dict.fromkeys(rng.sample(names, 60), 1_000)
            after = Fence(offset, LOG)
            store.count_clicks("i0", CLICKS, fence, after, {newest: counts}, BUCKETS)
            fence = after
            assert popularity.refresh()
            assert reads[-1] == {newest: limit}
        assert popularity.refresh() and reads[-1] == {}, "nothing changed, nothing is read"
        assert len(reads) == 22
        buckets = store.popular("i0", fresh_settings.popular_limit)
        weights = fresh_settings.popular_bucket_s, fresh_settings.popular_half_life_s
        plain = rank(buckets, limit=fresh_settings.popular_limit, weights=weights)
        assert popularity.ranked == plain
    finally:
        store.close()
