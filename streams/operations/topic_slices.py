"""Slices of the topics: the offsets that a command line names, and their records in apply order."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from kafka import KafkaConsumer, TopicPartition

from eddyline.errors import SettingsError
from eddyline.kafka import reading
from eddyline.kafka.topics import CLICKS, ITEMS, USERS
from eddyline.settings.loader import Settings

# By partition, the first offset and the one after the last.
Slices = dict[TopicPartition, tuple[int, int]]
# A partition that gives no record for this long, before the slice's end, is not being served.
_STALLED_S = 30.0


def between(settings: Settings, begin: str, end: str) -> Slices:
    """The offsets [begin, end) of each partition of clicks, users and items.

    begin, end: as for `state_replay.run`. Raises SettingsError, KafkaUnavailable.
    """
    counts = {
        CLICKS: settings.clicks_partitions,
        USERS: settings.clicks_partitions,
        ITEMS: settings.items_partitions,
    }
    partitions = [
        TopicPartition(settings.prefixed(t), p) for t, n in counts.items() for p in range(n)
    ]
    with reading.open_consumer(settings) as consumer:
        oldest = consumer.beginning_offsets(partitions)
        ends = consumer.end_offsets(partitions)
        lows = _bound(settings, consumer, "--from", begin, oldest, ends)
        highs = _bound(settings, consumer, "--to", end, oldest, ends)
    return {p: (lows[p], max(lows[p], highs[p])) for p in partitions}


def _bound(
    settings: Settings,
    consumer: KafkaConsumer,
    option: str,
    text: str,
    oldest: Mapping[TopicPartition, int],
    ends: Mapping[TopicPartition, int],
) -> dict[TopicPartition, int]:
    """The offset that `text` means in each partition, within what Kafka has."""
    if text == "earliest":
        return dict(oldest)
    if text == "latest":
        return dict(ends)
    if "=" in text:
        named = _named_offsets(settings, option, text)
        if unknown := named.keys() - ends.keys():
            place = min(unknown)
            raise SettingsError(f"{option}: there is no partition {place.topic}:{place.partition}")
        return dict(oldest) | {p: min(max(o, oldest[p]), ends[p]) for p, o in named.items()}
    at_ms = _time_ms(option, text)
    found = consumer.offsets_for_times(dict.fromkeys(ends, at_ms))
    return {p: end if found[p] is None else found[p].offset for p, end in ends.items()}


def _named_offsets(settings: Settings, option: str, text: str) -> dict[TopicPartition, int]:
    named = {}
    for part in text.split(","):
        try:
            name, _, rest = part.partition(":")
            partition, offset = (int(number) for number in rest.split("="))
        except ValueError:
            raise SettingsError(f"{option} {part!r}: expected topic:partition=offset") from None
        named[TopicPartition(settings.prefixed(name), partition)] = offset
    return named


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
    """(partition, its records in apply order): items' partitions, then those of clicks and users.

    Use up each iterator before the next partition. Raises KafkaUnavailable.
    """

    skips = reading.skips(settings)

    def read(consumer: KafkaConsumer, name: str, partition: int) -> Iterator[Any]:
        place = TopicPartition(settings.prefixed(name), partition)
        return reading.read_slices(
            consumer, {place: slices[place]}, stall_s=_STALLED_S, skips=skips
        )

    with reading.open_consumer(settings) as one, reading.open_consumer(settings) as other:
        for p in range(settings.items_partitions):
            yield p, read(one, ITEMS, p)
        for p in range(settings.clicks_partitions):
            clicks, profiles = read(one, CLICKS, p), read(other, USERS, p)
            yield p, heapq.merge(profiles, clicks, key=lambda record: record.timestamp)
