"""A real Redis Cluster of processes on loopback: routing, nodes that die, hang or hand over, slots
that move.

The contract suite runs against a cluster, too (tests/contract/test_state_store.py).
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import redis

from eddyline.errors import FenceMoved, StoreRefused, StoreUnavailable, Unavailable
from eddyline.schema.event_decay import EventDecay
from eddyline.schema.partitioning import item_slot
from eddyline.schema.user_history import Entry, UserHistory
from eddyline.settings.loader import Settings
from eddyline.stores import redis_client
from eddyline.stores.layout import Layout
from eddyline.stores.redis import RedisStore
from eddyline.stores.redis_cluster import RedisCluster
from eddyline.stores.state_store import (
    Fence,
    ItemMetadata,
    LogId,
    Source,
    StateStore,
    UserEffects,
    UserQuery,
    UserWrite,
)
from tests.decayed_events import NO_DECAY, plain_counts, stored_counts
from tests.integration.redis_servers import RealCluster, Server, real_cluster, real_server, wait_for
from tests.integration.test_crashes import assert_same_state, send_history

pytestmark = pytest.mark.timeout(240)

LOG = LogId("cluster", "topic")
TIMEOUT_MS = 500
SLOTS = [f"u{n}" for n in range(8)]


def at(offset: int) -> Fence:
    return Fence(offset, LOG)


def clicks(slot: str) -> Source:
    return Source("clicks", int(slot[1:]))


def seen(*items: str) -> UserHistory:
    return UserHistory(
        entries=tuple(Entry(item, at_ms=n, kind=0, weight=1.0) for n, item in enumerate(items))
    )


def settings_of(url: str, **more: object) -> Settings:
    made = Settings(redis_url=url, redis_cluster=True, redis_timeout_ms=TIMEOUT_MS)
    return msgspec.structs.replace(made, **{"namespace": f"t-{uuid.uuid4().hex[:12]}"} | more)


@contextlib.contextmanager
def opened(url: str, **more: object) -> Iterator[RedisStore]:
    store = RedisStore(settings_of(url, **more))
    try:
        yield store
    finally:
        store.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealCluster]:
    """Three nodes; a test that breaks them puts them right again.

    A killed node must have lost nothing: with `everysec` it keeps writes back while the disk is
    busy with those of the last second.
    """
    with real_cluster(tmp_path_factory.mktemp("three"), appendfsync="always") as made:
        yield made


@pytest.fixture
def store(cluster: RealCluster) -> Iterator[RedisStore]:
    cluster.wait_ok()
    with opened(cluster.url) as made:
        yield made


def until_applied(call: Callable[[], object], timeout_s: float = 60) -> object:
    """Retry while the store is unavailable, as ingest does."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return call()
        except Unavailable:
            assert time.monotonic() < deadline, f"the store was away for {timeout_s:g} s"
            time.sleep(0.05)


def test_one_address_is_enough_and_every_node_is_used(cluster: RealCluster) -> None:
    with opened(f"redis://{cluster.servers[1].name}/0") as store:
        store.check()
        store.claim_layout(Layout(1, 8, 4, 1))
        for slot in SLOTS:
            store.write_users(
                slot, clicks(slot), None, at(3), UserEffects(histories={"ana": seen(slot)})
            )
        for slot in SLOTS:
            assert store.read_user(slot, int(slot[1:]), "ana", "").history == seen(slot)
        ns = store._ns
        for server in cluster.servers:
            with server.client() as client:
                assert client.dbsize() > 0, f"{server.name} got no key of {ns}"


def test_reads_and_writes_of_many_slots_go_out_together(store: RedisStore) -> None:
    writes = [
        UserWrite(slot, clicks(slot), None, at(5), UserEffects(histories={"ana": seen(slot)}))
        for slot in SLOTS
    ]
    assert all(isinstance(applied, int) for applied in store.write_many(writes))
    again = store.write_many(writes)
    assert all(isinstance(refused, FenceMoved) for refused in again)
    reads = store.read_many([UserQuery(slot, clicks(slot), ["ana", "bo"], []) for slot in SLOTS])
    assert [read.fence for read in reads] == [at(5)] * len(SLOTS)
    assert [dict(read.histories) for read in reads] == [{"ana": seen(slot)} for slot in SLOTS]
    metadata = {f"item-{n}": ItemMetadata(0, n, b"{}") for n in range(200)}
    by_slot: dict[str, dict[str, ItemMetadata]] = {}
    for item, found in metadata.items():
        by_slot.setdefault(item_slot(item, 16), {})[item] = found
    for slot, mine in by_slot.items():
        store.write_item_metadata(slot, Source("items", 0), None, at(9), mine)
    assert len(by_slot) == 16 and store.read_item_metadata([*metadata, "none"], 16) == metadata


def test_a_node_that_forgot_the_scripts_gets_them_again(
    store: RedisStore, cluster: RealCluster
) -> None:
    for turn in range(2):
        before, new = (None, at(0)) if turn == 0 else (at(0), at(1))
        for server in cluster.servers:
            with server.client() as client:
                client.script_flush("SYNC")
        writes = [UserWrite(slot, clicks(slot), before, new, UserEffects()) for slot in SLOTS]
        assert all(isinstance(applied, int) for applied in store.write_many(writes))
        store.count_clicks("i0", clicks("u0"), before, new, {1: {"a": 500}}, 4)
    assert store.popular("i0", 10) == {1: {"a": 1000}}


def test_the_eviction_policy_of_every_node_is_looked_at(
    store: RedisStore, cluster: RealCluster
) -> None:
    for server in cluster.servers:
        with server.client() as client:
            client.config_set("maxmemory-policy", "allkeys-lru")
            try:
                with pytest.raises(
                    StoreRefused, match=rf"{server.name} has maxmemory-policy allkeys-lru"
                ):
                    store.check()
            finally:
                client.config_set("maxmemory-policy", "noeviction")
    store.check()


def test_a_cluster_that_is_not_set_as_one_is_told_so(
    cluster: RealCluster, servers: Settings, tmp_path: Path
) -> None:
    one = Settings(redis_url=f"redis://{cluster.servers[0].name}", redis_timeout_ms=TIMEOUT_MS)
    single = RedisStore(one)
    for call in (single.check, lambda: [single.read_user(s, 0, "ana", "") for s in SLOTS]):
        with pytest.raises(StoreRefused, match="node of a Redis Cluster: set redis_cluster = true"):
            call()
    single.close()
    with opened(servers.redis_url) as store:
        for call in (store.check, lambda: store.read_user("u0", 0, "ana", "")):
            with pytest.raises(StoreRefused, match="is a single server: set redis_cluster = false"):
                call()


def test_a_node_without_a_cluster_yet_is_waited_for(tmp_path: Path) -> None:
    with (
        real_server(tmp_path, cluster_enabled="yes") as alone,
        opened(f"redis://{alone.name}") as store,
    ):
        with pytest.raises(StoreUnavailable, match="serves no hash slot"):
            store.check()
        with alone.client() as client:
            client.execute_command("CLUSTER ADDSLOTSRANGE", 0, 9_999)
        with pytest.raises(StoreUnavailable, match="6,384 hash slots are served by no node"):
            store.check()


def test_a_killed_node_is_waited_for_and_has_lost_nothing(
    store: RedisStore, cluster: RealCluster
) -> None:
    for slot in SLOTS:
        store.write_users(
            slot, clicks(slot), None, at(1), UserEffects(histories={"ana": seen("a")})
        )
    dead = cluster.owner("u3")
    dead.kill()
    begun = time.monotonic()
    with pytest.raises(StoreUnavailable, match=dead.name):
        store.read_user("u3", 3, "ana", "")
    assert time.monotonic() - begun < 4 * TIMEOUT_MS / 1000
    writes = [
        UserWrite(slot, clicks(slot), at(1), at(2), UserEffects(histories={"ana": seen("b", "a")}))
        for slot in SLOTS
    ]
    answers = store.write_many(writes)
    held = {slot for slot, server in cluster.tags(SLOTS).items() if server is dead}
    for write, answer in zip(writes, answers, strict=True):
        assert isinstance(answer, StoreUnavailable if write.slot in held else int), write.slot
    assert held and held != set(SLOTS), "some slots are served, others are not"
    # Now the others notice, and the cluster refuses all of its slots.
    wait_for("the cluster to be down", lambda: down(store, min(set(SLOTS) - held)))
    dead.start()
    for write in writes:
        with contextlib.suppress(FenceMoved):
            until_applied(
                lambda w=write: store.write_users(w.slot, w.source, w.expected, w.new, w.effects)
            )
    for slot in SLOTS:
        found = until_applied(lambda slot=slot: store.read_user(slot, int(slot[1:]), "ana", ""))
        assert (found.fence, found.history) == (at(2), seen("b", "a")), slot  # type: ignore[attr-defined]
    cluster.wait_ok()
    store.check()


def down(store: RedisStore, slot: str) -> bool:
    try:
        store.read_user(slot, int(slot[1:]), "ana", "")
    except StoreUnavailable as error:
        return "cluster is down" in str(error)
    return False


def test_a_node_that_hangs_costs_two_time_outs_at_most(
    store: RedisStore, cluster: RealCluster
) -> None:
    store.write_users("u3", clicks("u3"), None, at(1), UserEffects())
    hung = cluster.owner("u3")
    hung.signal(signal.SIGSTOP)
    try:
        took = []
        for _ in range(3):
            begun = time.monotonic()
            with pytest.raises(StoreUnavailable):
                store.read_many([UserQuery(slot, clicks(slot), ["ana"], []) for slot in SLOTS])
            took.append(time.monotonic() - begun)
        # The shortest: a busy machine delays any single call.
        assert min(took) < 2 * TIMEOUT_MS / 1000 + 0.5
    finally:
        hung.signal(signal.SIGCONT)
    assert until_applied(lambda: store.fences(clicks("u3"), ["u3"])) == {"u3": at(1)}


def test_all_nodes_away_is_said_with_their_addresses_and_no_password(tmp_path: Path) -> None:
    with opened("redis://ann:s3cret@127.0.0.1:1,127.0.0.1:2/0") as store:
        begun = time.monotonic()
        with pytest.raises(StoreUnavailable) as raised:
            store.check()
    assert time.monotonic() - begun < 3
    assert "127.0.0.1:1, 127.0.0.1:2" in str(raised.value) and "s3cret" not in str(raised.value)


def test_many_threads_while_a_node_dies_and_comes_back(
    store: RedisStore, cluster: RealCluster
) -> None:
    """Eight threads count, each under its own fence; every count is applied exactly once."""
    stop, errors = threading.Event(), list[BaseException]()
    counted = dict.fromkeys(SLOTS, 0)

    def work(slot: str) -> None:
        try:
            while not stop.is_set():
                counted[slot] = count_one(store, slot, counted[slot])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(slot,)) for slot in SLOTS]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    dead = cluster.owner("i0")
    dead.kill()
    time.sleep(0.5)
    dead.start()
    cluster.wait_ok()
    time.sleep(0.5)
    stop.set()
    for thread in threads:
        thread.join(30)
    assert errors == [] and all(counted.values())
    assert store.popular("i0", 100) == {7: {slot: n for slot, n in counted.items()}}


def count_one(store: StateStore, slot: str, done: int) -> int:
    """Count one thousandth after the fence `done`, once, however often it is tried; returns the new
    offset.
    """
    source = clicks(slot)

    def once() -> int:
        fence = store.fences(source, ["i0"])["i0"]
        if fence is not None and fence.offset > done:
            return fence.offset
        store.count_clicks("i0", source, fence, at(done + 1), {7: {slot: 1}}, 4)
        return done + 1

    return int(until_applied(once))  # type: ignore[call-overload]


def test_a_replica_takes_over_and_the_fence_says_what_it_has(tmp_path: Path) -> None:
    with real_cluster(tmp_path, replicas=1) as six, opened(six.url) as store:
        store.check()
        replica = six.servers[3]
        with replica.client() as client:
            client.config_set("maxmemory-policy", "volatile-ttl")
            with pytest.raises(
                StoreRefused, match=f"{replica.name} has maxmemory-policy volatile-ttl"
            ):
                store.check()
            client.config_set("maxmemory-policy", "noeviction")
        for slot in SLOTS:
            store.write_users(
                slot, clicks(slot), None, at(1), UserEffects(histories={"ana": seen("a")})
            )
        dead = six.owner("u3")
        with dead.client() as client:
            assert client.wait(1, 5_000) == 1
        dead.kill()
        effects = UserEffects(histories={"ana": seen("b", "a")})

        def write() -> None:
            # As ingest: on from the fence that is found, which may be an older one on the replica.
            before = store.fences(clicks("u3"), ["u3"])["u3"]
            store.write_users("u3", clicks("u3"), before, at(2), effects)

        until_applied(write)
        assert store.read_user("u3", 3, "ana", "").history == seen("b", "a")
        assert six.owner("u3") is not dead
        store.check()
        dead.start()
        six.wait_ok()
        assert store.read_user("u3", 3, "ana", "").fence == at(2)


def move(cluster: RealCluster, tag: str, during: Callable[[], None]) -> Server:
    """Move a slot key by key, as redis-cli does; call `during` while half of its keys are moved."""
    source = cluster.owner(tag)
    target = next(s for s in cluster.servers if s is not source)
    with source.client() as here, target.client() as there:
        slot = here.execute_command("CLUSTER KEYSLOT", f"{{{tag}}}")
        ids = {c: str(c.execute_command("CLUSTER MYID"), "ascii") for c in (here, there)}
        there.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", ids[here])
        here.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", ids[there])
        keys = here.execute_command("CLUSTER GETKEYSINSLOT", slot, 100_000)
        for half in (keys[::2], keys[1::2]):
            for key in half:
                here.execute_command("MIGRATE", "127.0.0.1", target.port, key, 0, 5_000, "REPLACE")
            if half is not keys[1::2]:
                during()
        while left := here.execute_command("CLUSTER GETKEYSINSLOT", slot, 1_000):
            for key in left:
                here.execute_command("MIGRATE", "127.0.0.1", target.port, key, 0, 5_000, "REPLACE")
        for client in (there, here):
            client.execute_command("CLUSTER SETSLOT", slot, "NODE", ids[there])
        for server in cluster.servers:
            if server not in (source, target):
                with server.client() as other:
                    other.execute_command("CLUSTER SETSLOT", slot, "NODE", ids[there])
    return target


def move_at_once(cluster: RealCluster, tag: str) -> Server:
    """Move a slot with Valkey 9's own command."""
    source = cluster.owner(tag)
    target = next(s for s in cluster.servers if s is not source)
    with source.client() as here, target.client() as there:
        slot = here.execute_command("CLUSTER KEYSLOT", f"{{{tag}}}")
        to = str(there.execute_command("CLUSTER MYID"), "ascii")
        here.execute_command("CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", slot, slot, "NODE", to)
        wait_for("the slot to move", lambda: cluster.owner(tag) is target)
    return target


@pytest.mark.parametrize("way", ["key by key", "at once"])
def test_a_slot_that_moves_loses_and_doubles_nothing(
    way: str, store: RedisStore, cluster: RealCluster
) -> None:
    """Counts go on meanwhile: each of them is there once, and old buckets are gone, the latest at
    the end.
    """
    events: dict[str, Any] = {
        "items_max": 9,
        "clicked": ["a"],
        "decays": [EventDecay(1), EventDecay(NO_DECAY)],
    }
    counts = {bucket: {"a": 1000} for bucket in range(4)}
    store.count_clicks("i0", clicks("u0"), None, at(0), counts, 4, **events)
    stop, counted = threading.Event(), list[int]()

    def work() -> None:
        while not stop.is_set():
            before = len(counted)

            def once() -> None:
                fence = store.fences(clicks("u0"), ["i0"])["i0"]
                if fence == at(before):
                    # One bucket comes and one goes: keys that are here, there, or nowhere yet.
                    # So do the epochs of the short half-life.
                    more = {4 + before: {"a": 1000}}
                    store.count_clicks("i0", clicks("u0"), fence, at(before + 1), more, 4, **events)
                else:  # applied, and its answer was lost
                    assert fence == at(before + 1)

            until_applied(once)
            counted.append(before)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        wait_for("some counts", lambda: len(counted) > 10)
        if way == "at once":
            new = move_at_once(cluster, "i0")
        else:
            new = move(cluster, "i0", lambda: time.sleep(0.5))
        moved_at = len(counted)
        wait_for("some more", lambda: len(counted) > moved_at + 10)
    finally:
        stop.set()
        thread.join(30)
    assert not thread.is_alive() and cluster.owner("i0") is new
    done = len(counted)
    assert store.fences(clicks("u0"), ["i0"]) == {"i0": at(done)}
    assert store.popular("i0", 10) == {bucket: {"a": 1000} for bucket in range(done, done + 4)}
    assert stored_counts(store, "i0", events["decays"]) == plain_counts({"a": done + 1})
    assert len([*store._redis.scan_iter(match=f"{store._ns}*popular:*")]) == 4


def test_a_script_on_a_split_slot_does_nothing_at_all(
    store: RedisStore, cluster: RealCluster
) -> None:
    users = {f"user-{n}": seen("a") for n in range(40)}
    store.write_users("u3", clicks("u3"), None, at(0), UserEffects(histories=users))

    def halfway() -> None:
        more = {user: seen("b", "a") for user in users}
        with pytest.raises(StoreUnavailable):
            store.write_users("u3", clicks("u3"), at(0), at(1), UserEffects(histories=more))
        with pytest.raises(StoreUnavailable):
            store.read_many([UserQuery("u3", clicks("u3"), [*users], [])])

    move(cluster, "u3", halfway)
    read = store.read_many([UserQuery("u3", clicks("u3"), [*users], [])])[0]
    assert (read.fence, dict(read.histories)) == (at(0), users)


def test_keys_are_not_looked_through_while_slots_move(
    store: RedisStore, cluster: RealCluster
) -> None:
    store.write_users("u3", clicks("u3"), None, at(9), UserEffects())
    assert isinstance(store._redis, RedisCluster)
    found = store._redis.scan_iter(match=f"{store._ns}*")
    assert next(found)
    move(cluster, "u3", lambda: None)
    with pytest.raises(redis.ConnectionError, match="slots moved"):
        list(found)
    assert store.accept_log({"clicks": (LogId("cluster", "made anew"), {3: 0})}) == 1


def test_a_namespace_is_removed_from_all_nodes(cluster: RealCluster) -> None:
    from streams.operations.state_replay import remove_namespace

    settings = settings_of(cluster.url)
    with (
        opened(cluster.url, namespace=settings.namespace) as store,
        redis_client.client(settings) as client,
    ):
        for slot in SLOTS:
            store.write_users(slot, clicks(slot), None, at(1), UserEffects(accepted={"e": 1}))
        assert len([*client.scan_iter(match=f"{settings.namespace}:*")]) == 2 * len(SLOTS)
        remove_namespace(settings, settings.namespace)
        assert [*client.scan_iter(match=f"{settings.namespace}:*")] == []


def test_ingest_and_worker_on_a_cluster_whose_node_is_killed(
    fresh_settings: Settings, cluster: RealCluster, make_live, dataset
) -> None:
    """Real processes: clicks under way, kill -9 of a node, its restart; the oracle finds no
    difference.
    """
    cluster.wait_ok()
    settings = msgspec.structs.replace(fresh_settings, redis_url=cluster.url, redis_cluster=True)
    live = make_live(SimpleNamespace(settings=settings))
    send_history(live)
    user = dataset.clicks[0].user_id
    dead = cluster.owner(f"u{live.click(user, dataset.items[0].item_id)[0]}")
    dead.kill()
    send_history(live)
    answer = live.client().retrieve(user, 5, timeout_s=10)
    assert len(answer.items) == 5 and any("redis" in reason.lower() for reason in answer.missing)
    time.sleep(1.0)
    dead.start()
    send_history(live)
    cluster.wait_ok()
    assert assert_same_state(live) > 0
    assert live.supervisor.states()["ingest"] == ("ready", 0), "it waited, and was not restarted"
    token = live.click(user, dataset.items[1].item_id)
    fresh = live.client().retrieve(user, 5, after=token, wait_ms=2_000)
    assert fresh.freshness.after.applied and not fresh.missing
