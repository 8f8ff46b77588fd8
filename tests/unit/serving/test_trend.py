"""Popularity decayed by events in a worker, against plain arithmetic."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import ExitStack

import msgspec
import numpy as np
import pytest

from eddyline.errors import StoreUnavailable
from eddyline.schema.event_decay import EventDecay, decays
from eddyline.settings.loader import Settings
from eddyline.stores.memory import MemoryStore
from eddyline.stores.popularity import NO_TREND, SlotTrend
from eddyline.stores.state_store import Fence, LogId, Source
from serving.dependencies import start_retriever
from serving.recall import trend
from serving.recall.popularity import Popularity
from tests.decayed_events import decayed
from tests.unit.serving.test_retriever import Mean

LOG = LogId("cluster", "topic")
SETTINGS = Settings(
    item_slots=2, popular_limit=8, popular_fast_half_life_events=4, popular_slow_half_life_events=60
)


class Watched(MemoryStore):
    """Notes the reads of a trend; `away`: a slot that does not answer."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[tuple[str, bool]] = []
        self.away = ""

    def popular_trend(
        self, slot: str, decays: Sequence[EventDecay], limit: int, known: SlotTrend = NO_TREND
    ) -> SlotTrend:
        if slot == self.away:
            raise StoreUnavailable("redis-2: refused")
        found = super().popular_trend(slot, decays, limit, known)
        self.reads.append((slot, found is not known))
        return found


def click(store: MemoryStore, slot: str, clicked: Sequence[str]) -> None:
    source = Source("clicks", 0)
    before = store.fences(source, [slot])[slot]
    after = Fence(0 if before is None else before.offset + 1, LOG)
    store.count_clicks(slot, source, before, after, {}, 9, 99, clicked, decays(SETTINGS))


def in_order(sums: dict[str, float]) -> list[str]:
    return sorted(sums, key=lambda item: (-sums[item], item))


def test_the_lists_are_those_of_plain_arithmetic() -> None:
    draw, store = random.Random(3), MemoryStore()
    popularity = Popularity(SETTINGS, store, trend_limit=99)
    lists = {60: popularity.follow("slow"), 4: popularity.follow("fast")}
    clicked: dict[str, list[str]] = {"i0": [], "i1": []}
    for _ in range(40):
        slot = draw.choice(["i0", "i1"])
        more = [f"{slot}-{draw.randrange(12)}" for _ in range(draw.randrange(1, 6))]
        clicked[slot] += more
        click(store, slot, more)
        assert popularity.refresh()
        for half_life, found in lists.items():
            plain = decayed(clicked["i0"], half_life / 2) | decayed(clicked["i1"], half_life / 2)
            shown = dict(found.ranked)
            # Beyond two epochs of the fast half-life an item is left out.
            assert all(plain[item] < 2.0**-31 for item in plain.keys() - shown.keys())
            assert shown == pytest.approx({item: plain[item] for item in shown}, rel=1e-7)
            assert [item for item, _ in found.ranked] == in_order(shown)
            places = {item: n for n, item in enumerate(["unknown", *plain])}
            scores = found.scores(places)
            assert scores[0] == -np.inf
            assert {i: scores[n] for i, n in places.items() if scores[n] > -np.inf} == shown
        assert all(more[-1] in dict(found.ranked) for found in lists.values())


@pytest.mark.parametrize("items", [SETTINGS.popular_limit + n for n in (-1, 0, 1, 20)])
def test_a_list_has_so_many_items(items: int) -> None:
    store = MemoryStore()
    popularity = Popularity(SETTINGS, store)
    slow = popularity.follow("slow")
    click(store, "i0", [f"i{n}" for n in range(items)])
    popularity.refresh()
    newest_first = [f"i{n}" for n in reversed(range(items))]
    assert [item for item, _ in slow.ranked] == newest_first[: SETTINGS.popular_limit]
    assert ("i0" in dict(slow.ranked)) == (items <= SETTINGS.popular_limit)


def test_nothing_is_read_before_a_path_needs_it_and_sums_only_when_events_moved() -> None:
    store = Watched()
    popularity = Popularity(SETTINGS, store)
    click(store, "i0", ["a"])
    assert popularity.refresh() and store.reads == []
    fast = popularity.follow("fast")
    assert popularity.refresh() and store.reads == [("i0", True), ("i1", False)]
    kept = fast.ranked
    assert popularity.refresh() and store.reads[2:] == [("i0", False), ("i1", False)]
    assert fast.ranked is kept and kept == [("a", 1.0)]
    click(store, "i1", ["b"])
    assert popularity.refresh() and store.reads[4:] == [("i0", False), ("i1", True)]
    assert fast.ranked == [("a", 1.0), ("b", 1.0)]


def test_the_first_refresh_of_a_worker_reads_what_its_paths_follow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Popularity, "start", Popularity.refresh)  # the thread's first step
    store = Watched()
    click(store, "i0", ["a"])
    settings = msgspec.structs.replace(SETTINGS, recall_paths="popular_fast")
    with ExitStack() as closing:
        start_retriever(settings, store, generation="g", tower=Mean(), clicks=LOG, closing=closing)
    assert store.reads == [("i0", True), ("i1", False)]


def test_the_last_list_stays_while_a_store_is_away() -> None:
    store = Watched()
    popularity = Popularity(SETTINGS, store)
    fast = popularity.follow("fast")
    for slot in ("i0", "i1"):
        click(store, slot, [f"{slot}-a"])
    assert popularity.refresh() and [item for item, _ in fast.ranked] == ["i0-a", "i1-a"]
    store.away = "i1"
    for slot in ("i0", "i1"):
        click(store, slot, [f"{slot}-b"])
    assert not popularity.refresh()
    assert [item for item, _ in fast.ranked] == ["i0-b", "i1-a", "i0-a"]
    assert popularity.missing().endswith("s old: redis-2: refused")
    store.away = ""
    assert popularity.refresh() and popularity.missing() == ""
    assert [item for item, _ in fast.ranked] == ["i0-b", "i1-b", "i0-a", "i1-a"]


def test_names_that_left_every_list_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trend, "_UNUSED_MAX", 50)
    store = MemoryStore()
    popularity = Popularity(SETTINGS, store, trend_limit=5)
    fast = popularity.follow("fast")
    last: list[str] = []
    for n in range(300):
        last = [f"{n}-a", f"{n}-b"]
        click(store, "i0", last)
        popularity.refresh()
    assert len(popularity._trend._names) <= 50 + 4 * 5 + 10
    assert [item for item, _ in fast.ranked][:2] == last[::-1]
    assert fast.scores({last[1]: 0})[0] == pytest.approx(1.0)


def test_equal_half_lives_give_equal_lists() -> None:
    settings = Settings(popular_fast_half_life_events=9, popular_slow_half_life_events=9)
    store = MemoryStore()
    popularity = Popularity(settings, store)
    fast, slow = popularity.follow("fast"), popularity.follow("slow")
    log = Fence(0, LOG)
    store.count_clicks("i0", Source("clicks", 0), None, log, {}, 9, 9, ["a", "a"], decays(settings))
    popularity.refresh()
    assert fast.ranked == slow.ranked == [("a", pytest.approx(1.0 + 0.5 ** (1 / 9)))]
