"""Co-visitation rows: one suite over every `StateStore`."""

from __future__ import annotations

import contextlib
import random
import time
from dataclasses import replace

import numpy as np
import pytest

from eddyline.errors import FenceMoved, StoreRefused, StoreUnavailable
from eddyline.schema import co_visits
from eddyline.schema.co_visits import COUNT_MAX, CoVisits, Visit, entries
from eddyline.schema.item_key import item_key
from eddyline.schema.partitioning import item_slot
from eddyline.settings.loader import Settings
from eddyline.stores.memory import MemoryStore
from eddyline.stores.redis import RedisStore
from eddyline.stores.state_store import (
    Fence,
    ItemMetadata,
    LogId,
    Mark,
    Source,
    StateStore,
    UserEffects,
)

LOG = LogId("cluster", "topic")
CLICKS = Source("clicks", 3)
PAIRS = Source("co-visits", 3)


def at(offset: int) -> Fence:
    return Fence(offset, LOG)


def row(store: StateStore, slot: str, kind: str, item: str) -> bytes | None:
    """A row as it is stored."""
    if isinstance(store, MemoryStore):
        return store.snapshot().rows.get((slot, kind, item))
    assert isinstance(store, RedisStore)
    value = store._redis.get(f"{store._ns}{{{slot}}}:{kind}:{item}")
    assert value is None or isinstance(value, bytes)
    return value


def shown(found: CoVisits) -> tuple[dict[int, tuple[float, float]], float, float]:
    """A row with equal keys added up."""
    added: dict[int, tuple[float, float]] = {}
    for key, visits, after in zip(*found[:3], strict=True):
        before = added.get(int(key), (0.0, 0.0))
        added[int(key)] = before[0] + float(visits), before[1] + float(after)
    return added, found.visits_sum, found.next_sum


def test_unknown_items_have_empty_rows(store: StateStore) -> None:
    after, before = store.read_co_visits(["a", "b"], ["a"], 2)
    assert after == [co_visits.EMPTY] * 2 and before == [co_visits.EMPTY]
    assert store.read_co_visits([], [], 1) == ([], [])
    assert co_visits.EMPTY.keys.dtype == np.uint64 and not len(co_visits.EMPTY.keys)


def test_what_is_appended_adds_up(store: StateStore) -> None:
    more = {"a": entries([(1, 1_000, 1), (2, 500, 0)]), "é b": entries([(7, 333, 0)])}
    store.append_co_visits("i0", PAIRS, None, at(4), more, {"a": entries([(9, 1_000, 1)])}, 200)
    again = {"a": entries([(1, 250, 0)])}
    store.append_co_visits("i0", PAIRS, at(4), at(9), again, {}, 200)
    [of_a, of_none, of_b], [before_a] = store.read_co_visits(["a", "none", "é b"], ["a"], 1)
    assert shown(of_a) == ({1: (1.25, 1.0), 2: (0.5, 0.0)}, 1.75, 1.0)
    assert of_none is co_visits.EMPTY and shown(of_b)[1:] == (pytest.approx(0.333), 0.0)
    assert shown(before_a) == ({9: (1.0, 1.0)}, 1.0, 1.0)
    assert of_a.keys.dtype == np.uint64
    assert of_a.visits.dtype == np.float32 and of_a.next.dtype == np.float32
    assert store.fences(PAIRS, ["i0", "i1"]) == {"i0": at(9), "i1": None}


def test_rows_of_several_slots_are_read_together(store: StateStore) -> None:
    items = [f"item {n}" for n in range(20)]
    for n, item in enumerate(items):
        source, slot = Source("co-visits", n), item_slot(item, 3)
        store.append_co_visits(slot, source, None, at(0), {item: entries([(n, 1_000, 1)])}, {}, 9)
    after, before = store.read_co_visits(items, items[:2], 3)
    assert [int(one.keys[0]) for one in after] == list(range(20))
    assert before == [co_visits.EMPTY] * 2


@pytest.mark.parametrize("expected", [None, Fence(9, LOG), Fence(10, LogId("other", "topic"))])
def test_an_append_against_another_fence_is_refused_whole(
    store: StateStore, expected: Fence | None
) -> None:
    store.append_co_visits("i0", PAIRS, None, at(10), {"a": entries([(1, 1, 0)])}, {}, 200)
    with pytest.raises(FenceMoved, match="co-visits:3"):
        store.append_co_visits("i0", PAIRS, expected, at(11), {"a": entries([(1, 1, 0)])}, {}, 200)
    assert len(store.read_co_visits(["a"], [], 1)[0][0].keys) == 1
    assert store.fences(PAIRS, ["i0"]) == {"i0": at(10)}


@pytest.mark.parametrize("appended", [9, 10, 11, 10_000])
def test_a_row_is_compacted_from_its_limit_on(store: StateStore, appended: int) -> None:
    """Of different keys the half with most visits stays; the rest is in the sums."""
    keys = [(n * 2**60 + n) % 2**64 for n in range(1, appended + 1)]
    more = entries([(key, 1_000 + n, 1) for n, key in enumerate(keys)])
    store.append_co_visits("i0", PAIRS, None, at(1), {}, {"a": more}, 10)
    found = store.read_co_visits([], ["a"], 1)[1][0]
    kept = keys if appended < 10 else keys[-5:]
    assert found.keys.tolist() == kept
    assert found.visits_sum * 1_000 == sum(1_000 + n for n in range(appended))
    assert found.next_sum == appended


@pytest.mark.parametrize("different", [4, 5, 6])
def test_a_compacted_row_loses_no_key_up_to_half_its_limit(
    store: StateStore, different: int
) -> None:
    """Equal keys are one; of equally visited ones those that came last stay."""
    more = entries([(2**63 + n % different, 10, 1) for n in range(different * 10)])
    store.append_co_visits("i0", PAIRS, None, at(1), {"a": more}, {}, 10)
    found = store.read_co_visits(["a"], [], 1)[0][0]
    assert found.keys.tolist() == [2**63 + n for n in range(different)][-5:]
    assert found.next.tolist() == [10.0] * min(different, 5)
    assert (found.visits_sum, found.next_sum) == (different / 10, different * 10)


def test_counts_beyond_32_bits_are_in_the_sums(store: StateStore) -> None:
    more = entries([(1, COUNT_MAX, COUNT_MAX), (1, 1, 2), (2, 5, 5)])
    store.append_co_visits("i0", PAIRS, None, at(1), {"a": more}, {}, 3)
    found = store.read_co_visits(["a"], [], 1)[0][0]
    assert found.keys.tolist() == [1] and found.next.tolist() == [float(np.float32(COUNT_MAX))]
    assert found.visits_sum * 1_000 == COUNT_MAX + 6 and found.next_sum == COUNT_MAX + 7


@pytest.mark.parametrize("seed", range(12))
def test_rows_are_the_same_to_the_bit_in_every_store(store: StateStore, seed: int) -> None:
    draw = random.Random(seed)
    row_max, keys = draw.choice([2, 3, 10, 40]), [draw.getrandbits(64) for _ in range(50)]
    expected, fence = {("after", "x"): b"", ("before", "x"): b""}, None
    for offset in range(30):
        more = {
            kind: entries(
                (
                    draw.choice(keys[: draw.choice([3, 50])]),
                    draw.choice([100, 500, 1_000, COUNT_MAX]),
                    draw.choice([0, 1, COUNT_MAX]),
                )
                for _ in range(draw.randint(0, 30))
            )
            for kind in ("after", "before")
        }
        rows = [{"x": more[kind]} for kind in ("after", "before")]
        store.append_co_visits("i0", PAIRS, fence, at(offset), rows[0], rows[1], row_max)
        fence = at(offset)
        for kind in ("after", "before"):
            expected[kind, "x"] = co_visits.append(expected[kind, "x"], more[kind], row_max)
            assert row(store, "i0", kind, "x") == expected[kind, "x"]


def test_a_log_that_lost_its_tail_takes_the_fence_back(store: StateStore) -> None:
    fence = Fence(10, LOG, Mark(10, 99, 1))
    store.append_co_visits("i0", PAIRS, None, fence, {"a": entries([(1, 1, 0)])}, {}, 200)
    assert store.accept_log({"clicks": (LOG, {3: 11})}) == 0
    assert store.fences(PAIRS, ["i0"])["i0"] == at(10)
    assert store.accept_log({"clicks": (LOG, {3: 8})}) == 1
    assert store.fences(PAIRS, ["i0"]) == {"i0": at(7)}
    assert store.accept_log({"clicks": (LogId("cluster", "new"), {3: 8})}) == 1
    assert store.fences(PAIRS, ["i0"]) == {"i0": None}
    assert len(store.read_co_visits(["a"], [], 1)[0][0].keys) == 1


def outbox_of(store: StateStore) -> tuple[list[Visit], int]:
    read = store.read_slot("u3", CLICKS)
    return [tuple(visit) for visit in read.visits], read.visits_floor  # type: ignore[misc]


def test_the_outbox_keeps_visits_from_its_floor_on(store: StateStore) -> None:
    assert outbox_of(store) == ([], 0)
    first: list[Visit] = [(0, "a", ["b", "é"]), (0, "b", ["c"]), (2, "c", ["a"])]
    store.write_users("u3", CLICKS, None, at(3), UserEffects(visits=first))
    assert outbox_of(store) == (first, 0)
    # A write without visits leaves the outbox as it is.
    store.write_users("u3", CLICKS, at(3), at(4), UserEffects(visits_floor=4))
    assert outbox_of(store) == (first, 0)
    more: list[Visit] = [(5, "d", ["c", "d"])]
    store.write_users("u3", CLICKS, at(4), at(5), UserEffects(visits=more, visits_floor=3))
    assert outbox_of(store) == (more, 3)


@pytest.mark.parametrize(("floor", "left"), [(6, 2), (7, 1), (8, 1)])
def test_a_write_leaves_the_outbox_once_all_of_it_is_below_the_floor(
    fresh_settings: Settings, floor: int, left: int
) -> None:
    with contextlib.closing(RedisStore(fresh_settings)) as store:
        visits: list[Visit] = [(4, "a", ["b"]), (6, "c", ["a"])]
        store.write_users("u3", CLICKS, None, at(6), UserEffects(visits=visits))
        later = UserEffects(visits=[(9, "d", ["c"])], visits_floor=floor)
        store.write_users("u3", CLICKS, at(6), at(9), later)
        assert store._redis.llen(f"{store._ns}{{u3}}:visits") == left
        assert outbox_of(store)[0][-1:] == [(9, "d", ["c"])]


@pytest.mark.parametrize("writes", [999, 1_000, 1_001])
def test_a_long_outbox_is_read_whole_and_shrinks(store: StateStore, writes: int) -> None:
    fence = None
    for n in range(writes):
        store.write_users("u3", CLICKS, fence, at(n), UserEffects(visits=[(n, "a", ["b"])]))
        fence = at(n)
    assert [visit[0] for visit in outbox_of(store)[0]] == list(range(writes))
    for n in range(writes, writes + 80):
        effects = UserEffects(visits=[(n, "a", ["b"])], visits_floor=n)
        store.write_users("u3", CLICKS, fence, at(n), effects)
        fence = at(n)
    kept, floor = outbox_of(store)
    assert kept == [(writes + 79, "a", ["b"])] and floor == writes + 79


@pytest.mark.parametrize(("end", "left"), [(8, 2), (7, 2), (6, 1), (4, 0)])
def test_a_log_that_lost_its_tail_takes_visits_of_it_from_the_outbox(
    store: StateStore, end: int, left: int
) -> None:
    visits: list[Visit] = [(4, "a", ["b"]), (6, "c", ["a"])]
    store.write_users("u3", CLICKS, None, at(7), UserEffects(visits=visits, visits_floor=2))
    store.accept_log({"clicks": (LOG, {3: end})})
    assert outbox_of(store) == (visits[:left], 2 if left else 0)
    store.accept_log({"clicks": (LogId("cluster", "new"), {3: 100})})
    assert outbox_of(store) == ([], 0)


def test_a_row_whose_item_looks_like_a_key_is_no_item(fresh_settings: Settings) -> None:
    with contextlib.closing(RedisStore(fresh_settings)) as store:
        rows = {"0}:c:x": entries([(1, 1, 0)])}
        store.append_co_visits("i0", PAIRS, None, at(1), rows, rows, 200)
        cards = {"y:c:z": ItemMetadata(0, 1, b"{}")}
        store.write_item_metadata("i0", Source("items", 0), None, at(1), cards)
        assert store.live_item_ids() == {"y:c:z"}


def test_the_rows_of_a_deleted_item_end_with_it(store: StateStore) -> None:
    one, items = entries([(1, 1, 0)]), Source("items", 0)
    for slot in ("i0", "i1"):
        rows = {"gone": one, "due": one, "live": one}
        store.append_co_visits(slot, PAIRS, None, at(1), rows, rows, 200)
        cards = {name: ItemMetadata(0, 5, b"", 1, ends_ms=2_000) for name in ("gone", "due")}
        cards["due"] = replace(cards["due"], ends_ms=3_000)
        cards["live"] = ItemMetadata(0, 5, b"{}", 1)
        store.write_item_metadata(slot, items, None, Fence(9, LOG, Mark(9, 2_500, 1)), cards)
    assert sum(store.remove_deleted_items(["i0"], 1, 0)) == 1
    for slot, item in ((s, i) for s in ("i0", "i1") for i in ("gone", "due", "live")):
        for kind in ("after", "before"):
            assert (row(store, slot, kind, item) is None) == (slot == "i0" and item == "gone")


def test_a_closed_store_is_unavailable(store: StateStore) -> None:
    store.close()
    with pytest.raises(StoreUnavailable):
        store.read_co_visits(["a"], [], 1)
    with pytest.raises(StoreUnavailable):
        store.append_co_visits("i0", PAIRS, None, at(1), {}, {}, 200)


def test_a_damaged_row_is_refused_and_the_write_leaves_nothing(fresh_settings: Settings) -> None:
    with contextlib.closing(RedisStore(fresh_settings)) as store:
        key = f"{store._ns}{{i0}}:after:b"
        for damaged in (b"x" * 15, b"x" * 17):
            store._redis.set(key, damaged)
            with pytest.raises(StoreRefused, match=r"after:b: .*damaged"):
                store.read_co_visits(["a", "b"], [], 1)
            both = {"a": entries([(1, 1, 0)]), "b": entries([(1, 1, 0)])}
            with pytest.raises(StoreRefused, match=r"damaged row in .*after:b"):
                store.append_co_visits("i0", PAIRS, None, at(1), both, {}, 200)
            assert row(store, "i0", "after", "a") is None
            assert store.fences(PAIRS, ["i0"]) == {"i0": None}
        store._redis.delete(key)
        store.append_co_visits("i0", PAIRS, None, at(1), both, {}, 200)


def test_a_row_without_writes_ends(fresh_settings: Settings) -> None:
    with contextlib.closing(RedisStore(fresh_settings)) as store:
        one = entries([(1, 1, 0)])
        store.append_co_visits("i0", PAIRS, None, at(1), {"a": one, "b": one}, {}, 2, 60_000)
        store.append_co_visits("i0", PAIRS, at(1), at(2), {"c": one}, {"c": one}, 2, 0)
        store.append_co_visits("i0", PAIRS, at(2), at(3), {"b": one}, {}, 2, 150)
        left_ms = store._redis.pttl(f"{store._ns}{{i0}}:after:a")
        assert 0 < left_ms <= 60_000  # type: ignore[operator]
        assert store._redis.pttl(f"{store._ns}{{i0}}:before:c") == -1
        time.sleep(0.3)
        assert row(store, "i0", "after", "b") is None
        assert row(store, "i0", "after", "a") is not None


def test_every_write_renews_the_time_that_is_left_to_a_row(fresh_settings: Settings) -> None:
    with contextlib.closing(RedisStore(fresh_settings)) as store:
        one = entries([(1, 1, 0)])
        store.append_co_visits("i0", PAIRS, None, at(1), {"a": one}, {"b": one}, 200, 60_000)
        for n in range(1, 10):
            idle_ms = (n + 1) * 60_000
            store.append_co_visits(
                "i0", PAIRS, at(n), at(n + 1), {"a": one}, {"b": one}, 200, idle_ms
            )
            for key in ("after:a", "before:b"):
                left_ms = store._redis.pttl(f"{store._ns}{{i0}}:{key}")
                assert idle_ms - 60_000 < left_ms <= idle_ms  # type: ignore[operator]


def test_only_the_rows_that_are_named_and_new_ones_are_renewed(fresh_settings: Settings) -> None:
    with contextlib.closing(RedisStore(fresh_settings)) as store:
        one = entries([(1, 1, 0)])
        store.append_co_visits(
            "i0", PAIRS, None, at(1), {"a": one, "b": one}, {"a": one}, 2, 60_000
        )
        rows = {"a": one, "b": one, "c": one}
        renewed = [("after", "b")]
        store.append_co_visits("i0", PAIRS, at(1), at(2), rows, rows, 9, 600_000, renewed)
        left_ms = {
            key: store._redis.pttl(f"{store._ns}{{i0}}:{key}")
            for key in ("after:a", "after:b", "after:c", "before:a", "before:b", "before:c")
        }
        of_before = {key for key, left in left_ms.items() if left <= 60_000}  # type: ignore[operator]
        assert of_before == {"after:a", "before:a"} and min(left_ms.values()) > 0  # type: ignore[type-var]


def test_the_key_of_an_item_is_a_hash_of_its_id() -> None:
    assert item_key("50") == 0xADD4B6067B50EB24
    assert item_key("é") != item_key("e\u0301")


def test_rows_that_are_read_together_are_those_that_are_read_alone() -> None:
    rng = random.Random(3)
    rows: list[bytes | None] = [None, bytes(co_visits.HEADER_BYTES)]
    for size in (1, 2, 190):
        visits = [(rng.getrandbits(64), rng.randrange(1, COUNT_MAX), 1) for _ in range(size)]
        rows += [bytes(co_visits.HEADER_BYTES) + entries(visits), None]
    rows.append(co_visits.compact(rows[-2] or b"", 20))
    for found, stored in zip(co_visits.decode_all(rows), rows, strict=True):
        alone = co_visits.decode(stored)
        assert [part.tolist() for part in found[:3]] == [part.tolist() for part in alone[:3]]
        assert [part.dtype for part in found[:3]] == [part.dtype for part in alone[:3]]
        assert found[3:] == alone[3:]
    assert co_visits.decode_all([]) == []
    with pytest.raises(co_visits.DamagedRow) as failed:
        co_visits.decode_all([None, rows[2], b"short"])
    assert failed.value.place == 2
