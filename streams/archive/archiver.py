"""From Kafka into files: a consumer group of its own, whose positions are what the files say.

An error of Kafka or of the file system ends `run_once`; whoever calls it waits and calls it again, and what
was not in complete files is read again. The committed offset only tells others how far the archive is.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from kafka.consumer.subscription_state import ConsumerRebalanceListener
from kafka.coordinator.assignors.range import RangePartitionAssignor
from kafka.errors import KafkaError
from kafka.structs import OffsetAndMetadata

from eddyline.archive import Archive
from eddyline.errors import LogMismatch
from eddyline.kafka import clients
from eddyline.kafka import topics as kafka_topics
from eddyline.process import heartbeat
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import LogId
from streams.archive.partition_writer import Forgetting, PartitionWriter, open_partition

log = logging.getLogger(__name__)

GROUP = "archive"
# An hour's file is completed this long after the hour, if no record of a later hour has shown its end: the
# broker's clock may be behind ours by so much.
GRACE_MS = 60_000
_POLL_MS = 500
_POLL_RECORDS = 4_000
_LOOK_S = 1.0
# The shortest that Kafka's defaults allow; a process that is started again does not wait for it.
_SESSION_MS = 6_000


class Archiver(ConsumerRebalanceListener):  # type: ignore[misc]
    """The archive process' loop. Thread rule: one thread; `stop` may be set by any.

    member: a name in the group that outlives a crash, see `streams.static_membership`
    now_ms: this machine's clock; it only says when to look whether an hour is over
    """

    def __init__(
        self,
        settings: Settings,
        archive: Archive,
        stop: threading.Event,
        member: str,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self.rows = 0
        self._settings = settings
        self._archive = archive
        self._stop = stop
        self._member = member
        self._now_ms = now_ms
        self._consumer: Any = None
        self._writers: dict[TopicPartition, PartitionWriter] = {}
        self._new: set[TopicPartition] = set()
        self._committed: dict[TopicPartition, int] = {}
        self._looked_s = 0.0

    def run_once(self, idle: Callable[[], bool] = lambda: False) -> None:
        """Archive until `stop`, or until everything was read and `idle` says so.

        Raises KafkaUnavailable, OSError (both: call again), KafkaRefused and LogMismatch.
        """
        self._consumer = clients.connect(
            self._settings,
            KafkaConsumer,
            group_id=self._settings.prefixed(GROUP),
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            partition_assignment_strategy=[RangePartitionAssignor],
            session_timeout_ms=_SESSION_MS,
            heartbeat_interval_ms=1_000,
            group_instance_id=self._member,
        )
        try:
            topics = [self._settings.prefixed(name) for name in kafka_topics.SOURCES]
            self._consumer.subscribe(topics=topics, listener=self)
            while not self._stop.is_set():
                self._turn()
                if idle():
                    self._commit()
                    return
        except KafkaError as error:
            raise clients.translate_error(self._settings, error) from None
        finally:
            self._let_go(list(self._writers))
            self._new.clear()
            self._close()

    def caught_up(self) -> bool:
        """Whether every record that lay in the topics when this was asked has been taken."""
        places = list(self._consumer.assignment())
        if not places or self._new:
            return False
        return not self._behind(places)

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        """Nothing is read of a partition before its files were looked at."""
        self._new = set(assigned)
        self._consumer.pause(*self._new)

    def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        """What is not complete is read again by the next owner."""
        self._let_go(revoked)
        self._new -= set(revoked)

    def _turn(self) -> None:
        heartbeat.beat(self._settings, "archive")
        batches = self._consumer.poll(
            timeout_ms=0 if self._new else _POLL_MS, max_records=_POLL_RECORDS
        )
        for place, records in batches.items():
            if place in self._writers:
                writer = self._writers[place]
                before = writer.rows
                if records[0].offset > writer.last_read + 1:
                    self._look_for_lost(place, writer)
                writer.append(records)
                self.rows += writer.rows - before
        if self._new:
            self._open()
        if time.monotonic() - self._looked_s >= _LOOK_S:
            self._complete_past_hours()
            self._looked_s = time.monotonic()
        self._commit()

    def _look_for_lost(self, place: TopicPartition, writer: PartitionWriter) -> None:
        """Offsets are missing: markers of transactions, as a rule. Or retention was faster than we are."""
        begin = self._consumer.beginning_offsets([place])[place]
        if begin > writer.last_read + 1:
            log.error(
                "records were gone by retention before they were archived",
                extra={
                    "topic": place.topic,
                    "partition": place.partition,
                    "first": writer.last_read + 1,
                    "last": begin - 1,
                },
            )
            writer.skip_to(begin)

    def _open(self) -> None:
        """Find the position of each new partition in its files, and begin to read there."""
        places = sorted(self._new)
        ids = kafka_topics.log_ids(self._settings, kafka_topics.SOURCES)
        begins, ends = self._consumer.beginning_offsets(places), self._consumer.end_offsets(places)
        forgetting: defaultdict[int, Forgetting] = defaultdict(Forgetting)
        for place in places:
            heartbeat.beat(self._settings, "archive")
            topic = next(
                name
                for name in kafka_topics.SOURCES
                if self._settings.prefixed(name) == place.topic
            )
            self._check(topic, place, ids[topic], ends[place])
            writer = open_partition(
                self._settings,
                self._archive,
                topic,
                place.partition,
                ids[topic],
                begins[place],
                forgetting,
            )
            self._writers[place] = writer
            self._consumer.seek(place, writer.written)
        self._consumer.resume(*places)
        self._new.clear()
        log.info("archiving", extra={"partitions": len(places), "url": self._archive.url})

    def _check(self, topic: str, place: TopicPartition, now: LogId, end: int) -> None:
        """Refuse files of another log, or of one that has lost records: offsets would mean other events."""
        mine = self._archive.files(topic, place.partition)
        if not mine:
            return
        found, last = self._archive.log_id(mine[-1]), mine[-1].last
        if found == now and last < end:
            return
        was = (
            f"made of cluster {found.cluster_id}, topic id {found.topic_id}"
            if found
            else "of no known log"
        )
        raise LogMismatch(
            f"topic {place.topic}, partition {place.partition}: the archive at {self._archive.url} ends with "
            f"offset {last} and is {was}; this is cluster {now.cluster_id}, topic id {now.topic_id}, and "
            f"ends before offset {end}. Keep that archive and set EDDYLINE_ARCHIVE_URL to a new place."
        )

    def _complete_past_hours(self) -> None:
        """Complete files whose hour is over, if all that the broker appended in it has been read."""
        now_ms = self._now_ms()
        over = [
            place
            for place, writer in self._writers.items()
            if (end_ms := writer.hour_over_ms()) is not None and now_ms >= end_ms + GRACE_MS
        ]
        behind = self._behind(over) if over else set()
        for place in over:
            if place not in behind:
                self._writers[place].complete()
                heartbeat.beat(self._settings, "archive")

    def _behind(self, places: Iterable[TopicPartition]) -> set[TopicPartition]:
        ends = self._consumer.end_offsets(list(places))
        return {place for place, end in ends.items() if self._consumer.position(place) < end}

    def _commit(self) -> None:
        written = {place: writer.written for place, writer in self._writers.items()}
        news = {p: at for p, at in written.items() if at > self._committed.get(p, 0)}
        if not news:
            return
        try:
            self._consumer.commit({p: OffsetAndMetadata(at, "", -1) for p, at in news.items()})
        except KafkaError as error:
            log.info(
                "the position could not be told",
                extra={"reason": f"{type(error).__name__}: {error}"},
            )
        self._committed |= news

    def _let_go(self, places: Iterable[TopicPartition]) -> None:
        for place in places:
            self._committed.pop(place, None)
            if (writer := self._writers.pop(place, None)) is not None:
                writer.discard()

    def _close(self) -> None:
        try:
            self._consumer.close(timeout_ms=2_000)
        except KafkaError as error:
            log.info("the consumer did not close well", extra={"reason": str(error)})
