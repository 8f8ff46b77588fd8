"""`eddyline plan` against the memory that a real Valkey uses."""

from __future__ import annotations

import json
import time
from typing import Any

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

from cli.commands import capacity
from cli.commands.capacity import Sizes, amount, redis_parts, worker_parts
from cli.main import app
from eddyline.errors import SettingsError, StoreUnavailable
from eddyline.schema import seen_items, user_history
from eddyline.schema.co_visits import entries
from eddyline.schema.event_decay import decays
from eddyline.schema.user_history import Entry, UserHistory
from eddyline.settings.loader import Settings
from eddyline.stores.redis import RedisStore
from eddyline.stores.state_store import Fence, ItemMetadata, LogId, Source, UserEffects
from sandbox.servers import free_ports, valkey
from sandbox.servers.supervisor import Supervisor

MS = 1_700_000_000_000
LOG = LogId("c" * 22, "t" * 22)


@pytest.fixture
def store(tmp_path: Any) -> Any:
    """A Valkey of this test's own: no other test may use its memory."""
    port = free_ports.choose_ports(tmp_path, ("valkey",))["valkey"]
    supervisor = Supervisor(tmp_path / "logs")
    try:
        supervisor.start(valkey.prepare(tmp_path, port, valkey.program()[0]))
        made = RedisStore(
            Settings(redis_url=f"redis://127.0.0.1:{port}/0", redis_timeout_ms=10_000)
        )
        yield made
        made.close()
    finally:
        supervisor.stop()


def used(store: RedisStore) -> int:
    """Without what big commands leave behind for a while: the interpreter's garbage, buffers."""
    store._redis.script_flush("SYNC")
    store._redis.connection_pool.disconnect()
    time.sleep(0.3)
    return int(store._redis.info("memory")["used_memory"])


def filled(store: RedisStore, settings: Settings, sizes: Sizes) -> int:
    """Write what the sizes say through the store itself; the bytes that this took."""
    store.fences(Source("clicks", 0), ["u0"])
    empty = used(store)
    user_ids = [f"{n:0{sizes.user_id}d}" for n in range(sizes.users)]
    item_ids = [f"{n:0{sizes.item_id}d}" for n in range(sizes.items)]
    for partition in range(settings.clicks_partitions):
        slot, fence = f"u{partition}", None
        window = [f"{n:0{sizes.event_id}d}" for n in range(settings.dedupe_window_events)]
        mine = user_ids[partition :: settings.clicks_partitions]
        for first in range(0, len(window), settings.chunk_records_max):
            ids = window[first : first + settings.chunk_records_max]
            after = Fence(first + 1, LOG)
            accepted = {event_id: first + n for n, event_id in enumerate(ids)}
            store.write_users(
                slot, Source("clicks", partition), fence, after, UserEffects(accepted=accepted)
            )
            fence = after
        for first in range(0, len(mine), 250):
            chunk = mine[first : first + 250]
            kept = [str(n) for n in range(sizes.generations or settings.generations_kept)]
            effects = UserEffects(embeddings={name: {} for name in kept})
            beyond = sizes.history - settings.history_length_max
            fence = fill_seen(store, partition, chunk, item_ids[: max(0, beyond)], fence)
            for user in chunk:
                listed = range(min(sizes.history, settings.history_length_max))
                entries = tuple(Entry(item_ids[n % sizes.items], MS - n, 1, 1.0) for n in listed)
                effects.histories[user] = UserHistory(
                    partition=partition,
                    offset=10**6,
                    at_ms=MS,
                    produced_us=MS * 1_000,
                    appended_ms=MS,
                    read_us=MS * 1_000,
                    entries=entries,
                )
                if len(entries) <= user_history.RECENT_MAX:
                    effects.recent[user] = [user_history.compact(e) for e in entries]
                for learned in effects.embeddings.values():
                    learned[user] = (9, np.ones(sizes.dimension, "<f4").tobytes())
            before, fence = fence, Fence(first + 10**6, LOG)
            store.write_users(slot, Source("clicks", partition), before, fence, effects)
            # Later: half as many new ones as there may be, beside the older ones.
            effects.embeddings = {}
            some = user_history.RECENT_MAX // 2
            effects.recent = {
                user: [user_history.compact(e) for e in b.entries[:some]]
                if len(b.entries) > 2 * some
                else effects.recent[user]
                for user, b in effects.histories.items()
            }
            before, fence = fence, Fence(first + 10**6 + 1, LOG)
            store.write_users(slot, Source("clicks", partition), before, fence, effects)
        profiles = {user: {"p": "x" * (sizes.profile - 5)} for user in mine}
        store.write_profiles(slot, Source("users", partition), None, Fence(1, LOG), profiles, [])
    metadata = {item: ItemMetadata(0, 1, b"x" * sizes.item_json) for item in item_ids}
    store.write_item_metadata("i0", Source("items", 0), None, Fence(1, LOG), metadata)
    fence = None
    for first in range(0, sizes.items, 100):  # in pieces, as ingest does
        items = dict.fromkeys(item_ids[first : first + 100], 1_000)
        counts = dict.fromkeys(range(settings.popular_buckets), items)
        after = Fence(first, LOG)
        store.count_clicks(
            "i0", Source("clicks", 0), fence, after, counts, settings.popular_buckets
        )
        fence = after
    fill_epochs(store, settings, item_ids, fence)
    fill_rows(store, settings, item_ids)
    return used(store) - empty


def fill_seen(
    store: RedisStore, partition: int, users: list[str], items: list[str], fence: Fence | None
) -> Fence | None:
    """One event after the other leaves the lists of these users; returns the fence."""
    for n, item in enumerate(items):
        more = seen_items.stored([Entry(item, MS, 1)])
        effects = UserEffects(seen=dict.fromkeys(users, more), seen_max=1_000)
        after = Fence(10**5 + n, LOG)
        store.write_users(f"u{partition}", Source("clicks", partition), fence, after, effects)
        fence = after
    return fence


def fill_epochs(
    store: RedisStore, settings: Settings, item_ids: list[str], fence: Fence | None
) -> None:
    """Whole epochs of both half-lives, the items in turn."""
    clicks, half_lives = Source("clicks", 0), decays(settings)
    for first in range(0, 2 * int(half_lives[1].epoch_events), 160):
        clicked = [item_ids[n % len(item_ids)] for n in range(first, first + 160)]
        after = Fence(10**6 + first, LOG)
        store.count_clicks("i0", clicks, fence, after, {}, 9, 10**6, clicked, half_lives)
        fence = after


def fill_rows(store: RedisStore, settings: Settings, item_ids: list[str]) -> None:
    """Co-visitation rows that were compacted and grew again, and the outbox before them."""
    row_max, idle_ms = settings.co_visit_row_max, 1_000 * settings.co_visit_idle_s_max
    full = entries([(n, 1_000, 1) for n in range(row_max)])
    fence = None
    for first in range(0, len(item_ids), 50):
        some = item_ids[first : first + 50]
        for n, more in enumerate((full, entries([(1, 1_000, 1)]))):
            after, rows = Fence(2 * first + n, LOG), dict.fromkeys(some, more)
            store.append_co_visits(
                "i0", Source("co-visits", 0), fence, after, rows, rows, row_max, idle_ms
            )
            fence = after
    older = item_ids[: settings.co_visit_items]
    for partition in range(settings.clicks_partitions):
        source, slot = Source("clicks", partition), f"u{partition}"
        before = store.fences(source, [slot])[slot]
        effects = UserEffects(visits=[(10**7, item_ids[0], older)] * 256)
        store.write_users(slot, source, before, Fence(10**7, LOG), effects)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(users=4_000, items=3_000, history=50),
        Sizes(
            users=6_000,
            items=500,
            history=5,
            dimension=32,
            user_id=36,
            item_id=8,
            event_id=36,
            item_json=900,
        ),
        Sizes(
            users=500,
            items=8_000,
            history=100,
            item_id=24,
            profile=300,
            item_json=80,
            clicks_a_day=8_000,
            generations=1,
        ),
        Sizes(users=2_000, items=500, history=170, generations=1),
    ],
)
def test_the_plan_is_within_ten_percent_of_what_redis_uses(store: RedisStore, sizes: Sizes) -> None:
    settings = Settings(
        clicks_partitions=4,
        dedupe_window_events=3_000,
        popular_buckets=5,
        path_state="all",
        popular_fast_half_life_events=50,
        popular_slow_half_life_events=200,
    )
    settings = msgspec.structs.replace(settings, redis_url=store.address)
    before = store._redis.dbsize()
    parts = redis_parts(settings, sizes)
    assert store._redis.dbsize() == before, "samples are deleted"
    planned = sum(part.size for part in parts if part.what != "scripts and connections")
    assert planned == pytest.approx(filled(store, settings, sizes), rel=0.10)


def test_the_plan_grows_with_what_it_is_asked_for(servers: Settings) -> None:
    settings = Settings(redis_url=servers.redis_url)
    sizes = Sizes(users=10_000_000, items=1_000_000, history=50)
    parts = redis_parts(settings, sizes)
    assert {part.what: part.keys for part in parts}["user-ID embeddings"] == 3 * sizes.users
    base = {part.what: part.size for part in parts}
    assert 20e9 < sum(base.values()) < 40e9
    visited = Sizes(users=0, items=1, history=50, visitors_a_day=1_000)
    of_visitors = {part.what: part for part in redis_parts(settings, visited)}
    kept = of_visitors["visitors until they are idle"]
    assert kept.keys == 400 * 1_000 + 292 and 400 < kept.size / kept.keys < 800
    with pytest.raises(SettingsError, match="user_idle_s_max = 0: they stay for ever"):
        redis_parts(msgspec.structs.replace(settings, user_idle_s_max=0), visited)
    deleting = Sizes(users=0, items=1, history=50, deleted_a_day=1_000)
    ended = {part.what: part for part in redis_parts(settings, deleting)}
    kept = ended["deleted items until they end"]
    assert kept.keys == 30 * 1_000 + 292 and 60 < kept.size / kept.keys < 120
    with pytest.raises(SettingsError, match="deleted_items_kept_s = 0: they stay for ever"):
        redis_parts(msgspec.structs.replace(settings, deleted_items_kept_s=0), deleting)
    sizes = Sizes(users=10_000_000, items=1_000_000, history=1_000)
    longer = {part.what: part.size for part in redis_parts(settings, sizes)}
    assert (
        base["user histories"] < longer["user histories"] < 3 * base["user histories"]
    )  # 100 at most
    of_worker = capacity.worker_parts(settings, Sizes(users=1, items=1_000, history=1))
    assert {part.what: part.size for part in of_worker}["graph"] == 0
    with pytest.raises(SettingsError, match="lots"):
        amount("lots")


def test_the_command_prints_the_sums_and_json(
    servers: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDDYLINE_REDIS_URL", servers.redis_url)
    run = CliRunner().invoke
    shown = run(app, ["plan", "--users", "10M", "--items", "1M", "--history", "50"])
    assert (
        shown.exit_code == 0
        and "10,000,000" in shown.output
        and "each query worker" in shown.output
    )
    listed = json.loads(run(app, ["plan", "--users", "1k", "--items", "1k", "--json"]).output)
    assert {part["what"] for part in listed["Redis"]} >= {"user histories", "fences"}
    wanted = sum(
        p.size for p in worker_parts(Settings(), Sizes(users=1_000, items=1_000, history=50))
    )
    assert sum(part["bytes"] for part in listed["each query worker"]) == wanted


def test_without_a_redis_the_plan_says_where_it_looked() -> None:
    with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1:1"):
        redis_parts(Settings(redis_url="redis://127.0.0.1:1/0"), Sizes(1, 1, 1))
