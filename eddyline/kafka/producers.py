"""Producers, and one function for each kind of record that a caller sends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from kafka import KafkaProducer
from kafka.errors import KafkaError, KafkaTimeoutError, UnknownError
from typing_extensions import override

from eddyline.errors import KafkaUnavailable, Rejected
from eddyline.kafka import clients
from eddyline.kafka.clients import connect
from eddyline.kafka.topics import CLICKS, ITEMS, USERS
from eddyline.schema import events
from eddyline.schema.events import Click, Item, Merge, UserProfile
from eddyline.schema.records import marks
from eddyline.settings.loader import Settings


def now_ms() -> int:
    """The clock of this machine, in milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def sent_to(future: object, settings: Settings) -> tuple[int, int]:
    """(partition, offset) once the broker has the record.

    Raises KafkaUnavailable, KafkaRefused; Rejected where it is too large for the topic.
    """
    try:
        meta = future.get(timeout=settings.kafka_timeout_ms / 1000)  # type: ignore[attr-defined]
    except KafkaError as error:
        raise clients.translate_error(settings, error) from None
    return meta.partition, meta.offset


class Producer(KafkaProducer):  # type: ignore[misc]
    """kafka-python's producer; the futures of the records say what became of them."""

    _closing = False

    @override
    def flush(self, timeout: float | None = None) -> None:
        """Send all that is queued. Raises KafkaTimeoutError.

        timeout: seconds for each batch

        Where a batch is too large for its topic, kafka-python cuts it in two and sends the halves.
        Its `flush` waits for the whole one, and raises UnknownError then.
        """
        with suppress(UnknownError, *((KafkaTimeoutError,) if self._closing else ())):
            super().flush(timeout)

    @override
    def close(self, timeout: float | None = None, null_logger: bool = False) -> None:
        """Close within `timeout` seconds; what cannot be sent by then is given up.

        kafka-python's `close` ends with the error of its `flush`: that would hide the error before
        it, and leave the sending thread.
        """
        self._closing = True
        # Half of the time is for `flush`, half for the end of the thread, which still sends.
        super().close(timeout and timeout / 2, null_logger)


def confirm(settings: Settings, what: str, sent: Sequence[tuple[object, Any, Any]]) -> list[Any]:
    """Return once the broker has these records: their metadata, in order.

    sent: (number or place; event, value or None; future) of each; what: a record, for the message
          of a refusal
    Raises KafkaError; Rejected with the number of the largest record if a size is refused. The
    producer sends nothing more then.
    """
    confirmed: list[Any] = []
    too_large: list[tuple[int, object, KafkaError]] = []
    for number, event, future in sent:
        try:
            confirmed.append(future.get(timeout=settings.kafka_timeout_ms / 1000))
        except KafkaError as error:
            if not clients.is_too_large(error):
                raise
            value = event if event is None or isinstance(event, bytes) else events.encode(event)
            too_large.append((len(value or b""), number, error))
    if too_large:
        # The others of its batch, and those after it, have the same error.
        size, number, refused = max(too_large, key=lambda one: one[0])
        found = clients.translate_error(settings, refused, "Kafka")
        why = found.detail if isinstance(found, Rejected) else found
        raise Rejected("too_large", f"{what} {number}", f"{size:,} bytes: {why}")
    return confirmed


def make_producer(settings: Settings, **more: Any) -> Producer:
    """An idempotent producer that waits for all replicas. more: options of kafka-python."""
    options = {"acks": "all", "enable_idempotence": True, "max_block_ms": settings.kafka_timeout_ms}
    return connect(settings, Producer, **options | more)


def in_time(settings: Settings, call: Callable[[], object]) -> None:
    """Make a call of kafka-python that has no time-out of its own (the end of a transaction).

    Raises what the call raises, and KafkaUnavailable after twice `kafka_timeout_ms`; the call then
    continues in its thread.
    """
    failed: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            failed.append(error)

    timeout_s = 2 * settings.kafka_timeout_ms / 1000
    thread = threading.Thread(target=run, name="kafka-call", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        raise KafkaUnavailable(
            f"the transaction did not end in {timeout_s:.1f} s; the next run will see whether it "
            "stands"
        )
    if failed:
        raise failed[0]


def send(
    producer: KafkaProducer, settings: Settings, event: Click | Merge | Item | UserProfile
) -> Any:
    """Send an event to the topic of its kind. Returns a future."""
    if isinstance(event, Click):
        return send_click(producer, settings, event)
    if isinstance(event, Merge):
        return send_merge(producer, settings, event)
    if isinstance(event, Item):
        return send_item(producer, settings, event)
    return send_profile(producer, settings, event)


def send_click(producer: KafkaProducer, settings: Settings, click: Click) -> Any:
    """Send a click under its user's id, with the clock of this producer. Returns a future."""
    key, value = click.user_id.encode(), events.encode(click)
    headers = [*_stamp(), *marks(settings.clicks_map)]
    return producer.send(settings.prefixed(CLICKS), value, key=key, headers=headers)


def send_merge(producer: KafkaProducer, settings: Settings, merge: Merge) -> Any:
    """Merge a visitor's history into another user's: a record among the visitor's clicks."""
    key, value = merge.user_id.encode(), events.encode(merge)
    headers = [*_stamp(), *marks(settings.clicks_map)]
    return producer.send(settings.prefixed(CLICKS), value, key=key, headers=headers)


def send_item(producer: KafkaProducer, settings: Settings, item: Item) -> Any:
    """Send a whole item under its id."""
    key, value = item.item_id.encode(), events.encode(item)
    headers = [*_stamp(), *marks(settings.items_map)]
    return producer.send(settings.prefixed(ITEMS), value, key=key, headers=headers)


def send_delete(producer: KafkaProducer, settings: Settings, item_id: str) -> Any:
    """Delete an item: a null record under its id."""
    headers = marks(settings.items_map)
    return producer.send(settings.prefixed(ITEMS), None, key=item_id.encode(), headers=headers)


def send_profile(producer: KafkaProducer, settings: Settings, profile: UserProfile) -> Any:
    """Send a user's whole profile under the user's id."""
    key, value, headers = (
        profile.user_id.encode(),
        events.encode(profile),
        marks(settings.users_map),
    )
    return producer.send(settings.prefixed(USERS), value, key=key, headers=headers)


def send_forget(producer: KafkaProducer, settings: Settings, user_id: str) -> Any:
    """Forget a user: a null record under the user's id."""
    headers = marks(settings.users_map)
    return producer.send(settings.prefixed(USERS), None, key=user_id.encode(), headers=headers)


def _stamp() -> list[tuple[str, bytes]]:
    """The header with the producer's clock, in microseconds since 1970."""
    return [("produced_us", str(time.time_ns() // 1000).encode())]
