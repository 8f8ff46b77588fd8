"""Records at the limit of what a topic takes: a dead letter or a sentence with the size."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kafka.admin import ConfigResource, ConfigResourceType

from cli.commands import replay_file, send
from eddyline.errors import Rejected
from eddyline.kafka import producers, reading, topics
from eddyline.kafka.producers import now_ms
from eddyline.kafka.topics import CLICKS, DEAD_LETTERS, ITEMS
from eddyline.schema import events
from eddyline.schema.events import Click, Merge
from eddyline.schema.partitioning import partition_of
from eddyline.settings.loader import Settings
from eddyline.stores.memory import MemoryStore
from streams.dead_letters import FORWARD_BYTES_MAX, outlet_producer, record_bytes
from streams.handlers import Handlers, Outputs
from streams.importing import sending
from streams.importing.files import open_file
from streams.importing.rows import FileMap, RowReader
from streams.operations import dead_letter_replay
from tests.applying import ingest
from tests.simulation.test_ingest_faults import Rec

pytestmark = pytest.mark.timeout(120)
LIMIT = 2_000  # of the small topic, bytes


@pytest.fixture
def settings(fresh_settings: Settings) -> Settings:
    topics.ensure_topics(fresh_settings)
    return fresh_settings


def limit(settings: Settings, name: str, size: int) -> None:
    """Another's topic: it takes smaller records than Eddyline makes."""
    with topics.open_admin(settings) as admin:
        change = {"max.message.bytes": str(size)}
        resource = ConfigResource(ConfigResourceType.TOPIC, settings.prefixed(name), configs=change)
        admin.alter_configs([resource])


class Ingest:
    """The handler of clicks in this process; what it sends goes to the real topics."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.producer = outlet_producer(settings)
        outputs = Outputs.to_kafka(settings, self.producer)
        self.clicks = Handlers(
            settings, MemoryStore(), topics.log_ids(settings, [CLICKS]), [], outputs, []
        ).clicks
        ends = {p: (0, 2**40) for p in range(settings.clicks_partitions)}
        self.next = self.clicks.fences.open(ends)

    def apply(self, user: str, event: Click | Merge, **more: Any) -> Any:
        partition = partition_of(user, self.settings.clicks_partitions)
        offset = self.next[partition]
        self.next[partition] += 1
        topic = self.settings.prefixed(CLICKS)
        record = Rec(
            topic, partition, offset, now_ms(), user.encode(), events.encode(event), **more
        )
        return ingest(self.clicks, partition, [record])


@pytest.fixture
def process(settings: Settings) -> Iterator[Ingest]:
    made = Ingest(settings)
    yield made
    made.producer.close(timeout=5)


def visitor_with(process: Ingest, count: int) -> None:
    for n in range(count):
        process.apply("ana", Click(user_id="ana", item_id=f"{n}" * 256, at_ms=now_ms()))


def letters(settings: Settings) -> list[str]:
    return [
        dict(r.headers)["reason"].decode()
        for r in reading.read(settings, DEAD_LETTERS)
        if "reason" in dict(r.headers)
    ]


@pytest.mark.parametrize("over", [-1, 0, 1])
def test_what_a_merge_moves_arrives_whatever_headers_the_merge_has(
    settings: Settings, process: Ingest, over: int
) -> None:
    visitor_with(process, 2)
    merge = Merge(user_id="ana", merge_into="bo", at_ms=now_ms())
    place = f"{settings.prefixed(CLICKS)}/{partition_of('ana', settings.clicks_partitions)}/2"
    value = events.encode(
        Click(
            user_id="bo",
            item_id="0" * 256,
            at_ms=now_ms(),
            event_id=f"merge/{place.split('/', 1)[1]}/0",
            context=events.moved_context(0),
        )
    )
    bare = [("origin", place.encode()), (events.ORIGIN_MS, str(now_ms()).encode()), ("big", b"")]
    spare = FORWARD_BYTES_MAX - record_bytes(b"bo", value, bare)
    outcome = process.apply("ana", merge, headers=[("big", b"x" * (spare + over))])
    assert (outcome.forwarded, outcome.rejected) == (2, 0)
    found = list(reading.read(settings, CLICKS))
    assert [json.loads(r.value)["user_id"] for r in found] == ["bo", "bo"]
    assert [any(name == "big" for name, _ in r.headers) for r in found] == [over <= 0] * 2
    assert letters(settings) == []


def test_what_a_topic_does_not_take_of_a_merge_is_a_dead_letter(
    settings: Settings, process: Ingest
) -> None:
    """Several in one batch: kafka-python cuts it, and refuses each half."""
    visitor_with(process, 3)
    limit(settings, CLICKS, 300)
    process.apply("ana", Merge(user_id="ana", merge_into="bo", at_ms=now_ms()))
    assert letters(settings) == ["too_large"] * 3 and not list(reading.read(settings, CLICKS))
    # Nothing blocks what comes after.
    assert process.apply("ana", Click(user_id="ana", item_id="i", at_ms=now_ms())).applied == 1
    process.apply("ana", Merge(user_id="ana", merge_into="bo", at_ms=now_ms()))
    assert [json.loads(r.value)["item_id"] for r in reading.read(settings, CLICKS)] == ["i"]


def test_a_replay_says_what_a_topic_does_not_take_and_sends_it_once_it_does(
    settings: Settings, process: Ingest
) -> None:
    for visitor in ("ana", "eve"):
        process.apply(visitor, Click(user_id=visitor, item_id="i" * 256, at_ms=now_ms()))
    limit(settings, CLICKS, 300)
    for visitor in ("ana", "eve"):
        process.apply(visitor, Merge(user_id=visitor, merge_into="bo", at_ms=now_ms()))
    report = dead_letter_replay.replay(settings, reason="too_large")
    assert report.sent == [] and len(report.not_sent) == 2
    for why in report.not_sent.values():
        assert "bytes as a record" in why and "max.message.bytes" in why
    limit(settings, CLICKS, 1_048_588)
    report = dead_letter_replay.replay(settings, reason="too_large")
    assert len(report.sent) == 2 and report.not_sent == {}
    found = [json.loads(r.value)["user_id"] for r in reading.read(settings, CLICKS)]
    assert found == ["bo", "bo"]


def largest(settings: Settings) -> int:
    """The longest context value of a click that the small topic takes."""
    low, high = 1, LIMIT
    producer = producers.make_producer(settings)
    while low + 1 < high:
        middle = (low + high) // 2
        try:
            producers.sent_to(producers.send_click(producer, settings, click_of(middle)), settings)
            low = middle
        except Rejected:
            high = middle
            producer.close(timeout=5)  # it sends nothing more
            producer = producers.make_producer(settings)
    producer.close(timeout=5)
    return low


def click_of(length: int) -> Click:
    half = length // 2
    return Click(
        user_id="ana",
        item_id="i",
        at_ms=1_700_000_000_000,
        event_id="e" * 32,
        context={"a": "x" * half, "b": "y" * (length - half)},
    )


def test_what_a_command_sends_names_the_record_that_is_too_large(
    settings: Settings, tmp_path: Path
) -> None:
    limit(settings, CLICKS, LIMIT)
    fits = largest(settings)
    before = len(list(reading.read(settings, CLICKS)))
    file = tmp_path / "clicks.jsonl"
    for over, sent in ((-1, True), (0, True), (1, False)):
        lines = [events.encode(click_of(1)), events.encode(click_of(fits + over))]
        file.write_bytes(b"\n".join(lines) + b"\n")
        if sent:
            replay_file.replay_file(settings, file, speed=0, topic=CLICKS, shift_to_now=False)
            before += 2
            assert len(list(reading.read(settings, CLICKS))) == before
            continue
        with pytest.raises(Rejected, match=r"max\.message\.bytes") as refused:
            replay_file.replay_file(settings, file, speed=0, topic=CLICKS, shift_to_now=False)
        assert refused.value.reason == "too_large" and refused.value.field == "record 2"
        assert f"{len(lines[1]):,} bytes" in str(refused.value)


def row_reader(settings: Settings, path: Path) -> RowReader:
    file = open_file(path)
    text = '[items]\n[items.fields]\nitem_id = "sku"\ntitle = "name"\n'
    return RowReader(settings, file, file.digest(), ITEMS, FileMap(text, "map"))


def test_an_import_names_the_row_that_is_too_large_and_is_resumed(
    settings: Settings, tmp_path: Path
) -> None:
    path = tmp_path / "items.csv"
    rows = [f"s{n},{'t' * (900 if n == 7 else 9)}" for n in range(20)]
    path.write_text("\n".join(["sku,name", *rows]) + "\n", encoding="utf-8")
    limit(settings, ITEMS, 700)
    with pytest.raises(Rejected, match=r"\d bytes: .*max\.message\.bytes") as refused:
        sending.send_file(settings, row_reader(settings, path))
    assert (refused.value.reason, refused.value.field) == ("too_large", "row 8")
    limit(settings, ITEMS, 1_048_588)
    result = sending.send_file(settings, row_reader(settings, path))
    assert (result.sent, result.refused) == (20, 0)
    found = {json.loads(r.value)["item_id"] for r in reading.read(settings, ITEMS)}
    assert found == {f"s{n}" for n in range(20)}


def test_an_import_goes_into_a_topic_that_takes_less_than_a_batch(
    settings: Settings, tmp_path: Path
) -> None:
    """kafka-python cuts such a batch in two; no record is too large."""
    path = tmp_path / "items.csv"
    rows = "".join(f"s{n},{'t' * 400}\n" for n in range(200))
    path.write_text("sku,name\n" + rows, encoding="utf-8")
    limit(settings, ITEMS, LIMIT)
    assert sending.send_file(settings, row_reader(settings, path)).sent == 200
    assert len(list(reading.read(settings, ITEMS))) == 200


def test_one_record_of_a_command_that_is_too_large_is_refused_with_the_topic(
    settings: Settings,
) -> None:
    limit(settings, CLICKS, 300)
    with pytest.raises(Rejected, match=r"\d bytes: .*max\.message\.bytes"):
        send.click(
            settings, "u" * 250, "i" * 250, kind="click", weight=1.0, event_id="", impression_id=""
        )
    send.click(settings, "u", "i", kind="click", weight=1.0, event_id="", impression_id="")
    limit(settings, ITEMS, 300)
    with pytest.raises(Rejected, match=r"max\.message\.bytes"):
        send.item(
            settings, "i", title="t" * 1_000, categories=[], tags=[], attributes=[], available=True
        )


def test_item_vectors_take_more_than_an_item_can_have(settings: Settings) -> None:
    """A broker's own limit may be lower than that of `items`; ingest could never go on."""
    topics.ensure_topics(settings, [topics.item_vectors("1")])
    with topics.open_admin(settings) as admin:
        found = topics.shown_configs(settings, admin, [topics.item_vectors("1")])
    assert int(found[topics.item_vectors("1")]["max.message.bytes"]) == 2 * 1024 * 1024
