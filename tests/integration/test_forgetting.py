"""A forgotten user stays forgotten when Redis is emptied and everything is read again from Kafka."""

from __future__ import annotations

import pytest
import redis

from eddyline import kafka
from eddyline.cli.producers import now_ms
from eddyline.ports import Source
from eddyline.slots import partition_of
from eddyline.stores.redis import RedisStore

pytestmark = pytest.mark.timeout(240)


def listed(store: RedisStore, partitions: int, user: str) -> list[str]:
    partition = partition_of(user, partitions)
    read = store.read_users(f"u{partition}", Source(kafka.CLICKS, partition), [], [user], "1")
    found = read.behaviours.get(user)
    return [] if found is None else [entry.item_id for entry in found.entries]


def test_a_forgotten_user_does_not_come_back_with_an_emptied_redis(own_servers, make_live) -> None:
    live = make_live(own_servers)
    settings, store = live.settings, RedisStore(live.settings)
    stays = [f"stays-{n}" for n in range(8)]
    goes = [f"goes-{n}" for n in range(8)]
    returns = [f"returns-{n}" for n in range(8)]
    for user in stays + goes + returns:
        for n in range(9):  # enough for a micro-step
            live.click(user, f"i{n}", at_ms=now_ms() - 60_000)
    live.applied(60)
    for user in goes + returns:
        kafka.send_forget(live.producer, settings, user)
    live.producer.flush(timeout=30)
    live.applied(60)

    def gone(users: list[str]) -> bool:
        return all(listed(store, settings.clicks_partitions, user) == [] for user in users)

    live.wait_for("the users to be forgotten", lambda: gone(goes + returns), timeout_s=30)
    for user in returns:
        live.click(user, "again")
    live.applied(60)
    assert all(listed(store, settings.clicks_partitions, user) == ["again"] for user in returns)
    with redis.Redis.from_url(settings.redis_url) as client:
        client.flushall()

    def back() -> bool:
        return all(len(listed(store, settings.clicks_partitions, user)) == 9 for user in stays)

    live.wait_for("the lists", back, timeout_s=60)
    live.wait_for("the layout", lambda: store.layout() is not None, timeout_s=30)
    live.applied(60)
    assert gone(goes)
    assert all(listed(store, settings.clicks_partitions, user) == ["again"] for user in returns)
    store.close()
