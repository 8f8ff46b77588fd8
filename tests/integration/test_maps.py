"""Topics of another system on real parts: read under their own names, by a map."""

from __future__ import annotations

import json
import time
import uuid
from pathlib import Path
from typing import Any

import msgspec
import pytest
from kafka.admin import NewTopic

from eddyline.errors import LogMismatch, SettingsError
from eddyline.generations import Manifest
from eddyline.kafka import producers, topics
from eddyline.kafka.producers import now_ms
from eddyline.schema.partitioning import partition_of
from eddyline.schema.records import OWN
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import Source
from sandbox.datasets.dataset import Dataset
from streams.operations import dead_letter_replay
from tests.integration.conftest import living
from tests.integration.test_dead_letters import Ingesting

CLICKS_MAP = """
[clicks.fields]
user_id = "visitor"
item_id = "sku"
at_ms = { path = "seen_s", format = "s" }
[[clicks.rule]]
where = { lines = { exists = true } }
each = "lines"
user_id = "^.visitor"
at_ms = { path = "^.seen_s", format = "s" }
kind = { const = "purchase" }
[[clicks.rule]]
"""
ITEMS_MAP = """
[items]
partition = "key"
[items.fields]
item_id = "id"
title = "name"
categories = "groups"
available = { path = "stock", above = 0 }
[[items.rule]]
make = "delete"
where = { op = "removed" }
[[items.rule]]
"""


@pytest.fixture
def settings(fresh_settings: Settings, tmp_path: Path) -> Settings:
    """Topics as a shop makes them, with producers' time stamps, and their maps."""
    shop = f"shop.{uuid.uuid4().hex[:8]}"
    for name, text in (("clicks", CLICKS_MAP), ("items", ITEMS_MAP)):
        (tmp_path / f"{name}.toml").write_text(text, encoding="utf-8")
    settings = msgspec.structs.replace(
        fresh_settings,
        clicks_topic=f"{shop}.events",
        items_topic=f"{shop}.products",
        clicks_map=str(tmp_path / "clicks.toml"),
        items_map=str(tmp_path / "items.toml"),
    )
    sizes = {settings.clicks_topic: settings.clicks_partitions}
    sizes |= {settings.items_topic: settings.items_partitions}
    with topics.open_admin(settings) as admin:
        admin.create_topics([NewTopic(name, count, 1) for name, count in sizes.items()])
        admin.wait_for_topics(list(sizes), timeout_ms=10_000)
    return settings


def as_json(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


@pytest.mark.long
def test_a_shops_topics_are_read_as_they_are(
    settings: Settings, dataset: Dataset, bundle: tuple[Path, Manifest]
) -> None:
    with living(settings, dataset, bundle, with_items=False) as live:
        client, groups = live.client(), dataset.items[0].categories
        everything = len(dataset.items) + 50
        shown = [f"{n}" for n in range(5)]
        for number in shown:
            value = as_json(id=int(number), name=f"Item {number}", groups=groups, stock=3)
            live.raw(topics.ITEMS, value, as_json(id=int(number)))
        user = "visitor-1"
        here = partition_of(user, settings.clicks_partitions)
        other = (here + 1) % settings.clicks_partitions
        seen_s = now_ms() // 1000
        live.applied()
        live.raw(
            topics.CLICKS, as_json(visitor=user, sku=0, seen_s=seen_s), b"any", partition=other
        )
        lines = [{"sku": 1}, {"sku": 2}]
        token = live.raw(
            topics.CLICKS, as_json(visitor=user, lines=lines, seen_s=seen_s), b"any", partition=here
        )

        def left() -> set[str]:
            # Those of the generation are in the answers too.
            answer = client.retrieve(user, everything, after=token, wait_ms=2_000)
            return {item.item_id for item in answer.items} & set(shown)

        live.wait_for("the events of both records", lambda: left() == {"3", "4"})
        [forwarded] = [r for r in live.read(topics.CLICKS) if OWN in r.headers]
        assert (forwarded.partition, forwarded.key) == (here, user.encode())
        live.raw(topics.ITEMS, as_json(id=3, op="removed"), as_json(id=3))
        live.raw(topics.ITEMS, None, as_json(id=4))
        live.wait_for("the deletes", lambda: not left())
        live.raw(topics.ITEMS, as_json(id=[3]), as_json(id=3))
        [letter] = live.wait_for("the letter", lambda: live.read(topics.DEAD_LETTERS))
        assert letter.value == as_json(id=[3]) and dict(letter.headers)["field"] == b"item_id"


def test_a_dead_letter_counts_once_after_the_map_is_corrected(settings: Settings) -> None:
    producer = producers.make_producer(settings)
    try:
        topics.ensure_topics(settings)
        user = "u"
        here = partition_of(user, settings.clicks_partitions)
        seen = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        value = as_json(visitor=user, lines=[{"sku": 1}, {"sku": 1}], seen_s=seen)
        sent = producer.send(settings.clicks_topic, value, key=b"k", partition=here)
        offset = sent.get(timeout=10).offset
        ingesting = Ingesting(settings, producer)
        ingesting.catch_up()
        at = f"{settings.clicks_topic}/{here}/{offset}"
        report = dead_letter_replay.replay(settings, at=at)
        assert not report.sent and "no time of the format s" in report.not_sent[at]
        corrected = Path(settings.clicks_map).with_name("corrected.toml")
        corrected.write_text(CLICKS_MAP.replace('"s"', '["s", "iso"]'), encoding="utf-8")
        settings = msgspec.structs.replace(settings, clicks_map=str(corrected))
        assert dead_letter_replay.replay(settings, at=at).sent == [at]
        assert dead_letter_replay.replay(settings, at=at).not_sent == {at: "replayed before"}
        after = Ingesting(settings, producer)
        after.catch_up()
        assert after.items(user) == ["1", "1"] and after.counted("1") == 10_000
        window = after.store.read_slot(f"u{here}", Source(topics.CLICKS, here))
        assert sorted(window.accepted) == [f"{at}#0", f"{at}#1"]
    finally:
        producer.close(timeout=5)


def test_a_missing_topic_of_another_system_is_named_and_not_made(fresh_settings: Settings) -> None:
    settings = msgspec.structs.replace(fresh_settings, users_topic="shop.people")
    with pytest.raises(SettingsError, match=r"users_topic = 'shop\.people': Kafka has no such"):
        topics.ensure_topics(settings)
    named = msgspec.structs.replace(fresh_settings, clicks_topic=f"one.{uuid.uuid4().hex[:8]}")
    with topics.open_admin(settings) as admin:
        admin.create_topics([NewTopic(named.clicks_topic, 1, 1)])
        admin.wait_for_topics([named.clicks_topic], timeout_ms=10_000)
    with pytest.raises(LogMismatch, match=r"has 1 partitions, the settings 4"):
        topics.ensure_topics(named)
