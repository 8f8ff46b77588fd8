"""A producer and a broker that stops answering."""

from __future__ import annotations

import threading
import time

import msgspec
import pytest
from kafka.errors import KafkaError, KafkaTimeoutError

from eddyline.kafka import producers, topics
from eddyline.kafka.topics import CLICKS
from eddyline.schema.events import Click
from tests.integration.conftest import OwnServers

CLOSE_S = 1.0
CLICK = Click(user_id="ana", item_id="f", at_ms=1)


def senders() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if "kafka" in type(thread).__module__}


def test_a_producer_closes_in_time_and_without_an_error_where_the_broker_is_frozen(
    own_servers: OwnServers,
) -> None:
    """Else a stop would end in the error of `close`, and the thread would go on sending."""
    settings = msgspec.structs.replace(own_servers.settings, kafka_timeout_ms=5_000)
    topics.ensure_topics(settings, [CLICKS])
    before = senders()
    producer = producers.make_producer(settings)
    producers.sent_to(producers.send_click(producer, settings, CLICK), settings)
    [sender] = senders() - before
    own_servers.pause("kafka")
    try:
        unsent = producers.send_click(producer, settings, CLICK)
        with pytest.raises(KafkaTimeoutError):
            producer.flush(timeout=0.1)
        begun = time.monotonic()
        producer.close(timeout=CLOSE_S)
        assert time.monotonic() - begun < 2 * CLOSE_S
        sender.join(5)
        assert not sender.is_alive()
        with pytest.raises(KafkaError):
            unsent.get(timeout=1)
    finally:
        own_servers.resume("kafka")
