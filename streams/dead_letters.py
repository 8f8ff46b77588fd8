"""Outputs to Kafka besides item records: dead letters, forwarded clicks, forgotten users.

A dead letter has the key `topic/partition/offset`, the original bytes as its value, and these
headers: `reason`, `field`, `detail`, `key` (the original key, if any), `timestamp_ms`. A null
record has the header `no_value`, as a null value would delete; a value above the limit is cut, and
the headers `truncated_from_bytes` and `sha256` are added.
"""

from __future__ import annotations

import hashlib
import logging
from typing import Any

from kafka import KafkaProducer
from kafka.errors import KafkaError, KafkaTimeoutError, RetriableError
from typing_extensions import override

from eddyline.errors import KafkaRefused, KafkaUnavailable, Rejected
from eddyline.kafka.clients import lacks_right
from eddyline.kafka.producers import make_producer
from eddyline.kafka.topics import CLICKS, DEAD_LETTER_BYTES_MAX, DEAD_LETTERS
from eddyline.schema import events
from eddyline.settings.loader import Settings
from streams.ports import DeadLetterSink, ForgetSink, Forwarder, Record, coordinates

log = logging.getLogger(__name__)

# The difference is for the key and the headers.
VALUE_BYTES_MAX = DEAD_LETTER_BYTES_MAX - 64 * 1024
# The broker's limit for a record of `clicks` is 1 MiB; forwarding adds the key and `origin`.
FORWARD_BYTES_MAX = 1024 * 1024 - 16 * 1024


def outlet_producer(settings: Settings) -> KafkaProducer:
    """The producer of dead letters and forwarded records: sends at once, in order."""
    return make_producer(settings, linger_ms=0, max_request_size=DEAD_LETTER_BYTES_MAX)


class Delivery:
    """Sends records and confirms them.

    Thread rule: one batch at a time; the producer may be shared.
    """

    def __init__(self, producer: KafkaProducer, timeout_s: float) -> None:
        self._producer = producer
        self._timeout_s = timeout_s
        self._sent: list[Any] = []

    def send(self, topic: str, value: bytes, **more: Any) -> None:
        """Queue a record.

        Raises KafkaUnavailable where Kafka does not answer the metadata request.
        """
        try:
            self._sent.append(self._producer.send(topic, value, **more))
        except KafkaError as error:
            self._sent.clear()
            raise _translate(topic, error) from error

    def flush(self) -> None:
        """Return once Kafka has stored every queued record.

        An error means: apply the batch again.
        """
        sent, self._sent = self._sent, []
        if not sent:
            return
        try:
            self._producer.flush(timeout=self._timeout_s)
            for future in sent:
                future.get(timeout=self._timeout_s)
        except KafkaError as error:
            raise _translate("of dead letters or forwarded clicks", error) from error


class KafkaDeadLetters(DeadLetterSink):
    """Writes to the topic `dead-letters`."""

    def __init__(self, settings: Settings, producer: KafkaProducer) -> None:
        self._topic = settings.prefixed(DEAD_LETTERS)
        self._delivery = Delivery(producer, settings.kafka_timeout_ms / 1000)

    @override
    def put(self, record: Record, rejected: Rejected) -> None:
        at = coordinates(record)
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
            # A broker limits the compressed size, not the value itself; the checksum identifies the
            # rest.
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

    @override
    def flush(self) -> None:
        self._delivery.flush()


class KafkaForwarder(Forwarder, ForgetSink):
    """Writes to the record's own topic, and forgotten users to `clicks`."""

    def __init__(self, settings: Settings, producer: KafkaProducer) -> None:
        self._clicks = settings.prefixed(CLICKS)
        self._delivery = Delivery(producer, settings.kafka_timeout_ms / 1000)

    @override
    def forward(self, record: Record, key: bytes, value: bytes, partition: int) -> None:
        headers = [(n, bytes(v)) for n, v in record.headers if n != "origin" and v is not None]
        headers.append(("origin", coordinates(record).encode()))
        self._delivery.send(record.topic, value, key=key, partition=partition, headers=headers)

    @override
    def forget(self, record: Record, user_id: str) -> None:
        """A user's clicks and profile lie in the same partition number."""
        value = events.encode(events.Forget(user_id=user_id, forget_until_ms=record.timestamp))
        origin = [("origin", coordinates(record).encode())]
        self._delivery.send(
            self._clicks, value, key=user_id.encode(), partition=record.partition, headers=origin
        )

    @override
    def flush(self) -> None:
        self._delivery.flush()


def _translate(topic: str, error: KafkaError) -> Exception:
    """KafkaUnavailable where a retry may help, KafkaRefused for a missing right, else as it is."""
    if lacks_right(error):
        return KafkaRefused(
            f"topic {topic}: {error}; docs/security.md lists the rights that Eddyline needs"
        )
    if isinstance(error, RetriableError | KafkaTimeoutError) or getattr(error, "retriable", False):
        return KafkaUnavailable(f"topic {topic}: {type(error).__name__}: {error}")
    other: Exception = error
    return other
