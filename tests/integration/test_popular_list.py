"""The cost of the popular list with a real Redis and 28 full buckets."""

from __future__ import annotations

import random
import time

from eddyline.settings.loader import Settings
from eddyline.stores.redis import RedisStore
from eddyline.stores.state_store import Fence, LogId, Source
from serving.recall.popularity import Popularity
from tests.unit.serving.test_click_totals import rank

BUCKETS, ITEMS = 28, 4_000
CLICKS, LOG = Source("clicks", 0), LogId("cluster", "topic")


def test_a_refresh_costs_one_bucket_and_not_all(fresh_settings: Settings) -> None:
    """One bucket changes between two refreshes, as it is while users click."""
    rng, store, fence = random.Random(5), RedisStore(fresh_settings), None
    names = [f"item-{n:06d}-{rng.randrange(1 << 60):015x}" for n in range(20_000)]
    popularity = Popularity(fresh_settings, store)
    try:
        for bucket in range(BUCKETS):
            counts = {item: rng.randrange(1, 1 << 20) for item in rng.sample(names, ITEMS)}
            after = Fence(bucket, LOG)
            store.count_clicks("i0", CLICKS, fence, after, {bucket: counts}, BUCKETS)
            fence = after
        begun = time.thread_time()
        assert popularity.refresh()
        whole_s, took_s = time.thread_time() - begun, list[float]()
        for offset in range(BUCKETS, BUCKETS + 20):
            counts = dict.fromkeys(rng.sample(names, 60), 1_000)
            after = Fence(offset, LOG)
            store.count_clicks("i0", CLICKS, fence, after, {BUCKETS - 1: counts}, BUCKETS)
            fence = after
            begun = time.thread_time()
            assert popularity.refresh()
            took_s.append(time.thread_time() - begun)
        assert min(took_s) <= 0.015  # 3.6 to 6.8 ms; the machine may have other work
        assert sorted(took_s)[10] < whole_s / 4
        buckets = store.popular("i0", fresh_settings.popular_limit)
        weights = fresh_settings.popular_bucket_s, fresh_settings.popular_half_life_s
        plain = rank(buckets, limit=fresh_settings.popular_limit, weights=weights)
        assert popularity.ranked == plain
    finally:
        store.close()
