"""Archive the topics: a consumer group of its own, whose positions come from the archive's files.

An error of Kafka or of the file system ends `run_once`; the caller waits and calls it again, and
records that were not in complete files are read again. The committed offset only reports progress.
A batch that cannot be read stops its partition until it is skipped; the others go on.
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
from typing_extensions import override

from eddyline.archive import HOUR_MS, Archive
from eddyline.errors import LogMismatch
from eddyline.kafka import clients, reading
from eddyline.kafka import topics as kafka_topics
from eddyline.kafka.skips import Stops
from eddyline.process import heartbeat
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import LogId, Mark
from streams.archive.partition_writer import ForgottenUsers, PartitionWriter, open_partition
from streams.resuming import Resume

log = logging.getLogger(__name__)

GROUP = "archive"
# An hour's file is completed this long after the hour if no record of a later hour came: the
# broker's clock may be behind ours by as much.
GRACE_MS = 60_000
_POLL_MS = 500
# How often hours that are over are looked for.
_HOURS_CHECK_S = 1.0
# The shortest that Kafka's defaults allow: a dead process's partitions move after it.
_SESSION_MS = 6_000
# How long the partitions of the topics are waited for before the group is joined: a broker knows a
# new topic a moment after it was made, and a group that is led without them may stay without any.
_TOPICS_S = 5.0


class Archiver(ConsumerRebalanceListener):  # type: ignore[misc]
    """The archive process's loop. Thread rule: one thread; any thread may set `stop`.

    member: a name in the group that survives a crash, see `streams.static_membership`
    now_ms: this machine's clock; it only decides when to check whether an hour is over
    rows:   events archived so far
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
        self._unopened: set[TopicPartition] = set()
        self._committed: dict[TopicPartition, int] = {}
        self._resumes: dict[TopicPartition, Resume] = {}
        self._empty: dict[TopicPartition, int] = {}
        self._stops = Stops()
        self._hours_checked_s = 0.0

    def run_once(self, idle: Callable[[], bool] = lambda: False) -> None:
        """Archive until `stop` is set or `idle`, called after each poll, returns True.

        Raises KafkaUnavailable, OSError (both: call again), KafkaRefused and LogMismatch.
        """
        self._consumer = clients.connect(
            self._settings,
            KafkaConsumer,
            group_id=self._settings.prefixed(GROUP),
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            max_partition_fetch_bytes=clients.PARTITION_FETCH_BYTES,
            partition_assignment_strategy=[RangePartitionAssignor],
            session_timeout_ms=_SESSION_MS,
            heartbeat_interval_ms=1_000,
            group_instance_id=self._member,
        )
        try:
            topics = [self._settings.prefixed(name) for name in kafka_topics.ARCHIVED]
            self._await_topics()
            self._consumer.subscribe(topics=topics, listener=self)
            while not self._stop.is_set():
                self._poll()
                if idle():
                    self._commit()
                    return
        except KafkaError as error:
            raise clients.translate_error(self._settings, error) from None
        finally:
            self._discard(list(self._writers))
            self._unopened.clear()
            self._close()

    def _await_topics(self) -> None:
        """Return once the broker shows the source topics, or after `_TOPICS_S`."""
        until_s = time.monotonic() + _TOPICS_S
        wanted = [self._settings.prefixed(name) for name in kafka_topics.SOURCES]
        while not all(map(self._consumer.partitions_for_topic, wanted)):
            if time.monotonic() > until_s or self._stop.wait(0.1):
                return

    def caught_up(self) -> bool:
        """Whether every record that is in the topics now has been read."""
        assigned = list(self._consumer.assignment())
        return bool(assigned) and not self._unopened and not self._behind(assigned)

    @override
    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        self._unopened = set(assigned)
        self._consumer.pause(*self._unopened)  # until their positions are known

    @override
    def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        self._discard(revoked)
        self._unopened -= set(revoked)

    def _poll(self) -> None:
        heartbeat.beat(self._settings, "archive")
        batches = self._consumer.poll(
            timeout_ms=0 if self._unopened else _POLL_MS, max_records=clients.ALL_FETCHED
        )
        readable = self._stops.readable
        for place, fetched in batches.items():
            if place in self._writers and (records := readable(self._consumer, place, fetched)):
                writer = self._writers[place]
                before = writer.rows
                if (resume := self._resumes.pop(place, None)) is not None:
                    resume.check(records)
                if records[0].offset > writer.last_read + 1:
                    self._check_for_loss(place, writer)
                writer.append(records)
                self.rows += writer.rows - before
        if self._unopened:
            self._open()
        self._stops.resume_skipped(self._consumer, lambda: reading.skips(self._settings))
        if time.monotonic() - self._hours_checked_s >= _HOURS_CHECK_S:
            self._complete_past_hours()
            self._hours_checked_s = time.monotonic()
        self._commit()

    def _check_for_loss(self, place: TopicPartition, writer: PartitionWriter) -> None:
        """Find out why offsets are missing: transaction markers, or retention was faster."""
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
        """Seek each new partition to the end of its files and start reading it."""
        self._stops.skips = reading.skips(self._settings)
        places = sorted(self._unopened)
        names = {self._settings.prefixed(name): name for name in kafka_topics.ARCHIVED}
        ids = kafka_topics.log_ids(self._settings, kafka_topics.ARCHIVED)
        kept_ms = kafka_topics.delete_retention_ms(
            self._settings, (kafka_topics.ITEMS, kafka_topics.USERS)
        )
        begins, ends = self._consumer.beginning_offsets(places), self._consumer.end_offsets(places)
        forgotten: defaultdict[int, ForgottenUsers] = defaultdict(ForgottenUsers)
        for place in places:
            heartbeat.beat(self._settings, "archive")
            topic = names[place.topic]
            self._check_log(topic, place, ids[topic], ends[place])
            writer = open_partition(
                self._settings,
                self._archive,
                topic,
                place.partition,
                ids[topic],
                begins[place],
                forgotten,
            )
            self._writers[place] = writer
            if topic in kept_ms:
                self._resumes[place] = self._resume(topic, place, kept_ms[topic])
            self._consumer.seek(place, writer.written)
        self._consumer.resume(*places)
        self._unopened.clear()
        log.info("archiving", extra={"partitions": len(places), "url": self._archive.url})

    def _check_log(self, topic: str, place: TopicPartition, now: LogId, end: int) -> None:
        """Refuse files of another log, or of one that lost records: the offsets differ."""
        files = self._archive.files(topic, place.partition)
        if not files:
            return
        found, last = self._archive.log_id(files[-1]), files[-1].last
        if found == now and last < end:
            return
        was = (
            f"made of cluster {found.cluster_id}, topic id {found.topic_id}"
            if found
            else "of no known log"
        )
        raise LogMismatch(
            f"topic {place.topic}, partition {place.partition}: the archive at {self._archive.url} "
            f"ends with offset {last} and is {was}; this is cluster {now.cluster_id}, topic id "
            f"{now.topic_id}, and ends before offset {end}. Keep that archive and set "
            "EDDYLINE_ARCHIVE_URL to a new place."
        )

    def _resume(self, topic: str, place: TopicPartition, retention_ms: int) -> Resume:
        """What the first records after the archive's end are checked for: lost deletes."""
        files = self._archive.files(topic, place.partition)
        if not files:
            return Resume(topic, place.partition, None, -1, False, None)
        hour_end_ms = files[-1].hour_ms + HOUR_MS
        since_ms = max(hour_end_ms, self._archive.resynced_ms(topic))
        mark = Mark(files[-1].last, since_ms, 0)
        return Resume(
            topic, place.partition, mark, mark.offset, False, self._now_ms() - retention_ms
        )

    def _complete_past_hours(self) -> None:
        """Complete files whose hour is over once all records of the hour have been read."""
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
        self._note_empty()

    def _note_empty(self) -> None:
        """Note offsets without a record at the end of `clicks` partitions.

        Kafka's retention may remove them before ingest passes them. The files cannot show that no
        record was among them, as no later file says so.
        """
        clicks = self._settings.prefixed(kafka_topics.CLICKS)
        for place, writer in self._writers.items():
            if place.topic != clicks or writer.hour_over_ms() is not None:
                continue
            position = self._consumer.position(place)
            if position <= max(writer.written, self._empty.get(place, 0)):
                continue
            # A log that begins further on may have had records there: the position followed it.
            if self._consumer.beginning_offsets([place])[place] <= writer.written:
                last = writer.written - 1
                self._archive.note_empty(
                    kafka_topics.CLICKS, place.partition, writer.log_id, last, position
                )
                self._empty[place] = position

    def _behind(self, places: Iterable[TopicPartition]) -> set[TopicPartition]:
        ends = self._consumer.end_offsets(list(places))
        return {place for place, end in ends.items() if self._consumer.position(place) < end}

    def _commit(self) -> None:
        written = {place: writer.written for place, writer in self._writers.items()}
        moved = {p: at for p, at in written.items() if at > self._committed.get(p, 0)}
        if not moved:
            return
        try:
            self._consumer.commit({p: OffsetAndMetadata(at, "", -1) for p, at in moved.items()})
        except KafkaError as error:
            log.info(
                "offsets could not be committed",
                extra={"reason": f"{type(error).__name__}: {error}"},
            )
        self._committed |= moved

    def _discard(self, places: Iterable[TopicPartition]) -> None:
        for place in places:
            self._committed.pop(place, None)
            self._resumes.pop(place, None)
            self._empty.pop(place, None)
            self._stops.clear([place])
            if (writer := self._writers.pop(place, None)) is not None:
                writer.discard()

    def _close(self) -> None:
        try:
            self._consumer.close(timeout_ms=2_000)
        except KafkaError as error:
            log.info("the consumer did not close well", extra={"reason": str(error)})
