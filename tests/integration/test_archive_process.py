"""The archive process on a real Kafka: every accepted event once, through any kill."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pandas as pd
import pytest
from kafka import KafkaAdminClient, TopicPartition
from rich.progress import Progress

from eddyline.archive import Archive
from eddyline.errors import KafkaUnavailable, LogMismatch
from eddyline.kafka import clients, producers, topics
from eddyline.kafka.producers import now_ms
from eddyline.process import heartbeat
from eddyline.schema import events
from eddyline.schema.events import Click, Item, UserProfile
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import LogId
from embeddings.data import sources
from embeddings.data.examples import TrainingData
from embeddings.training import __main__ as trainer
from streams import static_membership
from streams.archive import archiver as archive_archiver
from streams.archive.archiver import Archiver
from tests.archiving import archive_all

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def settings(fresh_settings: Settings) -> Settings:
    made = msgspec.structs.replace(
        fresh_settings, archive_file_offsets=300, dedupe_window_events=600
    )
    topics.ensure_topics(made)
    return made


def send(settings: Settings, clicks: int, seed: int) -> None:
    """Clicks with re-sends, refused and stray ones, items with deletes, profiles."""
    rng, producer = random.Random(seed), producers.make_producer(settings, linger_ms=5)
    for n in range(clicks):
        user = f"user-{rng.randrange(40)}"
        event_id = f"{seed}-{n - rng.randrange(5) if rng.random() < 0.2 else n}"
        click = Click(user_id=user, item_id=f"i{n % 50}", at_ms=now_ms(), event_id=event_id)
        producers.send_click(producer, settings, click)
        if rng.random() < 0.02:
            producer.send(settings.prefixed(topics.CLICKS), b"{", key=user.encode())
            producer.send(
                settings.prefixed(topics.CLICKS), events.encode(click), partition=rng.randrange(4)
            )
    for n in range(100):
        producers.send_item(producer, settings, Item(item_id=f"i{n}", title=f"t{n}", at_ms=n))
    producers.send_delete(producer, settings, "i7")
    producers.send_profile(producer, settings, UserProfile(user_id="user-3", attributes={"age": 3}))
    producer.flush(timeout=20)
    producer.close(timeout=5)


def contents(settings: Settings) -> dict[str, bytes]:
    archive = Archive(settings)
    return {
        file.path.removeprefix(archive.root): Path(file.path).read_bytes()
        for name in topics.SOURCES
        for file in archive.files(name)
    }


def environment(settings: Settings) -> dict[str, str]:
    names = (
        "kafka_bootstrap_servers",
        "redis_url",
        "namespace",
        "data_dir",
        "archive_file_offsets",
        "dedupe_window_events",
        "clicks_partitions",
        "items_partitions",
        "kafka_timeout_ms",
    )
    env = {f"EDDYLINE_{name.upper()}": str(getattr(settings, name)) for name in names}
    return os.environ | env | {"EDDYLINE_BACKOFF_MS_MAX": "200"}


def start(settings: Settings) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", "cli", "archive"]
    return subprocess.Popen(argv, env=environment(settings), stderr=subprocess.PIPE)


def wait_for(check: Callable[[], Any], timeout_s: float = 100) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_killed_again_and_again_it_writes_what_one_run_writes(settings: Settings) -> None:
    send(settings, 4_000, seed=1)
    for turn in range(2):
        child, before = start(settings), len(contents(settings))
        try:
            wait_for(lambda before=before: len(contents(settings)) >= before + 2)
            assert child.poll() is None, "it is killed while it writes"
            time.sleep(0.01 * turn)
        finally:
            child.send_signal(signal.SIGKILL)
            child.communicate(timeout=10)
        if turn == 0:
            send(settings, 2_000, seed=2)
    archive_all(settings)
    once = msgspec.structs.replace(settings, archive_url=str(Path(settings.data_dir) / "once"))
    archive_all(once)
    assert contents(settings) == contents(once) and len(contents(once)) > 15
    mine, truth = sources.from_archive(settings), sources.from_kafka(settings)
    assert mine.clicks == truth.clicks and len(truth.clicks) > 4_000
    assert mine.items == truth.items and mine.versions == truth.versions and mine.cut == truth.cut
    assert mine.profiles == truth.profiles == {"user-3": {"age": 3}}
    assert sum(mine.rejected.values()) < sum(truth.rejected.values()), (
        "it holds accepted events only"
    )


def test_what_is_in_no_file_yet_comes_from_kafka(settings: Settings) -> None:
    send(settings, 1_500, seed=3)
    archive_all(settings, ahead_ms=0)
    in_files = sum(1 for _ in Archive(settings).read(topics.CLICKS))
    mine, truth = sources.from_archive(settings), sources.from_kafka(settings)
    assert 0 < in_files < len(truth.clicks) and mine.clicks == truth.clicks
    assert mine.items == truth.items and mine.profiles == truth.profiles


def test_training_takes_from_the_archive_what_kafka_no_longer_has(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(settings, 900, seed=11)
    archive_all(settings)
    ends = {p: end + 1 for p, end in Archive(settings).ends(topics.CLICKS).items()}
    send(settings, 300, seed=12)
    truth = sources.from_kafka(settings)
    admin = KafkaAdminClient(**clients.client_options(settings))
    try:
        topic = settings.prefixed(topics.CLICKS)
        admin.delete_records({TopicPartition(topic, p): end for p, end in ends.items()})
    finally:
        admin.close()

    def read(settings: Settings, *words: str) -> TrainingData:
        return trainer._read(settings, trainer._arguments([*words]), Progress(disable=True))

    mine = read(settings, "--archive")
    assert (mine.clicks, mine.items, mine.profiles) == (truth.clicks, truth.items, truth.profiles)
    assert (mine.versions, mine.cut) == (truth.versions, truth.cut)
    setting = msgspec.structs.replace(settings, train_from="archive")
    assert read(setting).clicks == truth.clicks
    rest = read(setting, "--no-archive").clicks
    assert rest == read(settings).clicks and 200 < len(rest) <= 300 < len(truth.clicks)
    monkeypatch.setattr(topics, "log_ids", lambda _, names: {n: LogId("c", "new") for n in names})
    with pytest.raises(LogMismatch, match="--no-archive"):
        read(settings, "--archive")


def test_a_null_record_takes_the_user_out_of_every_file(settings: Settings) -> None:
    send(settings, 1_500, seed=4)
    archive_all(settings)
    producer = producers.make_producer(settings)
    producers.send_forget(producer, settings, "user-3").get(timeout=10)
    time.sleep(0.01)
    again = Click(user_id="user-3", item_id="i1", at_ms=now_ms(), event_id="later")
    producers.send_click(producer, settings, again).get(timeout=10)
    producer.close(timeout=5)
    archive_all(settings)
    archive, rows = Archive(settings), []
    for name in (topics.CLICKS, topics.USERS):
        for file in archive.files(name):
            frame = pd.read_parquet(file.path)
            rows.append(frame[frame["user_id"] == "user-3"])
    assert list(pd.concat(rows)["event_id"]) == ["later"], "later events stay"


def test_the_command_rewrites_every_file_of_a_user(settings: Settings) -> None:
    send(settings, 1_200, seed=7)
    archive_all(settings)
    archive = Archive(settings)
    before = [e for e in archive.read(topics.CLICKS) if e.key != "user-5"]
    assert len(before) < sum(1 for _ in archive.read(topics.CLICKS))
    done = subprocess.run(
        [sys.executable, "-m", "cli", "archive", "forget", " user-5\u2003"],
        env=environment(settings),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and "rows removed" in done.stdout, done.stderr
    assert list(archive.read(topics.CLICKS)) == before
    assert not [path for path, raw in contents(settings).items() if b"user-5" in raw]


def test_topics_that_a_broker_shows_later_are_read(
    fresh_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The group was made when nothing was known of them: it has no partitions at first."""
    monkeypatch.setattr(archive_archiver, "_TOPICS_S", 0.2)
    stop = threading.Event()
    one = Archiver(fresh_settings, Archive(fresh_settings), stop, "archiver-0")
    thread = threading.Thread(target=one.run_once, daemon=True)
    thread.start()
    try:
        wait_for(lambda: one._consumer is not None)
        time.sleep(1.0)
        topics.ensure_topics(fresh_settings)
        send(fresh_settings, 2_000, seed=8)
        wait_for(lambda: one.rows, timeout_s=40)
    finally:
        stop.set()
        thread.join(timeout=20)


def test_two_processes_share_the_partitions(settings: Settings) -> None:
    stop, failed = threading.Event(), []

    def run() -> None:
        member = static_membership.take(Path(settings.data_dir) / "archiver")
        try:
            Archiver(settings, Archive(settings), stop, member.name).run_once()
        except Exception as error:
            failed.append(error)
        finally:
            member.close()

    threads = [threading.Thread(target=run) for _ in range(2)]
    try:
        threads[0].start()
        send(settings, 2_000, seed=8)
        wait_for(lambda: len(contents(settings)) >= 2 or failed)
        threads[1].start()
        send(settings, 2_000, seed=9)
        wait_for(lambda: len(contents(settings)) >= 9 or failed)
    finally:
        stop.set()
        for thread in filter(threading.Thread.is_alive, threads):
            thread.join(timeout=20)
    assert not failed
    archive_all(settings)
    once = msgspec.structs.replace(settings, archive_url=str(Path(settings.data_dir) / "once"))
    archive_all(once)
    assert contents(settings) == contents(once)


def test_the_group_says_how_far_the_archive_is(settings: Settings) -> None:
    send(settings, 500, seed=5)
    archive_all(settings)
    from kafka import KafkaConsumer

    group = settings.prefixed(archive_archiver.GROUP)
    consumer = KafkaConsumer(**clients.client_options(settings), group_id=group)
    try:
        at = {
            p: consumer.committed(TopicPartition(settings.prefixed(topics.CLICKS), p)) or 0
            for p in range(4)
        }
    finally:
        consumer.close()
    assert at == {p: end + 1 for p, end in Archive(settings).ends(topics.CLICKS).items()}


def test_files_of_another_log_are_refused(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(settings, 300, seed=6)
    archive_all(settings)
    before = contents(settings)
    monkeypatch.setattr(topics, "log_ids", lambda _, names: {n: LogId("c", "new") for n in names})
    with pytest.raises(LogMismatch, match=r"EDDYLINE_ARCHIVE_URL"):
        archive_all(settings)
    assert contents(settings) == before


def test_without_kafka_it_waits_and_stops_when_told(fresh_settings: Settings) -> None:
    settings = msgspec.structs.replace(
        fresh_settings, kafka_bootstrap_servers="127.0.0.1:1", kafka_timeout_ms=300
    )
    with pytest.raises(KafkaUnavailable):
        archive_all(settings)
    child = start(settings)
    try:
        wait_for(lambda: heartbeat.last_beat_s(settings, "archive") is not None)
        assert child.poll() is None
    finally:
        child.send_signal(signal.SIGTERM)
        _, errors = child.communicate(timeout=15)
    assert child.returncode == 0, errors.decode()
