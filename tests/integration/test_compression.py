"""Every codec of Kafka, by a producer or by the broker, is read by every process and command."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterator

import msgspec
import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import (
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ResourceType,
)

from eddyline.kafka import reading, topics
from eddyline.kafka.producers import now_ms
from eddyline.schema import events
from eddyline.schema.events import Click, Item, UserProfile
from eddyline.schema.partitioning import partition_of
from eddyline.settings.loader import Settings
from eddyline.stores.redis import RedisStore
from embeddings.data import sources
from serving.proto import retrieval_pb2 as pb
from tests.archiving import archive_all
from tests.integration.conftest import Live, living

pytestmark = pytest.mark.timeout(120)

CODECS = ("gzip", "snappy", "lz4", "zstd")
CLICKS, ITEMS = 60, 30
# By whom a batch is compressed: the producer, or the broker by the topic's `compression.type`.
BY = ("producer", "topic")


@pytest.fixture(scope="module")
def system(servers, dataset, bundle, tmp_path_factory) -> Iterator[Live]:
    settings = msgspec.structs.replace(
        servers,
        namespace=f"t-{uuid.uuid4().hex[:12]}",
        data_dir=str(tmp_path_factory.mktemp("codecs")),
        archive_file_offsets=300,
        dedupe_window_events=600,
    )
    with living(settings, dataset, bundle) as made:
        yield made


def compress_topic(settings: Settings, name: str, codec: str) -> None:
    """Let the broker compress the topic's records from now on."""
    entry = ConfigEntry("compression.type", codec, incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(
        ResourceType.TOPIC, settings.prefixed(name), incremental_configs=[entry]
    )
    admin = AdminClient({"bootstrap.servers": settings.kafka_bootstrap_servers})
    for done in admin.incremental_alter_configs([resource]).values():
        done.result(timeout=10)


def send(settings: Settings, codec: str, name: str) -> None:
    """Clicks of one user, items, a profile and a record to refuse: one batch of each partition."""
    made = Producer(
        {
            "bootstrap.servers": settings.kafka_bootstrap_servers,
            "compression.type": codec,
            "linger.ms": 200,
        }
    )
    partition = partition_of(name, settings.clicks_partitions)
    clicks = settings.prefixed(topics.CLICKS)
    for n in range(CLICKS):
        click = Click(
            user_id=name, item_id=f"{name}-{n % ITEMS}", at_ms=now_ms(), event_id=f"{name}-{n}"
        )
        made.produce(clicks, events.encode(click), name, partition=partition)
    made.produce(clicks, b"{" + name.encode(), name, partition=partition)
    for n in range(ITEMS):
        item_id = f"{name}-{n}"
        at = partition_of(item_id, settings.items_partitions)
        item = Item(item_id=item_id, title=f"title {n}", at_ms=now_ms())
        made.produce(settings.prefixed(topics.ITEMS), events.encode(item), item_id, partition=at)
    profile = UserProfile(user_id=name, attributes={"age": 30})
    made.produce(settings.prefixed(topics.USERS), events.encode(profile), name, partition=partition)
    assert made.flush(20) == 0


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("codec", CODECS)
def test_ingest_and_the_worker_read_it(codec: str, by: str, system: Live) -> None:
    settings, name = system.settings, f"{codec}-{by}"
    compressed = (topics.CLICKS, topics.ITEMS, topics.USERS) if by == "topic" else ()
    for topic in (*compressed, topics.item_vectors("1"), topics.DEAD_LETTERS):
        compress_topic(settings, topic, codec)
    try:
        send(settings, "none" if by == "topic" else codec, name)
        system.applied()
    finally:
        for topic in compressed:
            compress_topic(settings, topic, "producer")
    partition = partition_of(name, settings.clicks_partitions)
    store = RedisStore(settings)
    try:
        user = store.read_user(f"u{partition}", partition, name, "1")
    finally:
        store.close()
    assert user.profile == {"age": 30}
    assert Counter(entry.item_id for entry in user.history.entries) == {
        f"{name}-{n}": CLICKS // ITEMS for n in range(ITEMS)
    }
    only = pb.Filters(allow=[f"{name}-{n}" for n in range(ITEMS)])
    client = system.client()
    system.wait_for(
        "the worker to have the items",
        lambda: len(client.retrieve("nobody", ITEMS, filters=only).items) == ITEMS,
    )
    refused = [r.value for r in reading.read(settings, topics.DEAD_LETTERS)]
    assert sum(b"{" + name.encode() in value for value in refused if value) == 1


def test_the_trainer_and_the_archive_read_it(system: Live) -> None:
    settings = system.settings
    names = [f"{codec}-later" for codec in CODECS]
    for codec, name in zip(CODECS, names, strict=True):
        send(settings, codec, name)
    system.applied()
    archive_all(settings)
    for found in (sources.from_kafka(settings), sources.from_archive(settings)):
        clicks = Counter(click.user_id for click in found.clicks)
        assert [clicks[name] for name in names] == len(CODECS) * [CLICKS]
        items = {item.item_id for item in found.items}
        assert all(f"{name}-{n}" in items for name in names for n in range(ITEMS))
