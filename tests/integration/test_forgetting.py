"""Redis is emptied and all is read again: who was forgotten stays so, nothing is sent on a second
time.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import redis
from kafka import KafkaAdminClient, TopicPartition

from eddyline.kafka import clients, producers, topics
from eddyline.kafka.producers import now_ms
from eddyline.schema import events
from eddyline.schema.events import Click, Merge, UserProfile
from eddyline.schema.partitioning import partition_of
from eddyline.schema.step_ranges import always
from eddyline.settings.loader import Settings
from eddyline.stores.redis import RedisStore
from eddyline.stores.state_store import Source, UserEffects, UserQuery

pytestmark = pytest.mark.timeout(240)


def listed(store: RedisStore, partitions: int, user: str) -> list[str]:
    partition = partition_of(user, partitions)
    source = Source(topics.CLICKS, partition)
    [read] = store.read_many([UserQuery(f"u{partition}", source, [user], ["1"])])
    found = read.histories.get(user)
    return [] if found is None else [entry.item_id for entry in found.entries]


def committed(settings: Settings, topic: str) -> dict[int, int]:
    """Committed offset of ingest's group for each partition."""
    with clients.connect(settings, KafkaAdminClient) as admin:
        group, name = settings.prefixed("eddyline-ingest"), settings.prefixed(topic)
        places = [TopicPartition(name, p) for p in range(settings.clicks_partitions)]
        found = admin.list_group_offsets({group: places})[group]
    return {place.partition: max(0, found[place].offset) for place in places if place in found}


def test_an_emptied_redis_brings_nobody_back_and_sends_nothing_on_again(
    own_valkey, make_live
) -> None:
    live = make_live(own_valkey, with_worker=False)
    settings, store = live.settings, RedisStore(live.settings)
    stays = [f"stays-{n}" for n in range(8)]
    goes = [f"goes-{n}" for n in range(8)]
    returns = [f"returns-{n}" for n in range(8)]
    for user in stays + goes + returns:
        for n in range(9):  # enough for a micro-step
            live.click(user, f"i{n}", at_ms=now_ms() - 60_000)
    live.applied(60)
    for user in goes + returns:
        producers.send_forget(live.producer, settings, user)
    live.producer.flush(timeout=30)
    live.applied(60)

    def gone(users: list[str]) -> bool:
        return all(listed(store, settings.clicks_partitions, user) == [] for user in users)

    live.wait_for("the users to be forgotten", lambda: gone(goes + returns), timeout_s=30)
    for user in returns:
        live.click(user, "again")
    live.applied(60)
    assert all(listed(store, settings.clicks_partitions, user) == ["again"] for user in returns)
    stray, visitor = stays[0], "visitor"
    wrong = (partition_of(stray, settings.clicks_partitions) + 1) % settings.clicks_partitions
    click = Click(user_id=stray, item_id="i1", at_ms=now_ms() - 70_000)
    live.raw(topics.CLICKS, events.encode(click), key=stray.encode(), partition=wrong)
    live.click(visitor, "i2", at_ms=now_ms() - 80_000)
    merge = Merge(user_id=visitor, merge_into=stays[1], at_ms=now_ms())
    producers.send_merge(live.producer, settings, merge).get(timeout=30)
    live.wait_for(
        "what is sent on",
        lambda: all(
            len(listed(store, settings.clicks_partitions, user)) == 10 for user in stays[:2]
        ),
    )
    live.applied(60)
    for topic in (topics.CLICKS, topics.USERS):
        live.wait_for(
            "the commit", lambda t=topic: committed(settings, t) == topics.end_offsets(settings, t)
        )
    ends = topics.end_offsets(settings, topics.CLICKS)
    with redis.Redis.from_url(settings.redis_url) as client:
        client.flushall()

    def back() -> bool:
        found = [len(listed(store, settings.clicks_partitions, user)) for user in stays]
        return found == [10, 10] + [9] * 6

    live.wait_for("the lists", back, timeout_s=60)
    live.wait_for("the layout", lambda: store.layout() is not None, timeout_s=30)
    live.applied(60)
    assert gone(goes)
    assert topics.end_offsets(settings, topics.CLICKS) == ends, (
        "strays, merges or forgets were sent on again"
    )
    assert all(listed(store, settings.clicks_partitions, user) == ["again"] for user in returns)
    store.close()


def test_no_trace_of_a_forgotten_user_is_found_in_redis_and_in_logs(own_valkey, make_live) -> None:
    """Clocks ahead, a list pushed out, another generation, late events, an emptied Redis."""
    live = make_live(
        own_valkey, with_worker=False, history_length_max="5", history_cache_entries_max="0"
    )
    settings, store = live.settings, RedisStore(live.settings)
    ahead = [f"ahead-{n}" for n in range(6)]
    pushed = [f"pushed-{n}" for n in range(6)]
    users, begun_ms = ahead + pushed, now_ms()
    for user in users:
        shift_ms = 200_000 if user in ahead else -60_000
        for n in range(9):
            live.click(user, f"i{n}", at_ms=begun_ms + shift_ms)
        producers.send_profile(
            live.producer, settings, UserProfile(user_id=user, attributes={"age": 30})
        )
    live.producer.flush(timeout=30)
    live.applied(60)
    for partition in range(settings.clicks_partitions):
        another_generation(store, partition, users, settings.clicks_partitions)
    live.kill("ingest")  # the next one reads what the slots have
    for user in users:
        assert user.encode() in redis_bytes(settings)
        producers.send_forget(live.producer, settings, user)
    live.producer.flush(timeout=30)
    live.applied(60)
    users_log = live.read(topics.USERS)
    until_ms = max(r.timestamp for r in users_log if r.value is None)

    def late() -> None:
        for user in users:
            live.click(user, "offline", at_ms=begun_ms - 1_000)  # a phone's buffer
            click = Click(user_id=user, item_id="stray", at_ms=now_ms(), event_id=f"s-{now_ms()}")
            live.raw(
                topics.CLICKS,
                events.encode(click),
                key=user.encode(),
                partition=partition_of(user, settings.clicks_partitions),
                headers=[("origin_ms", str(begun_ms).encode())],
            )
        live.producer.flush(timeout=30)

    live.applied(60)
    late()
    live.applied(60)
    assert [user for user in users if user.encode() in redis_bytes(settings)] == []
    with redis.Redis.from_url(settings.redis_url) as client:
        hashes = [key for key in client.scan_iter(count=1_000) if b":f:" in key]
        assert len(hashes) == len(users)
        assert min(client.pttl(key) for key in hashes) > 399 * 86_400_000
        client.flushall()
    live.wait_for("the layout", lambda: store.layout() is not None, timeout_s=30)
    live.applied(60)
    late()
    live.applied(60)
    assert [user for user in users if user.encode() in redis_bytes(settings)] == []
    logs = b"".join(p.read_bytes() for p in (Path(settings.data_dir) / "logs").rglob("*.log"))
    assert logs and [user for user in users if user.encode() in logs] == []
    snapshots = [p.read_bytes() for p in Path(settings.data_dir).rglob("snapshots/**/*.*")]
    assert [user for user in users if any(user.encode() in one for one in snapshots)] == []
    for user in users:
        assert now_ms() > until_ms
        live.click(user, "again")
    live.applied(60)
    assert {tuple(listed(store, settings.clicks_partitions, user)) for user in users} == {
        ("again",)
    }
    store.close()


def another_generation(
    store: RedisStore, partition: int, users: list[str], partitions: int
) -> None:
    """Embeddings of a later generation, as its ingest process would write them."""
    mine = [user for user in users if partition_of(user, partitions) == partition]
    slot, source = f"u{partition}", Source(topics.CLICKS, partition)
    read = store.read_slot(slot, source)
    if read.fence is None:
        return
    effects = UserEffects(
        embeddings={"2": dict.fromkeys(mine, (9, bytes(256)))},
        step_ranges={**read.step_ranges, "2": always("")},
    )
    store.write_users(slot, source, read.fence, read.fence, effects)


def redis_bytes(settings: Settings) -> bytes:
    """All keys and values."""
    found = []
    with redis.Redis.from_url(settings.redis_url) as client:
        for key in client.scan_iter(count=1_000):
            found.append(key)
            kind = client.type(key)
            if kind == b"string":
                found.append(client.get(key) or b"")
            elif kind == b"list":
                found += client.lrange(key, 0, -1)
            elif kind == b"zset":
                found += client.zrange(key, 0, -1)
    return b"\n".join(found)
