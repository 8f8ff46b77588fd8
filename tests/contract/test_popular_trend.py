"""Popularity decayed by events, in every store, against plain arithmetic."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from eddyline.errors import FenceMoved
from eddyline.schema.event_decay import EPOCH_HALF_LIVES, EventDecay
from eddyline.stores.popularity import NO_TREND, SlotTrend
from eddyline.stores.redis import RedisStore
from eddyline.stores.state_store import Fence, LogId, Source, StateStore
from tests import decayed_events
from tests.decayed_events import ALL, decayed, plain_counts, stored_counts, sums_of

LOG = LogId("cluster", "topic")
CLICKS = Source("clicks", 0)
FAST, SLOW, NO_DECAY = EventDecay(1), EventDecay(50), EventDecay(decayed_events.NO_DECAY)
EPOCH = EPOCH_HALF_LIVES  # events, of the fast half-life


def count(
    store: StateStore,
    clicked: Sequence[str],
    decays: Sequence[EventDecay] = (FAST, SLOW),
    *,
    items_max: int = 1_000,
    source: Source = CLICKS,
    slot: str = "i0",
) -> None:
    """One write after the stored fence."""
    before = store.fences(source, [slot])[slot]
    after = Fence((-1 if before is None else before.offset) + 1, LOG)
    store.count_clicks(slot, source, before, after, {}, 4, items_max, clicked, decays)


def drawn(n: int, items: int = 20, seed: int = 1) -> list[str]:
    draw = random.Random(seed)
    return [f"{draw.randrange(items) + 1}é" for _ in range(n)]


def last_two_epochs(clicked: Sequence[str], decay: EventDecay) -> Sequence[str]:
    """The events that are not left out yet."""
    return clicked[max(0, int((decay.epoch(len(clicked) - 1) - 1) * decay.epoch_events)) :]


def test_an_empty_store_has_counted_nothing(store: StateStore) -> None:
    assert store.popular_trend("i0", [FAST, SLOW], 9) == SlotTrend()
    count(store, [])
    assert store.popular_trend("i0", [FAST, SLOW], 9) == SlotTrend()


@pytest.mark.parametrize("events", [1, EPOCH - 1, EPOCH, EPOCH + 1, 2 * EPOCH, 2 * EPOCH + 1, 700])
def test_sums_are_those_of_plain_arithmetic(store: StateStore, events: int) -> None:
    clicked, draw, at = drawn(events, 200), random.Random(2), 0
    while at < events:
        size = draw.choice([1, 2, 7, 40])
        count(store, clicked[at : at + size], source=Source("clicks", draw.randrange(3)))
        at += size
    trend = store.popular_trend("i0", [FAST, SLOW], ALL)
    assert trend.events == events
    for decay in (FAST, SLOW):
        found = sums_of(trend, decay)
        kept = decayed(last_two_epochs(clicked, decay), decay.half_life)
        assert found == pytest.approx(kept, rel=1e-9)
        # Of what is left out every event weighs less than 2^-32.
        for item, total in decayed(clicked, decay.half_life).items():
            assert total - found.get(item, 0.0) <= clicked.count(item) * 2.0**-EPOCH_HALF_LIVES


def test_a_slot_decays_by_its_share_of_the_events(store: StateStore) -> None:
    decay, clicked = EventDecay(30, item_slots=3), drawn(100)
    count(store, clicked, [decay], slot="i2")
    assert decay.half_life == 10.0
    found = sums_of(store.popular_trend("i2", [decay], ALL), decay)
    assert found == pytest.approx(decayed(clicked, 10.0), rel=1e-9)
    assert store.popular_trend("i0", [decay], ALL) == SlotTrend()


def test_sums_are_the_same_whatever_the_batches(store: StateStore) -> None:
    clicked = drawn(150)
    for slot, size in (("i0", 1), ("i1", 7), ("i2", 150)):
        for at in range(0, len(clicked), size):
            count(store, clicked[at : at + size], slot=slot)
    one, some, all_ = (store.popular_trend(f"i{n}", [FAST, SLOW], ALL) for n in range(3))
    for decay in (FAST, SLOW):
        sums = pytest.approx(sums_of(one, decay), rel=1e-12)
        assert sums_of(some, decay) == sums == sums_of(all_, decay)


def test_a_half_life_without_end_counts_events(store: StateStore) -> None:
    clicked = drawn(300)
    for at in range(0, 300, 60):
        count(store, clicked[at : at + 60], [NO_DECAY])
    counts = {item: clicked.count(item) for item in clicked}
    assert stored_counts(store, "i0", [NO_DECAY]) == plain_counts(counts)


def test_equal_half_lives_are_counted_once(store: StateStore) -> None:
    count(store, ["a", "a"], [NO_DECAY, NO_DECAY])
    assert stored_counts(store, "i0", [NO_DECAY, NO_DECAY]) == plain_counts({"a": 2})


def test_events_without_an_item_that_counts_change_no_sums(store: StateStore) -> None:
    count(store, ["a"])
    before = store.popular_trend("i0", [FAST, SLOW], ALL)
    count(store, [])
    assert store.popular_trend("i0", [FAST, SLOW], ALL) == before


def test_without_half_lives_all_sums_end(store: StateStore) -> None:
    count(store, ["a"])
    count(store, ["a"], [NO_DECAY], slot="i1")
    other = store.popular_trend("i1", [NO_DECAY], ALL)
    for clicked in (["a", "b"], []):
        count(store, clicked, [])
        assert store.popular_trend("i0", [FAST, SLOW], ALL) == NO_TREND
    assert store.popular_trend("i1", [NO_DECAY], ALL) == other, "of that slot only"
    if isinstance(store, RedisStore):
        assert not [*store._redis.scan_iter(match=f"{store._ns}{{i0}}:trend*")]
    # Switched on again, they begin at 0.
    count(store, ["b"])
    assert sums_of(store.popular_trend("i0", [FAST, SLOW], ALL), FAST).keys() == {"b"}


def test_a_write_behind_another_fence_counts_nothing(store: StateStore) -> None:
    count(store, ["a"])
    before = store.popular_trend("i0", [FAST, SLOW], ALL)
    with pytest.raises(FenceMoved):
        store.count_clicks(
            "i0", CLICKS, Fence(9, LOG), Fence(10, LOG), {}, 4, 9, ["a", "b"], [FAST, SLOW]
        )
    assert store.popular_trend("i0", [FAST, SLOW], ALL) == before


def test_sums_are_read_again_once_something_was_counted(store: StateStore) -> None:
    count(store, drawn(EPOCH + 3))
    first = store.popular_trend("i0", [FAST, SLOW], ALL)
    assert store.popular_trend("i0", [FAST, SLOW], ALL, first) is first
    for more in (1, EPOCH, 5, 2 * EPOCH, 1):
        count(store, drawn(more, seed=more))
        found = store.popular_trend("i0", [FAST, SLOW], ALL, first)
        assert found.events == first.events + more
        new = store.popular_trend("i0", [FAST, SLOW], ALL)
        assert found.events == new.events
        for decay in (FAST, SLOW):
            assert sums_of(found, decay) == sums_of(new, decay)
        first = found


def test_sums_are_read_again_from_a_store_with_fewer_events(store: StateStore) -> None:
    """As after it was emptied. Another slot has what it was filled with since."""
    count(store, ["a"] * (EPOCH + 9))
    before = store.popular_trend("i0", [FAST], ALL)
    count(store, ["b"] * (EPOCH + 5), slot="i1")
    assert set(sums_of(store.popular_trend("i1", [FAST], ALL, before), FAST)) == {"b"}


@pytest.mark.parametrize("limit", [1, 2, 3, 4])
def test_the_top_items_are_read(store: StateStore, limit: int) -> None:
    count(store, ["a", "b", "b", "c", "c", "c"], [NO_DECAY])
    [part] = store.popular_trend("i0", [NO_DECAY], limit).parts
    assert sorted(part.items) == sorted([b"c", b"b", b"a"][:limit])


@pytest.mark.parametrize("items_max", [2, 3, 4])
def test_an_epoch_keeps_its_most_counted_items(store: StateStore, items_max: int) -> None:
    count(store, ["b", "a", "c", "c"], [NO_DECAY, SLOW], items_max=items_max)
    found = store.popular_trend("i0", [NO_DECAY, SLOW], ALL)
    # A later event weighs a little more.
    assert sums_of(found, SLOW).keys() == ({"a", "c"} if items_max == 2 else {"a", "b", "c"})
    assert len(sums_of(found, NO_DECAY)) == min(items_max, 3)
    assert found.events == 4


@pytest.mark.parametrize("more", [EPOCH - 1, EPOCH, EPOCH + 1])
def test_sums_of_another_half_life_end(store: StateStore, more: int) -> None:
    """Those that the settings no longer name, an epoch after their last write."""
    count(store, ["a"], [FAST, SLOW])
    count(store, ["b"] * more, [SLOW])
    trend = store.popular_trend("i0", [FAST, SLOW], ALL)
    assert trend.events == 1 + more
    assert ("a" in sums_of(trend, FAST)) == (more < EPOCH)
    assert sums_of(trend, SLOW).keys() == {"a", "b"}
    count(store, ["c"], [FAST, SLOW])
    assert "c" in sums_of(store.popular_trend("i0", [FAST, SLOW], ALL), FAST)


def test_a_longer_half_life_ends_with_those_that_replace_it(store: StateStore) -> None:
    count(store, ["a"], [NO_DECAY])
    count(store, ["b"] * EPOCH, [FAST])
    assert sums_of(store.popular_trend("i0", [NO_DECAY], ALL), NO_DECAY) == {}
