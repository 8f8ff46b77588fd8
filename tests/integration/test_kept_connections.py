"""Reads over connections that stay open, on a real broker."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import pytest

from eddyline.errors import KafkaUnavailable
from eddyline.kafka import kept, producers, reading, topics
from eddyline.kafka.kept import KeptKafka
from eddyline.kafka.topics import GENERATIONS
from eddyline.settings.loader import Settings
from tests.integration.conftest import OwnServers


def write(settings: Settings, values: Mapping[bytes, bytes | None]) -> None:
    producer = producers.make_producer(settings)
    try:
        for key, value in values.items():
            producer.send(settings.prefixed(GENERATIONS), value, key=key).get(timeout=10)
    finally:
        producer.close(timeout=5)


def counted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[int]:
    """One entry for each call of a function that is replaced by itself."""
    calls, original = list[int](), getattr(module, name)

    def call(*arguments: Any, **more: Any) -> Any:
        calls.append(1)
        return original(*arguments, **more)

    monkeypatch.setattr(module, name, call)
    return calls


def remade(settings: Settings) -> None:
    """The topic without records, as another log."""
    topics.delete_topics(settings, [GENERATIONS])
    topics.ensure_topics(settings, [GENERATIONS])


@pytest.fixture
def settings(fresh_settings: Settings) -> Settings:
    topics.ensure_topics(fresh_settings, [GENERATIONS])
    return fresh_settings


def test_only_what_is_new_is_read_over_one_connection(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(settings, {f"k{n}".encode(): b"1" for n in range(50)})
    admins = counted(monkeypatch, topics, "open_admin")
    consumers = counted(monkeypatch, reading, "open_consumer")
    read, original = list[int](), reading.read_slices

    def slices(*arguments: Any, **more: Any) -> Any:
        for record in original(*arguments, **more):
            read.append(record.offset)
            yield record

    monkeypatch.setattr(reading, "read_slices", slices)
    with KeptKafka(settings) as connections:
        assert len(connections.latest(GENERATIONS)) == 50 and len(read) == 50
        write(settings, {b"k0": b"2", b"k1": None, b"new": b"3"})
        found = connections.latest(GENERATIONS)
        assert (found[b"k0"], found[b"new"], b"k1" in found) == (b"2", b"3", False)
        # The last record of before is compared, the three new ones are applied.
        assert len(read) == 54
        ids = [connections[GENERATIONS] for _ in range(3)]
        assert (len(admins), len(consumers)) == (1, 1)
        assert [*found.items()] == [*reading.latest(settings, GENERATIONS).items()]
        assert set(ids) == {topics.log_ids(settings, [GENERATIONS])[GENERATIONS]}


@pytest.mark.parametrize("more", [0, 1, 2, 7])
def test_a_topic_that_was_made_anew_is_read_from_its_beginning(
    settings: Settings, more: int
) -> None:
    """Also where it is as long as before, or longer."""
    write(settings, {b"a": b"1", b"b": b"1"})
    with KeptKafka(settings) as connections:
        before = connections[GENERATIONS]
        assert connections.latest(GENERATIONS) == {b"a": b"1", b"b": b"1"}
        remade(settings)
        other = {f"o{n}".encode(): b"2" for n in range(more)}
        write(settings, other)
        assert connections.latest(GENERATIONS) == other
        assert connections[GENERATIONS] != before


@pytest.mark.long
def test_a_broker_that_was_away_is_read_again(own_servers: OwnServers) -> None:
    settings = msgspec.structs.replace(own_servers.settings, kafka_timeout_ms=1_000)
    topics.ensure_topics(settings, [GENERATIONS])
    write(settings, {b"a": b"1"})
    with KeptKafka(settings) as connections:
        log_id = connections[GENERATIONS]
        assert connections.latest(GENERATIONS) == {b"a": b"1"}
        calls: list[Callable[[], object]] = [
            lambda: connections.latest(GENERATIONS),
            lambda: connections[GENERATIONS],
        ]
        own_servers.pause("kafka")
        try:
            for call in calls:
                with pytest.raises(KafkaUnavailable):
                    call()
        finally:
            own_servers.resume("kafka")
        assert connections.latest(GENERATIONS) == {b"a": b"1"}
        assert connections[GENERATIONS] == log_id
        own_servers.kill("kafka")
        time.sleep(1)
        deadline = time.monotonic() + 60
        while not own_servers.up("kafka"):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        write(settings, {b"b": b"2"})
        assert connections.latest(GENERATIONS) == {b"a": b"1", b"b": b"2"}
        assert connections[GENERATIONS] == log_id


def test_an_error_of_the_caller_closes_the_connection(settings: Settings) -> None:
    opened = kept._Kept(lambda: topics.open_admin(settings))

    def fail(_: object) -> None:
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        opened.call(fail)
    assert opened._client is None
    assert opened.call(lambda admin: admin.describe_cluster()["cluster_id"])
    opened.close()
