"""Reads the topics from Kafka, all partitions by one consumer outside of any group.

So no rebalance and no other process can take a partition away.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError

from eddyline.errors import LogMismatch
from eddyline.kafka import clients, reading
from eddyline.kafka.producers import now_ms
from eddyline.kafka.skips import Stops
from eddyline.kafka.topics import ARCHIVED, ITEMS
from eddyline.settings.loader import Settings
from evaluation.judge.merging import Decoder, Group, Merge, Place

log = logging.getLogger(__name__)

# Records of a partition that wait for those of the others; beyond it the partition is paused.
BUFFER_MAX = 2_000
_POLL_MS = 500
# A fetch waits for more records: one for each click would cost more than the judge's own work.
_FETCH_BYTES = 65_536
# A partition of which nothing came for so long does not hold up the others.
SILENT_S = 10.0


def places(settings: Settings) -> list[Place]:
    """Every partition of the topics."""
    return [
        (topic, partition)
        for topic in ARCHIVED
        for partition in range(
            settings.items_partitions if topic == ITEMS else settings.clicks_partitions
        )
    ]


class LogReader:
    """The topics' records in groups, from given offsets on. Thread rule: one thread.

    positions: the offset after the last record of each partition that left in a group
    """

    def __init__(
        self,
        settings: Settings,
        consumer: KafkaConsumer,
        decoder: Decoder,
        positions: Mapping[Place, int],
    ) -> None:
        """positions: where to begin; absent ones: at the oldest record that Kafka has"""
        self._settings = settings
        self._consumer = consumer
        self._decoder = decoder
        self._at = {
            TopicPartition(settings.prefixed(topic), partition): (topic, partition)
            for topic, partition in places(settings)
        }
        self._merge = Merge(list(self._at.values()), settings.judge_wait_s, BUFFER_MAX)
        self._stops = Stops(reading.skips(settings))
        consumer.assign(list(self._at))
        oldest = consumer.beginning_offsets(list(self._at))
        ends = consumer.end_offsets(list(self._at))
        self.positions: dict[Place, int] = {}
        for at, place in self._at.items():
            first = positions.get(place, oldest[at])
            if first > ends[at]:
                raise LogMismatch(
                    f"{at.topic}/{at.partition}: the judge's checkpoint is at offset {first}, but "
                    f"the log ends before {ends[at]}: Kafka lost records. Remove the checkpoint to "
                    "begin anew"
                )
            if first < oldest[at]:
                log.warning(
                    "records are gone that were not judged",
                    extra={"at": f"{at.topic}/{at.partition}/{first}", "next": oldest[at]},
                )
                first = oldest[at]
            self.positions[place] = first
            consumer.seek(at, first)
        self._came_s = dict.fromkeys(self._at.values(), time.monotonic())
        self._ended: set[Place] = set()

    def read(self) -> None:
        """Fetch what is there, for half a second at most."""
        self._stops.resume_skipped(self._consumer, lambda: reading.skips(self._settings))
        for at, place in self._at.items():
            full = self._merge.size(place) >= BUFFER_MAX
            if at not in self._stops.stopped and full != (at in self._consumer.paused()):
                (self._consumer.pause if full else self._consumer.resume)(at)
        fetched = self._consumer.poll(timeout_ms=_POLL_MS, max_records=clients.ALL_FETCHED)
        now_s = time.monotonic()
        for at, records in fetched.items():
            place = self._at[at]
            self._came_s[place] = now_s
            kept = self._stops.readable(self._consumer, at, records)
            self._merge.add(place, [self._decoder.decode(place[0], one, now_s) for one in kept])
        self._ended = {place for at, place in self._at.items() if self._is_at_end(at, now_s)}

    def next(self) -> Group | None:
        """The next group; None while none is complete."""
        group = self._merge.next(self._ended, time.monotonic(), now_ms())
        for one in () if group is None else group.records:
            self.positions[one.topic, one.record.partition] = one.record.offset + 1
        return group

    def lag_s(self) -> float:
        """How long the oldest record that was read waits for more than its time, in seconds."""
        if (oldest_ms := self._merge.oldest_ms()) is None:
            return 0.0
        return max(0.0, time.time() - oldest_ms / 1_000 - self._settings.judge_wait_s)

    def is_past(self, started_ms: int) -> bool:
        """Whether a record that waits was appended before this time."""
        oldest_ms = self._merge.oldest_ms()
        return oldest_ms is not None and oldest_ms < started_ms

    def behind(self) -> dict[str, int]:
        """Topic -> offsets that are not judged yet, as far as the broker has reported them."""
        found = dict.fromkeys(ARCHIVED, 0)
        for at, (topic, partition) in self._at.items():
            end = self._consumer.highwater(at) or self.positions[topic, partition]
            found[topic] += max(0, end - self.positions[topic, partition])
        return found

    def _is_at_end(self, at: TopicPartition, now_s: float) -> bool:
        """Whether nothing more of the partition is to be waited for now."""
        if at in self._stops.stopped or now_s - self._came_s[self._at[at]] > SILENT_S:
            return True
        end = self._consumer.highwater(at)
        return end is not None and self._consumer.position(at) >= end


@contextmanager
def open_reader(
    settings: Settings, decoder: Decoder, positions: Mapping[Place, int]
) -> Iterator[LogReader]:
    """A reader, closed at the end.

    Raises KafkaUnavailable, KafkaRefused, LogMismatch; inside the block errors of the consumer
    become the same.
    """
    consumer = clients.connect(
        settings,
        KafkaConsumer,
        group_id=None,
        enable_auto_commit=False,
        auto_offset_reset="earliest",  # where retention removes the next record
        isolation_level="read_committed",
        fetch_min_bytes=_FETCH_BYTES,
        fetch_max_wait_ms=_POLL_MS,
        max_partition_fetch_bytes=clients.PARTITION_FETCH_BYTES,
        max_poll_records=clients.ALL_FETCHED,
    )
    try:
        yield LogReader(settings, consumer, decoder, positions)
    except (KafkaError, OSError) as error:
        raise clients.translate_error(settings, error) from None
    finally:
        consumer.close()
