"""`eddyline click` and `eddyline item`: send one record, checked by the codec first."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable, Sequence

import msgspec
from kafka import KafkaProducer
from kafka.errors import KafkaTimeoutError

from cli.console import console
from eddyline.errors import KafkaUnavailable, Rejected, SettingsError
from eddyline.kafka import producers, topics
from eddyline.kafka.producers import now_ms, sent_to
from eddyline.schema import events, validation
from eddyline.schema.events import Item, Scalar
from eddyline.settings.loader import Settings


def click(
    settings: Settings,
    user: str,
    item: str,
    *,
    kind: str,
    weight: float,
    event_id: str,
    impression_id: str,
) -> None:
    """Send one click and print its token. Raises Rejected where the codec would refuse it."""
    fields = {
        "user_id": user,
        "item_id": item,
        "kind": kind,
        "weight": weight,
        "event_id": event_id or uuid.uuid4().hex,
        "impression_id": impression_id or None,
        "at_ms": now_ms(),
    }
    checked = events.decode_click(
        msgspec.json.encode(fields),
        appended_ms=now_ms(),
        far_future_ms_max=60_000,
        id_form=settings.id_form,
    )
    partition, offset = _send(
        settings,
        lambda producer: producers.send_click(producer, settings, checked),
        len(events.encode(checked)),
    )
    console.print(f"sent: {topics.CLICKS}/{partition}/{offset}")
    console.print(f"then: {sys.argv[0]} query {user} --after {partition}/{offset}")


def item(
    settings: Settings,
    item_id: str,
    *,
    title: str,
    categories: list[str],
    tags: list[str],
    attributes: Sequence[str],
    available: bool,
) -> None:
    """Send one whole item. Raises Rejected where the codec would refuse it, SettingsError."""
    validation.check_may_send(settings, topics.ITEMS)
    fields = {
        "item_id": item_id,
        "title": title,
        "categories": categories,
        "tags": tags,
        "attributes": dict(map(_attribute, attributes)),
        "available": available,
        "at_ms": now_ms(),
    }
    checked: Item = events.decode_item(
        msgspec.json.encode(fields),
        key=item_id,
        appended_ms=now_ms(),
        far_future_ms_max=60_000,
        vector_dimension=0,
        id_form=settings.id_form,
    )
    partition, offset = _send(
        settings,
        lambda producer: producers.send_item(producer, settings, checked),
        len(events.encode(checked)),
    )
    console.print(f"sent: {topics.ITEMS}/{partition}/{offset}")


def delete_item(settings: Settings, item_id: str) -> None:
    """Send the delete of one item. Raises Rejected, SettingsError."""
    validation.check_may_send(settings, topics.ITEMS)
    item_id = events.id_in_form("item_id", item_id, settings.id_form)
    partition, offset = _send(
        settings, lambda producer: producers.send_delete(producer, settings, item_id)
    )
    console.print(f"sent: {topics.ITEMS}/{partition}/{offset} (delete)")


def _send(
    settings: Settings, send: Callable[[KafkaProducer], object], size: int = 0
) -> tuple[int, int]:
    """Send one record whose value has `size` bytes; see `sent_to`."""
    producer = producers.make_producer(settings)
    try:
        return sent_to(send(producer), settings)
    except KafkaTimeoutError:
        raise KafkaUnavailable(
            f"Kafka at {settings.kafka_bootstrap_servers} has no topics in the namespace "
            f"{settings.namespace or '(none)'}: start `eddyline ingest` or the demo first, or set "
            "EDDYLINE_NAMESPACE"
        ) from None
    except Rejected as error:
        raise Rejected(error.reason, "", f"{size:,} bytes: {error.detail}") from None
    finally:
        producer.close(timeout=settings.kafka_timeout_ms / 1000)


def _attribute(text: str) -> tuple[str, Scalar]:
    name, equals, value = text.partition("=")
    if not equals:
        raise SettingsError(f"--attribute {text!r}: expected name=value")
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, value
