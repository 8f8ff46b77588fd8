"""`eddyline dead-letters` on a real Kafka: what it shows, and that a replay counts once whatever
happens.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from cli.main import app
from eddyline.errors import EddylineError, SettingsError
from eddyline.kafka import producers, reading, topics
from eddyline.kafka.producers import now_ms, sent_to
from eddyline.schema import events
from eddyline.schema.erasure import Erasure, digest
from eddyline.schema.events import Click, Item, Merge, UserProfile
from eddyline.schema.partitioning import partition_of
from eddyline.settings.loader import Settings
from eddyline.stores.memory import MemoryStore
from eddyline.stores.redis import RedisStore
from eddyline.stores.state_store import Fence, Source, UserEffects
from streams.clicks.handler import ClickHandler
from streams.dead_letters import KafkaDeadLetters, KafkaForwarder
from streams.fences import PartitionFences
from streams.operations import dead_letter_replay
from streams.records import coordinates
from tests.applying import ingest

# Killed at a named moment of the transaction: before the commit, or just after it.
KILLED = """
import os, signal, sys
from kafka import KafkaProducer
from streams.operations import dead_letter_replay
from eddyline.settings.loader import load
commit = KafkaProducer.commit_transaction
def killed(self):
    self.flush(timeout=10)
    if sys.argv[1] == "after":
        commit(self)
    os.kill(os.getpid(), signal.SIGKILL)
KafkaProducer.commit_transaction = killed
dead_letter_replay.replay(load(), reason="far_future")
"""


@pytest.fixture
def settings(fresh_settings: Settings) -> Settings:
    made = msgspec.structs.replace(fresh_settings, far_future_ms_max=60_000)
    topics.ensure_topics(made)
    return made


@pytest.fixture
def producer(settings: Settings) -> Iterator[Any]:
    made = producers.make_producer(settings)
    yield made
    made.close(timeout=5)


def environment(settings: Settings) -> dict[str, str]:
    names = ("kafka_bootstrap_servers", "redis_url", "namespace", "data_dir", "clicks_partitions")
    names += ("items_partitions", "far_future_ms_max")
    return {f"EDDYLINE_{name.upper()}": str(getattr(settings, name)) for name in names}


def run(settings: Settings, *command: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["dead-letters", *command], env=environment(settings))
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def beginnings(settings: Settings, name: str) -> dict[int, int]:
    return topics.beginning_offsets(settings, name)


def log_of(settings: Settings, name: str) -> list[Any]:
    return list(reading.read(settings, name, beginnings(settings, name)))


class Ingesting:
    """The click function on committed records, with dead letters in Kafka and state in memory."""

    def __init__(self, settings: Settings, producer: Any) -> None:
        self.settings, self.store = settings, MemoryStore()
        log_id = topics.log_ids(settings, [topics.CLICKS])[topics.CLICKS]
        self.fences = PartitionFences(settings, self.store, topics.CLICKS, {topics.CLICKS: log_id})
        self.handler = ClickHandler(
            settings,
            self.store,
            self.fences,
            KafkaDeadLetters(settings, producer),
            KafkaForwarder(settings, producer),
            [],
        )

    def catch_up(self) -> None:
        ends = topics.end_offsets(self.settings, topics.CLICKS)
        starts = self.fences.open({p: (0, end) for p, end in ends.items()})
        records = list(reading.read(self.settings, topics.CLICKS, starts))
        for partition in ends:
            self.handler.open(partition)
            if mine := [r for r in records if r.partition == partition]:
                ingest(self.handler, partition, mine)
                self.handler.write_behind.write(partition)

    def items(self, user: str) -> list[str]:
        partition = partition_of(user, self.settings.clicks_partitions)
        return [
            e.item_id
            for e in self.store.read_user(f"u{partition}", partition, user, "").history.entries
        ]

    def counted(self, item: str) -> int:
        return sum(bucket.get(item, 0) for bucket in self.store.popular("i0", 1_000).values())


def early(user: str, item: str, **more: Any) -> Click:
    """A click from a clock that is 61 s fast: refused now, right in a second."""
    return Click(user_id=user, item_id=item, at_ms=now_ms() + 61_000, **more)


def refuse(settings: Settings, producer: Any, *sent: Click) -> tuple[Ingesting, list[str]]:
    """Send them and wait until ingest refuses them; returns their coordinates."""
    at = [sent_to(producers.send_click(producer, settings, click), settings) for click in sent]
    ingesting = Ingesting(settings, producer)
    ingesting.catch_up()
    name = settings.prefixed(topics.CLICKS)
    return ingesting, [f"{name}/{partition}/{offset}" for partition, offset in at]


@pytest.mark.timeout(60)
def test_letters_are_listed_shown_and_replayed_once(settings: Settings, producer: Any) -> None:
    name = settings.prefixed(topics.CLICKS)
    rubbish = sent_to(producer.send(name, b"\x1b[2J{\xff", key=b"k", partition=0), settings)
    ingesting, (first, second) = refuse(
        settings, producer, early("ana", "a"), early("bo", "b", event_id="mine")
    )
    bad = f"{name}/{rubbish[0]}/{rubbish[1]}"
    listed = run(settings, "list")
    assert (
        all(at in listed for at in (first, second, bad)) and "3 dead letters, 0 of them" in listed
    )
    assert "2 × far_future" in listed and "1 × malformed_json" in listed
    listed = run(settings, "list", "--reason", "malformed_json")
    assert bad in listed and first not in listed
    assert second in (listed := run(settings, "list", "--limit", "1")) and first not in listed
    shown = run(settings, "show", bad)
    assert r"\x1b[2J{\xff" in shown and "malformed_json" in shown and "\x1b" not in shown
    with pytest.raises(SettingsError, match="no record"):
        dead_letter_replay.find(settings, "x/0/1")
    time.sleep(1.1)
    assert "1 replayed, 0 stay" in run(settings, "replay", first)
    assert "1 replayed, 0 stay" in run(settings, "replay", "--reason", "far_future")
    assert "0 replayed, 0 stay" in run(settings, "replay", "--reason", "far_future")
    assert "replayed before" in run(settings, "replay", first, code=1)
    assert "malformed_json" in run(settings, "replay", bad, code=1)  # refused again: it stays
    assert "3 dead letters, 2 of them replayed" in run(settings, "list")
    ingesting.catch_up()
    assert (ingesting.items("ana"), ingesting.items("bo")) == (["a"], ["b"])
    assert (ingesting.counted("a"), ingesting.counted("b")) == (1_000, 1_000)
    again = [r for r in log_of(settings, topics.CLICKS) if dict(r.headers).get("replayed_from")]
    values = {dict(r.headers)["replayed_from"].decode(): r for r in again}
    assert msgspec.json.decode(values[first].value)["event_id"] == first
    assert (values[first].key, values[second].key) == (b"ana", b"bo")
    original = next(r for r in log_of(settings, topics.CLICKS) if r.key == b"bo")
    assert values[second].value == original.value  # it has an id of its own: byte for byte


@pytest.mark.timeout(60)
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_replay_that_is_killed_counts_once(
    settings: Settings, producer: Any, moment: str
) -> None:
    ingesting, _ = refuse(settings, producer, early("ana", "a"), early("bo", "b", event_id="mine"))
    time.sleep(1.1)
    environ = {k: v for k, v in os.environ.items() if not k.startswith("EDDYLINE_")} | environment(
        settings
    )
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, moment], env=environ, timeout=30, check=False
    )
    assert killed.returncode == -9
    done = dead_letter_replay.replay(settings, reason="far_future")
    assert len(done.sent) == (2 if moment == "before" else 0)
    assert dead_letter_replay.replay(settings, reason="far_future").sent == []
    ingesting.catch_up()
    assert (ingesting.counted("a"), ingesting.counted("b")) == (1_000, 1_000)
    assert (ingesting.items("ana"), ingesting.items("bo")) == (["a"], ["b"])


@pytest.mark.timeout(60)
def test_a_second_replay_stops_the_first(
    settings: Settings, producer: Any, monkeypatch: Any
) -> None:
    ingesting, _ = refuse(settings, producer, early("ana", "a"))
    time.sleep(1.1)
    real, others = dead_letter_replay._marks, []

    def overtaken(settings: Settings) -> Any:
        marks = real(settings)
        monkeypatch.setattr(dead_letter_replay, "_marks", real)
        others.append(dead_letter_replay.replay(settings, reason="far_future"))
        return marks

    monkeypatch.setattr(dead_letter_replay, "_marks", overtaken)
    with pytest.raises(EddylineError, match="another replay"):
        dead_letter_replay.replay(settings, reason="far_future")
    assert len(others[0].sent) == 1
    ingesting.catch_up()
    assert ingesting.counted("a") == 1_000


@pytest.mark.timeout(60)
def test_a_replayed_item_never_overrides_a_newer_one(settings: Settings, producer: Any) -> None:
    """Refused for their partition (another partitioner); one was replaced, one deleted, one is the
    newest.
    """
    sink, name = KafkaDeadLetters(settings, producer), settings.prefixed(topics.ITEMS)
    at = {}
    for item_id in ("replaced", "deleted", "newest"):
        wrong = 1 - partition_of(item_id, 2)
        value = events.encode(Item(item_id=item_id, title="old"))
        at[item_id] = sent_to(
            producer.send(name, value, key=item_id.encode(), partition=wrong), settings
        )
    for record in log_of(settings, topics.ITEMS):
        sink.put(record, events.Rejected("wrong_partition", "key", "murmur2"))
        sink.put(
            record, events.Rejected("wrong_partition", "key", "murmur2")
        )  # as after a chunk done again
    sink.flush()
    time.sleep(0.01)
    producers.send_item(producer, settings, Item(item_id="replaced", title="new"))
    sent_to(producers.send_delete(producer, settings, "deleted"), settings)
    producer.flush(timeout=10)
    done = dead_letter_replay.replay(settings, reason="wrong_partition")
    newest = f"{name}/{at['newest'][0]}/{at['newest'][1]}"
    assert done.sent == [newest] and len(done.not_sent) == 2
    assert all("newer" in why for why in done.not_sent.values())
    last = {
        r.key: r
        for r in sorted(log_of(settings, topics.ITEMS), key=lambda r: (r.timestamp, r.offset))
    }
    assert last[b"newest"].partition == partition_of("newest", 2)
    assert (
        msgspec.json.decode(last[b"replaced"].value)["title"] == "new"
        and last[b"deleted"].value is None
    )


@pytest.mark.timeout(60)
def test_letters_from_before_their_user_was_forgotten_stay(
    settings: Settings, producer: Any
) -> None:
    """The first append counts, also for a dead letter of a forwarded record."""
    store, partition = RedisStore(settings), partition_of("ana", 4)
    until_ms = now_ms() + 1_000  # the null record of `users` was appended then
    log_id = topics.log_ids(settings, [topics.CLICKS])[topics.CLICKS]
    erasure = Erasure(until_ms, 7, until_ms + 86_400_000)
    source, slot = Source(topics.CLICKS, partition), f"u{partition}"
    effects = UserEffects(erasures={digest("ana"): erasure})
    store.write_users(slot, source, None, Fence(0, log_id), effects)
    store.close()
    sink = KafkaDeadLetters(settings, producer)

    def refuse(name: str, offset: int, event: Any, after_ms: int, origin_ms: int = 0) -> str:
        record = SimpleNamespace(
            topic=settings.prefixed(name),
            partition=partition,
            offset=offset,
            timestamp=until_ms + after_ms,
            key=event.user_id.encode(),
            value=events.encode(event),
            headers=[("origin_ms", str(origin_ms).encode())] if origin_ms else [],
        )
        sink.put(record, events.Rejected("refused", "", ""))
        return coordinates(record)

    def click(user: str = "ana", after_ms: int = 1) -> Click:
        return Click(user_id=user, item_id="a", at_ms=until_ms + after_ms)

    profile = UserProfile(user_id="ana")
    merge = Merge(user_id="ana", merge_into="bo", at_ms=until_ms + 1)
    stays = [
        refuse(topics.CLICKS, 1, click(), 0),
        refuse(topics.CLICKS, 2, click(after_ms=0), 1),
        refuse(topics.CLICKS, 3, click(), 1, origin_ms=until_ms),
        refuse(topics.CLICKS, 4, merge, 0),
        refuse(topics.USERS, 5, profile, 0),
        refuse(topics.USERS, 6, profile, 1, origin_ms=until_ms),
    ]
    goes = [
        refuse(topics.CLICKS, 7, click(), 1),
        refuse(topics.CLICKS, 8, click("bo", 0), 0),
        refuse(topics.USERS, 9, profile, 1),
    ]
    sink.flush()
    done = dead_letter_replay.replay(settings, reason="refused")
    assert sorted(done.sent) == sorted(goes)
    assert done.not_sent == dict.fromkeys(stays, "its user was forgotten since")


@pytest.mark.timeout(60)
def test_a_replay_carries_the_first_append_of_a_forwarded_record(
    settings: Settings, producer: Any
) -> None:
    """Ingest compares the first append with the time at which the user was forgotten."""
    sink = KafkaDeadLetters(settings, producer)
    click = Click(user_id="ana", item_id="a", at_ms=now_ms())
    record = SimpleNamespace(
        topic=settings.prefixed(topics.CLICKS),
        partition=0,
        offset=3,
        timestamp=now_ms(),
        key=b"ana",
        value=events.encode(click),
        headers=[("origin_ms", b"77")],
    )
    sink.put(record, events.Rejected("refused", "", ""))
    sink.flush()
    assert len(dead_letter_replay.replay(settings, reason="refused").sent) == 1
    [sent] = log_of(settings, topics.CLICKS)
    assert events.origin_ms(sent.headers) == 77


@pytest.mark.timeout(60)
def test_a_profile_under_a_bad_key_stays_and_a_delete_is_replayed(
    settings: Settings, producer: Any
) -> None:
    sink, name = KafkaDeadLetters(settings, producer), settings.prefixed(topics.USERS)
    wrong = (partition_of("ana", 4) + 1) % 4
    sent_to(
        producer.send(name, events.encode(UserProfile(user_id="x")), key=b"\xff", partition=0),
        settings,
    )
    sent_to(producer.send(name, None, key=b"ana", partition=wrong), settings)
    for record in log_of(settings, topics.USERS):
        sink.put(
            record,
            events.Rejected(
                "malformed_key" if record.key == b"\xff" else "wrong_partition", "key", ""
            ),
        )
    sink.flush()
    assert dead_letter_replay.replay(settings, reason="malformed_key").sent == []
    assert len(dead_letter_replay.replay(settings, reason="wrong_partition").sent) == 1
    assert [
        r.value for r in log_of(settings, topics.USERS) if r.partition == partition_of("ana", 4)
    ][-1] is None
