"""The user cache: never more entries than allowed, never a state that another wrote over."""

from __future__ import annotations

import pytest

from eddyline.errors import FenceMoved
from eddyline.schema.user_history import Entry, UserHistory
from eddyline.stores.memory import MemoryStore
from eddyline.stores.state_store import Fence, LogId, Source, UserEffects, UserRead
from streams.clicks.user_cache import CachedUser, UserCache, Window

LOG = LogId("cluster", "topic")
CLICKS, USERS = Source("clicks", 3), Source("users", 3)


def missing(cache: UserCache, slot: str, users: list[str]) -> list[str]:
    return cache.look(slot, users)[1]


def take(
    cache: UserCache, slot: str, users: list[str], read: UserRead | None = None
) -> dict[str, CachedUser]:
    return cache.complete(cache.look(slot, users)[0], read)


def user_with(entries: int) -> CachedUser:
    return CachedUser([Entry(str(n), -n) for n in range(entries)], [], 0)


@pytest.mark.parametrize(
    ("entries_max", "kept"), [(0, 0), (13, 0), (14, 1), (15, 1), (28, 2), (10**6, 3)]
)
def test_no_more_entries_are_kept_than_allowed_and_the_least_used_go(
    entries_max: int, kept: int
) -> None:
    cache = UserCache(MemoryStore(), ["1"], entries_max)
    for user in ("a", "b", "c"):
        cache.keep("u3", {user: user_with(10)})
    assert missing(cache, "u3", ["c", "b", "a"]) == ["c", "b", "a"][kept:]


def test_a_user_that_grows_is_counted_again() -> None:
    cache = UserCache(MemoryStore(), ["1"], 30)
    cache.keep("u3", {"a": user_with(5), "b": user_with(5)})
    users = take(cache, "u3", ["a"])
    users["a"].entries += [Entry("more", 1)] * 15
    cache.keep("u3", users)
    assert missing(cache, "u3", ["a", "b"]) == ["b"]  # 24 + 9 are too many
    cache.keep("u3", {"b": user_with(2)})
    assert missing(cache, "u3", ["a", "b"]) == []


def test_who_is_needed_again_stays_and_who_is_not_leaves_first() -> None:
    cache = UserCache(MemoryStore(), ["1"], 42)
    for user in ("a", "b", "c"):
        cache.keep("u3", {user: user_with(10)})
    cache.keep("u3", take(cache, "u3", ["a", "b"]))
    cache.keep("u3", {"d": user_with(10)})
    assert missing(cache, "u3", ["a", "b", "c", "d"]) == ["c"]
    # Passed over once: now the two that came first are as good as anybody.
    cache.keep("u3", {"e": user_with(10)})
    assert missing(cache, "u3", ["a", "b", "d", "e"]) == ["d"]
    cache.keep("u3", {"f": user_with(10)})
    assert missing(cache, "u3", ["a", "b", "e", "f"]) == ["a"] and cache.entries == 42


def test_an_emptied_user_replaces_the_earlier_state() -> None:
    cache = UserCache(MemoryStore(), ["1"], 100)
    cache.keep("u3", {"a": user_with(10)})
    before = take(cache, "u3", ["a"])["a"]
    cache.keep("u3", {"a": user_with(2)})
    assert (
        cache.entries == 6
        and not before.kept
        and take(cache, "u3", ["a"])["a"].entries != before.entries
    )


@pytest.mark.parametrize("users", [255, 256, 257, 2_000])
def test_making_room_passes_over_a_limited_number_at_once(users: int) -> None:
    cache = UserCache(MemoryStore(), ["1"], 5 * users)
    everybody = {str(n): user_with(1) for n in range(users)}
    cache.keep("u3", everybody)
    cache.keep("u3", take(cache, "u3", list(everybody)))
    cache.keep("u3", {"one more": user_with(1)})
    passed_over = sum(not d.used for d in cache._users.values()) - 1
    assert passed_over == min(users, 256) - (users <= 256) and cache.entries == 5 * users


def test_a_large_profile_counts_like_the_behaviours_that_it_takes_the_room_of() -> None:
    cache = UserCache(MemoryStore(), ["1"], 600)
    profiles = {"a": {f"n{n}": "x" * 1_000 for n in range(64)}, "b": {"age": 3}}
    cache.keep("u3", take(cache, "u3", ["a", "b"], UserRead(None, {}, {"1": {}}, profiles)))
    assert 4 + 4 + 64_000 // 150 <= cache.entries <= 600
    cache.keep("u3", {"c": user_with(200)})
    assert missing(cache, "u3", ["a", "b", "c"]) == ["a"]


def test_a_dropped_slot_is_read_again_and_other_slots_stay() -> None:
    store = MemoryStore()
    store.write_users("u3", CLICKS, None, Fence(4, LOG), UserEffects(accepted={"e": 4}))
    cache = UserCache(store, ["1"], 100)
    known = cache.slot("u3", CLICKS, Fence(4, LOG))
    assert known.window.known == {"e": 4} and cache.slot("u3", CLICKS, None) is known
    cache.keep("u3", {"a": user_with(1)})
    cache.keep("u4", {"a": user_with(1)})
    cache.drop("u3")
    assert missing(cache, "u3", ["a"]) == ["a"] and missing(cache, "u4", ["a"]) == []
    with pytest.raises(FenceMoved):
        cache.slot("u3", CLICKS, Fence(5, LOG))


def test_users_whose_profile_was_written_are_read_again_under_its_fence() -> None:
    store = MemoryStore()
    cache = UserCache(store, ["1"], 100)
    known = cache.slot("u3", CLICKS, None)
    cache.keep("u3", {"a": user_with(1), "b": user_with(1)})
    cache.profiles_written("u3", None, Fence(9, LOG), ["a", "x"])
    assert missing(cache, "u3", ["a", "b"]) == ["a"]
    assert known.profiles == str(Fence(9, LOG))
    cache.profiles_written("u9", None, Fence(9, LOG), ["a"])  # of a slot that was never read


def test_an_unnoticed_write_of_profiles_drops_all_users() -> None:
    cache = UserCache(MemoryStore(), ["1"], 100)
    cache.slot("u3", CLICKS, None)
    cache.keep("u3", {"a": user_with(1), "b": user_with(1)})
    cache.profiles_written(
        "u3", Fence(8, LOG), Fence(9, LOG), ["a"]
    )  # the write of 8 went unnoticed
    assert missing(cache, "u3", ["a", "b"]) == ["a", "b"] and cache.entries == 0


def test_users_that_leave_while_they_are_taken_are_counted_once_when_they_return() -> None:
    cache = UserCache(MemoryStore(), ["1"], 28)
    cache.keep("u4", {"b": user_with(10)})
    for _ in range(3):
        taken = {slot: take(cache, slot, [user]) for slot, user in (("u3", "a"), ("u4", "b"))}
        cache.keep("u3", {"a": user_with(20)})  # b leaves
        cache.keep("u4", taken["u4"])
        kept = [user.size for user in cache._users.values()]
        assert cache.entries == sum(kept) <= 28


def test_a_user_is_cached_as_read() -> None:
    cache = UserCache(MemoryStore(), ["1"], 100)
    listed = UserHistory(at_ms=8, entries=(Entry("a", 8),))
    read = UserRead(
        None,
        {"ana": listed, "bo": listed},
        {"1": {"ana": (3, b"1234")}},
        {"ana": {"age": 3}},
        {"ana": [("a", 8)]},
    )
    users = take(cache, "u3", ["ana", "bo", "new"], read)
    ana = users["ana"]
    assert (ana.entries, ana.recent, ana.at_ms) == ([Entry("a", 8)], [("a", 8)], 8)
    assert (ana.embeddings[0].steps, ana.embeddings[0].vector) == (3, b"1234")
    assert ana.profile == {"age": 3}
    assert users["bo"].recent is None  # nobody knows what is stored: write it whole
    assert (users["new"].entries, users["new"].recent) == ([], [])


@pytest.mark.parametrize("loaded", [0, 1, 255, 256, 257, 1_000])
def test_the_window_lets_ids_go_below_its_floor_only(loaded: int) -> None:
    window = Window({f"e{n}": n for n in range(loaded)})
    for n in range(loaded, loaded + 600):
        floor = n + 1 - 300
        window.add({f"e{n}": n}, floor)
        assert all(f"e{k}" in window.known for k in range(max(0, floor), n + 1, 37))
        assert len(window.known) <= 300 + 256
    window.add({"e1": 5_000}, 5_000)  # accepted anew
    assert window.known == {"e1": 5_000}
