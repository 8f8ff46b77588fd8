"""Where records go that are not applied here: dead letters, and clicks that lie in a foreign partition.

A dead letter has the key `topic/partition/offset`, the original bytes as its value, and headers that say
why: `reason`, `field`, `detail`, `key` (the original key, where there was one), `timestamp_ms`. A record that
had no value at all carries the header `no_value`, since a null would delete; one above the limit is cut, and
carries `truncated_from_bytes` and `sha256`.
"""

from __future__ import annotations

import hashlib
import logging
from typing import Any

from kafka import KafkaProducer
from kafka.errors import KafkaError, KafkaTimeoutError, RetriableError

from eddyline.errors import KafkaRefused, KafkaUnavailable, Rejected
from eddyline.kafka.clients import lacks_right
from eddyline.kafka.producers import make_producer
from eddyline.kafka.topics import CLICKS, DEAD_LETTER_BYTES_MAX, DEAD_LETTERS
from eddyline.schema import events
from eddyline.settings.loader import Settings
from streams.ports import Record

log = logging.getLogger(__name__)

# The rest of a dead letter is for its key and headers.
VALUE_BYTES_MAX = DEAD_LETTER_BYTES_MAX - 64 * 1024
# The broker's own limit for a record of `clicks` is 1 MiB; what is forwarded grows by key and `origin`.
FORWARD_BYTES_MAX = 1024 * 1024 - 16 * 1024


def outlet_producer(settings: Settings) -> KafkaProducer:
    """The producer of this process's dead letters and forwarded records: sends at once, in order."""
    return make_producer(settings, linger_ms=0, max_request_size=DEAD_LETTER_BYTES_MAX)


class Delivery:
    """Sends, and makes sure of it. Thread rule: one chunk at a time; the producer may be shared."""

    def __init__(self, producer: KafkaProducer, timeout_s: float) -> None:
        self._producer = producer
        self._timeout_s = timeout_s
        self._sent: list[Any] = []

    def send(self, topic: str, value: bytes, **more: Any) -> None:
        """Queue a record. Raises KafkaUnavailable where Kafka does not even take the metadata request."""
        try:
            self._sent.append(self._producer.send(topic, value, **more))
        except KafkaError as error:
            self._sent.clear()
            raise _translated(topic, error) from error

    def flush(self) -> None:
        """Return once every queued record is stored by Kafka; else raise, and the chunk is done again."""
        sent, self._sent = self._sent, []
        if not sent:
            return
        try:
            self._producer.flush(timeout=self._timeout_s)
            for future in sent:
                future.get(timeout=self._timeout_s)
        except KafkaError as error:
            raise _translated("of dead letters or forwarded clicks", error) from error


class KafkaDeadLetters:
    """A `DeadLetterSink` in the topic `dead-letters`."""

    def __init__(self, settings: Settings, producer: KafkaProducer) -> None:
        self._topic = settings.prefixed(DEAD_LETTERS)
        self._delivery = Delivery(producer, settings.kafka_timeout_ms / 1000)

    def put(self, record: Record, rejected: Rejected) -> None:
        """See `DeadLetterSink.put`."""
        at = f"{record.topic}/{record.partition}/{record.offset}"
        headers = [
            ("reason", rejected.reason.encode()),
            ("field", rejected.field.encode("utf-8", "replace")),
            ("detail", rejected.detail.encode("utf-8", "replace")),
            ("timestamp_ms", str(record.timestamp).encode()),
        ]
        if record.key is not None:
            headers.append(("key", bytes(record.key)))
        if record.value is None:
            headers.append(("no_value", b"1"))
        value = record.value or b""
        if len(value) > VALUE_BYTES_MAX:
            # A broker limits what is sent compressed, not what it becomes: the rest is told by its checksum.
            headers.append(("truncated_from_bytes", str(len(value)).encode()))
            headers.append(("sha256", hashlib.sha256(value).hexdigest().encode()))
            value = value[:VALUE_BYTES_MAX]
        self._delivery.send(self._topic, value, key=at.encode(), headers=headers)
        log.info(
            "record refused",
            extra={
                "at": at,
                "reason": rejected.reason,
                "field": rejected.field,
                "detail": rejected.detail,
            },
        )

    def flush(self) -> None:
        """See `DeadLetterSink.flush`."""
        self._delivery.flush()


class KafkaForwarder:
    """A `Forwarder` within the record's own topic, and a `ForgetSink`."""

    def __init__(self, settings: Settings, producer: KafkaProducer) -> None:
        self._clicks = settings.prefixed(CLICKS)
        self._delivery = Delivery(producer, settings.kafka_timeout_ms / 1000)

    def forward(self, record: Record, key: bytes, value: bytes, partition: int) -> None:
        """See `Forwarder.forward`."""
        at = f"{record.topic}/{record.partition}/{record.offset}"
        headers = [(n, bytes(v)) for n, v in record.headers if n != "origin" and v is not None]
        headers.append(("origin", at.encode()))
        self._delivery.send(record.topic, value, key=key, partition=partition, headers=headers)

    def forget(self, record: Record, user_id: str) -> None:
        """See `ForgetSink.forget`. A user's clicks lie in the partition that his profile lies in."""
        value = events.encode(events.Forget(user_id=user_id, forget_until_ms=record.timestamp))
        origin = [("origin", f"{record.topic}/{record.partition}/{record.offset}".encode())]
        self._delivery.send(
            self._clicks, value, key=user_id.encode(), partition=record.partition, headers=origin
        )

    def flush(self) -> None:
        """See `Forwarder.flush`."""
        self._delivery.flush()


def _translated(topic: str, error: KafkaError) -> Exception:
    """KafkaUnavailable for what waiting may heal, KafkaRefused for a missing right; others as they are."""
    if lacks_right(error):
        return KafkaRefused(
            f"topic {topic}: {error}; docs/security.md lists the rights that Eddyline needs"
        )
    if isinstance(error, RetriableError | KafkaTimeoutError) or getattr(error, "retriable", False):
        return KafkaUnavailable(f"topic {topic}: {type(error).__name__}: {error}")
    wrong: Exception = error
    return wrong
