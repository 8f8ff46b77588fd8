"""Topics read up to their present end, and transactions that end in time: for commands, not processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError

from eddyline.errors import KafkaUnavailable
from eddyline.kafka import clients, producers
from eddyline.settings.loader import Settings


def read(settings: Settings, name: str, starts: Mapping[int, int]) -> Iterator[Any]:
    """The committed records of a topic from these offsets (by partition) to its present end.

    Raises KafkaUnavailable where nothing comes for `kafka_timeout_ms`.
    """
    with _consumer(settings) as consumer:
        at = {TopicPartition(settings.prefixed(name), p): start for p, start in starts.items()}
        consumer.assign(list(at))
        for partition, start in at.items():
            consumer.seek(partition, start)
        ends = consumer.end_offsets(list(at)) if at else {}
        patience_s = settings.kafka_timeout_ms / 1000
        deadline = time.monotonic() + patience_s
        while any(consumer.position(p) < end for p, end in ends.items()):
            if time.monotonic() > deadline:
                raise KafkaUnavailable(f"topic {name} could not be read to its end in time")
            for partition, records in consumer.poll(timeout_ms=200, max_records=5_000).items():
                yield from (record for record in records if record.offset < ends[partition])
                deadline = time.monotonic() + patience_s


def offsets_at(
    settings: Settings, name: str, partitions: Collection[int], since_ms: int
) -> dict[int, int]:
    """Where the records of that time (the broker's clock, ms) and later begin, by partition."""
    with _consumer(settings) as consumer:
        times = {TopicPartition(settings.prefixed(name), p): since_ms for p in partitions}
        ends, found = consumer.end_offsets(list(times)), consumer.offsets_for_times(times)
        return {p.partition: found[p].offset if found.get(p) else ends[p] for p in times}


def in_time(settings: Settings, call: Callable[[], object]) -> None:
    """Make a call of kafka-python that would wait for ever where Kafka is away. Raises what it raises."""
    try:
        producers.in_time(call, 2 * settings.kafka_timeout_ms / 1000)
    except TimeoutError as error:
        raise KafkaUnavailable(f"{error}; the next run will see whether it stands") from None


@contextmanager
def _consumer(settings: Settings) -> Iterator[KafkaConsumer]:
    consumer = clients.connect(
        settings,
        KafkaConsumer,
        group_id=None,
        enable_auto_commit=False,
        isolation_level="read_committed",
    )
    try:
        yield consumer
    except KafkaError as error:
        raise clients.translate_error(settings, error) from None
    finally:
        consumer.close()
