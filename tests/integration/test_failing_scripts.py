"""Write scripts that fail: nothing is written, and the same write succeeds once the cause is gone.

Redis does not undo what a script wrote before it failed. A fence that has moved beyond missing
effects loses them for good; effects under a fence that has not moved are applied twice.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import redis

from eddyline.errors import StoreRefused, StoreUnavailable
from eddyline.schema import seen_items
from eddyline.schema.co_visits import entries
from eddyline.schema.event_decay import EventDecay
from eddyline.schema.user_history import Entry, UserHistory
from eddyline.settings.loader import Settings
from eddyline.stores import write_scripts
from eddyline.stores.redis import RedisStore
from eddyline.stores.state_store import Fence, ItemMetadata, LogId, Source, UserEffects
from tests.integration.redis_servers import Server, real_server

LOG = LogId("cluster", "topic")
CLICKS, USERS, ITEMS = Source("clicks", 3), Source("users", 3), Source("items", 0)
CO_VISITS = Source("co-visits", 3)
INGEST = "compositor"


def at(offset: int) -> Fence:
    return Fence(offset, LOG)


def history(*items: str, **stamps: int) -> UserHistory:
    entries = tuple(Entry(item, at_ms=n) for n, item in enumerate(items))
    return UserHistory(entries=entries[::-1], **stamps)


def write_users(store: RedisStore, after: Fence | None, offset: int) -> None:
    effects = UserEffects(
        accepted={f"e{offset}": offset},
        window_floor=offset,
        histories={"ana": history("a", offset=offset), "cy": history("c", "d")},
        recent={"cy": [("d", 1)]},
        embeddings={"1": {"ana": (offset + 1, b"1234")}},
        emptied=("bo", "cy"),
        visits=[(offset, "a", ["b"])],
        visits_floor=offset,
        seen={
            "ana": seen_items.stored([Entry("y", offset * 60_000)]),
            "cy": seen_items.stored([Entry("z", 5)]),
            # From the second write on it is compacted.
            "di": seen_items.stored([Entry(f"i{n}", n) for n in range(3)]),
        },
        seen_max=2 if offset == 8 else 9,
    )
    store.write_users("u3", CLICKS, after, at(offset), effects)


def write_profiles(store: RedisStore, after: Fence | None, offset: int) -> None:
    profiles = {"ana": {"age": offset}, "bo": None, "di": None}
    until_ms = {"bo": 50, "di": 50}
    store.write_profiles("u3", USERS, after, at(offset), profiles, ["1"], until_ms)


def count_clicks(store: RedisStore, after: Fence | None, offset: int) -> None:
    counts = {offset: {"a": 1000, "b": 2500, "c": 1}, offset + 5: {"a": 500}}
    # The second write begins a new epoch of the short half-life.
    clicked, decays = ["a", "b", "c"] * 8, [EventDecay(1), EventDecay(100)]
    store.count_clicks("i0", CLICKS, after, at(offset), counts, 3, 2, clicked, decays)


def append_co_visits(store: RedisStore, after: Fence | None, offset: int) -> None:
    rows = {"a": entries([(offset, 1_000, 1), (2, 500, 0)]), "b": entries([(1, 333, 0)])}
    store.append_co_visits("i0", CO_VISITS, after, at(offset), rows, {"c": rows["a"]}, 4)


def write_item_metadata(store: RedisStore, after: Fence | None, offset: int) -> None:
    items = {"a": ItemMetadata(0, offset, b"{}"), "b": ItemMetadata(0, offset + 1, b"")}
    store.write_item_metadata("i0", ITEMS, after, at(offset), items)


WRITES: dict[str, Callable[[RedisStore, Fence | None, int], None]] = {
    "write_users": write_users,
    "write_profiles": write_profiles,
    "count_clicks": count_clicks,
    "append_co_visits": append_co_visits,
    "write_item_metadata": write_item_metadata,
}


@dataclass
class Place:
    """A namespace that holds the effects of one write of the script; `write` is the next one."""

    server: Server
    script: str
    settings: Settings
    store: RedisStore
    admin: redis.Redis

    def write(self) -> None:
        WRITES[self.script](self.store, at(7), 8)

    def state(self) -> dict[str, object]:
        """Every key and its value, without the server's time in histories and versions."""
        ns, found = self.settings.key_prefix, {}
        for key in self.admin.scan_iter(match=f"{ns}*", count=1_000):
            name, kind = key.decode().removeprefix(ns), self.admin.type(key)
            if kind == b"string":
                value: object = self.admin.get(key)
                if re.search(r"}:h:", name) and isinstance(value, bytes):
                    value = value[:-8]
                if re.search(r"}:version:", name) and isinstance(value, bytes):
                    value = value.split()[-1]
            elif kind == b"list":
                value = self.admin.lrange(key, 0, -1)
            elif kind == b"zset":
                value = self.admin.zrange(key, 0, -1, withscores=True)
            else:
                value = kind
            found[name] = value
        return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with real_server(tmp_path_factory.mktemp("failing")) as made, made.client() as admin:
        admin.execute_command("ACL SETUSER", INGEST, "on", ">p", "~*", "+@all")
        yield made


def made_place(server: Server, script: str, admin: redis.Redis) -> Place:
    url = f"redis://{INGEST}:p@127.0.0.1:{server.port}/0"
    settings = Settings(namespace=f"t-{uuid.uuid4().hex[:12]}", redis_url=url)
    store = RedisStore(settings)
    for user in ("ana", "bo", "di"):  # `di` has a later event, so only the profile goes
        stamps = {"appended_ms": 90 if user == "di" else 40}
        effects = UserEffects(
            histories={user: history("x", **stamps)}, embeddings={"1": {user: (1, b"4321")}}
        )
        source = Source("clicks", 9)
        store.write_users("u3", source, store.fences(source, ["u3"])["u3"], at(0), effects)
    WRITES[script](store, None, 7)
    return Place(server, script, settings, store, admin)


@pytest.fixture
def admin(server: Server) -> Iterator[redis.Redis]:
    with server.client() as made:
        yield made
        made.config_set("maxmemory", 0)
        made.execute_command("ACL SETUSER", INGEST, "+@all")


@pytest.fixture
def make_place(server: Server, admin: redis.Redis) -> Iterator[Callable[[str], Place]]:
    places: list[Place] = []

    def make(script: str) -> Place:
        places.append(made_place(server, script, admin))
        return places[-1]

    yield make
    for place in places:
        place.store.close()


@pytest.fixture
def written(make_place: Callable[[str], Place]) -> Callable[[str], dict[str, object]]:
    """The state after an undisturbed write."""

    def state(script: str) -> dict[str, object]:
        place = make_place(script)
        place.write()
        return place.state()

    return state


COMMANDS = [(name, c) for name in WRITES for c in sorted(write_scripts.commands(name))]


@pytest.mark.parametrize(("script", "command"), COMMANDS)
def test_a_right_that_is_missing_leaves_nothing_behind(
    script: str,
    command: str,
    make_place: Callable[[str], Place],
    written: Callable[[str], dict[str, object]],
    admin: redis.Redis,
) -> None:
    expected, place = written(script), make_place(script)
    before = place.state()
    admin.execute_command("ACL SETUSER", INGEST, f"-{command}")
    with pytest.raises(StoreRefused, match=rf"(?i)\b{command}\b.*docs/security\.md"):
        place.write()
    assert place.state() == before
    admin.execute_command("ACL SETUSER", INGEST, f"+{command}")
    place.write()
    assert place.state() == expected


@pytest.mark.parametrize("script", WRITES)
def test_a_key_of_another_type_leaves_nothing_behind(
    script: str, make_place: Callable[[str], Place], written: Callable[[str], dict[str, object]]
) -> None:
    """Every key that the write reads or changes, in turn."""
    expected = written(script)
    names = sorted(expected.keys() | make_place(script).state().keys())
    refused = 0
    for name in names:
        place = make_place(script)
        key, admin = f"{place.settings.key_prefix}{name}", place.admin
        kept = admin.dump(key)
        admin.delete(key)
        admin.hset(key, "a", "b")
        before = place.state()
        try:
            place.write()
        except StoreRefused:
            refused += 1
            assert place.state() == before, name
            admin.delete(key)
            if kept is not None:
                admin.restore(key, 0, kept)
            place.write()
            assert place.state() == expected, name
    assert refused


@pytest.mark.parametrize("script", WRITES)
def test_a_full_server_leaves_nothing_behind(
    script: str,
    make_place: Callable[[str], Place],
    written: Callable[[str], dict[str, object]],
    admin: redis.Redis,
) -> None:
    expected, place = written(script), make_place(script)
    before = place.state()
    admin.config_set("maxmemory", 1)
    with pytest.raises(StoreUnavailable, match="maxmemory"):
        place.write()
    assert place.state() == before
    admin.config_set("maxmemory", 0)
    place.write()
    assert place.state() == expected


def test_a_server_that_fills_up_during_a_write_lets_it_end(
    make_place: Callable[[str], Place], admin: redis.Redis
) -> None:
    """Redis checks the limit when a script starts: a large write is applied whole or refused."""
    place = make_place("write_users")
    limit = int(admin.info("memory")["used_memory"])
    users = {f"user{n}": history(*("x" * 100 for _ in range(50))) for n in range(800)}
    effects = UserEffects(accepted={"e8": 8}, histories=users)
    keys = admin.dbsize()
    for _ in range(100):
        limit += 700_000
        admin.config_set("maxmemory", limit)
        admin.config_resetstat()
        try:
            place.store.write_users("u3", CLICKS, at(7), at(8), effects)
            break
        except StoreUnavailable:
            assert admin.dbsize() == keys
    assert int(admin.info("memory")["used_memory_peak"]) > limit
    assert sum("}:h:user" in name for name in place.state()) == 800
    assert place.store.fences(CLICKS, ["u3"]) == {"u3": at(8)}


@pytest.mark.parametrize("of", ["window", "visits"])
@pytest.mark.parametrize("blob", [b"", b"short"])
def test_a_damaged_window_leaves_nothing_behind(
    blob: bytes,
    of: str,
    make_place: Callable[[str], Place],
    written: Callable[[str], dict[str, object]],
) -> None:
    expected, place = written("write_users"), make_place("write_users")
    key = f"{place.settings.key_prefix}{{u3}}:{of}"
    place.admin.lpush(key, blob)
    before = place.state()
    with pytest.raises(StoreRefused, match=of):
        place.write()
    assert place.state() == before
    place.admin.lpop(key)
    place.write()
    assert place.state() == expected


@pytest.mark.parametrize("name", ["nan", "x"])
@pytest.mark.parametrize("index", ["buckets", "trend"])
def test_a_foreign_member_of_an_index_leaves_nothing_behind(
    index: str,
    name: str,
    make_place: Callable[[str], Place],
    written: Callable[[str], dict[str, object]],
) -> None:
    expected, place = written("count_clicks"), make_place("count_clicks")
    key = f"{place.settings.key_prefix}{{i0}}:{index}"
    place.admin.zadd(key, {name: 10**9})
    before = place.state()
    with pytest.raises(StoreRefused, match=index):
        place.write()
    assert place.state() == before
    place.admin.zrem(key, name)
    place.write()
    assert place.state() == expected


def test_item_metadata_that_is_cut_off_is_replaced(make_place: Callable[[str], Place]) -> None:
    """A value shorter than a version counts as none: the write succeeds."""
    place = make_place("write_item_metadata")
    place.admin.set(f"{place.settings.key_prefix}{{i0}}:c:a", b"abc")
    place.write()
    assert place.store.read_item_metadata(["a"], 1)["a"].offset == 8


def test_ids_beyond_the_fence_are_not_in_the_window(make_place: Callable[[str], Place]) -> None:
    """A failed write leaves nothing that would make an event a duplicate."""
    place = make_place("write_users")
    key = f"{place.settings.key_prefix}{{u3}}:window"
    other = make_place("write_users")
    other.write()
    place.admin.rpush(key, *place.admin.lrange(f"{other.settings.key_prefix}{{u3}}:window", 0, -1))
    assert place.store.read_slot("u3", CLICKS).accepted == {"e7": 7}


ALL = sorted({command for _, command in COMMANDS})


@pytest.mark.parametrize("command", ALL)
def test_a_missing_right_is_found_before_the_first_write(
    command: str, make_place: Callable[[str], Place], admin: redis.Redis
) -> None:
    place = make_place("write_users")
    place.store.check_rights()
    admin.execute_command("ACL SETUSER", INGEST, f"-{command}")
    with pytest.raises(StoreRefused, match=rf"permissions to run '{command}'; docs/security\.md"):
        place.store.check_rights()
