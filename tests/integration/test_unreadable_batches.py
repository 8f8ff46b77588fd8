"""A batch that cannot be read stops its partition alone, until an operator gives it up."""

from __future__ import annotations

import json
import urllib.request
import uuid
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cli.commands import dead_letters
from eddyline.errors import EddylineError, KafkaUnavailable, SettingsError
from eddyline.kafka import producers, reading, topics
from eddyline.kafka.producers import now_ms
from eddyline.kafka.unreadable import BatchUnreadable
from eddyline.schema import events
from eddyline.schema.events import Click, Item, UserProfile
from eddyline.schema.partitioning import partition_of
from eddyline.settings.loader import Settings
from eddyline.stores.redis import RedisStore
from embeddings.data import sources
from sandbox.processes import free_port
from streams.archive.archiver import Archiver
from streams.operations import dead_letter_replay
from tests import oracle
from tests.archiving import archive_all
from tests.integration import broken_batches
from tests.integration.conftest import Live

pytestmark = pytest.mark.timeout(240)


def named(settings: Settings, partition: int, count: int = 1) -> list[str]:
    """Ids of users of this partition of `clicks`."""
    ids = (f"user-{n}" for n in range(1_000))
    found = [i for i in ids if partition_of(i, settings.clicks_partitions) == partition]
    return found[:count]


def click(user: str, item: str) -> tuple[bytes, bytes]:
    made = Click(user_id=user, item_id=item, at_ms=now_ms(), event_id=uuid.uuid4().hex)
    return user.encode(), events.encode(made)


def history(settings: Settings, user: str) -> list[str]:
    partition = partition_of(user, settings.clicks_partitions)
    store = RedisStore(settings)
    try:
        read = store.read_user(f"u{partition}", partition, user, "1")
        return [entry.item_id for entry in read.history.entries]
    finally:
        store.close()


def stopped(port: int) -> set[tuple[str, str, str]]:
    """(topic, partition, reason) of the metric."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    lines = [n for n in text.splitlines() if n.startswith("eddyline_ingest_partition_stopped{")]
    found = set()
    for line in lines:
        labels = dict(
            part.split("=") for part in line[line.index("{") + 1 : line.index("}")].split(",")
        )
        values = {name: json.loads(value) for name, value in labels.items()}
        found.add((values["topic"], values["partition"], values["reason"]))
    return found


def append_batches(live: Live, data_dir: Path, lost: str, kept: str) -> dict[str, str]:
    """One unreadable batch in each topic, of users in partition 0; coordinates -> reason."""
    gone, settings = "gone-item", live.settings
    profile = events.encode(UserProfile(user_id=lost, attributes={"age": 7}))
    item = events.encode(Item(item_id=gone, at_ms=now_ms()))
    shelf = partition_of(gone, settings.items_partitions)
    clicks = [click(lost, "a"), click(lost, "b"), click(kept, "c")]
    wanted = [
        (topics.CLICKS, 0, clicks, broken_batches.codec),
        (topics.USERS, 0, [(lost.encode(), profile)], broken_batches.checksum),
        (topics.ITEMS, shelf, [(gone.encode(), item)], broken_batches.checksum),
    ]
    found = broken_batches.append(settings, data_dir, wanted)
    return dict(zip(found, ("codec", "checksum", "checksum"), strict=True))


def restart_ingest(live: Live) -> None:
    before = live.kill("ingest")
    live.wait_for("a new process", lambda: live.supervisor.pids().get("ingest", before) != before)


def check_refusals(settings: Settings, at: str) -> None:
    """What is no unreadable batch is not given up. at: the batch of three clicks."""
    topic, _, first = at.rsplit("/", 2)
    for bad, error, why in (
        (f"{topic}/1/0", EddylineError, "can be read"),
        (f"{topic}/0/{int(first) + 1}", EddylineError, f"not where readers stop.*skip {at}"),
        (f"{topic}/0/999999", EddylineError, "can be read"),
        (f"{topic}/99/0", SettingsError, "no such partition"),
        ("elsewhere/0/0", SettingsError, "cannot be skipped"),
        (f"{topic}/0", SettingsError, "topic/partition/offset"),
    ):
        with pytest.raises(error, match=why):
            dead_letters.skip(settings, [bad], to=None)


def check_letters(settings: Settings, batches: dict[str, str], at: str) -> None:
    """Each batch is a dead letter with its bytes, which is not replayed."""
    letters = dead_letter_replay.summary(settings, reason="unreadable_batch", limit=10).letters
    assert {letter.at for letter in letters} == set(batches) and all(r.value for r in letters)
    report = dead_letter_replay.replay(settings, at=at, reason="", limit=1)
    assert report.sent == [] and "cannot be read" in report.not_sent[at]


@pytest.mark.long
def test_the_others_go_on_and_a_skip_lets_it_go_on(
    make_live: Any, servers: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    live: Live = make_live(ingest_metrics_port=str(port))
    settings, (lost, kept), (other,) = (
        live.settings,
        named(live.settings, 0, 2),
        named(live.settings, 1),
    )
    batches = append_batches(live, Path(servers.data_dir), lost, kept)
    at = next(iter(batches))
    held = live.dataset.items[0].item_id
    live.click(kept, held)
    live.click(other, held)
    live.wait_for("the other partition", lambda: history(settings, other) == [held])
    places = {(*at.rsplit("/", 2)[:2], reason) for at, reason in batches.items()}
    live.wait_for("the metric", lambda: stopped(port) == places)
    assert history(settings, kept) == []

    # A restart comes up with the same partitions stopped, and the others go on.
    restart_ingest(live)
    live.click(other, live.dataset.items[1].item_id)
    live.wait_for("the other partition", lambda: len(history(settings, other)) == 2, timeout_s=40)
    live.wait_for("the metric", lambda: stopped(port) == places, timeout_s=30)
    assert history(settings, kept) == [] and live.supervisor.states()["ingest"][1] == 1
    lines = live.supervisor.log_file("ingest").read_text(encoding="utf-8").splitlines()
    for named_at, reason in batches.items():
        said = [line for line in lines if f"eddyline dead-letters skip {named_at}" in line]
        assert len(said) == 2 and all(f"cannot be read ({reason}: " in line for line in said)

    # Readers that must leave nothing out end with the same sentence.
    with pytest.raises(BatchUnreadable, match="cannot be read"):
        list(reading.read(settings, topics.CLICKS))
    with pytest.raises(BatchUnreadable, match="cannot be read"):
        sources.from_kafka(settings)
    check_refusals(settings, at)
    assert stopped(port) == places

    dead_letters.skip(settings, list(batches), to=None)
    first = int(at.rsplit("/", 1)[1])
    printed = capsys.readouterr().out.replace("\n", " ")
    assert f"offsets {first} to {first + 2} are skipped" in printed
    live.wait_for("what is behind it", lambda: history(settings, kept) == [held], timeout_s=20)
    live.applied()
    assert stopped(port) == set()
    # The fences have passed offsets without a record, which a second reading does not see; the
    # letters are the command's.
    differences = oracle.compare(settings).differences
    assert [line for line in differences if not line.startswith(("fence ", "dead letter "))] == []
    check_letters(settings, batches, at)
    with pytest.raises(EddylineError, match="ingest has applied this offset"):
        dead_letters.skip(settings, [at], to=None)

    archive_all(settings)
    archived = [c.user_id for c in sources.from_archive(settings).clicks]
    assert archived.count(other) == 2 and archived.count(kept) == 1 and lost not in archived
    assert [c.user_id for c in sources.from_kafka(settings).clicks].count(kept) == 1


def test_the_archive_and_the_trainer_go_on_after_a_skip(
    fresh_settings: Settings, servers: Settings
) -> None:
    settings = msgspec.structs.replace(fresh_settings, archive_file_offsets=100)
    topics.ensure_topics(settings)
    (lost, kept), (other,) = named(settings, 0, 2), named(settings, 1)
    clicks = [click(lost, "a"), click(lost, "b")]
    wanted = [(topics.CLICKS, 0, clicks, broken_batches.checksum)]
    [at] = broken_batches.append(settings, Path(servers.data_dir), wanted)
    producer = producers.make_producer(settings)
    for user in (kept, other):
        key, value = click(user, "c")
        producer.send(settings.prefixed(topics.CLICKS), value, key=key).get(timeout=20)
    producer.close(timeout=5)
    skipped: list[str] = []

    def skip(archiver: Archiver) -> None:
        """Once the partition stands still and the other one is read."""
        places = {place: batch.at for place, batch in archiver._stops.stopped.items()}
        read = [w.rows for place, w in archiver._writers.items() if place.partition == 1]
        if places and any(read) and not skipped:
            assert list(places.values()) == [at]
            dead_letters.skip(settings, [at], to=None)
            skipped.append(at)

    archive_all(settings, at_each_poll=skip)
    assert skipped == [at]
    assert sorted(c.user_id for c in sources.from_archive(settings).clicks) == sorted([kept, other])
    assert sorted(c.user_id for c in sources.from_kafka(settings).clicks) == sorted([kept, other])
    check_letters(settings, {at: "checksum"}, at)


def test_what_the_broker_cannot_read_is_named_and_not_given_up_blindly(
    fresh_settings: Settings, servers: Settings
) -> None:
    settings = fresh_settings
    topics.ensure_topics(settings)
    user = named(settings, 0)[0]
    records = [click(user, "a"), click(user, "b")]
    wanted = [(topics.CLICKS, 0, records, broken_batches.old_compressed)]
    [at] = broken_batches.append(settings, Path(servers.data_dir), wanted)
    assert at == f"{settings.prefixed(topics.CLICKS)}/0/0"
    with pytest.raises(BatchUnreadable, match=r"the batch at offset 0 cannot be read \(broker"):
        list(reading.read(settings, topics.CLICKS))
    with pytest.raises(EddylineError, match="--to OFFSET"):
        dead_letters.skip(settings, [at], to=None)
    for to in (-1, 3):
        with pytest.raises(SettingsError, match=r"must lie in 0\.\.2"):
            dead_letters.skip(settings, [at], to=to)
    # The broker cannot read this file at all, so there is nothing to go on with.
    with pytest.raises(EddylineError, match="kafka-delete-records"):
        dead_letters.skip(settings, [at], to=1)


def test_a_batch_of_format_0_is_named(fresh_settings: Settings, servers: Settings) -> None:
    settings = fresh_settings
    topics.ensure_topics(settings)
    records = [click(named(settings, 0)[0], "a")]
    wanted = [(topics.CLICKS, 0, records, broken_batches.old_format)]
    [at] = broken_batches.append(settings, Path(servers.data_dir), wanted)
    assert at == f"{settings.prefixed(topics.CLICKS)}/0/0"
    with pytest.raises(BatchUnreadable, match=r"the batch at offset 0 cannot be read \(format"):
        list(reading.read(settings, topics.CLICKS))


def test_a_batch_that_the_broker_cannot_pass_is_named(
    fresh_settings: Settings, servers: Settings
) -> None:
    """Its length is wrong. The broker returns nothing, and no error."""
    settings = msgspec.structs.replace(fresh_settings, kafka_timeout_ms=2_000)
    topics.ensure_topics(settings)
    records = [click(named(settings, 0)[0], "a")]
    wanted = [(topics.CLICKS, 0, records, broken_batches.length)]
    [at] = broken_batches.append(settings, Path(servers.data_dir), wanted)
    with pytest.raises(KafkaUnavailable, match="clicks/0: no records for 2 s, before the end"):
        list(reading.read(settings, topics.CLICKS))
    with pytest.raises(EddylineError, match="kafka-delete-records"):
        dead_letters.skip(settings, [at], to=None)
