"""The popular list is built from changed buckets only, and is bit for bit the plain sum."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import SimpleNamespace

import numpy as np
import pytest

from eddyline.errors import StoreUnavailable
from eddyline.schema.item_record import ItemRecord
from eddyline.settings.loader import Settings
from eddyline.stores.memory import MemoryStore
from eddyline.stores.popularity import PopularBucket
from eddyline.stores.state_store import Fence, LogId, Source
from index.exact import ExactIndex
from serving.answer.deadline import Deadline
from serving.recall import click_totals
from serving.recall import popularity as popularity_module
from serving.recall.base import RecallContext, RecallRequest
from serving.recall.click_totals import ClickTotals
from serving.recall.popular import PopularPath
from serving.recall.popularity import LOOK_S, Popularity

LOG = LogId("cluster", "topic")
LIMIT = 25
VECTOR = np.array([1, 0], np.float32)


def rank(
    buckets: Mapping[int, Mapping[str, int]],
    *,
    limit: int = LIMIT,
    weights: tuple[int, int] = (10, 15),
) -> list[tuple[str, float]]:
    """The plain definition. weights: width of a bucket and half-life, seconds."""
    bucket_s, half_life_s = weights
    newest, totals = max(buckets, default=0), dict[str, float]()
    for bucket in sorted(buckets):
        weight = 0.5 ** ((newest - bucket) * bucket_s / half_life_s) / 1000
        for item_id, count in buckets[bucket].items():
            totals[item_id] = totals.get(item_id, 0.0) + weight * count
    return sorted(totals.items(), key=lambda pair: (-pair[1], pair[0]))[:limit]


def made(limit: int = LIMIT) -> ClickTotals:
    return ClickTotals(bucket_s=10, half_life_s=15, limit=limit)


def read_of(version: int, counts: Mapping[str, int]) -> PopularBucket:
    items = sorted(counts, key=lambda item: -counts[item])
    return PopularBucket(
        b"%d" % version, ([item.encode() for item in items], [counts[item] for item in items])
    )


def test_clicks_are_decayed_against_the_newest_bucket_and_ties_go_by_id() -> None:
    counts = {10: {"old": 4000, "b": 1000}, 12: {"a": 250, "new": 1000}}
    for limit, found in (
        (9, [("new", 1.0), ("old", 1.0), ("a", 0.25), ("b", 0.25)]),
        (1, [("new", 1.0)]),
        (3, [("new", 1.0), ("old", 1.0), ("a", 0.25)]),
    ):
        totals = ClickTotals(bucket_s=10, half_life_s=10, limit=limit)
        totals.update("i0", {b: read_of(1, of_bucket) for b, of_bucket in counts.items()})
        assert totals.ranked() == found
    assert made().ranked() == []


@pytest.mark.parametrize("seed", range(5))
def test_any_changes_give_the_plain_sum_bit_for_bit(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two slots, buckets that grow, come and go; the table of names is cleaned often."""
    monkeypatch.setattr(click_totals, "_UNUSED_MAX", 10)
    rng, totals, version = random.Random(seed), made(), 0
    state: dict[str, dict[int, dict[str, int]]] = {"i0": {}, "i1": {}}
    for _ in range(60):
        for slot, buckets in state.items():
            found = {}
            for bucket in rng.sample(range(40), rng.randrange(4)):
                counts = buckets.setdefault(bucket, {})
                for _ in range(rng.randrange(30)):
                    item = f"{slot}-é{rng.randrange(60)}"
                    counts[item] = counts.get(item, 0) + rng.choice([1, 250, 1000, 1000, 3333])
                version += 1
                found[bucket] = read_of(version, counts)
            if len(buckets) > 6:
                del buckets[gone := rng.choice(list(buckets))]
                found.pop(gone, None)
            kept = {bucket: PopularBucket(b"") for bucket in buckets}
            totals.update(slot, kept | found)
        merged: dict[int, dict[str, int]] = {}
        for buckets in state.values():
            for bucket, counts in buckets.items():
                merged.setdefault(bucket, {}).update(counts)
        assert totals.ranked() == rank(merged)


class Counting(MemoryStore):
    """Notes which buckets are read, and can lose all versions, as before they were stored."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[int] = []
        self.versions = True

    def popular_buckets(
        self, slot: str, limit: int, known: Mapping[int, bytes]
    ) -> dict[int, PopularBucket]:
        if not self.versions:
            known = {bucket: b"0" for bucket in known}
            self._orders._bucket_writes.clear()
        found = super().popular_buckets(slot, limit, known)
        self.read += [bucket for bucket, read in found.items() if read.counted is not None]
        return found


def test_a_refresh_reads_what_changed_and_no_more() -> None:
    store, fence = Counting(), None
    popularity = Popularity(Settings(popular_bucket_s=60), store)
    for offset, bucket in enumerate([*range(28), 27, 27, 3]):
        after = Fence(offset, LOG)
        store.count_clicks("i0", Source("clicks", 0), fence, after, {bucket: {"a": 1000}}, 28)
        fence = after
        store.read.clear()
        assert popularity.refresh() and store.read == [bucket]
    store.read.clear()
    assert popularity.refresh() and store.read == []


def test_clicks_into_the_newest_bucket_are_added_to_a_kept_sum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The other buckets are summed again only if one of them changes, comes or goes."""
    totals, added, add = made(), list[list[tuple[str, int]]](), ClickTotals._add

    def counting(self: ClickTotals, sums: object, keys: list[tuple[str, int]], newest: int) -> None:
        added.append(list(keys))
        add(self, sums, keys, newest)

    monkeypatch.setattr(ClickTotals, "_add", counting)
    versions, rng = iter(range(1_000_000)), random.Random(3)
    held: dict[int, PopularBucket] = {}

    def change(*buckets: int) -> set[int]:
        """The buckets that are added after these have changed."""
        for bucket in held:
            held[bucket] = PopularBucket(held[bucket].version)  # unchanged, so not read
        for bucket in buckets:
            counts = {f"item-{rng.randrange(50)}": rng.randrange(1, 5_000) for _ in range(20)}
            held[bucket] = read_of(next(versions), counts)
        for slot in ("i0", "i1"):
            totals.update(slot, held)
        added.clear()
        totals.ranked()
        return {bucket for keys in added for _, bucket in keys}

    assert change(*range(28)) == set(range(28))
    assert change(27) == {27} and change(27) == {27}
    assert change(3) == set(range(28))
    assert change(27) == {27}
    assert change(28) == set(range(29)), "the weights are those of the newest bucket"
    del held[0]
    assert change(28) == set(range(1, 29))
    assert change(28) == {28}


@pytest.mark.parametrize(("dead", "filled"), [(30, 2), (62, 2), (63, 1), (64, 0), (500, 0)])
def test_live_items_fill_the_list_where_dead_ones_lead(dead: int, filled: int) -> None:
    """Up to sixteen times the length of the list; a query that finds too few starts the search."""
    limit, counts = 4, {f"dead-{n}": 100_000 - n for n in range(dead)}
    counts |= {f"live-{n}": 1_000 - n for n in range(6)}
    store, index = MemoryStore(), ExactIndex(2)
    index.upsert([ItemRecord(f"live-{n}", 0, n, n, n, VECTOR) for n in range(6)])
    store.count_clicks("i0", Source("clicks", 0), None, Fence(0, LOG), {5: counts}, 28)
    settings = Settings(popular_bucket_s=60, popular_limit=limit)
    popularity = Popularity(settings, store, index)
    assert popularity.refresh()
    plain = [f"dead-{n}" for n in range(limit)]
    assert [item_id for item_id, _ in popularity.ranked] == plain
    path = PopularPath(RecallContext(settings, store, None, popularity, ExitStack()))  # type: ignore[arg-type]
    request = RecallRequest(None, 3, (), None, 0.0, Deadline.of_call(None, 60_000))
    assert not path.recall(request, index).hits
    for _ in range(6):
        assert popularity.refresh()
    # Two of the list's four places are enough to end the search.
    live = ["live-0", "live-1"][:filled]
    assert [hit.item_id for hit in path.recall(request, index).hits] == live
    assert [item_id for item_id, _ in popularity.ranked] == [*plain[: limit - filled], *live]
    alone = Popularity(settings, store)
    alone.look_for_live()
    assert alone.refresh() and [item_id for item_id, _ in alone.ranked] == plain


def test_the_search_for_live_items_lasts_as_long_as_queries_need_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Then reads are as deep as the list is long, also if no query found enough."""
    now_s = 1_000.0
    monkeypatch.setattr(popularity_module, "time", SimpleNamespace(monotonic=lambda: now_s))
    store, index = MemoryStore(), ExactIndex(2)
    index.upsert([ItemRecord(f"live-{n}", 0, n, n, n, VECTOR) for n in range(6)])
    counts = {f"dead-{n}": 100_000 - n for n in range(30)}
    counts |= {f"live-{n}": 1_000 - n for n in range(6)}
    store.count_clicks("i0", Source("clicks", 0), None, Fence(0, LOG), {5: counts}, 28)
    settings = Settings(popular_bucket_s=60, popular_limit=4)
    popularity = Popularity(settings, store, index)
    path = PopularPath(RecallContext(settings, store, None, popularity, ExitStack()))  # type: ignore[arg-type]
    request = RecallRequest(None, 2, (), None, 0.0, Deadline.of_call(None, 60_000))
    assert popularity.refresh() and not path.recall(request, index).hits
    for _ in range(6):
        assert popularity.refresh()
    for _ in range(5):  # every query finds enough, and longer than one search lasts
        now_s += LOOK_S * 0.9
        assert len(path.recall(request, index).hits) == 2
        assert popularity.refresh()
    assert popularity._totals.depth > 4
    now_s += LOOK_S + 1
    assert popularity.refresh()
    assert popularity._totals.depth == 4
    assert not path.recall(request, index).hits


def test_reads_are_no_longer_deep_once_the_dead_items_do_not_lead() -> None:
    totals = made(limit=4)
    counts = {f"dead-{n}": 900 - n for n in range(5)}
    totals.update("i0", {5: read_of(1, counts)})
    for depth in (8, 8):  # the bucket has fewer than eight, so more depth finds no more
        totals.ranked_live(lambda ids: [False for _ in ids], 2)
        assert totals.depth == depth
        totals.update("i0", {5: read_of(1, counts)})
    totals.ranked_live(lambda ids: [True for _ in ids], 2)
    assert totals.depth == 4 and totals.known("i0") == {5: b"1"}


def test_a_list_with_every_clicked_item_is_the_same_with_and_without_the_index() -> None:
    """A coordinator, which has no index, gives the answers and reasons of a worker."""
    store, index = MemoryStore(), ExactIndex(2)
    index.upsert([ItemRecord(f"live-{n}", 0, n, n, n, VECTOR) for n in range(9)])
    counts = {"dead-0": 9, "live-0": 7, "dead-1": 5, "dead-2": 3, "live-1": 3, "dead-3": 1}
    store.count_clicks("i0", Source("clicks", 0), None, Fence(0, LOG), {5: counts}, 28)
    settings, answers = Settings(popular_bucket_s=60, popular_limit=8), []
    request = RecallRequest(None, 4, (), None, 0.0, Deadline.of_call(None, 60_000))
    for own in (None, index):
        popularity = Popularity(settings, store, own)
        context = RecallContext(settings, store, None, popularity, ExitStack())  # type: ignore[arg-type]
        path = PopularPath(context)
        for _ in range(3):
            assert popularity.refresh()
            found = path.recall(request, index)
            ln_p = [hit.score for hit in popularity.debias(found.hits, 4, 1.0)]
            answers.append((found, ln_p, popularity.ranked))
    assert all(answer == answers[0] for answer in answers)
    assert answers[0][0].why == "of 6 popular items 2 are live and unseen"


def test_a_list_that_is_mostly_live_stays_as_it_is() -> None:
    totals, asked = made(limit=4), list[int]()
    counts = {"dead": 900, "a": 800, "b": 700, "c": 600, "d": 500}
    totals.update("i0", {5: read_of(1, counts)})

    def live_of(ids: Sequence[str]) -> list[bool]:
        asked.append(len(ids))
        return [item_id != "dead" for item_id in ids]

    assert totals.ranked_live(live_of, 2) == totals.ranked()
    assert asked == [4] and totals.depth == 4 and totals.known("i0") == {5: b"1"}
    assert [item_id for item_id, _ in totals.ranked_live(live_of, 4)] == ["a", "b", "c", "d"]


def test_a_slot_that_is_away_keeps_its_clicks_and_stops_no_other() -> None:
    class Frail(MemoryStore):
        dead = ""

        def popular_buckets(
            self, slot: str, limit: int, known: Mapping[int, bytes]
        ) -> dict[int, PopularBucket]:
            if slot == self.dead:
                raise StoreUnavailable("redis-2: refused")
            return super().popular_buckets(slot, limit, known)

    store, source = Frail(), Source("clicks", 0)
    popularity = Popularity(Settings(item_slots=3, popular_bucket_s=60), store)
    for n in range(3):
        store.count_clicks(f"i{n}", source, None, Fence(0, LOG), {5: {f"item-{n}": 1000}}, 28)
    assert popularity.refresh() and len(popularity.ranked) == 3
    store.dead = "i1"
    for n in range(3):
        counts = {5: {f"item-{n}": 1000 * n}}
        store.count_clicks(f"i{n}", source, Fence(0, LOG), Fence(1, LOG), counts, 28)
    assert not popularity.refresh()
    assert popularity.ranked == [("item-2", 3.0), ("item-0", 1.0), ("item-1", 1.0)]
    assert popularity.missing().endswith("s old: redis-2: refused")
    store.dead = ""
    assert popularity.refresh() and popularity.missing() == ""
    assert popularity.ranked == [("item-2", 3.0), ("item-1", 2.0), ("item-0", 1.0)]


def test_every_slot_is_read_again_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(click_totals, "REREAD_S", 0.0)
    totals, again = made(), list[tuple[str, int]]()
    for slot in ("i0", "i1"):
        totals.update(slot, {bucket: read_of(1, {"a": 1}) for bucket in (5, 7)})
    for _ in range(4):
        for slot in ("i0", "i1"):
            gone = {5, 7} - totals.known(slot).keys()
            again += [(slot, bucket) for bucket in gone]
            kept = {bucket: PopularBucket(b"1") for bucket in (5, 7)}
            totals.update(slot, kept | {bucket: read_of(1, {"a": 1}) for bucket in gone})
    assert again[:4] == [("i0", 5), ("i0", 7), ("i1", 5), ("i1", 7)]


def test_counts_without_versions_are_seen_one_bucket_after_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(click_totals, "REREAD_S", 0.0)
    store, fence = Counting(), None
    store.versions = False
    popularity = Popularity(Settings(popular_bucket_s=60), store)
    for offset, item in enumerate(["a", "b"]):
        after, counts = Fence(offset, LOG), {bucket: {item: 2000 * offset + 1} for bucket in (5, 7)}
        store.count_clicks("i0", Source("clicks", 0), fence, after, counts, 28)
        fence = after
        popularity.refresh()
    for _ in range(3):
        popularity.refresh()
    assert [item for item, _ in popularity.ranked] == ["b", "a"]
    assert store.read[-3:] in ([5, 7, 5], [7, 5, 7])
