"""Clicks that Kafka's retention removed before ingest applied them: find them, or skip them.

Ingest does not start over such a gap (`streams.fences`). `eddyline refill` closes it from the
archive, `eddyline accept-log --skip-lost` gives the records up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

from kafka import KafkaAdminClient, TopicPartition
from kafka.errors import (
    CoordinatorLoadInProgressError,
    CoordinatorNotAvailableError,
    NoError,
    NotCoordinatorError,
)
from kafka.structs import OffsetAndMetadata

from eddyline.archive import Archive, ArchiveFile
from eddyline.errors import EddylineError, LogMismatch
from eddyline.kafka import topics
from eddyline.kafka.topics import CLICKS
from eddyline.settings.loader import Settings
from eddyline.stores import layout
from eddyline.stores.redis import RedisStore
from eddyline.stores.state_store import Fence, LogId, Source, StateStore, UserEffects
from streams.fences import PartitionFences, sources

GROUP = "eddyline-ingest"
_COORDINATOR_POLL_S = 0.1
# Ranges of offsets that an error names; there may be one for every hour.
_NAMED_MAX = 20
_NO_COORDINATOR_YET = (
    CoordinatorLoadInProgressError,
    CoordinatorNotAvailableError,
    NotCoordinatorError,
)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Gap:
    """Offsets of a clicks partition, first and last included, that are neither applied nor in
    Kafka.

    end: the offset that the partition's next record will get
    """

    partition: int
    first: int
    last: int
    end: int


class AcceptObserver(Protocol):
    """Learns of each change of `accept_log` once it is made, so that an error hides none."""

    def fences_changed(self, count: int) -> None:
        """So many fences follow Kafka's present logs."""

    def given_up(self, gap: Gap) -> None:
        """The records of this gap will never be applied."""


def find(settings: Settings, store: StateStore, log: LogId) -> list[Gap]:
    """The gaps of all partitions. Raises LogMismatch where fences belong to another log."""
    begins, ends = topics.beginning_offsets(settings, CLICKS), topics.end_offsets(settings, CLICKS)
    fences = PartitionFences(settings, store, CLICKS, {CLICKS: log})
    # Opened as if the log still began with 0: the result is the next offset by the fences.
    next_offsets = fences.open({partition: (0, end) for partition, end in ends.items()})
    return [
        Gap(partition, first, begins[partition] - 1, ends[partition])
        for partition, first in sorted(next_offsets.items())
        if first < begins[partition]
    ]


def archived_files(archive: Archive, gap: Gap, log: LogId) -> list[ArchiveFile]:
    """The archive's files with clicks of a gap. Raises LogMismatch where they are of another log,
    OSError.
    """
    files = [
        file
        for file in archive.files(CLICKS, gap.partition)
        if gap.first <= file.last and file.first <= gap.last
    ]
    if files and archive.log_id(files[-1]) != log:
        raise LogMismatch(
            f"the archive at {archive.url} is not of this log (cluster {log.cluster_id}, topic "
            f"id {log.topic_id}): its offsets are other events. Set EDDYLINE_ARCHIVE_URL to "
            "the one that is"
        )
    return files


def lacking(archive: Archive, gaps: Sequence[Gap], log: LogId) -> str:
    """Which offsets of the gaps the archive lacks, as a sentence; "" for none.

    Raises as `archived_files`.
    """
    ranges: list[str] = []
    records = 0
    for gap in gaps:
        archived_files(archive, gap, log)
        for first, last in archive.lacking(CLICKS, gap.partition, gap.first, gap.last, log):
            ranges.append(f"{CLICKS}/{gap.partition} offsets {first} to {last}")
            records += last - first + 1
    if not ranges:
        return ""
    more = f" and {len(ranges) - _NAMED_MAX} more" if len(ranges) > _NAMED_MAX else ""
    named = "; ".join(ranges[:_NAMED_MAX])
    return f"the archive at {archive.url} lacks {records:,}: {named}{more}"


def close(settings: Settings, store: StateStore, log: LogId, gap: Gap) -> None:
    """Move every fence that is behind the gap's end up to it.

    Raises FenceMoved where another process writes.
    """
    target = Fence(gap.last, log)
    for source, slots in sources(settings, CLICKS, gap.partition).items():
        for slot, fence in store.fences(source, slots).items():
            if fence is None or fence.offset < gap.last:
                _move(settings, store, slot, source, fence, target)


def accept_log(settings: Settings, observer: AcceptObserver, *, skip_lost: bool) -> None:
    """Accept Kafka's present logs as the ones that the fences continue.

    skip_lost: give up the records of all gaps, too
    Raises EddylineError while an ingest runs.
    """
    topics.ensure_topics(settings)
    ids = topics.log_ids(settings, topics.SOURCES)
    store = RedisStore(settings)
    try:
        ends = {name: topics.end_offsets(settings, name) for name in ids}
        # First: with a fence that moved back and an old committed offset, ingest would take new
        # records for ones that it forwarded before.
        reset_committed(settings, ends)
        changed = store.accept_log({name: (ids[name], ends[name]) for name in ids})
        observer.fences_changed(changed)
        for gap in find(settings, store, ids[CLICKS]) if skip_lost else ():
            close(settings, store, ids[CLICKS], gap)
            observer.given_up(gap)
    finally:
        store.close()


def ingest_members(settings: Settings) -> int:
    """How many ingest processes are in their consumer group.

    A killed one counts for some seconds.
    """
    group = settings.prefixed(GROUP)
    described = _of_group(settings, lambda admin: admin.describe_groups([group]))
    return len(described[group]["members"])


def _of_group(settings: Settings, call: Callable[[KafkaAdminClient], _T]) -> _T:
    """The answer of the group's coordinator. Raises KafkaUnavailable, KafkaRefused.

    Kafka creates the topic of groups at the first request for one, and has no coordinator until
    then.
    """
    deadline = time.monotonic() + settings.kafka_timeout_ms / 1000
    with topics.open_admin(settings) as admin:
        while True:
            try:
                return call(admin)
            except _NO_COORDINATOR_YET:
                if time.monotonic() > deadline:
                    raise
            time.sleep(_COORDINATOR_POLL_S)


def reset_committed(settings: Settings, ends: Mapping[str, Mapping[int, int]]) -> None:
    """Set the ingest group's committed offsets that are beyond a log's end back to the end.

    ends: topic without prefix -> partition -> the offset that the next record will get
    Raises EddylineError while an ingest runs.
    """
    beyond = {
        TopicPartition(settings.prefixed(name), partition): OffsetAndMetadata(of[partition], "", -1)
        for name, of in ends.items()
        for partition, offset in committed_offsets(settings, name, len(of)).items()
        if offset > of[partition]
    }
    if not beyond:
        return
    group = settings.prefixed(GROUP)
    results = _of_group(settings, lambda admin: admin.alter_group_offsets(group, beyond))
    for place, error in results.items():
        if error is not NoError:
            raise EddylineError(
                f"the committed offset of {place.topic}:{place.partition} could not be set back "
                f"({error.__name__}): stop every ingest first (a killed one leaves the group after "
                "six seconds)"
            )


def committed_offsets(
    settings: Settings, name: str = CLICKS, count: int | None = None, group: str = ""
) -> Mapping[int, int]:
    """A group's committed offset of each partition of a topic; 0 where there is none.

    count: of the topic's partitions; default: that of `clicks`
    group: default: that of ingest
    Ingest commits after the effects, so the offset is at most a second behind.
    """
    found = committed(settings, name, count, group)
    return {partition: offset for partition, (offset, _) in found.items()}


def committed(
    settings: Settings, name: str = CLICKS, count: int | None = None, group: str = ""
) -> dict[int, tuple[int, str]]:
    """As `committed_offsets`, each offset with the text that was committed with it."""
    group, topic = group or settings.prefixed(GROUP), settings.prefixed(name)
    count = settings.clicks_partitions if count is None else count
    partitions = [TopicPartition(topic, p) for p in range(count)]
    wanted = {group: partitions}
    found = _of_group(settings, lambda admin: admin.list_group_offsets(wanted))[group]
    return {
        p.partition: (max(0, found[p].offset), found[p].metadata or "") if p in found else (0, "")
        for p in partitions
    }


@contextmanager
def open_store(settings: Settings) -> Iterator[RedisStore]:
    """The store for an operation that writes, closed with the block; no ingest runs at its start.

    Raises Unavailable, StoreRefused, LogMismatch, and EddylineError while an ingest runs.
    """
    topics.ensure_topics(settings)
    require_no_ingest(settings)
    store = RedisStore(settings)
    try:
        store.check()
        store.check_rights()
        store.claim_layout(layout.layout(settings))
        yield store
    finally:
        store.close()


def require_no_ingest(settings: Settings) -> None:
    """Raise EddylineError while an ingest process runs.

    The fences would keep both right, but slow.
    """
    if found := ingest_members(settings):
        raise EddylineError(
            f"{found} ingest processes are in the consumer group {settings.prefixed(GROUP)}: stop "
            "them first (a killed one leaves the group after six seconds)"
        )


def _move(
    settings: Settings, store: StateStore, slot: str, source: Source, old: Fence | None, new: Fence
) -> None:
    if slot.startswith("u"):
        store.write_users(slot, source, old, new, UserEffects())
    else:
        limits = settings.popular_buckets, settings.popular_items_max
        store.count_clicks(slot, source, old, new, {}, *limits)
