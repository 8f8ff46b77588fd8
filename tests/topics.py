"""What lies in the topics of a namespace, read whole; and its popularity counts, made by hand."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kafka import KafkaConsumer, TopicPartition

from eddyline.errors import Rejected
from eddyline.kafka import clients, reading
from eddyline.kafka import topics as kafka_topics
from eddyline.kafka.unreadable import UnreadableBatch
from eddyline.schema import events
from eddyline.schema.events import Click
from eddyline.schema.partitioning import partition_of
from eddyline.settings.loader import Settings

READ_S = 180.0


@dataclass
class Topics:
    """Every committed record of a namespace, by topic, sorted by partition and offset.

    logs: which log each source topic is
    """

    records: dict[str, list[Any]]
    logs: Mapping[str, Any]

    @classmethod
    def read(
        cls,
        settings: Settings,
        generation: str = "1",
        timeout_s: float = READ_S,
        known: Mapping[str, list[Any]] | None = None,
    ) -> Topics:
        """Read them all. Raises KafkaUnavailable, and TimeoutError where an end is not reached.

        known: topics that are not read, and their records
        """
        names = [
            *kafka_topics.SOURCES,
            kafka_topics.DEAD_LETTERS,
            kafka_topics.item_vectors(generation),
        ]
        found = dict(known or {})
        found |= {n: read_all(settings, n, timeout_s) for n in names if n not in found}
        return cls(found, kafka_topics.log_ids(settings, kafka_topics.SOURCES))

    def by_partition(self, name: str) -> dict[int, list[Any]]:
        """The records of one topic, oldest first."""
        parts: dict[int, list[Any]] = {}
        for record in self.records[name]:
            parts.setdefault(record.partition, []).append(record)
        return parts


def read_all(settings: Settings, name: str, timeout_s: float = READ_S) -> list[Any]:
    """Every committed record of a topic that was not skipped, by partition and offset."""
    topic, skips = settings.prefixed(name), reading.skips(settings)
    consumer = KafkaConsumer(
        **clients.client_options(settings),
        group_id=None,
        isolation_level="read_committed",
        max_poll_records=5_000,
        max_partition_fetch_bytes=4 * 1024 * 1024,
    )
    try:
        at = [TopicPartition(topic, p) for p in consumer.partitions_for_topic(topic) or ()]
        consumer.assign(at)
        consumer.seek_to_beginning(*at)
        ends, records = consumer.end_offsets(at), []
        deadline = time.monotonic() + timeout_s
        while any(consumer.position(p) < end for p, end in ends.items()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{topic} could not be read to its end in {timeout_s:.0f} s")
            for place, batch in consumer.poll(timeout_ms=200).items():
                if isinstance(batch[0], UnreadableBatch):
                    after = skips.next_offset(place, batch[0].first)
                    assert after is not None, str(batch[0])
                    consumer.seek(place, after)
                else:
                    records += skips.kept(place, batch)
        return sorted(records, key=lambda r: (r.partition, r.offset))
    finally:
        consumer.close()


def counted_plainly(
    settings: Settings,
    topics: Topics,
    value_of: Callable[[Any], bytes | None] = lambda record: record.value,
) -> tuple[dict[int, dict[str, int]], dict[str, int]]:
    """Popularity, counted event by event without any of ingest's functions.

    Returns bucket -> item -> thousandths of a click, and item -> events.

    value_of: a record's value in Eddyline's own format
    """
    buckets: dict[int, dict[str, int]] = {}
    clicked: dict[str, int] = {}
    for partition, records in topics.by_partition(kafka_topics.CLICKS).items():
        accepted_at: dict[str, int] = {}
        for record in records:
            try:
                event = events.decode_user_event(
                    value_of(record),
                    appended_ms=record.timestamp,
                    far_future_ms_max=settings.far_future_ms_max,
                    id_form=settings.id_form,
                )
            except Rejected:
                continue
            if partition_of(event.user_id, settings.clicks_partitions) != partition:
                continue
            if (event_id := event.event_id) is not None:
                before = accepted_at.get(event_id)
                if before is not None and record.offset - before <= settings.dedupe_window_events:
                    continue
                accepted_at[event_id] = record.offset
            if not isinstance(event, Click) or "eddyline.moved" in (event.context or {}):
                continue
            if more := round(1_000 * event.weight * settings.kind_weights[event.kind]):
                bucket = buckets.setdefault(event.at_ms // (1_000 * settings.popular_bucket_s), {})
                bucket[event.item_id] = bucket.get(event.item_id, 0) + more
                clicked[event.item_id] = clicked.get(event.item_id, 0) + 1
    return buckets, clicked
