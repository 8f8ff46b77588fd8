"""`eddyline replay --from --to --into`: the same slice gives the same state, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator

import msgspec
import pytest
import redis

from cli.commands import replay_file as sending
from eddyline import generations
from eddyline.errors import SettingsError
from eddyline.generations import KafkaStepRanges
from eddyline.kafka import producers, topics
from eddyline.kafka.producers import now_ms
from eddyline.schema.events import UserProfile, shifted_to_now
from eddyline.schema.step_ranges import FOREVER, StepRanges
from eddyline.settings.loader import Settings
from eddyline.stores.memory import MemoryStore
from eddyline.stores.redis import RedisStore
from embeddings.bundle import bundle as bundles
from streams.operations import state_replay, topic_slices

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def logs(servers, dataset, bundle, tmp_path_factory) -> Iterator[Settings]:
    """Topics that nobody else reads: items, a delete, profiles, clicks, re-sends, nonsense."""
    folder, manifest = bundle
    settings = msgspec.structs.replace(
        servers,
        namespace=f"t-{uuid.uuid4().hex[:12]}",
        bundle_dir=str(folder),
        data_dir=str(tmp_path_factory.mktemp("replay")),
        chunk_records_max=64,
        path_state="all",
        history_length_max=8,
    )
    topics.ensure_topics(settings)
    generations.publish(settings, manifest)
    clicks = shifted_to_now(dataset.clicks, now_ms())[-2_500:]
    sending.send(settings, [*dataset.items[:120], *clicks[:1_500]])
    producer = producers.make_producer(settings)
    profiled = clicks[0].user_id
    gone = next(c.user_id for c in clicks if c.user_id != profiled)
    producers.send_profile(
        producer, settings, UserProfile(user_id=profiled, attributes={"b": 1, "a": "x"})
    )
    producers.send_forget(producer, settings, gone)
    producers.send_delete(producer, settings, dataset.items[0].item_id)
    for partition in range(4):
        producer.send(settings.prefixed(topics.CLICKS), b"{", key=b"x", partition=partition)
    producer.flush(timeout=10)
    producer.close(timeout=5)
    time.sleep(0.02)
    sending.send(settings, [*clicks[1_300:], *dataset.items[5:40]])
    yield settings


def replayed(settings: Settings, store, chunk: int, begin: str = "earliest", end: str = "latest"):
    towers = bundles.load(settings.bundles / "1")
    return state_replay.replay(
        settings, store, topic_slices.between(settings, begin, end), towers, chunk
    )


def test_one_slice_one_hash_in_both_stores_whatever_the_chunks(logs) -> None:
    first = replayed(logs, MemoryStore(), 256)
    assert replayed(logs, MemoryStore(), 7).hash == first.hash
    with state_replay.temporary_store(logs, "redis") as store:
        assert replayed(logs, store, 97).hash == first.hash
    totals = {name: outcome.counts() for name, outcome in first.outcomes.items()}
    assert totals["clicks"]["applied"] == 2_500 and totals["clicks"]["duplicates"] == 200
    assert totals["clicks"]["rejected"] == 4 and totals["clicks"]["steps"] > 500
    assert totals["items"]["applied"] == 156 and totals["users"]["applied"] == 2


def test_micro_steps_are_taken_where_they_are_recorded(logs) -> None:
    """Ingest loaded the generation in the middle of the log: no earlier event taught it."""
    everywhere = replayed(logs, MemoryStore(), 256)
    ends = topics.end_offsets(logs, topics.CLICKS)
    log = str(topics.log_ids(logs, [topics.CLICKS])[topics.CLICKS])
    manifest = generations.active_generation(logs)
    producer = producers.make_producer(logs)
    recorded = KafkaStepRanges(logs, producer)

    def counted(first: dict[int, int]) -> int:
        """Events counted by a replay, where steps begin at these offsets."""
        recorded.write({("1", p): StepRanges(log, ((at, FOREVER),)) for p, at in first.items()})
        store = MemoryStore()
        assert replayed(logs, store, 97).hash != everywhere.hash or not any(first.values())
        return sum(steps for steps, _ in store.snapshot().embeddings.values())

    try:
        assert counted(dict.fromkeys(ends, 0)) == counted(dict.fromkeys(ends, 0)) > 0
        half = counted({p: end // 2 for p, end in ends.items()})
        later = counted({p: end * 3 // 4 for p, end in ends.items()})
        assert 0 == counted(ends) < later < half < counted(dict.fromkeys(ends, 0))
    finally:
        generations.clear_records(logs, ["1"])
        generations.publish(logs, manifest)
        producer.close(timeout=5)


def test_what_is_in_the_state_is_in_the_hash(logs) -> None:
    store = MemoryStore()
    done = replayed(logs, store, 256)
    before = store.snapshot()
    changes = {
        "behaviours": lambda s: s.histories.popitem(),
        "seen items": lambda s: s.seen.popitem(),
        "embeddings": lambda s: s.embeddings.popitem(),
        "window": lambda s: next(iter(s.window.values())).popitem(),
        "profiles": lambda s: s.profiles.popitem(),
        "buckets": lambda s: next(iter(s.buckets["i0"].values())).popitem(),
        "co-visits": lambda s: s.rows.popitem(),
        "cards": lambda s: s.items.popitem(),
        "fences": lambda s: s.fences.popitem(),
    }
    for name, change in changes.items():
        state = store.snapshot()
        change(state)
        store.restore(state)
        assert state_replay.state_hash(logs, store, done, "1") != done.hash, name
        store.restore(before)
        assert state_replay.state_hash(logs, store, done, "1") == done.hash
    (user, (steps, vector)), *_ = store.snapshot().embeddings.items()
    state = store.snapshot()
    state.embeddings[user] = (steps, vector[:-1] + bytes([vector[-1] ^ 1]))
    store.restore(state)
    assert state_replay.state_hash(logs, store, done, "1") != done.hash, "a single bit"


def test_a_slice_by_offsets_and_by_time(logs) -> None:
    ends = topics.end_offsets(logs, topics.CLICKS)
    upto = ",".join(f"clicks:{p}={end - 10}" for p, end in ends.items())
    short = replayed(logs, MemoryStore(), 50, "clicks:0=5", upto)
    assert short.outcomes["clicks"].records == sum(ends.values()) - 5 - 10 * len(ends)
    assert short.outcomes["items"].records == 0, "topics that an end does not name are left out"
    assert replayed(logs, MemoryStore(), 3, "clicks:0=5", upto).hash == short.hash
    whole = replayed(logs, MemoryStore(), 256).hash
    assert (
        replayed(logs, MemoryStore(), 256, "0", str(now_ms() + 60_000)).hash == whole != short.hash
    )
    assert replayed(logs, MemoryStore(), 256, "2020-01-01T00:00:00").hash == whole
    assert replayed(logs, MemoryStore(), 256, "latest").outcomes["clicks"].records == 0


@pytest.mark.parametrize(
    "text", ["yesterday", "clicks:0", "clicks:x=1", "clicks:99=1", "letters:0=1"]
)
def test_a_bound_that_is_none_is_a_sentence(logs, text: str) -> None:
    with pytest.raises(SettingsError, match="--from"):
        topic_slices.between(logs, text, "latest")


def test_the_command_prints_the_hash_and_leaves_nothing_in_redis(logs) -> None:
    env = {
        f"EDDYLINE_{name.upper()}": str(getattr(logs, name))
        for name in (
            "kafka_bootstrap_servers",
            "redis_url",
            "namespace",
            "data_dir",
            "bundle_dir",
            "clicks_partitions",
            "items_partitions",
            "chunk_records_max",
            "path_state",
            "history_length_max",
        )
    }
    argv = [sys.executable, "-m", "cli", "replay", "--into", "redis", "--chunk", "500"]
    done = subprocess.run(argv, env=os.environ | env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"state {replayed(logs, MemoryStore(), 256).hash}" in done.stdout
    with redis.Redis.from_url(logs.redis_url) as client:
        assert list(client.scan_iter(match=f"*{logs.namespace}*")) == []
    argv = [*argv[:4], "--into", "disk"]
    wrong = subprocess.run(argv, env=os.environ | env, capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 2 and "expected memory or redis" in wrong.stderr


@pytest.mark.long
def test_two_ingest_processes_come_to_the_same_state(make_live) -> None:
    live = make_live(with_worker=False)
    shared = {"clicks_partitions": "4", "items_partitions": "2"}
    live.supervisor.start(live.deployment.ingest_child("ingest-2", **shared))
    live.wait_for("the second process to read", lambda: live.reads_clicks("ingest-2"), timeout_s=30)
    clicks = shifted_to_now(live.dataset.clicks, now_ms())
    sending.send(live.settings, clicks)
    live.applied()
    done = replayed(live.settings, MemoryStore(), 256)
    store = RedisStore(live.settings)
    try:
        assert state_replay.state_hash(live.settings, store, done, "1") == done.hash
    finally:
        store.close()
