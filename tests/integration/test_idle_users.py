"""One-click visitors in a Redis of limited memory: idle ones make room for new ones."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eddyline.kafka.topics import CLICKS, ITEMS, USERS
from eddyline.schema import events
from eddyline.schema.events import Click
from eddyline.schema.partitioning import partition_of
from eddyline.settings.loader import Settings
from eddyline.stores.redis import RedisStore
from eddyline.stores.state_store import LogId
from sandbox.servers import free_ports, valkey
from sandbox.servers.supervisor import Supervisor
from streams import background_removal
from streams.generation import Generation
from streams.handlers import Handlers, Outputs
from streams.idle_users import IdleUsers
from tests.applying import batch_of
from tests.simulation.test_ingest_faults import Rec
from tests.unit.streams.test_generations import Letters, Topic, Towers

DAY_MS = 86_400_000
IDLE_D = 10
PARTITIONS = 2
# The most clicks of a partition that ingest applies at a time.
BATCH = 48
BEGIN_MS = 1_700_000_000_000
LOG = LogId("c" * 22, "t" * 22)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RedisStore]:
    """A Valkey of this test's own."""
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


class Shop:
    """Ingest's handlers; every visitor clicks once and does not come back. Log time is simulated.

    removals_a_day: how often idle users are removed; ingest does it four times a day
    peak:           the most bytes that Redis used, before a removal
    """

    def __init__(
        self, store: RedisStore, visitors_a_day: int, idle_d: int, removals_a_day: float = 4
    ) -> None:
        self.settings = Settings(
            clicks_partitions=PARTITIONS,
            items_partitions=1,
            dedupe_window_events=1_024,
            user_idle_s_max=idle_d * 86_400,
            popular_bucket_s=86_400,
            popular_buckets=7,
        )
        self.store, self.a_day, self.peak = store, visitors_a_day, 0
        self.every = round(visitors_a_day / removals_a_day)
        self.handlers = Handlers(
            self.settings,
            store,
            {CLICKS: LOG, USERS: LOG, ITEMS: LOG},
            [Generation(Towers("1", 64, 1.0), Topic())],  # type: ignore[arg-type]
            Outputs.to_sink(Letters()),
            ["1"],
        )
        self.clicks = self.handlers.clicks
        for partition in range(PARTITIONS):
            self.clicks.open(partition)
            self.clicks.fences.open({partition: (0, 2**40)})
        self.idle = IdleUsers(self.settings, store, self.clicks.cache, threading.Lock())
        self.offsets, self.visitors = [0] * PARTITIONS, 0
        self.waiting: dict[int, list[Any]] = {partition: [] for partition in range(PARTITIONS)}

    def visit(self, days: int) -> None:
        """Some days of visitors."""
        for number in range(self.visitors, self.visitors + days * self.a_day):
            at_ms = BEGIN_MS + number * DAY_MS // self.a_day
            self._click(f"visitor-{number:020}", at_ms)
            if number % self.every == 0:
                self._flush()
                self.clicks.flush()
                self.peak = max(self.peak, self.used())
                self.idle.check()
        self.visitors += days * self.a_day
        self._flush()
        self.clicks.flush()

    def used(self) -> int:
        """Bytes that Redis uses."""
        return int(self.store._redis.info("memory")["used_memory"])

    def keys(self) -> int:
        """Keys in Redis."""
        return int(self.store._redis.dbsize())

    def _click(self, user: str, at_ms: int) -> None:
        partition = partition_of(user, PARTITIONS)
        click = Click(user_id=user, item_id=f"i{at_ms % 3}", at_ms=at_ms, event_id=user)
        offset = self.offsets[partition]
        self.offsets[partition] += 1
        waiting, value = self.waiting[partition], events.encode(click)
        waiting.append(Rec(CLICKS, partition, offset, at_ms, user.encode(), value))
        if len(waiting) == BATCH:
            self._flush()

    def _flush(self) -> None:
        """Apply what waits, of all partitions at a time."""
        batches = [batch_of(waiting) for waiting in self.waiting.values() if waiting]
        for result in self.clicks.apply(batches) if batches else ():
            if isinstance(result, Exception):
                raise result
        self.waiting = {partition: [] for partition in self.waiting}


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else uses this Redis: removal leaves it no time."""
    monkeypatch.setattr(background_removal, "_IDLE_SHARE", 0.0)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("visitors", "mib", "removals_a_day"),
    [(4_000, 1, 4), pytest.param(1_000_000, 120, 0.5, marks=pytest.mark.long)],
)
def test_one_click_visitors_fit_in_a_redis_of_limited_memory(
    store: RedisStore,
    visitors: int,
    mib: int,
    removals_a_day: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    days = 80
    shop = Shop(store, visitors // days, IDLE_D, removals_a_day)
    store._redis.config_set("maxmemory", shop.used() + (mib << 20))
    shop.visit(days)
    # Idle for ten days; removed at the first removal more than an hour after that.
    alive = (IDLE_D + 1 / removals_a_day + 0.25) * shop.a_day
    assert 2 * IDLE_D * shop.a_day <= shop.keys() <= 2 * alive + 100
    assert shop.idle.removed >= shop.visitors - alive
    last = f"visitor-{shop.visitors - 1:020}"
    first = f"visitor-{0:020}"
    at = {user: partition_of(user, PARTITIONS) for user in (first, last)}
    found = [store.read_user(f"u{p}", p, user, "1") for user, p in at.items()]
    assert [len(one.history.entries) for one in found] == [0, 1]
    assert [one.embedding is None for one in found] == [True, False]
    with capsys.disabled():
        sys.stderr.write(
            f"\n{shop.visitors:,} visitors: at most {shop.peak / 2**20:.1f} MiB of Redis, "
            f"{shop.keys():,} keys at the end, {shop.idle.removed:,} users removed\n"
        )


def test_without_the_rule_they_do_not_fit(store: RedisStore) -> None:
    shop = Shop(store, 4_000 // 80, 0)
    store._redis.config_set("maxmemory", shop.used() + (1 << 20))
    with pytest.raises(Exception, match="maxmemory"):
        shop.visit(80)
