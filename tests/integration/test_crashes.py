"""kill -9 of one process at a time, on real servers: every effect is there exactly once.

The oracle (`tests/oracle.py`) reads the topics and applies them, in chunks of another size, to a
store in memory. The comparison covers lists, windows, embeddings, counts, metadata and vectors.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from kafka import KafkaAdminClient

from cli.commands import replay_file
from eddyline.kafka import clients, topics
from eddyline.kafka.producers import now_ms
from eddyline.schema import user_history
from eddyline.schema.events import shifted_to_now
from eddyline.stores.redis import RedisStore
from eddyline.stores.state_store import Source
from sandbox.servers.supervisor import Supervisor
from serving.rpc.client import is_ready
from tests import oracle

pytestmark = pytest.mark.timeout(240)


def assert_same_state(live) -> int:
    """Compare the state with the oracle's; returns the number of entries in all lists."""
    live.applied(timeout_s=60)
    found = oracle.compare(live.settings)
    assert found.differences == []
    return found.counts["list entry"]


def send_history(live, times: int = 1) -> int:
    """Send the data set's clicks `times` times, each time with new event ids; returns how many."""
    clicks = shifted_to_now(live.dataset.clicks, now_ms())
    for turn in range(times):
        replay_file.send(
            live.settings,
            [msgspec.structs.replace(c, event_id=f"{turn}-{c.event_id}") for c in clicks],
        )
    return times * len(clicks)


def clicks_applied(live) -> int:
    """Number of records of `clicks` that are applied, by the fences."""
    store = RedisStore(live.settings)
    try:
        fences = [store.fences(Source("clicks", p), [f"u{p}"])[f"u{p}"] for p in range(4)]
    finally:
        store.close()
    return sum(fence.offset + 1 for fence in fences if fence)


def test_ingest_killed_in_mid_chunk(make_live) -> None:
    live = make_live(with_worker=False)
    sent = send_history(live, times=3)
    for turn in range(4):
        before = clicks_applied(live)
        live.wait_for(
            "more clicks to be applied",
            lambda before=before: before < (now := clicks_applied(live)) or now == sent,
            timeout_s=30,
        )
        time.sleep(0.05 * turn)
        killed = live.kill("ingest")
        live.wait_for(
            "another ingest process",
            lambda killed=killed: live.supervisor.pids().get("ingest", killed) != killed,
        )
    total = assert_same_state(live)
    assert live.supervisor.states()["ingest"][1] >= 4, "it was killed and restarted"
    assert 0 < total <= sent


def test_two_ingest_processes_share_and_one_is_killed(make_live) -> None:
    live = make_live(with_worker=False)
    live.supervisor.start(
        live.deployment.ingest_child("ingest-2", clicks_partitions="4", items_partitions="2")
    )
    live.wait_for("the second process to read", lambda: live.reads_clicks("ingest-2"), timeout_s=30)
    send_history(live, times=2)
    live.kill("ingest-2")
    send_history(live)  # the same events again: re-sends, to be dropped
    assert_same_state(live)


@pytest.mark.long
def test_redis_killed_heals_from_kafka(own_valkey, make_live) -> None:
    live = make_live(own_valkey, with_worker=False)
    send_history(live)
    time.sleep(0.5)
    own_valkey.kill("valkey")
    send_history(live, times=2)
    assert_same_state(live)


@pytest.mark.long
def test_the_broker_killed_for_three_seconds(own_servers, make_live) -> None:
    live = make_live(own_servers)
    send_history(live)
    os.kill(own_servers.pid("kafka"), signal.SIGKILL)
    time.sleep(3)
    live.wait_for("Kafka to be back", lambda: own_servers.up("kafka"), timeout_s=40)
    answer = live.client().retrieve(live.dataset.clicks[0].user_id, 5)
    assert len(answer.items) == 5, "the worker answers all the time"
    send_history(live, times=2)
    assert_same_state(live)
    token = live.click("after-the-crash", live.dataset.items[0].item_id)
    assert (
        live.client()
        .retrieve("after-the-crash", 5, after=token, wait_ms=2000)
        .freshness.after.applied
    )


def test_a_worker_killed_and_back_gives_the_same_answers(make_live) -> None:
    live = make_live()
    send_history(live)
    live.applied()
    live.delete(live.dataset.items[0].item_id)
    live.applied()
    users = sorted({c.user_id for c in live.dataset.clicks})[:30]
    time.sleep(1.0)  # the popular list is read twice a second

    def ask():
        with_client = live.client()
        return {u: [i.item_id for i in with_client.retrieve(u, 20).items] for u in users}

    before = ask()
    assert not any(live.dataset.items[0].item_id in items for items in before.values())
    live.kill("worker")
    live.supervisor.wait("worker", timeout_s=30)
    live.wait_for("the worker to answer", lambda: is_ready(live.address))
    live.wait_for("the same answers", lambda: ask() == before)


def test_without_redis_the_worker_answers_what_it_can(own_valkey, make_live) -> None:
    live = make_live(own_valkey)
    send_history(live)
    live.applied()
    user = live.dataset.clicks[0].user_id
    own_valkey.pause("valkey")
    try:
        answer = live.client().retrieve(user, 5, timeout_s=10)
        assert len(answer.items) == 5 and any("redis" in m.lower() for m in answer.missing)
        assert {i.path for i in answer.items} <= {"popular", "newest"}
    finally:
        own_valkey.resume("valkey")
    live.wait_for(
        "Redis to be used again", lambda: not live.client().retrieve(user, 5, timeout_s=10).missing
    )


def test_kafka_made_anew_under_an_old_redis_is_refused(make_live) -> None:
    live = make_live(with_worker=False)
    send_history(live)
    live.applied()
    live.supervisor.stop()
    admin = KafkaAdminClient(**clients.client_options(live.settings))
    try:
        admin.delete_topics([live.settings.prefixed(topics.CLICKS)])
    finally:
        admin.close()
    live.wait_for("the topic to go", lambda: gone(live, topics.CLICKS))
    topics.ensure_topics(live.settings)
    child = live.deployment.ingest_child("again", clicks_partitions="4", items_partitions="2")
    run = lambda: subprocess.run(  # noqa: E731
        list(child.argv),
        env=os.environ | dict(child.env),
        capture_output=True,
        text=True,
        timeout=60,
    )
    done = run()
    assert done.returncode == 3, done.stderr[-2000:]
    assert "eddyline accept-log" in done.stderr and "topic id" in done.stderr
    accepted = subprocess.run(
        [sys.executable, "-m", "cli", "accept-log", "--yes"],
        env=os.environ | dict(child.env),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert accepted.returncode == 0, accepted.stderr
    store = RedisStore(live.settings)
    assert not any(store.fences(Source("clicks", p), [f"u{p}"])[f"u{p}"] for p in range(4))
    user = live.dataset.clicks[0].user_id
    slot = kafka_slot(live, user)
    kept = store.read_user(f"u{slot}", slot, user, "1").history
    assert kept != user_history.EMPTY, "lists are kept"
    assert all(store.fences(Source("items", p), ["i0"])["i0"] for p in range(2)), (
        "items are the same log"
    )
    with Supervisor(Path(live.settings.data_dir) / "again") as again:
        again.start(child)
        live.click(user, live.dataset.items[1].item_id)
        live.applied()
        entries = store.read_user(f"u{slot}", slot, user, "1").history.entries
        assert (
            entries[0].item_id == live.dataset.items[1].item_id and entries[1:] == kept.entries[:99]
        )
    store.close()


def kafka_slot(live, user: str) -> int:
    from eddyline.schema.partitioning import partition_of

    return partition_of(user, live.settings.clicks_partitions)


def gone(live, name: str) -> bool:
    admin = KafkaAdminClient(**clients.client_options(live.settings))
    try:
        return live.settings.prefixed(name) not in admin.list_topics()
    finally:
        admin.close()


def test_nothing_is_left_when_a_system_ends(make_live) -> None:
    live = make_live()
    pids = list(live.supervisor.pids().values())
    live.supervisor.stop()
    assert pids and not [pid for pid in pids if Path("/proc", str(pid)).exists()]


BROKEN_FETCHER = """
import asyncio, runpy, sys
from aiokafka.consumer.fetcher import Fetcher
fetch = Fetcher._fetch_requests_routine

async def broken(self):
    asyncio.get_running_loop().call_later(3, self._fetch_task.cancel)
    await fetch(self)

Fetcher._fetch_requests_routine = broken
runpy.run_module("streams", run_name="__main__")
"""


def test_a_process_that_would_read_nothing_more_ends(make_live) -> None:
    live = make_live(with_worker=False)
    fields = (
        "kafka_bootstrap_servers",
        "redis_url",
        "namespace",
        "bundle_dir",
        "clicks_partitions",
        "items_partitions",
        "path_state",
        "popular_fast_half_life_events",
    )
    values = {f"EDDYLINE_{name.upper()}": str(getattr(live.settings, name)) for name in fields}
    more = {"EDDYLINE_DATA_DIR": str(Path(live.settings.data_dir) / "second")}
    ended = subprocess.run(
        [sys.executable, "-c", BROKEN_FETCHER],
        env=os.environ | values | more,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 1, ended.stderr
    assert "aiokafka's fetcher ended" in ended.stderr
    send_history(live)
    assert_same_state(live)  # the other one has all partitions again
