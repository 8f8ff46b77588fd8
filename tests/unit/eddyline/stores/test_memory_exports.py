"""The memory store's own abilities: all state as bytes, and buckets whose order is kept."""

from __future__ import annotations

import random

import msgspec
import pytest

from eddyline.schema.erasure import Erasure
from eddyline.schema.event_decay import EventDecay
from eddyline.schema.step_ranges import always
from eddyline.schema.user_history import Entry, UserHistory
from eddyline.stores.memory import MemoryStore
from eddyline.stores.memory_popularity import SORTED_MAX
from eddyline.stores.state_store import (
    Fence,
    ItemMetadata,
    LogId,
    Mark,
    RefusedRecord,
    Source,
    UserEffects,
)

LOG = LogId("cluster", "topic")


def fence(offset: int) -> Fence:
    return Fence(offset, LOG, Mark(offset, 5, 6))


def full_store() -> MemoryStore:
    store = MemoryStore()
    history = UserHistory(at_ms=7, entries=(Entry("i1", 7), Entry("i0", 6, 2, 0.5)))
    effects = UserEffects(
        histories={"ana": history},
        embeddings={"1": {"ana": (3, b"\x00\x01")}},
        accepted={"e1": 0},
        erasures={"hash": Erasure(1, 2, 3)},
        step_ranges={"1": always(str(LOG))},
    )
    store.write_users("u0", Source("clicks", 0), None, fence(0), effects)
    profile = {"age": 7, "name": "Ana", "vip": True, "score": 1.5}
    store.write_profiles(
        "u0", Source("users", 0), None, fence(4), {"ana": profile}, ["1"], {}, {"ana": (4, 5)}
    )
    store.count_clicks(
        "i0",
        Source("clicks", 0),
        None,
        fence(0),
        {9: {"i1": 1_500}},
        3,
        clicked=["i1", "é", "i1"],
        decays=[EventDecay(10), EventDecay(20)],
    )
    refused = RefusedRecord(0, 3, 4, "bad", hidden=True)
    items = {"i1": ItemMetadata(0, 2, b'{"item_id":"i1"}', 5, refused=refused, born_ms=8)}
    store.write_item_metadata("i0", Source("items", 0), None, fence(2), items)
    return store


def test_a_store_that_was_exported_and_loaded_is_the_same() -> None:
    store = full_store()
    loaded = MemoryStore.load(store.export())
    assert loaded.snapshot() == store.snapshot()
    assert loaded.every_item() == store.every_item() != []
    before = store.popular_buckets("i0", 5, {})
    assert loaded.popular_buckets("i0", 5, {})[9].counted == before[9].counted
    # It goes on from its fences.
    loaded.write_users("u0", Source("clicks", 0), fence(0), fence(1), UserEffects())


@pytest.mark.parametrize("damaged", [b"", b"\x00", b"no store"])
def test_bytes_that_are_no_store_are_refused(damaged: bytes) -> None:
    with pytest.raises(msgspec.MsgspecError):
        MemoryStore.load(damaged)


def test_the_order_of_a_bucket_is_that_of_a_new_sort() -> None:
    draw, store, last = random.Random(4), MemoryStore(), None
    counts: dict[int, dict[str, int]] = {}
    for n in range(600):
        bucket = draw.choice([1, 2, 2, 3])
        change = {f"i{draw.randrange(25)}": draw.choice([1, 500, 1_000]) for _ in range(3)}
        items_max = 12 if n % 50 == 49 else 100
        new = fence(n)
        store.count_clicks("i0", Source("clicks", 0), last, new, {bucket: change}, 3, items_max)
        last, mine = new, counts.setdefault(bucket, {})
        for item, more in change.items():
            mine[item] = mine.get(item, 0) + more
        kept = sorted(mine, key=lambda i: (mine[i], i))
        for item in kept[: len(mine) - items_max] if len(mine) > items_max else ():
            del mine[item]
        limit = draw.choice([1, 5, 100])
        found = store.popular_buckets("i0", limit, {})
        for at, of_bucket in counts.items():
            pairs = sorted(((c, i) for i, c in of_bucket.items()), reverse=True)[:limit]
            assert found[at].counted == ([i.encode() for _, i in pairs], [c for c, _ in pairs])


def test_only_so_many_orders_are_kept() -> None:
    store, last = MemoryStore(), None
    for n in range(3 * SORTED_MAX):
        store.count_clicks("i0", Source("clicks", 0), last, fence(n), {n: {"i": 1}}, 1_000)
        last = fence(n)
    assert len(store.popular_buckets("i0", 5, {})) == 3 * SORTED_MAX
    assert len(store._orders.sorted) == SORTED_MAX
