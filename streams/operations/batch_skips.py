"""Give up a batch that cannot be read: its offsets are left out by every reader from then on.

Nothing is given up that can be read, or that ingest has applied. The batch's bytes go into
`dead-letters` first; then the decision is recorded (`eddyline.kafka.skips`), and the readers whose
partition stands in front of the batch go on within some seconds.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Any

import msgspec
from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError

from eddyline import generations
from eddyline.errors import EddylineError, Rejected, SettingsError
from eddyline.kafka import clients, producers, reading, topics
from eddyline.kafka import skips as decisions
from eddyline.kafka.producers import now_ms
from eddyline.kafka.unreadable import UnreadableBatch
from eddyline.schema.records import BuiltRecord
from eddyline.settings.loader import Settings
from eddyline.stores.redis import RedisStore
from streams.dead_letters import KafkaDeadLetters, outlet_producer
from streams.fences import sources

# The reason of the dead letter; such a letter cannot be replayed.
REASON = "unreadable_batch"
_COORDINATES = re.compile(r"([^/]+)/([0-9]{1,9})/([0-9]{1,18})")
_POLL_MS = 200


@dataclass(frozen=True, slots=True)
class GivenUp:
    """What was given up: the batch's coordinates, and the last offset that is left out."""

    at: str
    first: int
    last: int


def skip(settings: Settings, at: str, *, to: int | None = None) -> GivenUp:
    """Give up the batch at these coordinates.

    at: `topic/partition/offset`, as the reader that stopped there names it
    to: the last offset to leave out, where the head of the batch is damaged
    Raises SettingsError for other coordinates, EddylineError for offsets that can be read or were
    applied, Unavailable, KafkaRefused.
    """
    place, name, first = _parsed(settings, at)
    with reading.open_consumer(settings) as consumer:
        known = consumer.partitions_for_topic(place.topic) or set()
        if place.partition not in known:
            raise SettingsError(f"{at}: there is no such partition")
        batch = _unreadable_at(settings, consumer, place, first)
        last = _last(settings, consumer, place, batch, to)
    _refuse_applied(settings, name, batch)
    producer = outlet_producer(settings)
    try:
        letters = KafkaDeadLetters(settings, producer)
        detail = f"offsets {first} to {last}: {batch.reason}: {batch.detail}"
        record = BuiltRecord(place.topic, place.partition, first, now_ms(), None, batch.data)
        letters.put(record, Rejected(REASON, "", detail))
        letters.flush()
        log = topics.log_ids(settings, [name])[name]
        value = msgspec.json.encode(decisions.Skip(str(log), last, batch.reason))
        sent = producer.send(
            settings.prefixed(topics.GENERATIONS),
            value,
            key=decisions.key_of(place.topic, place.partition, first),
        )
        producers.sent_to(sent, settings)
    except KafkaError as error:
        raise clients.translate_error(settings, error) from None
    finally:
        producer.close(timeout=1)
    return GivenUp(at, first, last)


def _parsed(settings: Settings, at: str) -> tuple[TopicPartition, str, int]:
    """(partition, topic without prefix, offset)."""
    found = _COORDINATES.fullmatch(at)
    if found is None:
        raise SettingsError(f"{at!r}: expected topic/partition/offset")
    topic, name = found[1], found[1].removeprefix(settings.prefixed(""))
    if topic != settings.prefixed(name) or not reading.can_skip(name):
        raise SettingsError(f"{at!r}: offsets of this topic cannot be skipped")
    return TopicPartition(topic, int(found[2])), name, int(found[3])


def _unreadable_at(
    settings: Settings, consumer: KafkaConsumer, place: TopicPartition, first: int
) -> UnreadableBatch:
    """The batch that stops readers at exactly this offset. Raises EddylineError for none."""
    found = _first_at(settings, consumer, place, first)
    if isinstance(found, UnreadableBatch) and found.base < found.first:
        # Readers that come from before stop at the first offset that they cannot decode.
        reached = found.base
        while not isinstance(
            found := _first_at(settings, consumer, place, reached), UnreadableBatch
        ):
            if found is None:
                break
            reached = found.offset + 1
    if not isinstance(found, UnreadableBatch):
        raise EddylineError(
            f"{place.topic}/{place.partition}/{first} can be read: nothing is skipped"
        )
    if found.first != first:
        raise EddylineError(
            f"{place.topic}/{place.partition}/{first} is not where readers stop: {found}"
        )
    return found


def _first_at(
    settings: Settings, consumer: KafkaConsumer, place: TopicPartition, offset: int
) -> Any | None:
    """The first record or batch that cannot be read from `offset` on; None at the end."""
    consumer.assign([place])
    end = consumer.end_offsets([place])[place]
    if offset >= end:
        return None
    consumer.seek(place, offset)
    deadline = time.monotonic() + settings.kafka_timeout_ms / 1000
    while consumer.position(place) < end:
        for records in consumer.poll(timeout_ms=_POLL_MS, max_records=1).values():
            return records[0]
        if time.monotonic() > deadline:
            raise EddylineError(
                f"{place.topic}/{place.partition}/{offset}: Kafka returned nothing within "
                f"{settings.kafka_timeout_ms} ms. If the batch's length is damaged, the broker "
                "itself cannot pass it: move the beginning of the log with kafka-delete-records"
            )
    return None


def _last(
    settings: Settings,
    consumer: KafkaConsumer,
    place: TopicPartition,
    batch: UnreadableBatch,
    to: int | None,
) -> int:
    """The last offset to leave out. Raises EddylineError, SettingsError for a bad `to`."""
    if to is None:
        if batch.last is None:
            raise EddylineError(
                f"{batch.at}: it is not known where the batch ends ({batch.reason}). "
                "Name the last offset to give up: --to OFFSET"
            )
        return batch.last
    end = consumer.end_offsets([place])[place]
    if not batch.first <= to < end:
        raise SettingsError(f"--to {to}: must lie in {batch.first}..{end - 1}")
    if batch.last is not None and to != batch.last:
        raise SettingsError(f"--to {to}: the batch ends with offset {batch.last}")
    following = _first_at(settings, consumer, place, to + 1)
    if isinstance(following, UnreadableBatch) and following.last is None:
        raise EddylineError(
            f"--to {to}: what follows cannot be read either. Name a later offset; or move the "
            "beginning of the log with kafka-delete-records"
        )
    return to


def _refuse_applied(settings: Settings, name: str, batch: UnreadableBatch) -> None:
    """Raise EddylineError where ingest has applied the offset: another reader lacks a codec."""
    if name not in topics.SOURCES:
        return
    store = RedisStore(settings)
    try:
        store.check()
        known = generations.known(settings) if name == topics.ITEMS else ()
        fences = [
            fence
            for source, slots in sources(settings, name, batch.partition, known).items()
            for fence in store.fences(source, slots).values()
        ]
    finally:
        store.close()
    if all(fence is not None and fence.offset >= batch.first for fence in fences):
        raise EddylineError(
            f"{batch.at}: ingest has applied this offset. The reader that cannot read it lacks "
            "something that ingest has (a codec, a version): nothing is skipped"
        )
