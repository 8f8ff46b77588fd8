"""Fences: from which offset each partition is read on, and which fences this process expects.

Reading continues after the lowest fence of a partition. The fences of co-visitation rows do not
count for that: their visits come from the outbox in the user slot, not from the log.

Offsets are not records: transaction markers, aborts and compaction leave offsets without one. Where
a partition ends with such offsets, the fences pass them once it is idle (`Handler.skip_empty`).
`open` raises LogMismatch where a fence belongs to another log (a topic that was created again,
another cluster), and where retention removed clicks before they were applied. Compacted topics
(items, users) may begin later: their oldest kept record is sufficient.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from eddyline.errors import FenceMoved, LogMismatch
from eddyline.kafka.topics import CLICKS, ITEMS, USERS
from eddyline.schema.partitioning import item_slots, user_slot
from eddyline.schema.records import Record
from eddyline.settings.loader import Settings
from eddyline.stores.fence import CO_VISITS
from eddyline.stores.state_store import Fence, LogId, Mark, Source, StateStore
from streams.resuming import Resume, mark_of

# No log is so long.
_NO_RECORD_BEYOND = 2**63 - 1
# The item slot that holds the fence of published records, however many item slots there are.
PUBLISHED_SLOT = "i0"


class LogIds(Protocol):
    """The id of each topic's log, by the topic's name without prefix."""

    def __getitem__(self, topic: str, /) -> LogId:
        """The log's id. May raise KafkaUnavailable."""


def published_source(generation: str, partition: int) -> Source:
    """The source of the item records that one generation has published."""
    return Source(f"{ITEMS}@{generation}", partition)


def co_visit_sources(settings: Settings, partition: int) -> dict[Source, list[str]]:
    """The source of the co-visitation rows of a partition of `clicks`, with its slots; see
    `sources`. Empty where no rows are kept.
    """
    if not settings.kept_co_visit_items:
        return {}
    return {Source(CO_VISITS, partition): item_slots(settings.item_slots)}


def sources(
    settings: Settings, topic: str, partition: int, generations: Sequence[str] = ()
) -> dict[Source, list[str]]:
    """The sources of a partition that are read from its log, each with the slots that have a fence
    of it, in the order of writing.

    generations: those that publish items; only for ITEMS
    """
    of_items = item_slots(settings.item_slots)
    if topic == CLICKS:
        return {Source(CLICKS, partition): [user_slot(partition), *of_items]}
    if topic == USERS:
        return {Source(USERS, partition): [user_slot(partition)]}
    published = {published_source(name, partition): [PUBLISHED_SLOT] for name in generations}
    return {**published, Source(ITEMS, partition): of_items}


class PartitionFences:
    """The fences of one topic's partitions, as this process last read or wrote them.

    topic:       its name without prefix
    generations: those that publish items; only for ITEMS
    delete_retention_ms: `delete.retention.ms` of a compacted topic; None: lost deletes are not
                 looked for
    Thread rule: one thread, the one that applies the topic's batches.
    """

    def __init__(
        self,
        settings: Settings,
        store: StateStore,
        topic: str,
        logs: LogIds,
        generations: Sequence[str] = (),
        delete_retention_ms: int | None = None,
    ) -> None:
        self._settings = settings
        self._store = store
        self._name = topic
        self._topic = settings.prefixed(topic)
        self._logs = logs
        self._generations = generations
        self._log: LogId | None = None
        self._expected: dict[int, dict[tuple[Source, str], Fence | None]] = {}
        self._last_read: dict[int, int] = {}  # the last offset that a batch had
        self._committed: dict[int, int] = {}
        self._replay_from: dict[int, int] = {}
        self._marks: dict[int, list[Mark]] = {}  # of the last two batches
        self._resumes: dict[int, Resume] = {}
        self._retention_ms = delete_retention_ms

    def replay_from(self, partition: int, first: int) -> None:
        """At the next `open`, read from the offset `first` on, although fences are beyond it."""
        self._replay_from[partition] = min(first, self._replay_from.get(partition, first))

    def open(
        self, bounds: Mapping[int, tuple[int, int]], committed: Mapping[int, int] | None = None
    ) -> dict[int, int]:
        """Read the fences and return the offset to read from, by partition.

        bounds:    partition -> (offset of the oldest record kept, offset the next record will get)
        committed: partition -> offset that the consumer group committed, see `forwarded_up_to`
        Raises LogMismatch (also for clicks that retention removed), StoreUnavailable,
        KafkaUnavailable.
        """
        self._log = self._logs[self._name]
        for partition, (_, end) in bounds.items():
            self._committed[partition] = min(end, (committed or {}).get(partition, 0))
        return {
            partition: self._open(partition, begin, end, self._log)
            for partition, (begin, end) in bounds.items()
        }

    def expected(self, source: Source, slot: str) -> Fence | None:
        """The fence that the store must have; None where no batch was ever applied."""
        return self._fences_of(source.partition)[source, slot]

    def done(self, source: Source, slot: str) -> int:
        """The offset up to which the slot has everything; −1 for none."""
        fence = self.expected(source, slot)
        return -1 if fence is None else fence.offset

    def is_open(self, partition: int) -> bool:
        """Whether this process opened the partition; it may have lost it since. Any thread."""
        return partition in self._expected

    def lowest(self, partition: int) -> int:
        """The offset up to which every slot has everything; −1 for none."""
        return _lowest(_of_log(self._fences_of(partition)))

    def highest(self, partition: int) -> int:
        """The offset up to which some slot has everything; −1 for none."""
        fences = _of_log(self._fences_of(partition)).values()
        return max(-1 if fence is None else fence.offset for fence in fences)

    def forwarded_up_to(self, partition: int) -> int:
        """Last offset whose forwarded records a previous owner already sent; −1 if none.

        Offsets are committed after the effects. Records that are read again (Redis was emptied, or
        went back) forward nothing: beyond the event-id window a forwarded event would count twice.
        """
        return self._committed.get(partition, 0) - 1

    def log(self) -> LogId:
        """The log that `open` found."""
        if self._log is None:
            raise LookupError(f"topic {self._topic} has not been opened")
        return self._log

    def fence(self, partition: int, offset: int) -> Fence:
        """The fence "everything up to and with `offset`" of the log that `open` found."""
        marks = (mark for mark in self._marks.get(partition, ()) if mark.offset <= offset)
        return Fence(offset, self.log(), max(marks, key=lambda mark: mark.offset, default=None))

    def resume_at(self, partition: int, position: int) -> int:
        """Where to read on to check the log: at the last record that was applied, if it is there.

        position: as `open` returned it
        """
        resume = self._resumes.get(partition)
        if resume is None or not resume.compare or resume.mark is None:
            return position
        return min(position, resume.mark.offset)

    def resumed(self, partition: int, records: Sequence[Record]) -> int:
        """Check the first records after `open`; how many of them were applied before.

        records: of one batch. Raises LogMismatch where the log lost its end and has grown again,
        and where deletes may be lost.
        """
        resume = self._resumes.get(partition)
        if resume is None:
            return 0
        applied = resume.check(records)
        if not resume.pending:
            self._resumes.pop(partition, None)
        return applied

    def moved(self, source: Source, slot: str, fence: Fence) -> None:
        """Expect a fence that was just written."""
        self._fences_of(source.partition)[source, slot] = fence

    def find_diverged(self, partitions: Collection[int]) -> list[int]:
        """Those of these partitions whose stored fences are not the expected ones.

        The store went back in time, or another process wrote. This finds it for partitions that
        have nothing to write; a write would be refused. Raises StoreUnavailable.
        """
        diverged = []
        for partition in self._expected.keys() & partitions:
            expected = self._expected[partition]
            for source, slots in self._sources(partition).items():
                found = self._store.fences(source, slots)
                if any(expected[source, slot] != found[slot] for slot in slots):
                    diverged.append(partition)
                    break
        return diverged

    def check(self, partition: int) -> None:
        """Raises FenceMoved where the partition's stored fences diverged, StoreUnavailable."""
        if self.find_diverged([partition]):
            at = f"{self._topic}:{partition}"
            raise FenceMoved(at, "that of the last write", "another one")

    def begin(self, partition: int, records: Sequence[Record]) -> None:
        """Start a batch. Raises FenceMoved where its offsets do not follow those of the batch
        before.

        Then the log itself went back: the topic was created again, for example. `open` finds the
        reason.
        """
        before, first, last = self._last_read[partition], records[0], records[-1]
        if first.offset <= before:
            raise FenceMoved(
                f"{self._topic}:{partition}", f"a record after {before}", f"record {first.offset}"
            )
        self._last_read[partition] = last.offset
        self._marks[partition] = [*self._marks.get(partition, ()), mark_of(last)][-2:]

    def can_skip(self, partition: int, taken: int, last: int) -> bool:
        """Whether every fence may move to `last`, as no record lies after `taken` up to there.

        So it is where all records up to `taken` are applied and no later batch has begun. Raises
        LogMismatch where deletes may have been among them.
        """
        if self._last_read.get(partition, _NO_RECORD_BEYOND) > last:
            return False
        if not taken <= self.lowest(partition) < last:
            return False
        if (resume := self._resumes.get(partition)) is not None:
            resume.check_age()
        return True

    def invalidate(self, partition: int) -> None:
        """Refuse the partition's batches (FenceMoved) until the next `open`."""
        self._last_read[partition] = _NO_RECORD_BEYOND

    def _sources(self, partition: int) -> dict[Source, list[str]]:
        found = sources(self._settings, self._name, partition, self._generations)
        more = co_visit_sources(self._settings, partition) if self._name == CLICKS else {}
        return found | more

    def _fences_of(self, partition: int) -> dict[tuple[Source, str], Fence | None]:
        try:
            return self._expected[partition]
        except KeyError:
            raise LookupError(
                f"partition {partition} of {self._topic} has not been opened"
            ) from None

    def _open(self, partition: int, begin: int, end: int, now: LogId) -> int:
        found: dict[tuple[Source, str], Fence | None] = {}
        for source, slots in self._sources(partition).items():
            for slot, fence in self._store.fences(source, slots).items():
                self._check(source, slot, fence, end, now)
                found[source, slot] = fence
        self._expected[partition] = found
        found = _of_log(found)
        lowest = _lowest(found)
        if self._name == CLICKS and lowest + 1 < begin:
            raise self._lost(partition, lowest + 1, begin - 1, begin, applied=lowest >= 0)
        position = max(min(lowest + 1, self._replay_from.pop(partition, lowest + 1)), begin)
        self._last_read[partition] = position - 1
        marks = {f.mark for f in found.values() if f is not None and f.mark is not None}
        self._marks[partition] = sorted(marks, key=lambda mark: mark.offset)
        self._resumes.pop(partition, None)
        bounds = begin, end
        resume = Resume.of(self._name, partition, found.values(), bounds, self._retention_ms)
        if resume.pending:
            self._resumes[partition] = resume
        return position

    def _lost(
        self, partition: int, first: int, last: int, begin: int, *, applied: bool
    ) -> LogMismatch:
        state = (
            f"the state has everything up to offset {first - 1}"
            if applied
            else "the state has nothing"
        )
        return LogMismatch(
            f"topic {self._topic}, partition {partition}: {state}, but the log begins with offset "
            f"{begin}: Kafka's retention removed offsets {first} to {last} "
            f"({last - first + 1:,}) before they were applied here. Stop every ingest and run "
            "`eddyline refill`, which applies them from the archive; or `eddyline accept-log "
            "--skip-lost` to go on without them, as on a first start on an old topic."
        )

    def _check(self, source: Source, slot: str, fence: Fence | None, end: int, now: LogId) -> None:
        if fence is None or (fence.log == now and fence.offset < end):
            return
        at = (
            f"topic {self._topic}, partition {source.partition} (fence of {source.name} in slot "
            f"{slot})"
        )
        way_out = (
            "If the log is to go on as it is now, stop every ingest and run `eddyline accept-log`: "
            "it removes the fences of logs that no longer exist; a new log is then read from its "
            "beginning."
        )
        if "@" in source.name:
            way_out = (
                f"Item vectors of generation {source.name.partition('@')[2]} are versioned by the "
                "old log: train and activate a new generation with `eddyline train`."
            )
        if fence.log != now:
            raise LogMismatch(
                f"{at}: the state was written for cluster {fence.log.cluster_id} and topic id "
                f"{fence.log.topic_id}, but this is cluster {now.cluster_id} and topic id "
                f"{now.topic_id}. {way_out}"
            )
        raise LogMismatch(
            f"{at}: the state has everything up to offset {fence.offset}, but the log ends before "
            f"{end} (cluster {now.cluster_id}, topic id {now.topic_id}): Kafka lost records. "
            f"{way_out}"
        )


def _of_log(
    fences: Mapping[tuple[Source, str], Fence | None],
) -> dict[tuple[Source, str], Fence | None]:
    """Those whose effects are read from the log."""
    return {at: fence for at, fence in fences.items() if at[0].name != CO_VISITS}


def _lowest(fences: Mapping[tuple[Source, str], Fence | None]) -> int:
    return min(-1 if fence is None else fence.offset for fence in fences.values())
