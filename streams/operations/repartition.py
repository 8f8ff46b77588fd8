"""Copy the topics of a namespace into another one, whose topics have more partitions or fewer.

The first namespace goes on as it is. Every accepted record is copied once, by its key, in the order
of its partition, with the time of its first append. Copies and positions are one transaction of
Kafka, so a killed copy goes on where it stopped. Strays are left out: ingest of the first namespace
has forwarded them, and what it forwarded is copied. ADR 30 has the procedure.
"""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import msgspec
from kafka import KafkaProducer, TopicPartition
from kafka.errors import KafkaError
from kafka.structs import OffsetAndMetadata

from eddyline.archive import FORGETS, MERGES
from eddyline.errors import EddylineError, Rejected
from eddyline.kafka import clients, producers, reading, topics
from eddyline.kafka.topics import CLICKS, ITEMS, SOURCES, USERS
from eddyline.schema import events, validation
from eddyline.schema.deduplication import DedupeWindow
from eddyline.schema.events import Forget
from eddyline.schema.partitioning import partition_of
from eddyline.schema.records import FORMAT, Record
from eddyline.settings.loader import Settings
from streams.dead_letters import FORWARD_BYTES_MAX, record_bytes
from streams.operations import retention_gaps
from streams.operations.refill_records import ArchivedRecord, as_sent, batches
from streams.operations.repartition_plan import (
    Place,
    checked_positions,
    group,
    logs_of,
    lost_clicks,
    lost_error,
    open_archive,
)
from streams.operations.retention_gaps import Gap

# Records and bytes in one transaction, which has to end in time.
_BATCH = 1_000
_BATCH_BYTES = 4 * 1024 * 1024
# Kafka aborts a transaction after this time, also that of a killed copy: readers wait until then.
_TRANSACTION_TIMEOUT_MS = 10_000
_PAUSE_S = 0.5
# Above every offset of a null record in the second namespace, which begins at 0.
_ANY_OFFSET = 2**62
# How long a copy waits for the ingest of the first namespace to come to the ends of its topics.
INGEST_WAIT_S = 60.0
# Forgets and what ingest forwards are in `clicks` before the null record or the stray is committed.
_ORDER = (CLICKS, USERS, ITEMS)
# Headers that a copy does not keep: it is in its own partition, in its own format.
_REPLACED = (events.ORIGIN_MS, "origin", FORMAT)
# (records copied, records left out) so far, at each transaction
OnProgress = Callable[[int, int], None]


class _Removed(Exception):
    """Retention removed clicks while they were read."""


@dataclass(slots=True)
class CopyReport:
    """What a copy did. copied: by topic; left_out: by reason."""

    copied: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)


def run(
    source: Settings,
    target: Settings,
    *,
    follow: bool,
    skip_lost: bool = False,
    on_progress: OnProgress = lambda copied, left_out: None,
) -> CopyReport:
    """Copy all that is not copied yet.

    follow:    go on with new records until the process is ended; otherwise return when ingest of
               the first namespace and the copy are at the ends of all topics
    skip_lost: copy without clicks that neither Kafka nor the archive has
    Raises what `repartition_plan.plan` raises; Rejected for a copy that is too large for its topic;
    EddylineError where another copy has begun or ingest of the first namespace does not come to
    the ends.
    """
    topics.ensure_topics(target)
    producer = producers.make_producer(
        target, transactional_id=group(target), transaction_timeout_ms=_TRANSACTION_TIMEOUT_MS
    )
    try:
        # First, so that the transaction of a killed copy is aborted or its positions stand.
        producers.in_time(target, producer.init_transactions)
        positions = checked_positions(source, target)
        copier = Copier(source, target, producer, positions, on_progress, skip_lost=skip_lost)
        deadline = time.monotonic() + INGEST_WAIT_S
        while True:
            if copier.copy():
                deadline = time.monotonic() + INGEST_WAIT_S
            elif not follow:
                behind = copier.ingest_behind()
                if not behind:
                    return copier.report
                if time.monotonic() > deadline:
                    raise EddylineError(
                        f"ingest of namespace {source.namespace!r} has not applied {behind}: is it "
                        "running? It forwards records in a wrong partition, which are copied then"
                    )
            time.sleep(_PAUSE_S)
    except KafkaError as error:
        text = f"{type(error).__name__} {error}"
        if "Fenced" in text or "InvalidProducerEpoch" in text:
            raise EddylineError(
                f"another copy into namespace {target.namespace!r} has begun, or a transaction "
                f"took more than {_TRANSACTION_TIMEOUT_MS / 1000:.0f} s; this one stopped, nothing "
                "is copied twice. If no other one runs, start it again"
            ) from None
        raise clients.translate_error(target, error) from None
    finally:
        producer.close(timeout=1)


class Copier:
    """Copies what is new. Thread rule: one thread. report: what was done so far."""

    def __init__(
        self,
        source: Settings,
        target: Settings,
        producer: KafkaProducer,
        positions: Mapping[Place, int],
        on_progress: OnProgress,
        *,
        skip_lost: bool = False,
    ) -> None:
        """positions: the next offset of every partition; other arguments as for `run`."""
        self.report = CopyReport()
        self._source = source
        self._target = target
        self._producer = producer
        self._next = dict(positions)
        self._on_progress = on_progress
        self._skip_lost = skip_lost
        self._logs = logs_of(source, target)
        # Made at the first records of a partition: what was accepted just before is read for it.
        self._windows: dict[int, DedupeWindow] = {}

    def copy(self) -> int:
        """Copy up to the present ends; returns how many records were read.

        Raises LogMismatch for clicks that neither Kafka nor the archive has.
        """
        # In reverse: see `_ORDER`.
        ends = {name: topics.end_offsets(self._source, name) for name in reversed(_ORDER)}
        read = 0
        for name in _ORDER:
            read += self._copy_topic(name, ends[name])
            for partition, end in ends[name].items():  # markers at the end are no records
                self._next[name, partition] = max(end, self._next[name, partition])
        return read

    def ingest_behind(self) -> str:
        """The first partition whose end ingest has not reached; "" for none."""
        for name in SOURCES:
            ends = topics.end_offsets(self._source, name)
            committed = retention_gaps.committed_offsets(self._source, name, len(ends))
            for partition, end in ends.items():
                if committed[partition] < end or self._next[name, partition] < end:
                    return f"{name}/{partition} up to offset {end - 1}"
        return ""

    def _copy_topic(self, name: str, ends: Mapping[int, int]) -> int:
        read = 0
        while True:
            try:
                with closing(self._batches(name, ends)) as found:
                    for batch in found:
                        read += len(batch)
                        self._send(name, batch)
                return read
            except _Removed:
                self._windows.clear()  # they lack what was not read

    def _batches(self, name: str, ends: Mapping[int, int]) -> Generator[list[Record], None, None]:
        """The records that are not copied yet, in the order of each partition."""
        starts = {partition: self._next[name, partition] for partition in ends}
        due = {partition: end for partition, end in ends.items() if starts[partition] < end}
        if not due:
            return
        starts = {partition: starts[partition] for partition in due}
        if name == CLICKS:
            begins = topics.beginning_offsets(self._source, name)
            if not self._skip_lost and (lost := lost_clicks(self._source, starts, begins)):
                raise lost_error(lost)
            for partition in due.keys() - self._windows.keys():
                self._windows[partition] = DedupeWindow(self._source.dedupe_window_events)
                # Twice the window: what was accepted in it depends on what came before.
                width = 2 * self._source.dedupe_window_events
                starts[partition] = max(0, starts[partition] - width)
            for partition in due:
                archived = self._archived(partition, starts[partition], begins[partition])
                yield from batches(archived, _BATCH, _BATCH_BYTES)
                starts[partition] = max(starts[partition], begins[partition])
        with closing(reading.read(self._source, name, starts, due)) as records:
            at = dict(starts)
            for batch in batches(records, _BATCH, _BATCH_BYTES):
                if name == CLICKS:
                    self._check_kept(_pass(at, batch))
                yield batch
            if name == CLICKS:
                self._check_kept({p: first for p, first in at.items() if first < due[p]})

    def _check_kept(self, without_record: Mapping[int, int]) -> None:
        """Raise _Removed if retention removed clicks after their partition's begin was read.

        without_record: partition -> the first offset at which no record was read. Kafka may have
                        none there: a marker of a transaction, a skipped batch
        """
        begins = topics.beginning_offsets(self._source, CLICKS) if without_record else {}
        if any(first < begins[partition] for partition, first in without_record.items()):
            raise _Removed

    def _archived(self, partition: int, first: int, begin: int) -> Iterator[Record]:
        """What only the archive has: its events below Kafka's oldest record."""
        if first >= begin:
            return
        topic = self._source.prefixed(CLICKS)
        log = topics.log_ids(self._source, [CLICKS])[CLICKS]
        with open_archive(self._source) as archive:
            gap = Gap(partition, first, begin - 1, begin)
            retention_gaps.archived_files(archive, gap, log)  # of this log
            parts = (archive.read(of, partition, first=first) for of in (CLICKS, MERGES, FORGETS))
            for event in heapq.merge(*parts, key=lambda event: event.offset):
                if event.offset >= begin:
                    return
                yield as_sent(topic, event)

    def _send(self, name: str, batch: Sequence[Record]) -> None:
        """Copy records in one transaction."""
        positions: dict[int, int] = {}
        copies: list[tuple[str, dict[str, Any]]] = []
        left_out: Counter[str] = Counter()
        for record in batch:
            if record.offset < self._next[name, record.partition]:
                self._warm(record)
                continue
            positions[record.partition] = record.offset + 1
            place = f"{name}/{record.partition}/{record.offset}"
            try:
                copies += ((place, copy) for copy in self._copies(name, record, left_out))
            except Rejected as rejected:
                left_out[rejected.reason] += 1
        if not positions:
            return
        topic, source_topic = self._target.prefixed(name), self._source.prefixed(name)
        self._producer.begin_transaction()
        sent = [
            (place, copy["value"], self._producer.send(topic, **copy)) for place, copy in copies
        ]
        try:
            producers.confirm(self._target, f"copy into {topic} of", sent)
        except Rejected as refused:
            again = f"{refused.detail}, and start the command again: it goes on there"
            raise Rejected(refused.reason, refused.field, again) from None
        offsets = {
            TopicPartition(source_topic, p): OffsetAndMetadata(offset, self._logs[name], -1)
            for p, offset in positions.items()
        }
        self._producer.send_offsets_to_transaction(offsets, group(self._target))
        producers.in_time(self._target, self._producer.commit_transaction)
        self._next |= {(name, p): offset for p, offset in positions.items()}
        self.report.copied[name] += len(copies)
        self.report.left_out += left_out
        self._on_progress(self.report.copied.total(), self.report.left_out.total())

    def _warm(self, record: Record) -> None:
        """Note an event that was copied before."""
        for event_id, own in self._event_ids(record):
            if own:
                self._windows[record.partition].accept(event_id, record.offset)

    def _event_ids(self, record: Record) -> Iterable[tuple[str | None, bool]]:
        if record.key is None and isinstance(record, ArchivedRecord):
            return []
        try:
            found = validation.user_events(self._source, record)
        except Rejected:
            return []
        return [(event.event_id, own) for _, event, own in found]

    def _copies(
        self, name: str, record: Record, left_out: Counter[str]
    ) -> Iterator[dict[str, Any]]:
        """What to send for a record. Raises Rejected for one that ingest refuses."""
        if isinstance(record, ArchivedRecord) and record.forget is not None:
            left_out["forgotten user without id"] += 1
            return
        for user_or_item, own, event_id, value in self._keys(name, record):
            if not own:
                left_out["wrong partition"] += 1
            elif name == CLICKS and not self._windows[record.partition].accept(
                event_id, record.offset
            ):
                left_out["sent again"] += 1
            elif isinstance(record, ArchivedRecord) and record.target_forgotten:
                # The target's id is gone. The visitor's history ends, and nothing is moved.
                end = Forget(
                    user_id=user_or_item,
                    forget_until_ms=0,
                    keep_after_ms=events.AT_MS_MAX,
                    ends_ms=0,
                )
                yield self._copy(name, user_or_item, record, events.encode(end))
            else:
                yield self._copy(name, user_or_item, record, value)

    def _keys(self, name: str, record: Record) -> list[tuple[str, bool, str | None, bytes | None]]:
        """(user or item, whether in its partition, event id, value to send) of each event."""
        if name != CLICKS:
            find = validation.item_changes if name == ITEMS else validation.profiles
            return [(key, own, None, record.value) for key, _, own in find(self._source, record)]
        found = []
        for _, event, own in validation.user_events(self._source, record):
            value = record.value
            if isinstance(event, Forget):
                # The one that ingest there writes for the copied null record only repeats this one.
                value = events.encode(msgspec.structs.replace(event, users_offset=_ANY_OFFSET))
            found.append((event.user_id, own, event.event_id, value))
        return found

    def _copy(self, name: str, key: str, record: Record, value: bytes | None) -> dict[str, Any]:
        kept = [(n, v) for n, v in record.headers if n not in _REPLACED and v is not None]
        first_ms = (events.ORIGIN_MS, str(events.first_append_ms(record)).encode())
        if record_bytes(key.encode(), value, [*kept, first_ms]) > FORWARD_BYTES_MAX:
            kept = []
        if record_bytes(key.encode(), value, [first_ms]) > FORWARD_BYTES_MAX:
            raise Rejected("too_large", "", "does not fit with the time of its first append")
        partitions = self._target.items_partitions
        if name != ITEMS:
            partitions = self._target.clicks_partitions
        return {
            "key": key.encode(),
            "value": value,
            "partition": partition_of(key, partitions),
            "headers": [*kept, first_ms],
        }


def _pass(at: dict[int, int], batch: Sequence[Record]) -> dict[int, int]:
    """Move `at`, the next offset by partition, behind the batch.

    Returns the first offset of each partition that the batch leaves out.
    """
    left_out: dict[int, int] = {}
    for record in batch:
        if record.offset > at[record.partition]:
            left_out.setdefault(record.partition, at[record.partition])
        at[record.partition] = record.offset + 1
    return left_out
