"""Records that Kafka no longer has: a log that lost its end and grew again, and deletes that
compaction removed before they were applied. On real brokers.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.admin import (
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ResourceType,
)

from eddyline.errors import Rejected
from eddyline.kafka import producers, topics
from eddyline.kafka.topics import CLICKS, ITEMS
from eddyline.schema.item_record import decode_record
from eddyline.schema.partitioning import partition_of
from eddyline.settings.loader import Settings
from eddyline.stores.redis import RedisStore
from eddyline.stores.state_store import Fence, Source
from sandbox.servers.supervisor import Child, Supervisor

# Of a record batch in a segment: its first offset and its length after these.
BATCH = struct.Struct(">qi")
DAY_MS = 86_400_000


def run_child(child: Child, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*child.argv],
        env=os.environ | dict(child.env),
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def command(child: Child, *words: str) -> subprocess.CompletedProcess[str]:
    """An `eddyline` command with the settings of a child."""
    return subprocess.run(
        [sys.executable, "-m", "cli", *words],
        env=os.environ | dict(child.env),
        capture_output=True,
        text=True,
        timeout=60,
    )


def cut_segment(folder: Path, offset: int) -> None:
    """Remove the batches from this offset on, as a power cut before their fsync would."""
    [segment] = folder.glob("*.log")
    raw, at = segment.read_bytes(), 0
    while at < len(raw):
        first, length = BATCH.unpack_from(raw, at)
        if first >= offset:
            break
        at += BATCH.size + length
    assert at < len(raw)
    os.truncate(segment, at)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("running", [pytest.param(False, marks=pytest.mark.long), True])
def test_a_log_that_grew_again_over_a_hole_is_refused(
    own_servers: Any, make_live: Any, running: bool
) -> None:
    live = make_live(own_servers, with_worker=False)
    item = live.dataset.items[0].item_id
    partition = partition_of("ana", live.settings.clicks_partitions)
    for _ in range(10):
        _, last = live.click("ana", item)
    live.applied()
    if not running:
        live.supervisor.stop()
    name = f"{live.settings.prefixed(CLICKS)}-{partition}"
    own_servers.pause("kafka")
    cut_segment(Path(own_servers.settings.data_dir) / "kafka" / "log" / name, last - 4)
    own_servers.kill("kafka")
    time.sleep(1)
    live.wait_for("Kafka to be back", lambda: own_servers.up("kafka"), timeout_s=60)
    live.producer.close(timeout=1)
    live.producer = producers.make_producer(live.settings)
    offsets = [live.click("ana", item)[1] for _ in range(8)]
    assert offsets == list(range(last - 4, last + 4))
    child = live.deployment.ingest_child(
        "again", clicks_partitions="4", items_partitions="2", kafka_timeout_ms="5000"
    )
    if running:
        live.wait_for(
            "the refusal", lambda: live.supervisor.states()["ingest"][0] == "failed", timeout_s=60
        )
        said = live.supervisor.log_file("ingest").read_text(encoding="utf-8")
        live.supervisor.stop()
    else:
        refused = run_child(child)
        assert refused.returncode == 3, refused.stderr
        said = refused.stderr
    assert f"partition {partition}: the record at offset {last} is not the one" in said
    accepted = command(child, "accept-log", "--yes")
    assert accepted.returncode == 0, accepted.stderr
    with Supervisor(Path(live.settings.data_dir) / "again") as again:
        again.start(child)
        live.applied()
        assert again.states()["again"] == ("ready", 0)


def configure(settings: Settings, name: str, **configs: int | float) -> None:
    """Set configurations of a topic; a name's `_` is a dot."""
    entries = [
        ConfigEntry(key.replace("_", "."), str(value), incremental_operation=AlterConfigOpType.SET)
        for key, value in configs.items()
    ]
    resource = ConfigResource(
        ResourceType.TOPIC, settings.prefixed(name), incremental_configs=entries
    )
    admin = AdminClient({"bootstrap.servers": settings.kafka_bootstrap_servers})
    for done in admin.incremental_alter_configs([resource]).values():
        done.result(timeout=10)


def served(settings: Settings, read: Any) -> set[str]:
    """The items that a worker of generation 1 has."""
    found = set[str]()
    for record in read(topics.item_vectors("1")):
        try:
            item = decode_record(record.key, record.value)
        except Rejected:
            continue
        (found.discard if item.retired else found.add)(item.item_id)
    return found


@pytest.mark.long
@pytest.mark.timeout(240)
def test_a_delete_that_compaction_removed_is_made_up_for(make_live: Any) -> None:
    """Without `eddyline resync` the deleted item would be served for ever."""
    live = make_live()
    gone, others = live.dataset.items[0].item_id, live.dataset.items[1:]
    partition = partition_of(gone, 2)
    mine = [item for item in others if partition_of(item.item_id, 2) == partition]
    live.supervisor.stop()
    assert gone in served(live.settings, live.read)
    fast = {"segment_ms": 100, "min_cleanable_dirty_ratio": 0.001, "delete_retention_ms": 1}
    configure(live.settings, ITEMS, **fast)
    live.delete(gone)
    deadline = time.monotonic() + 150
    while gone.encode() in {record.key for record in live.read(ITEMS)}:
        assert time.monotonic() < deadline, "the delete was not compacted away"
        live.item(mine[0])  # a new segment: the one before may be compacted
        time.sleep(1)
    child = live.deployment.ingest_child("again", clicks_partitions="4", items_partitions="2")
    refused = run_child(child)
    assert refused.returncode == 3 and "`eddyline resync`" in refused.stderr, refused.stderr
    configure(live.settings, ITEMS, delete_retention_ms=DAY_MS)
    done = command(child, "resync", "--yes")
    assert done.returncode == 0 and done.stdout.startswith("1 items and 0 users"), done.stdout
    with Supervisor(Path(live.settings.data_dir) / "again") as again:
        again.start(child)
        live.applied()
        assert again.states()["again"] == ("ready", 0)
    assert gone not in served(live.settings, live.read)
    assert {item.item_id for item in others} == served(live.settings, live.read)
    assert command(child, "resync", "--yes").stdout.startswith("0 items and 0 users")


@pytest.mark.long
@pytest.mark.timeout(120)
def test_resync_forgets_users_whose_profile_kafka_has_no_more(make_live: Any) -> None:
    """Compaction removed their null record: the topic has no record of them."""
    live = make_live()
    settings, partition = live.settings, partition_of("ana", 4)
    live.click("ana", live.dataset.items[0].item_id)
    live.applied()
    live.supervisor.stop()
    store = RedisStore(settings)
    try:
        slot, source = f"u{partition}", Source(topics.USERS, partition)
        fence = store.fences(source, [slot])[slot]
        end = topics.end_offsets(settings, topics.USERS)[partition]
        log_id = topics.log_ids(settings, [topics.USERS])[topics.USERS]
        assert fence is None and end == 0
        live.raw(topics.USERS, b"{", b"bo", partition=partition)  # an offset for the fence
        profiles = {"ana": {"age": 3}}
        store.write_profiles(slot, source, None, Fence(0, log_id), profiles, [])
        child = live.deployment.ingest_child("again", clicks_partitions="4", items_partitions="2")
        done = command(child, "resync", "--yes")
        assert done.returncode == 0 and done.stdout.startswith("0 items and 1 users"), done.stderr
        with Supervisor(Path(settings.data_dir) / "again") as again:
            again.start(child)
            live.applied()
        found = store.read_user(slot, partition, "ana", "1")
        assert (found.profile, found.history.entries) == ({}, ())
    finally:
        store.close()


def test_topics_that_we_make_keep_deletes_for_thirty_days(fresh_settings: Settings) -> None:
    topics.ensure_topics(fresh_settings)
    names = (ITEMS, topics.USERS)
    found = topics.delete_retention_ms(fresh_settings, names)
    assert found == dict.fromkeys(names, 30 * DAY_MS)
    configure(fresh_settings, ITEMS, delete_retention_ms=77)
    assert topics.delete_retention_ms(fresh_settings, [ITEMS]) == {ITEMS: 77}
