"""Apply clicks from the archive that Kafka no longer has and that ingest never applied.

The archive's events go through ingest's own handlers, each under its old offset and behind the same
fences, one batch in memory at a time. So a killed refill may be run again, and the resulting state
is the one that ingest would have made. Profiles and forgotten users, of the archive and of Kafka,
take effect at their append time. Ingest continues afterwards with what Kafka has.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import groupby, takewhile

from eddyline import generations
from eddyline.archive import FORGETS, MERGES, Archive, ArchiveUnavailable
from eddyline.errors import EddylineError, FenceMoved, LogMismatch, Rejected
from eddyline.kafka import topics
from eddyline.kafka.topics import CLICKS, USERS
from eddyline.schema.records import Record
from eddyline.settings.loader import Settings
from eddyline.stores.redis import RedisStore
from eddyline.stores.state_store import LogId
from embeddings.bundle import bundle as bundles
from embeddings.bundle.bundle import Bundle
from streams.clicks.step_ranges import RecordedStepRanges, StepRangeRule
from streams.dead_letters import KafkaForwarder, outlet_producer
from streams.generation import Generation
from streams.handlers import Handlers, Outputs
from streams.operations import retention_gaps
from streams.operations.refill_records import (
    ProfileRecords,
    as_sent,
    batches,
    erasures,
    is_unknown,
    with_ids,
)
from streams.operations.retention_gaps import Gap
from streams.ports import Outcome, RecordBatch

# Refused writes in a row before the refill gives up: another process is writing.
_TRIES = 5
# The topics of the archive that hold records of `clicks`.
_OF_CLICKS = (CLICKS, MERGES, FORGETS)
# (offsets done, offsets of all gaps)
OnProgress = Callable[[int, int], None]


@dataclass(slots=True)
class RefillReport:
    """What a refill did.

    gaps:    what was missing; when empty, nothing was done
    lost:    which offsets the archive lacks, as a sentence; "" for none
    files_without_merges: archive files from before merges were archived: those users keep their
                          history
    clicks, profiles: counts of the records that were applied
    refused: events that the present settings refuse, by reason
    forwarded: events that merges moved to another user
    """

    gaps: Sequence[Gap]
    lost: str = ""
    files_without_merges: int = 0
    clicks: Outcome = field(default_factory=Outcome)
    profiles: Outcome = field(default_factory=Outcome)
    refused: dict[str, int] = field(default_factory=dict)
    forwarded: int = 0


@dataclass
class RefillSinks:
    """Where the outputs of ingest's handlers go during a refill: refused events are only counted.

    refused: events by reason; forwarded: how many events of merges were sent
    forgets: how many Forgets were sent
    """

    forwarder: KafkaForwarder
    refused: dict[str, int] = field(default_factory=dict)
    forwarded: int = 0
    forgets: int = 0

    def put(self, record: Record, rejected: Rejected) -> None:
        """Count an event that was accepted once and is refused by the present settings."""
        self.refused[rejected.reason] = self.refused.get(rejected.reason, 0) + 1

    def forward(self, record: Record, key: bytes, value: bytes | None, partition: int) -> None:
        """Send an event that a merge moves, unless the merge's target was forgotten."""
        if not getattr(record, "target_forgotten", False):
            self.forwarder.forward(record, key, value, partition)
            self.forwarded += 1

    def forget(self, record: Record, user_id: str) -> None:
        """Send the Forget of a null record that no ingest has applied."""
        self.forwarder.forget(record, user_id)
        self.forgets += 1

    def flush(self) -> None:
        """Return once everything that was sent is stored."""
        if self.forwarded or self.forgets:
            self.forwarder.flush()


def run(
    settings: Settings,
    *,
    skip_lost: bool,
    on_progress: OnProgress = lambda done, total: None,
    on_lost: Callable[[str], None] = lambda sentence: None,
) -> RefillReport:
    """Fill every gap.

    skip_lost: skip offsets that the archive lacks; otherwise they are an error, and nothing is
               applied
    on_lost:   called with the skipped offsets, before anything is applied
    Raises LogMismatch, Unavailable, StoreRefused, BundleError, and EddylineError while an ingest
    runs.
    """
    with retention_gaps.open_store(settings) as store:
        log = topics.log_ids(settings, [CLICKS])[CLICKS]
        report = RefillReport(retention_gaps.find(settings, store, log))
        if report.gaps:
            archive = Archive(settings)
            try:
                _check_archive(archive, log, report, skip_lost=skip_lost)
                if report.lost:
                    on_lost(report.lost)
                _fill_all(settings, archive, store, report, on_progress)
            except OSError as error:
                raise ArchiveUnavailable(f"archive at {archive.url}: {error}") from None
        return report


def _check_archive(archive: Archive, log: LogId, report: RefillReport, *, skip_lost: bool) -> None:
    """Refuse an archive of another log, or one that lacks offsets; note both kinds of loss."""
    for gap in report.gaps:
        files = retention_gaps.archived_files(archive, gap, log)
        report.files_without_merges += sum(archive.since(file) is None for file in files)
    report.lost = retention_gaps.lacking(archive, report.gaps, log)
    if report.lost and not skip_lost:
        raise LogMismatch(
            f"{report.lost}. Nothing was applied. `eddyline refill --skip-lost` applies what is "
            "there and goes on without the rest"
        )


def _fill_all(
    settings: Settings,
    archive: Archive,
    store: RedisStore,
    report: RefillReport,
    on_progress: OnProgress,
) -> None:
    towers = bundles.recorded(settings, generations.active_generation(settings))
    producer = outlet_producer(settings)
    sinks = RefillSinks(KafkaForwarder(settings, producer))
    try:
        steps = RecordedStepRanges(generations.KafkaStepRanges(settings, producer))
        known = generations.known(settings)
        filler = GapFiller(settings, archive, store, towers, known, sinks, steps)
        done, total = 0, sum(gap.last - gap.first + 1 for gap in report.gaps)
        for gap in report.gaps:
            for offsets in filler.fill(gap):
                done += offsets
                on_progress(done, total)
    finally:
        producer.close(timeout=settings.kafka_timeout_ms / 1000)
    report.clicks, report.profiles = filler.clicks, filler.profiles
    report.refused, report.forwarded = sinks.refused, sinks.forwarded


class GapFiller:
    """Fills gaps one after the other. Thread rule: one thread.

    known:            all generations: their embeddings are deleted with a forgotten user
    steps:            where micro-steps are taken: where ingest took them before, as recorded
    clicks, profiles: counts of what was applied so far
    """

    def __init__(
        self,
        settings: Settings,
        archive: Archive,
        store: RedisStore,
        towers: Bundle,
        known: Sequence[str],
        sinks: RefillSinks,
        steps: StepRangeRule,
    ) -> None:
        ids = topics.log_ids(settings, [CLICKS, USERS])
        self.clicks = Outcome()
        self.profiles = Outcome()
        self._settings = settings
        self._archive = archive
        self._store = store
        self._log = ids[CLICKS]
        self._committed = retention_gaps.committed_offsets(settings)
        self._committed_users = retention_gaps.committed_offsets(settings, USERS)
        self._profile_records = ProfileRecords(settings, archive, store)
        self._user_ends = topics.end_offsets(settings, USERS)
        outputs = Outputs(
            sinks, sinks, sinks, sinks, user_forwarder=sinks, forgets=sinks, steps=steps
        )
        kept_ms = topics.delete_retention_ms(settings, [USERS])
        self._handlers = Handlers(
            settings, store, ids, [Generation(towers)], outputs, known, delete_retention_ms=kept_ms
        )

    def fill(self, gap: Gap) -> Iterator[int]:
        """Apply what the archive has of the gap, then close it; yields how many offsets each step
        passed.

        Raises EddylineError where another process writes all the time, Unavailable, OSError.
        """
        at, tries = gap.first, 0
        self._profile_records.reset(gap.partition)
        while True:
            try:
                for record in self._apply(gap):
                    yield max(0, record.offset + 1 - at)
                    at, tries = max(at, record.offset + 1), 0
                retention_gaps.close(self._settings, self._store, self._log, gap)
                break
            except FenceMoved as error:
                tries += 1
                if tries == _TRIES:
                    raise EddylineError(
                        f"another process writes, an ingest perhaps: {error}"
                    ) from None
        yield max(0, gap.last + 1 - at)

    def _apply(self, gap: Gap) -> Iterator[Record]:
        """Apply from the fences on; yields the last click of every applied batch."""
        partition, clicks_topic = gap.partition, self._settings.prefixed(CLICKS)
        by_clicks, by_users = self._handlers.clicks, self._handlers.users
        by_clicks.open(partition)
        next_offsets = by_clicks.fences.open({partition: (0, gap.end)}, self._committed)
        # A null record that no ingest has applied has no Forget yet: without one, the user's clicks
        # in Kafka would be applied.
        by_users.fences.open({partition: (0, self._user_ends[partition])}, self._committed_users)
        last_ms = self._last_ms(gap)
        if last_ms is None:
            return
        first_user = self._profile_records.next_offset(USERS, partition)
        in_kafka = self._profile_records.in_kafka(partition, first_user)
        with closing(in_kafka):
            profiles = takewhile(
                lambda record: record.timestamp <= last_ms,
                self._profile_records.merged(partition, first_user, in_kafka),
            )
            clicks = self._clicks(partition, next_offsets[partition], gap.last)
            merged = with_ids(
                heapq.merge(profiles, clicks, key=lambda record: record.timestamp),
                self._profile_records.ids_of_forgets(partition, next_offsets[partition], gap.last),
                self._settings.id_form,
            )
            for (topic, unknown), run_ in groupby(merged, key=lambda r: (r.topic, is_unknown(r))):
                for records in batches(run_, self._settings.chunk_records_max):
                    batch = RecordBatch(topic, partition, records, time.time_ns() // 1_000)
                    if unknown:
                        by_clicks.keep_erasures(partition, erasures(records), batch.last)
                        yield records[-1]
                    elif topic == clicks_topic:
                        self.clicks.add(by_clicks.apply_one(batch))
                        yield records[-1]
                    else:
                        by_users.fences.resumed(partition, records)
                        self.profiles.add(by_users.apply_one(batch))
        by_clicks.write_behind.write(partition)

    def _last_ms(self, gap: Gap) -> int | None:
        """Append time of the gap's last event that the archive has; None where it has none."""
        found = (self._last_ms_of(topic, gap) for topic in _OF_CLICKS)
        return max((last_ms for last_ms in found if last_ms is not None), default=None)

    def _last_ms_of(self, topic: str, gap: Gap) -> int | None:
        for file in reversed(self._archive.files(topic, gap.partition)):
            if file.first <= gap.last and file.last >= gap.first:
                last_ms = None
                for event in self._archive.events(file):
                    if gap.first <= event.offset <= gap.last:
                        last_ms = event.appended_ms
                if last_ms is not None:
                    return last_ms
        return None

    def _clicks(self, partition: int, first: int, last: int) -> Iterator[Record]:
        """The archive's clicks, merges and Forgets of a partition, by offset."""
        parts = (self._archive.read(topic, partition, first=first) for topic in _OF_CLICKS)
        topic = self._settings.prefixed(CLICKS)
        for event in heapq.merge(*parts, key=lambda event: event.offset):
            if event.offset > last:
                return
            yield as_sent(topic, event)
