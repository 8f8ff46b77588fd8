"""Records without a time stamp, which a topic with CreateTime may have: through every reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from kafka.admin import ConfigResource, ConfigResourceType

from eddyline.archive import Archive
from eddyline.kafka import producers, reading, topics
from eddyline.kafka.producers import now_ms
from eddyline.kafka.topics import CLICKS, DEAD_LETTERS, ITEMS, USERS
from eddyline.schema import events
from eddyline.schema.events import Click, Item, UserProfile
from eddyline.schema.partitioning import partition_of, user_slot
from eddyline.settings.loader import Settings
from eddyline.stores.memory import MemoryStore
from eddyline.stores.state_store import Source, UserQuery
from embeddings.bundle import bundle as bundles
from embeddings.data import sources
from streams.dead_letters import outlet_producer
from streams.handlers import Handlers, Outputs
from streams.operations import dead_letter_replay, state_replay, topic_slices
from tests.applying import ingest
from tests.archiving import archive_all

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def settings(fresh_settings: Settings) -> Settings:
    """Topics in which producers decide on the time stamps."""
    topics.ensure_topics(fresh_settings)
    with topics.open_admin(fresh_settings) as admin:
        for name in topics.SOURCES:
            resource = ConfigResource(
                ConfigResourceType.TOPIC,
                fresh_settings.prefixed(name),
                configs={"message.timestamp.type": "CreateTime"},
            )
            admin.alter_configs([resource])
    return fresh_settings


def send(settings: Settings) -> None:
    """Of each topic a record with a time stamp, one without, and one with; and two deletes."""
    producer = producers.make_producer(settings)
    for stamp in (None, -1, None):
        stamped = -1 if stamp else now_ms()
        number = f"{stamp or now_ms()}"
        click = Click(user_id="ana", item_id=f"i{number}", at_ms=now_ms(), event_id=number)
        values = {
            CLICKS: (b"ana", events.encode(click)),
            USERS: (b"ana", events.encode(UserProfile(user_id="ana", attributes={"n": number}))),
            ITEMS: (b"i1", events.encode(Item(item_id="i1", title=number))),
        }
        for name, (key, value) in values.items():
            count = settings.items_partitions if name == ITEMS else settings.clicks_partitions
            producer.send(
                settings.prefixed(name),
                value,
                key=key,
                partition=partition_of(key.decode(), count),
                timestamp_ms=stamped,
            ).get(timeout=10)
    for name, key in ((ITEMS, b"i1"), (USERS, b"ana")):
        count = settings.items_partitions if name == ITEMS else settings.clicks_partitions
        place = partition_of(key.decode(), count)
        producer.send(settings.prefixed(name), None, key=key, partition=place, timestamp_ms=-1).get(
            timeout=10
        )
    producer.close(timeout=5)


def test_a_record_without_a_time_stamp_is_a_dead_letter_for_every_reader(
    settings: Settings, bundle: Any, tmp_path: Path
) -> None:
    send(settings)
    read = {name: list(reading.read(settings, name)) for name in topics.SOURCES}
    stamps = {name: [r.timestamp for r in of] for name, of in read.items()}
    assert {name: [s == -1 for s in of] for name, of in stamps.items()} == {
        CLICKS: [False, True, False],
        USERS: [False, True, False, True],
        ITEMS: [False, True, False, True],
    }
    producer = outlet_producer(settings)
    kept = topics.delete_retention_ms(settings, (USERS, ITEMS))
    store, ids = MemoryStore(), topics.log_ids(settings, topics.SOURCES)

    def handlers() -> Handlers:
        outputs = Outputs.to_kafka(settings, producer)
        made = Handlers(settings, store, ids, [], outputs, [], 0.0, delete_retention_ms=kept)
        for name, of in read.items():
            partition = of[0].partition
            bounds = {partition: (0, of[-1].offset + 1)}
            made.of(name).open(partition)
            made.of(name).fences.open(bounds)
        return made

    first = handlers()
    for name, of in read.items():
        ingest(first.of(name), of[0].partition, of)
        first.of(name).flush()
    found = [dict(r.headers)["reason"] for r in reading.read(settings, DEAD_LETTERS)]
    assert found == [b"no_timestamp"] * 4
    [state] = store.read_many([_query(read[CLICKS][0].partition)])
    assert len(state.histories["ana"].entries) == 2 and "n" in state.profiles["ana"]
    assert store.read_item_metadata(["i1"], 1)["i1"].deleted, "a delete always applies"

    # A restart finds marks without a time stamp, and goes on.
    again = handlers()
    for name, of in read.items():
        assert again.of(name).fences.resumed(of[0].partition, of[-1:]) == 1

    # The archive has what ingest has, and no file for an hour of 1969.
    archive_all(settings)
    archive = Archive(settings)
    assert len(list(archive.read(CLICKS))) == 2
    assert [e.event is None for e in archive.read(ITEMS)] == [False, False, True]
    hours = [file.hour_ms for name in topics.SOURCES for file in archive.files(name)]
    assert min(hours) > now_ms() - 10_000_000

    # A replay of the slice, the trainer, and the replay of the letters.
    towers = bundles.load(bundle[0] / "1")
    slices = topic_slices.between(settings, "earliest", "latest")
    done = state_replay.replay(settings, MemoryStore(), slices, towers, 7)
    assert {name: o.counts()["rejected"] for name, o in done.outcomes.items()} == {
        CLICKS: 1,
        USERS: 2,
        ITEMS: 1,
    }
    assert sources.from_kafka(settings).rejected["no_timestamp"] == 4
    replayed = dead_letter_replay.replay(
        msgspec.structs.replace(settings, data_dir=str(tmp_path)), reason="no_timestamp"
    )
    assert len(replayed.sent) + len(replayed.not_sent) == 4 and replayed.sent
    producer.close(timeout=5)


def _query(partition: int) -> UserQuery:
    return UserQuery(user_slot(partition), Source(CLICKS, partition), ["ana"], [])
