"""Errors of Kafka while ingest runs: found in the consumer group, or by a connection check."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

import msgspec
import pytest
from aiokafka.errors import GroupAuthorizationFailedError, KafkaError

from eddyline.errors import KafkaRefused, KafkaUnavailable
from eddyline.kafka import diagnostics
from eddyline.settings.loader import Settings
from streams.consumer import errors
from streams.consumer.thread import ConsumerThread

SETTINGS = Settings(kafka_bootstrap_servers="127.0.0.1:1", kafka_timeout_ms=300)


class Coordinator:
    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def check_errors(self) -> None:
        if self.error is not None:
            raise self.error


class Thread(ConsumerThread):
    """The consumer's thread, without its loop."""

    def __init__(self, coordinator: Coordinator | None) -> None:
        self._consumer: Any = type("Consumer", (), {"_coordinator": coordinator})()

    async def _call(self, work: Coroutine[Any, Any, Any]) -> Any:
        return await work


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_GROUP_CHECK_S", 0.01)
    monkeypatch.setattr(errors, "_CONNECTION_CHECK_S", 0.05)


def watched(settings: Settings, thread: Thread, limit_s: float = 5.0) -> None:
    async def within() -> None:
        await asyncio.wait_for(errors.watch_consumer(settings, thread), limit_s)

    asyncio.run(within())


def test_a_missing_right_in_the_group_is_raised() -> None:
    with pytest.raises(KafkaRefused, match=r"lacks a right.*the-group"):
        watched(SETTINGS, Thread(Coordinator(GroupAuthorizationFailedError("the-group"))))


def test_another_error_of_the_coordinator_is_raised_as_it_is() -> None:
    with pytest.raises(KafkaError, match="something else"):
        watched(SETTINGS, Thread(Coordinator(KafkaError("something else"))))


def test_without_a_consumer_or_a_coordinator_nothing_is_checked() -> None:
    bare = Thread(None)
    bare._consumer = None
    for thread in (bare, Thread(None), Thread(Coordinator())):
        with pytest.raises(TimeoutError):
            watched(SETTINGS, thread, limit_s=0.2)


def test_a_password_that_is_no_longer_valid_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Settings] = []

    def check(settings: Settings) -> None:
        checked.append(settings)
        raise KafkaUnavailable("away") if len(checked) < 3 else KafkaRefused("another password")

    monkeypatch.setattr(diagnostics, "check_connection", check)
    secured = msgspec.structs.replace(SETTINGS, kafka_security_protocol="SSL")
    with pytest.raises(KafkaRefused, match="another password"):
        watched(secured, Thread(Coordinator()))
    assert len(checked) == 3
    with pytest.raises(TimeoutError):  # a plain connection is not checked
        watched(SETTINGS, Thread(Coordinator()), limit_s=0.2)
    assert len(checked) == 3


def test_only_the_stack_traces_of_missing_rights_are_dropped() -> None:
    def record(error: Exception | None) -> logging.LogRecord:
        exc_info = (type(error), error, None) if error else None
        return logging.LogRecord("mode", logging.ERROR, "", 0, "crashed", None, exc_info)

    keep = errors.WithoutTraceback().filter
    assert not keep(record(GroupAuthorizationFailedError("g")))
    assert not keep(record(KafkaRefused("topic t: [Error 29] TopicAuthorizationFailedError")))
    assert keep(record(ValueError("x"))) and keep(record(None))
