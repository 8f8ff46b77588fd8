"""Topics that a broker or a colleague made before: named, completed while empty, never cemented."""

from __future__ import annotations

import msgspec
import pytest
from kafka import KafkaProducer
from kafka.admin import NewTopic

from cli.commands import topics as command
from eddyline.errors import EddylineError, LogMismatch
from eddyline.kafka import topic_checks, topics
from eddyline.kafka.clients import client_options
from eddyline.settings.loader import Settings


def make(settings: Settings, name: str, partitions: int, **configs: str) -> str:
    """A topic as someone else makes it."""
    topic = settings.prefixed(name)
    with topics.open_admin(settings) as admin:
        admin.create_topics([NewTopic(topic, partitions, 1, topic_configs=configs)])
        admin.wait_for_topics([topic], timeout_ms=10_000)
    return topic


def partitions(settings: Settings, name: str) -> int:
    return len(topics.end_offsets(settings, name))


def test_findings_are_printed_with_their_command_until_they_are_mended(
    fresh_settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = fresh_settings
    configs = {"cleanup.policy": "compact", "message.timestamp.type": "CreateTime"}
    topic = make(settings, topics.CLICKS, settings.clicks_partitions, **configs)
    with pytest.raises(EddylineError, match="8 findings"):
        command.check(settings)
    printed = capsys.readouterr().out
    assert f"{topic}: cleanup.policy is compact, not delete" in printed
    assert f"{topic}: message.timestamp.type is CreateTime" in printed
    assert printed.count("does not exist") == 6 and "eddyline topics create" in printed
    command.create(settings)
    assert f"made {settings.prefixed(topics.ITEMS)}" in capsys.readouterr().out
    with pytest.raises(EddylineError, match="2 findings"):
        command.check(settings)
    other = msgspec.structs.replace(settings, namespace=settings.namespace + "-other")
    command.create(other)
    capsys.readouterr()
    command.check(other)
    assert "keep what Eddyline needs" in capsys.readouterr().out
    command.create(other)
    assert "0 topics made" in capsys.readouterr().out


def test_an_empty_topic_gets_its_partitions_and_one_with_records_does_not(
    fresh_settings: Settings,
) -> None:
    settings = fresh_settings
    clicks = make(settings, topics.CLICKS, 1)
    assert clicks in topics.ensure_topics(settings)
    assert partitions(settings, topics.CLICKS) == settings.clicks_partitions
    other = msgspec.structs.replace(settings, namespace=settings.namespace + "-used")
    used = make(other, topics.ITEMS, 1)
    producer = KafkaProducer(**client_options(other))
    producer.send(used, b"{}", b"i").get(timeout=10)
    producer.close(timeout=10)
    with pytest.raises(LogMismatch, match=f"topic {used} has 1 partitions, the settings"):
        topics.ensure_topics(other)
    assert partitions(other, topics.ITEMS) == 1


def test_too_many_partitions_are_refused_though_the_topic_is_empty(
    fresh_settings: Settings,
) -> None:
    many = fresh_settings.clicks_partitions + 1
    make(fresh_settings, topics.CLICKS, many)
    with pytest.raises(LogMismatch, match=f"has {many} partitions"):
        topics.ensure_topics(fresh_settings)
    assert topic_checks.check_topics(fresh_settings)
