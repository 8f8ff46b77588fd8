"""`eddyline merge` with real servers and a real ingest process."""

from __future__ import annotations

import os
import signal
import uuid
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.main import app
from eddyline.kafka.producers import now_ms, send_profile
from eddyline.schema.events import UserProfile
from eddyline.schema.partitioning import partition_of, user_slot
from eddyline.stores.redis import RedisStore


def run(live: Any, *command: str, code: int = 0) -> str:
    settings = live.settings
    names = ("kafka_bootstrap_servers", "redis_url", "namespace", "data_dir")
    names += ("clicks_partitions", "items_partitions")
    environment = {f"EDDYLINE_{name.upper()}": str(getattr(settings, name)) for name in names}
    result = CliRunner().invoke(app, ["merge", *command], env=environment)
    assert result.exit_code == code, (result.output, result.exception)
    return f"{result.output}{result.exception or ''}"


def entries(store: RedisStore, live: Any, user: str) -> list[tuple[str, int, int, float]]:
    partition = partition_of(user, live.settings.clicks_partitions)
    found = store.read_user(user_slot(partition), partition, user, "1").history.entries
    return [(e.item_id, e.at_ms, e.kind, e.weight) for e in found]


def counts(store: RedisStore, items: list[str]) -> dict[str, int]:
    buckets = store.popular("i0", 100_000).values()
    return {item: sum(bucket.get(item, 0) for bucket in buckets) for item in items}


def pair() -> tuple[str, str]:
    """A visitor and a user whose clicks lie in different partitions."""
    visitor = f"visitor-{uuid.uuid4().hex[:8]}"
    names = (f"user-{uuid.uuid4().hex[:8]}" for _ in range(100))
    return visitor, next(n for n in names if partition_of(n, 4) != partition_of(visitor, 4))


@pytest.mark.timeout(120)
def test_a_visitors_list_is_moved_once_by_time_and_forgotten(live: Any, store: RedisStore) -> None:
    visitor, user = pair()
    now = now_ms() - 60_000
    items = [f"{user}-item-{n}" for n in range(7)]
    for n, item in enumerate(items[:6]):
        more = {"kind": "like"} if n == 2 else {"kind": "dislike"} if n == 4 else {}
        live.click(visitor if n % 2 == 0 else user, item, at_ms=now + n, **more)
    live.click(visitor, items[0], at_ms=now + 9, event_id=None)
    send_profile(live.producer, live.settings, UserProfile(user_id=visitor, attributes={"age": 9}))
    live.producer.flush(timeout=10)
    live.applied()
    before, expected = (
        counts(store, items),
        sorted(entries(store, live, visitor) + entries(store, live, user), key=lambda e: -e[1]),
    )
    assert len(expected) == 7 and expected[0][0] == items[0]
    assert "4 events" in run(live, visitor, user)
    live.wait_for("the list to arrive", lambda: entries(store, live, user) == expected)
    live.applied()
    assert entries(store, live, visitor) == []
    assert counts(store, items) == before  # moved, not clicked again
    assert "0 events" in run(live, visitor, user)
    live.applied()
    assert entries(store, live, user) == expected
    assert store._redis.keys(f"*{visitor}*") == []
    # An event from before the visitor was forgotten arrives late: it is dropped.
    live.click(visitor, items[5], at_ms=now + 20)
    live.applied()
    assert entries(store, live, visitor) == []
    # The visitor goes on without logging in, and logs in again.
    live.click(visitor, items[6])
    assert "1 events" in run(live, visitor, user) or entries(store, live, visitor) == []
    live.wait_for(
        "the later event", lambda: [e[0] for e in entries(store, live, user)][:1] == [items[6]]
    )


@pytest.mark.timeout(120)
def test_a_merge_survives_the_death_of_ingest(make_live: Any) -> None:
    """Killed while merges are under way, and Redis put back to nothing for both: each click is
    there once.
    """
    live = make_live(with_worker=False)
    store = RedisStore(live.settings)
    pairs = [pair() for _ in range(6)]
    for visitor, user in pairs:
        for n in range(5):
            live.click(visitor, f"i{n}", at_ms=1_700_000_000_000 + n)
    live.applied()
    for visitor, user in pairs:
        run_without_waiting(live, visitor, user)
    live.kill("ingest", signal.SIGKILL)
    for visitor, user in pairs:  # the same merges again: nothing is left to move
        run_without_waiting(live, visitor, user)
    for visitor, user in pairs:
        live.wait_for(
            "the moved list",
            lambda v=visitor, u=user: (
                len(entries(store, live, u)) == 5 and not entries(store, live, v)
            ),
            timeout_s=40,
        )
    live.applied(60)
    newest_first = [f"i{n}" for n in reversed(range(5))]
    assert [[e[0] for e in entries(store, live, user)] for _, user in pairs] == [newest_first] * 6
    prefix = f"{live.settings.namespace}:"
    for key in store._redis.scan_iter(match=f"{prefix}*", count=1_000):
        if any(
            part in key for part in (b":h:", b":o:", b":window", b"fence:{u", b"fence:{i0}:clicks")
        ):
            store._redis.delete(key)
    live.kill("ingest", signal.SIGKILL)
    for _, user in pairs:
        live.wait_for(
            "the healed list", lambda u=user: len(entries(store, live, u)) == 5, timeout_s=40
        )
    live.applied(60)
    assert [[e[0] for e in entries(store, live, user)] for _, user in pairs] == [newest_first] * 6
    assert all(entries(store, live, visitor) == [] for visitor, _ in pairs)
    store.close()


def run_without_waiting(live: Any, visitor: str, user: str) -> None:
    """Only the record, as a command that was killed right after it."""
    from eddyline.kafka.producers import send_merge
    from eddyline.schema.events import Merge

    send_merge(
        live.producer, live.settings, Merge(user_id=visitor, merge_into=user, at_ms=now_ms())
    )
    live.producer.flush(timeout=10)


@pytest.mark.timeout(60)
def test_without_ingest_a_merge_says_so_and_no_user_merges_into_itself(fresh_settings: Any) -> None:
    from types import SimpleNamespace

    from eddyline.kafka import topics

    topics.ensure_topics(fresh_settings)
    alone = SimpleNamespace(settings=fresh_settings)
    assert "it will once it runs" in run(alone, "v", "u", "--wait-s", "0.1", code=1)
    assert "same_user" in run(alone, "u", "u", code=1)
    assert "control" in run(alone, "v\n", "u", code=1)
    assert os.environ.get("EDDYLINE_NAMESPACE") is None
