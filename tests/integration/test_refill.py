"""`eddyline refill`: records that Kafka removed come from the archive, to the same bits."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
from kafka import KafkaAdminClient, TopicPartition

from cli.commands import refill as commands_refill
from cli.commands import replay_file as sending
from eddyline import generations
from eddyline.archive import Archive
from eddyline.errors import EddylineError, LogMismatch
from eddyline.kafka import clients, producers, topics
from eddyline.kafka.producers import now_ms
from eddyline.kafka.topics import CLICKS, USERS
from eddyline.schema import events
from eddyline.schema.erasure import digest
from eddyline.schema.events import KINDS, Click, Merge, UserProfile
from eddyline.schema.partitioning import partition_of
from eddyline.schema.step_ranges import FOREVER
from eddyline.settings.loader import Settings
from eddyline.stores.memory import MemoryStore
from eddyline.stores.redis import RedisStore
from embeddings.bundle import bundle as bundles
from sandbox import processes
from streams.clicks.step_ranges import FixedStepRanges
from streams.operations import refill, retention_gaps, state_replay, topic_slices
from tests.archiving import archive_all

pytestmark = pytest.mark.timeout(240)
WANTED = (
    "kafka_bootstrap_servers",
    "redis_url",
    "namespace",
    "data_dir",
    "bundle_dir",
    "clicks_partitions",
    "items_partitions",
    "chunk_records_max",
    "dedupe_window_events",
    "archive_file_offsets",
)


@pytest.fixture
def settings(fresh_settings: Settings, dataset: Any, bundle: Any) -> Settings:
    folder, manifest = bundle
    made = msgspec.structs.replace(
        fresh_settings,
        bundle_dir=str(folder),
        chunk_records_max=64,
        dedupe_window_events=600,
        archive_file_offsets=300,
    )
    topics.ensure_topics(made)
    generations.publish(made, manifest)
    sending.send(made, dataset.items[:120])
    return made


def environment(settings: Settings) -> dict[str, str]:
    return os.environ | {
        f"EDDYLINE_{name.upper()}": str(getattr(settings, name)) for name in WANTED
    }


def command(settings: Settings, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "cli", *words]
    return subprocess.run(
        argv, env=environment(settings), capture_output=True, text=True, timeout=60
    )


@contextmanager
def ingesting(settings: Settings) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "-m", "cli", "ingest"]
    child = subprocess.Popen(argv, env=environment(settings), stderr=subprocess.PIPE, text=True)
    try:
        yield child
    finally:
        child.terminate()
        child.communicate(timeout=20)


def applied(settings: Settings) -> None:
    """Wait until ingest has applied all records, including those that it forwards."""
    for _ in range(3):
        processes.wait_until_applied(settings, timeout_s=30)
        before = topics.end_offsets(settings, CLICKS)
        time.sleep(0.3)
        if topics.end_offsets(settings, CLICKS) == before:
            return


def send_behaviour(
    settings: Settings,
    items: list[str],
    seed: int,
    n: int = 1_200,
    forwarded: bool = False,
    without: str = "",
) -> None:
    """Clicks of every kind: sent again, without an id, refused, in a wrong partition; visitors who
    log in. without: a user who sends none
    """
    rng, producer = random.Random(seed), producers.make_producer(settings, linger_ms=5)
    start_ms, topic = now_ms() - 3_600_000, settings.prefixed(CLICKS)
    for number in range(n):
        user, draw = f"user-{rng.randrange(40)}", rng.random()
        if user == without:
            continue
        event_id = (
            None if draw < 0.1 else f"{seed}-{number - rng.randrange(9) if draw < 0.3 else number}"
        )
        click = Click(
            user_id=user,
            item_id=rng.choice(items),
            at_ms=start_ms + number * 1_000 - rng.randrange(5_000),
            event_id=event_id,
            kind=rng.choice(KINDS),
            weight=rng.choice([1.0, 2.5]),
            context={"page": number} if draw < 0.5 else None,
        )
        producers.send_click(producer, settings, click)
        if draw < 0.03:
            producer.send(topic, b"{", key=user.encode())
        if forwarded and draw < 0.03:
            producer.send(topic, events.encode(click), partition=rng.randrange(4))
        if forwarded and draw > 0.98:
            into = f"user-{rng.randrange(40)}"
            if into != user:
                merge = Merge(user_id=user, merge_into=into, at_ms=click.at_ms)
                producers.send_merge(producer, settings, merge)
    producer.flush(timeout=20)
    producer.close(timeout=5)


def send_clicks(settings: Settings, *clicks: Click) -> None:
    producer = producers.make_producer(settings)
    for click in clicks:
        producers.send_click(producer, settings, click)
    producer.flush(timeout=10)
    producer.close(timeout=5)


def send_profiles(settings: Settings, age: int) -> None:
    producer = producers.make_producer(settings)
    for number in range(0, 40, 3):
        profile = UserProfile(user_id=f"user-{number}", attributes={"age": age + number})
        producers.send_profile(producer, settings, profile)
    producer.flush(timeout=10)
    producer.close(timeout=5)


def forget(settings: Settings, user: str) -> None:
    producer = producers.make_producer(settings)
    producers.send_forget(producer, settings, user).get(timeout=10)
    producer.close(timeout=5)


def retention(settings: Settings, share: float) -> dict[int, int]:
    """Remove this share of every partition's clicks from Kafka; returns the new first offsets."""
    topic = settings.prefixed(CLICKS)
    begins = {p: round(end * share) for p, end in topics.end_offsets(settings, CLICKS).items()}
    admin = KafkaAdminClient(**clients.client_options(settings))
    try:
        admin.delete_records({TopicPartition(topic, p): begin for p, begin in begins.items()})
    finally:
        admin.close()
    assert topics.beginning_offsets(settings, CLICKS) == begins
    return begins


def keys(settings: Settings) -> dict[bytes, bytes]:
    with redis.Redis.from_url(settings.redis_url) as client:
        return {
            key: client.dump(key)
            for key in client.scan_iter(match=f"{settings.namespace}:*", count=999)
        }


def put_back(settings: Settings, copy: dict[bytes, bytes]) -> None:
    """Restore Redis from the copy; an empty copy empties Redis."""
    with redis.Redis.from_url(settings.redis_url) as client:
        for key in client.scan_iter(match=f"{settings.namespace}:*", count=999):
            client.delete(key)
        for key, value in copy.items():
            client.restore(key, 0, value)


def truth(settings: Settings, generation: str = "1") -> state_replay.ReplayResult:
    """The state that ingest's functions compute in memory, while Kafka still has every record."""
    towers, slices = (
        bundles.load(settings.bundles / generation),
        topic_slices.between(settings, "earliest", "latest"),
    )
    return state_replay.replay(settings, MemoryStore(), slices, towers, 97)


def state(settings: Settings, touched: state_replay.ReplayResult, generation: str = "1") -> str:
    store = RedisStore(settings)
    try:
        return state_replay.state_hash(settings, store, touched, generation)
    finally:
        store.close()


def replay_into_redis(settings: Settings) -> None:
    towers, slices = (
        bundles.load(settings.bundles / "1"),
        topic_slices.between(settings, "earliest", "latest"),
    )
    store = RedisStore(settings)
    try:
        state_replay.replay(settings, store, slices, towers, 64)
    finally:
        store.close()


def test_an_emptied_redis_is_filled_from_the_archive_to_the_same_bits(
    settings: Settings, dataset: Any
) -> None:
    items = [item.item_id for item in dataset.items[:110]]
    with ingesting(settings):
        send_profiles(settings, 20)
        applied(settings)
        send_behaviour(settings, items, seed=1, forwarded=True)
        applied(settings)
        send_profiles(settings, 50)
        applied(settings)
        send_behaviour(settings, items, seed=2)
        applied(settings)
        with pytest.raises(EddylineError, match="1 ingest processes"):
            refill.run(settings, skip_lost=False)
    touched, ends = truth(settings), topics.end_offsets(settings, CLICKS)
    assert touched.outcomes[CLICKS].forwarded > 20 and touched.outcomes[CLICKS].rejected > 20
    assert touched.outcomes[CLICKS].duplicates > 50 and touched.outcomes[CLICKS].steps > 500
    assert state(settings, touched) == touched.hash, "the live state is the topics'"
    archive_all(settings)
    # Nothing of what Kafka still has is to be forwarded: ingest would, as after any emptied Redis.
    begins = retention(settings, 0.7)
    put_back(settings, {})

    with ingesting(settings) as refused:
        _, errors = refused.communicate(timeout=40)
    assert refused.returncode == 3, errors
    assert "`eddyline refill`" in errors
    assert any(f"removed offsets 0 to {begin - 1}" in errors for begin in begins.values())

    class Killed(Exception):
        pass

    first = begins[0]
    passed = 0
    store = RedisStore(settings)
    try:  # a refill that is killed half-way
        log = topics.log_ids(settings, [CLICKS])[CLICKS]
        found = retention_gaps.find(settings, store, log)
        assert (found[0].partition, found[0].first, found[0].last) == (0, 0, first - 1)
        sinks: Any = refill.RefillSinks(forwarder=None)  # type: ignore[arg-type]
        towers, steps = bundles.load(settings.bundles / "1"), FixedStepRanges()
        filler = refill.GapFiller(settings, Archive(settings), store, towers, ["1"], sinks, steps)
        with pytest.raises(Killed):
            for offsets in filler.fill(found[0]):
                passed += offsets
                if passed > first // 2:
                    raise Killed
        users = store.fences(retention_gaps.Source(CLICKS, 0), ["u0"])["u0"]
        assert users is not None and first // 2 < users.offset < first, (
            "the counts are further behind"
        )
    finally:
        store.close()

    done = command(settings, "refill")
    assert done.returncode == 0, done.stderr
    assert (
        "sent on" not in done.stdout
        and "refused" not in done.stdout
        and "sent again" not in done.stdout
    )
    assert "nothing is missing" in command(settings, "refill").stdout
    with ingesting(settings):
        applied(settings)
    assert topics.end_offsets(settings, CLICKS) == ends, "nothing was sent a second time"
    assert state(settings, touched) == touched.hash, (
        "lists, embeddings, windows, profiles, counters, fences"
    )


def kept_erasures(settings: Settings) -> dict[str, bytes | None]:
    """The erasures in Redis by key, without their expiry times."""
    with redis.Redis.from_url(settings.redis_url) as client:
        match = f"{settings.key_prefix}{{u*}}:f:*"
        return {key.decode(): client.get(key) for key in client.scan_iter(match=match, count=999)}


def second_generation(settings: Settings, folder: Path) -> Settings:
    """The towers of generation 1 as generation 2, published and active."""
    shutil.copytree(settings.bundles / "1", folder / "1")
    shutil.copytree(settings.bundles / "1", folder / "2")
    file = folder / "2" / "manifest.json"
    content = file.read_text(encoding="utf-8")
    again = content.replace('"generation": "1"', '"generation": "2"')
    assert again != content
    file.write_text(again, encoding="utf-8")
    checksum = f"{hashlib.sha256(again.encode()).hexdigest()}  {file.name}\n"
    (folder / "2" / "manifest.sha256").write_text(checksum, encoding="utf-8")
    made = msgspec.structs.replace(settings, bundle_dir=str(folder))
    second = generations.Manifest(generation="2", bundle="2", dimension=64, created_ms=now_ms())
    generations.publish(made, second)
    return made


@pytest.mark.parametrize(
    "share",
    [pytest.param(0.3, marks=pytest.mark.long), 0.7],
    ids=["begin in Kafka", "begin in the archive"],
)
def test_a_generation_that_began_in_the_middle_is_filled_to_the_same_bits(
    settings: Settings, dataset: Any, tmp_path: Path, share: float
) -> None:
    items = [item.item_id for item in dataset.items[:110]]
    with ingesting(settings):
        send_behaviour(settings, items, seed=1)
        applied(settings)
    began = topics.end_offsets(settings, CLICKS)
    settings = second_generation(settings, tmp_path)
    with ingesting(settings):
        applied(settings)
        send_behaviour(settings, items, seed=2)
        applied(settings)
    recorded = generations.step_ranges(settings)
    assert {key: found.ranges for key, found in recorded.items()} == {
        **{("1", p): ((0, first),) for p, first in began.items()},
        **{("2", p): ((first, FOREVER),) for p, first in began.items()},
    }
    touched = truth(settings, "2")
    assert 100 < touched.outcomes[CLICKS].steps < 1_400
    assert state(settings, touched, "2") == touched.hash, "the live state is the topics'"

    archive_all(settings)
    retention(settings, share)
    put_back(settings, {})
    done = command(settings, "refill")
    assert done.returncode == 0, done.stderr
    with ingesting(settings):
        applied(settings)
    assert state(settings, touched, "2") == touched.hash, "after refill and ingest"
    assert generations.step_ranges(settings)["2", 0] == recorded["2", 0]


@pytest.mark.long
def test_an_older_copy_is_filled_and_who_was_forgotten_since_goes(
    settings: Settings, dataset: Any
) -> None:
    """Includes a user of whom Redis and the archive hold only the hash."""
    items = [item.item_id for item in dataset.items[:110]]
    gone, unknown, begun_ms = "user-3", "never-seen", now_ms()
    send_profiles(settings, 20)
    send_behaviour(settings, items, seed=3, n=600)
    replay_into_redis(settings)
    older = keys(settings)
    assert [key for key in older if b":h:user-3" in key or b":p:user-3" in key]
    with ingesting(settings):
        applied(settings)
        forget(settings, gone)
        forget(settings, unknown)
        applied(settings)
        send_clicks(settings, Click(user_id=gone, item_id=items[0], at_ms=now_ms() + 1))
        send_behaviour(settings, items, seed=4, n=600, without=gone)
        applied(settings)
        # Events of an offline buffer; Kafka still has them when Redis is filled.
        late = [
            Click(user_id=user, item_id=items[1], at_ms=begun_ms - n, event_id=f"{user}-{n}")
            for user in (gone, unknown)
            for n in range(3)
        ]
        send_clicks(settings, *late)
        applied(settings)
    expected, erasures = truth(settings), kept_erasures(settings)
    assert expected.outcomes[CLICKS].forgotten == len(late) and len(erasures) == 2
    assert state(settings, expected) == expected.hash
    archive_all(settings)
    retention(settings, 0.9)
    put_back(settings, older)
    refill.run(settings, skip_lost=False)
    assert kept_erasures(settings) == erasures
    with ingesting(settings):
        applied(settings)
    assert state(settings, expected) == expected.hash
    store = RedisStore(settings)
    try:
        for user, listed in ((gone, items[:1]), (unknown, [])):
            found = store.read_user(f"u{partition_of(user, 4)}", partition_of(user, 4), user, "1")
            assert found.profile == {}
            assert [entry.item_id for entry in found.history.entries] == listed
    finally:
        store.close()


def test_a_null_record_that_no_ingest_has_applied_becomes_a_forget(
    settings: Settings, dataset: Any
) -> None:
    """Refill moves the fence of `users` past the null record, so ingest never reads it."""
    items, gone = [item.item_id for item in dataset.items[:110]], "user-3"
    partition = partition_of(gone, 4)
    send_profiles(settings, 20)
    send_behaviour(settings, items, seed=3, n=300)
    time.sleep(0.01)
    forget(settings, gone)
    time.sleep(0.01)
    send_behaviour(settings, items, seed=4, n=300, without=gone)
    send_clicks(settings, Click(user_id=gone, item_id=items[1], at_ms=now_ms() - 60_000))
    archive_all(settings)
    ends = topics.end_offsets(settings, CLICKS)
    retention(settings, 0.9)
    refill.run(settings, skip_lost=False)
    after = topics.end_offsets(settings, CLICKS)
    assert after == ends | {partition: ends[partition] + 1}
    with ingesting(settings):
        applied(settings)
    store = RedisStore(settings)
    try:
        mine = store.read_user(f"u{partition}", partition, gone, "1")
        assert mine.profile == {} and mine.history.entries == ()
    finally:
        store.close()
    assert topics.end_offsets(settings, CLICKS) == after
    assert [key[-64:] for key in kept_erasures(settings)] == [digest(gone)]


@pytest.mark.parametrize("lost", [False, True])
def test_a_marker_that_expired_before_ingest_passed_it_is_not_lacking(
    settings: Settings, dataset: Any, lost: bool
) -> None:
    """lost: the archive did not run; the offset may have been a record."""
    click = Click(user_id="ana", item_id=dataset.items[0].item_id, at_ms=now_ms())
    partition, name = partition_of("ana", 4), settings.prefixed(CLICKS)
    producer = producers.make_producer(settings, transactional_id=settings.prefixed("once"))
    producer.init_transactions()
    producer.begin_transaction()
    producer.send(name, events.encode(click), key=b"ana", partition=partition)
    producer.commit_transaction()
    producer.close(timeout=5)
    replay_into_redis(settings)
    if not lost:
        archive_all(settings)
    admin = KafkaAdminClient(**clients.client_options(settings))
    try:
        admin.delete_records({TopicPartition(name, partition): 2})
    finally:
        admin.close()
    if lost:
        with pytest.raises(LogMismatch, match=f"lacks 1: clicks/{partition} offsets 1 to 1"):
            refill.run(settings, skip_lost=False)
        archive_all(settings)  # too late: it begins after the marker
        with pytest.raises(LogMismatch, match="lacks 1"):
            refill.run(settings, skip_lost=False)
        return
    report = refill.run(settings, skip_lost=False)
    assert [(gap.first, gap.last) for gap in report.gaps] == [(1, 1)] and report.lost == ""
    assert refill.run(settings, skip_lost=False).gaps == []


def test_what_the_archive_lacks_is_named_and_given_up_only_when_asked(
    settings: Settings, dataset: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    items = [item.item_id for item in dataset.items[:110]]
    send_behaviour(settings, items, seed=5, n=400, forwarded=True)
    archive_all(settings)
    ends = topics.end_offsets(settings, CLICKS)
    send_behaviour(settings, items, seed=6, n=400)
    begins = retention(settings, 0.9)
    with pytest.raises(LogMismatch) as refused:
        refill.run(settings, skip_lost=False)
    for p in range(4):
        assert f"clicks/{p} offsets {ends[p]} to {begins[p] - 1}" in str(refused.value)
    assert "Nothing was applied" in str(refused.value) and keys(settings).keys() == {
        f"{settings.namespace}:layout".encode()
    }
    before = topics.end_offsets(settings, CLICKS)
    commands_refill.refill(settings, skip_lost=True)
    # No ingest was ever here, so nothing that a merge moves has been sent on: this time it is.
    sent = sum(topics.end_offsets(settings, CLICKS).values()) - sum(before.values())
    assert sent > 5 and f"of merges: {sent} events sent on" in capsys.readouterr().out
    store = RedisStore(settings)
    try:
        assert (
            retention_gaps.find(settings, store, topics.log_ids(settings, [CLICKS])[CLICKS]) == []
        )
        rows = sum(1 for _ in Archive(settings).read(CLICKS))
        window = sum(
            len(store.read_slot(f"u{p}", retention_gaps.Source(CLICKS, p)).accepted)
            for p in range(4)
        )
        assert 0 < window <= rows
    finally:
        store.close()


def test_a_first_start_on_an_old_topic_is_refused_until_it_is_accepted(
    settings: Settings, dataset: Any
) -> None:
    items = [item.item_id for item in dataset.items[:110]]
    send_behaviour(settings, items, seed=7, n=300)
    begins = retention(settings, 0.5)
    lacks = command(settings, "refill")
    assert lacks.returncode == 3 and f"clicks/0 offsets 0 to {begins[0] - 1}" in lacks.stderr
    accepted = command(settings, "accept-log", "--yes", "--skip-lost")
    assert accepted.returncode == 0, accepted.stderr
    assert f"given up: clicks/0 offsets 0 to {begins[0] - 1}" in accepted.stdout
    with ingesting(settings) as child:
        applied(settings)
        # Now it is running, is held up, and retention overtakes it.
        child.send_signal(signal.SIGSTOP)
        send_behaviour(settings, items, seed=8, n=50)
        send_behaviour(settings, items, seed=9, n=300)
        retention(settings, 1.0)
        child.send_signal(signal.SIGCONT)
        _, errors = child.communicate(timeout=40)
    assert child.returncode == 3 and "Kafka's retention removed offsets" in errors


def test_an_archive_of_another_log_is_refused(
    settings: Settings, dataset: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    send_behaviour(settings, [dataset.items[0].item_id], seed=10, n=100)
    archive_all(settings)
    retention(settings, 1.0)
    monkeypatch.setattr(Archive, "log_id", lambda *_: None)
    with pytest.raises(LogMismatch, match="is not of this log"):
        refill.run(settings, skip_lost=False)
    assert USERS == "users"
