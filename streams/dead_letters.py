"""Outputs to Kafka besides item records: dead letters, forwarded clicks, forgotten users.

A dead letter has the key `topic/partition/offset`, the original bytes as its value, and these
headers: `reason`, `field`, `detail`, `key` (the original key, if any), `timestamp_ms`, and
`origin_ms`, the time of the first append, of a record that was forwarded or replayed. A null record
has the header `no_value`, as a null value would delete; a value above the limit is cut, and
the headers `truncated_from_bytes` and `sha256` are added. A key above the limit is cut as well; the
header is `key_truncated_from_bytes`. Where the broker takes less than our limits, the letter is
sent again with the first bytes of key and value. A letter of a topic with a map has the record's
own headers too, named `record.…`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kafka import KafkaProducer
from kafka.errors import (
    KafkaError,
    KafkaTimeoutError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
    RetriableError,
)
from typing_extensions import override

from eddyline.errors import KafkaRefused, KafkaUnavailable, Rejected
from eddyline.kafka.clients import lacks_right
from eddyline.kafka.producers import make_producer
from eddyline.kafka.topics import CLICKS, DEAD_LETTER_BYTES_MAX, DEAD_LETTERS, SOURCES
from eddyline.schema import events
from eddyline.schema.erasure import DAY_MS
from eddyline.schema.records import FORMAT, Headers, Record, marks
from eddyline.settings.loader import Settings
from streams.ports import DeadLetterSink, ForgetSink, Forwarder
from streams.records import RESPELLED, coordinates

log = logging.getLogger(__name__)

# The difference is for the key and the headers.
VALUE_BYTES_MAX = DEAD_LETTER_BYTES_MAX - 64 * 1024
KEY_BYTES_MAX = 32 * 1024
# The record's own headers in the letter of a topic with a map, and how much of them is kept.
HEADER_PREFIX = "record."
HEADERS_BYTES_MAX = 16 * 1024
# What is kept of a value and of a key where the broker refuses a dead letter as too large.
SHORT_BYTES = 1_024
# The broker's default limit for a batch with one record is 1 MiB and 12 bytes.
FORWARD_BYTES_MAX = 1024 * 1024
# At most so many bytes of a record are neither key, value nor headers: the head of its batch, and
# lengths.
_FRAME_BYTES = 128
_HEADER_FRAME_BYTES = 10
_STAMP_BYTES_MAX = 32


def outlet_producer(settings: Settings) -> KafkaProducer:
    """The producer of dead letters and forwarded records: sends at once, in order.

    Not an idempotent one: kafka-python's sends nothing more once a broker has refused the size of
    one record. A record that is sent twice counts once: by its event id, its key, or its place.
    """
    return make_producer(
        settings,
        linger_ms=0,
        max_request_size=DEAD_LETTER_BYTES_MAX,
        enable_idempotence=False,
        max_in_flight_requests_per_connection=1,
    )


def record_bytes(
    key: bytes | None, value: bytes | None, headers: Sequence[tuple[str, bytes]]
) -> int:
    """The most bytes that a batch with this record alone takes, uncompressed."""
    named = sum(len(name.encode()) + len(v) + _HEADER_FRAME_BYTES for name, v in headers)
    return _FRAME_BYTES + len(key or b"") + len(value or b"") + named


@dataclass(frozen=True, slots=True)
class _Pending:
    """A record on its way. too_large: queues a smaller one where the broker refuses its size."""

    future: Any
    too_large: Callable[[], None] | None


class Delivery:
    """Sends records and confirms them: `flush` returns once all that were queued before are stored.

    A failed `send` leaves the queued records of other batches in place.
    Thread rule: one batch at a time; the producer may be shared.
    """

    def __init__(self, producer: KafkaProducer, timeout_s: float) -> None:
        self._producer = producer
        self._timeout_s = timeout_s
        self._pending: list[_Pending] = []

    def send(
        self,
        topic: str,
        value: bytes | None,
        too_large: Callable[[], None] | None = None,
        **more: Any,
    ) -> None:
        """Queue a record.

        too_large: called once where the broker refuses the record's size; queues a smaller one.
                   None: that is an error of `flush`
        Raises KafkaUnavailable where Kafka does not answer the metadata request.
        """
        try:
            self._pending.append(_Pending(self._producer.send(topic, value, **more), too_large))
        except (MessageSizeTooLargeError, RecordListTooLargeError):
            if too_large is None:
                raise
            too_large()
        except KafkaError as error:
            raise _translate(topic, error) from error

    def flush(self) -> None:
        """Return once Kafka has stored every queued record.

        An error means: apply all batches that queued records again.
        """
        while self._pending:
            pending, self._pending = self._pending, []
            try:
                self._producer.flush(timeout=self._timeout_s)
                for one in pending:
                    self._confirm(one)
            except KafkaError as error:
                raise _translate("of dead letters or forwarded clicks", error) from error

    def _confirm(self, one: _Pending) -> None:
        try:
            one.future.get(timeout=self._timeout_s)
        except (MessageSizeTooLargeError, RecordListTooLargeError):
            if one.too_large is None:
                raise
            one.too_large()


class KafkaDeadLetters(DeadLetterSink):
    """Writes to the topic `dead-letters`."""

    def __init__(
        self, settings: Settings, producer: KafkaProducer, delivery: Delivery | None = None
    ) -> None:
        """delivery: shared with another output of the same handler; default: one of its own."""
        self._topic = settings.prefixed(DEAD_LETTERS)
        # A map may read headers: a letter of a topic with a map has those of its record.
        self._mapped = {
            settings.prefixed(name) for name in SOURCES if getattr(settings, f"{name}_map")
        }
        self._delivery = delivery or Delivery(producer, settings.kafka_timeout_ms / 1000)

    @override
    def put(self, record: Record, rejected: Rejected) -> None:
        at = coordinates(record)

        def send(key_max: int, value_max: int, too_large: Callable[[], None] | None) -> None:
            value, headers = _letter(record, rejected, key_max, value_max)
            if record.topic in self._mapped:
                headers += _original_headers(record)
            self._delivery.send(self._topic, value, too_large, key=at.encode(), headers=headers)

        # The limits hold for topics that Eddyline makes; another configuration may allow less.
        send(KEY_BYTES_MAX, VALUE_BYTES_MAX, lambda: send(SHORT_BYTES, SHORT_BYTES, None))
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
        self._settings = settings
        self._clicks = settings.prefixed(CLICKS)
        self._delivery = Delivery(producer, settings.kafka_timeout_ms / 1000)
        self._letters = KafkaDeadLetters(settings, producer, self._delivery)

    @override
    def forward(self, record: Record, key: bytes, value: bytes | None, partition: int) -> None:
        name = record.topic.removeprefix(self._settings.prefixed(""))
        own_format = marks(getattr(self._settings, f"{name if name in SOURCES else CLICKS}_map"))
        origin = [
            ("origin", coordinates(record).encode()),
            (events.ORIGIN_MS, str(events.first_append_ms(record)).encode()),
            *own_format,
        ]
        if name != CLICKS and partition == record.partition and key != record.key:
            origin.append(RESPELLED)
        names = {FORMAT, RESPELLED[0], *(name for name, _ in origin)}
        headers = [(n, bytes(v)) for n, v in record.headers if n not in names and v is not None]
        if record_bytes(key, value, [*headers, *origin]) > FORWARD_BYTES_MAX:
            headers = [
                h for h in headers if h[0] == "produced_us" and len(h[1]) <= _STAMP_BYTES_MAX
            ]
            headers = headers[:1]
        size = record_bytes(key, value, [*headers, *origin])
        if size > FORWARD_BYTES_MAX:
            raise _too_large(f"{size:,} bytes with key and origin, {FORWARD_BYTES_MAX:,} allowed")
        refused = _too_large(f"the broker refuses its size; it has {size:,} bytes")
        unsent = _Unsent(record, key, value, own_format)
        self._delivery.send(
            record.topic,
            value,
            lambda: self._letters.put(unsent, refused),
            key=key,
            partition=partition,
            headers=[*headers, *origin],
        )

    @override
    def forget(self, record: Record, user_id: str) -> None:
        """A user's clicks and profile lie in the same partition number."""
        value = events.encode(forget_of(self._settings, record, user_id))
        origin = [("origin", coordinates(record).encode()), *marks(self._settings.clicks_map)]
        self._delivery.send(
            self._clicks, value, key=user_id.encode(), partition=record.partition, headers=origin
        )

    @override
    def flush(self) -> None:
        self._delivery.flush()


class _Unsent:
    """A record that was not forwarded: the coordinates of its origin, its own key and value.

    marks: of a record in Eddyline's own format, see `schema.records`
    """

    def __init__(
        self, origin: Record, key: bytes, value: bytes | None, marks: Sequence[tuple[str, bytes]]
    ) -> None:
        self.topic = origin.topic
        self.partition = origin.partition
        self.offset = origin.offset
        self.timestamp = origin.timestamp
        first_ms = str(events.first_append_ms(origin)).encode()
        self.headers: Headers = [(events.ORIGIN_MS, first_ms), *marks]
        self.key: bytes | None = key
        self.value = value


def _too_large(detail: str) -> Rejected:
    return Rejected("too_large", "", f"in a wrong partition and cannot be forwarded: {detail}")


def _letter(
    record: Record, rejected: Rejected, key_max: int, value_max: int
) -> tuple[bytes, list[tuple[str, bytes]]]:
    """(value, headers) of the dead letter, cut to these lengths."""
    headers = [
        ("reason", rejected.reason.encode()),
        ("field", rejected.field.encode("utf-8", "replace")),
        ("detail", rejected.detail.encode("utf-8", "replace")),
        ("timestamp_ms", str(record.timestamp).encode()),
    ]
    if (first_ms := events.first_append_ms(record)) != record.timestamp:
        headers.append((events.ORIGIN_MS, str(first_ms).encode()))
    if record.key is not None:
        headers.append(("key", bytes(record.key[:key_max])))
        if len(record.key) > key_max:
            headers.append(("key_truncated_from_bytes", str(len(record.key)).encode()))
    if record.value is None:
        headers.append(("no_value", b"1"))
    value = record.value or b""
    if len(value) > value_max:
        # A broker limits the compressed size, not the value itself; the checksum identifies the
        # rest.
        headers.append(("truncated_from_bytes", str(len(value)).encode()))
        headers.append(("sha256", hashlib.sha256(value).hexdigest().encode()))
        value = value[:value_max]
    return value, headers


def _original_headers(record: Record) -> list[tuple[str, bytes]]:
    """The record's headers with `HEADER_PREFIX` in front; those beyond a limit are left out."""
    kept, size = [], 0
    for name, value in record.headers:
        if value is not None and name != events.ORIGIN_MS:
            size += len(name.encode()) + len(value)
            if size > HEADERS_BYTES_MAX:
                break
            kept.append((HEADER_PREFIX + name, bytes(value)))
    return kept


def forget_of(settings: Settings, record: Record, user_id: str) -> events.Forget:
    """The Forget record of a null record in `users`; it carries the settings of now."""
    until_ms = events.first_append_ms(record)
    return events.Forget(
        user_id=user_id,
        forget_until_ms=until_ms,
        keep_after_ms=min(until_ms + settings.far_future_ms_max, events.AT_MS_MAX),
        users_offset=record.offset,
        ends_ms=until_ms + settings.forgotten_kept_d * DAY_MS,
    )


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
