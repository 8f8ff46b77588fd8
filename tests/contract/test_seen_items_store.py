"""Seen items beyond the lists: one suite over every `StateStore`."""

from __future__ import annotations

import random

import pytest

from eddyline.errors import StoreRefused, StoreUnavailable
from eddyline.schema import seen_items
from eddyline.schema.seen_items import ENTRY_BYTES
from eddyline.schema.user_history import Entry, UserHistory
from eddyline.stores.redis import RedisStore
from eddyline.stores.state_store import (
    Fence,
    LogId,
    Mark,
    Source,
    StateStore,
    UserEffects,
    UserQuery,
)

LOG = LogId("cluster", "topic")
CLICKS = Source("clicks", 3)
MS = 1_700_000_000_000


def at(offset: int, appended_ms: int = MS) -> Fence:
    return Fence(offset, LOG, Mark(offset, appended_ms, 0))


def entries(*items: str, minute: int = 0) -> bytes:
    return seen_items.stored([Entry(item, MS + 60_000 * minute) for item in items])


def stored(store: StateStore, *users: str) -> dict[str, bytes]:
    [read] = store.read_many([UserQuery("u3", CLICKS, [], [], users)])
    return dict(read.seen)


class Writer:
    """Writes to one slot, one fence after another."""

    def __init__(self, store: StateStore) -> None:
        self.store, self.fence = store, None
        self.offset = 0

    fence: Fence | None

    def write(self, **effects: object) -> None:
        after = at(self.offset)
        made = UserEffects(**{"seen_max": 10, **effects})  # type: ignore[arg-type]
        self.store.write_users("u3", CLICKS, self.fence, after, made)
        self.fence = after
        self.offset += 1


def test_users_without_any_have_none(store: StateStore) -> None:
    assert stored(store, "ana", "bo") == {}
    assert store.read_user("u3", 3, "ana", "").seen == b""


def test_what_is_appended_is_read_by_ingest_and_by_queries(store: StateStore) -> None:
    writer = Writer(store)
    writer.write(seen={"ana": entries("a", "b"), "bo": entries("c")})
    writer.write(seen={"ana": entries("d", minute=1)}, histories={"ana": UserHistory()})
    both = entries("a", "b") + entries("d", minute=1)
    assert stored(store, "ana", "bo", "cy") == {"ana": both, "bo": entries("c")}
    assert store.read_user("u3", 3, "ana", "").seen == both
    [read] = store.read_many([UserQuery("u3", CLICKS, ["ana"], ["1"], ["bo"])])
    assert dict(read.seen) == {"bo": entries("c")} and [*read.histories] == ["ana"]


def test_a_users_new_beginning_replaces_them(store: StateStore) -> None:
    writer = Writer(store)
    writer.write(seen={"ana": entries("a"), "bo": entries("b"), "cy": entries("c")})
    writer.write(seen={"ana": entries("d"), "cy": entries("e")}, emptied=("ana", "bo"))
    assert stored(store, "ana", "bo", "cy") == {"ana": entries("d"), "cy": entries("c", "e")}


def test_compacted_bytes_are_those_of_the_schema(store: StateStore) -> None:
    """Equal times, several kinds, all compactions of a long life: every store has one form."""
    rng, writer, value = random.Random(5), Writer(store), b""
    for n in range(60):
        more = seen_items.stored(
            Entry(
                f"i{rng.randrange(30)}",
                MS + 60_000 * (n // 9 + rng.choice([0, 0, -3, 2**33])),
                rng.randrange(6),
            )
            for _ in range(rng.choice([1, 1, 2, 30]))
        )
        writer.write(seen={"ana": more})
        value = seen_items.append(value, more, 10)
        assert stored(store, "ana") == {"ana": value}
    writer.write(seen={"ana": more * 100}, emptied=("ana",))
    assert stored(store, "ana") == {"ana": seen_items.append(b"", more * 100, 10)}


def test_ties_at_the_limit_are_decided_by_key(store: StateStore) -> None:
    names = [f"i{n}" for n in range(200)]
    Writer(store).write(seen={"ana": entries(*names)}, seen_max=50)
    assert len(stored(store, "ana")["ana"]) == 50 * ENTRY_BYTES
    assert stored(store, "ana")["ana"] == seen_items.append(b"", entries(*names), 50)


def test_a_forgotten_user_loses_them(store: StateStore) -> None:
    writer = Writer(store)
    history = UserHistory(appended_ms=40)
    writer.write(seen=dict.fromkeys(("ana", "bo"), entries("a")), histories={"ana": history})
    source = Source("users", 3)
    store.write_profiles("u3", source, None, at(0), {"ana": None, "bo": None}, [], {"ana": 40})
    assert stored(store, "ana", "bo") == {}


def test_a_user_who_came_back_keeps_them(store: StateStore) -> None:
    writer = Writer(store)
    history = UserHistory(appended_ms=41)
    writer.write(seen={"ana": entries("a")}, histories={"ana": history})
    store.write_profiles("u3", Source("users", 3), None, at(0), {"ana": None}, [], {"ana": 40})
    assert stored(store, "ana") == {"ana": entries("a")}


def test_idle_users_have_none_and_lose_them(store: StateStore) -> None:
    idle = UserHistory(appended_ms=MS - 100, idle_after_ms=MS - 50, entries=(Entry("x", MS),))
    awake = UserHistory(appended_ms=MS - 100, idle_after_ms=MS, entries=(Entry("x", MS),))
    Writer(store).write(
        seen=dict.fromkeys(("ana", "bo"), entries("a")), histories={"ana": idle, "bo": awake}
    )
    assert store.read_user("u3", 3, "ana", "").seen == b""
    assert store.read_user("u3", 3, "bo", "").seen == entries("a")
    assert sum(store.remove_idle_users(["u3"], 0)) == 1
    assert stored(store, "ana", "bo") == {"bo": entries("a")}


@pytest.mark.parametrize("damage", ["length", "type"])
def test_a_damaged_value_is_named_and_not_written_to(store: StateStore, damage: str) -> None:
    if not isinstance(store, RedisStore):
        pytest.skip("a memory store keeps what was written")
    writer = Writer(store)
    writer.write(seen={"ana": entries("a")})
    key = f"{store._ns}{{u3}}:seen:ana"
    if damage == "length":
        store._redis.append(key, b"x")
    else:
        store._redis.delete(key)
        store._redis.rpush(key, b"x")
    with pytest.raises((StoreRefused, StoreUnavailable), match=r"seen items|seen:ana|WRONGTYPE"):
        writer.write(seen={"ana": entries("b")}, histories={"ana": UserHistory(at_ms=5)})
    if damage == "length":
        with pytest.raises(StoreRefused, match=r"13 bytes, .*delete the key"):
            stored(store, "ana")
    # Nothing of the write is there; a user who begins anew is rid of the damage.
    assert store.fences(CLICKS, ["u3"])["u3"] == at(0)
    writer.write(seen={"ana": entries("b")}, emptied=("ana",))
    assert stored(store, "ana") == {"ana": entries("b")}
