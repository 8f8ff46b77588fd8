"""A slice of the topics: which offsets a command line means, and their records in the order to apply them."""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError

from eddyline.errors import KafkaUnavailable, SettingsError
from eddyline.kafka import clients
from eddyline.kafka.topics import CLICKS, ITEMS, USERS
from eddyline.settings.loader import Settings

# By partition, the first offset and the one after the last.
Slices = dict[TopicPartition, tuple[int, int]]
# A partition that gives no record for so long, before the slice's end, is not being served.
_STALLED_S = 30.0


def between(settings: Settings, begin: str, end: str) -> Slices:
    """The offsets of each partition of clicks, users and items, [begin, end). Raises SettingsError."""
    consumer = _consumer(settings)
    try:
        counts = {CLICKS: settings.clicks_partitions, USERS: settings.clicks_partitions}
        counts[ITEMS] = settings.items_partitions
        places = [
            TopicPartition(settings.prefixed(t), p) for t, n in counts.items() for p in range(n)
        ]
        firsts, ends = consumer.beginning_offsets(places), consumer.end_offsets(places)
        lows = _bound(settings, consumer, "--from", begin, firsts, firsts, ends)
        highs = _bound(settings, consumer, "--to", end, firsts, firsts, ends)
    except KafkaError as error:
        raise clients.translate_error(settings, error) from None
    finally:
        consumer.close()
    return {place: (lows[place], max(lows[place], highs[place])) for place in places}


def _bound(
    settings: Settings,
    consumer: Any,
    option: str,
    text: str,
    default: dict[Any, int],
    firsts: dict[Any, int],
    ends: dict[Any, int],
) -> dict[Any, int]:
    """Offsets by partition, none outside of what Kafka has."""
    if text in ("earliest", "latest"):
        return dict(firsts if text == "earliest" else ends)
    if "=" in text:
        found = dict(default)
        for part in text.split(","):
            try:
                name, _, rest = part.partition(":")
                partition, offset = (int(number) for number in rest.split("="))
            except ValueError:
                raise SettingsError(f"{option} {part!r}: expected topic:partition=offset") from None
            place = TopicPartition(settings.prefixed(name), partition)
            if place not in found:
                raise SettingsError(f"{option} {part!r}: there is no such partition")
            found[place] = min(max(offset, firsts[place]), ends[place])
        return found
    at_ms = _time_ms(option, text)
    times = consumer.offsets_for_times({place: at_ms for place in ends})
    return {place: ends[place] if times[place] is None else times[place].offset for place in ends}


def _time_ms(option: str, text: str) -> int:
    if text.isdigit():
        return int(text)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise SettingsError(
            f"{option} {text!r}: expected earliest, latest, a time or topic:partition=offset"
        ) from None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)


def merged(settings: Settings, slices: Slices) -> Iterator[tuple[int, Iterator[Any]]]:
    """(partition, its records in the order to apply them): items' partitions, then clicks' and users'."""
    one, other = _consumer(settings), _consumer(settings)
    try:
        for p in range(settings.items_partitions):
            yield p, _read(one, TopicPartition(settings.prefixed(ITEMS), p), slices)
        for p in range(settings.clicks_partitions):
            mine = _read(one, TopicPartition(settings.prefixed(CLICKS), p), slices)
            people = _read(other, TopicPartition(settings.prefixed(USERS), p), slices)
            yield p, heapq.merge(people, mine, key=lambda record: record.timestamp)
    except KafkaError as error:
        raise clients.translate_error(settings, error) from None
    finally:
        one.close()
        other.close()


def _read(consumer: Any, place: TopicPartition, slices: Slices) -> Iterator[Any]:
    first, end = slices[place]
    if first >= end:
        return
    consumer.assign([place])
    consumer.seek(place, first)
    heard_s = time.monotonic()
    while (position := consumer.position(place)) < end:
        for record in consumer.poll(timeout_ms=500, max_records=2_000).get(place, ()):
            if record.offset < end:
                yield record
        if consumer.position(place) > position:
            heard_s = time.monotonic()
        elif time.monotonic() - heard_s > _STALLED_S:
            raise KafkaUnavailable(f"{place.topic}, partition {place.partition} gave nothing")


def _consumer(settings: Settings) -> Any:
    return clients.connect(
        settings,
        KafkaConsumer,
        group_id=None,
        enable_auto_commit=False,
        isolation_level="read_committed",
    )
