"""`eddyline refill`: clicks that Kafka no longer has, and that were never applied, out of the archive.

The archive's events go through ingest's own functions, each under the offset that it had, behind the same
fences, a chunk in memory at a time. So it may be killed and given again, and what it leaves is the state that
ingest would have made of the topic. Profiles and forgotten users, of the archive and of Kafka, take effect
at their own time of appending. Afterwards ingest goes on with what Kafka has.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import groupby, islice, takewhile

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cli.console import console
from eddyline import generations
from eddyline.archive import MERGES, Archive, ArchiveUnavailable
from eddyline.errors import EddylineError, FenceMoved, LogMismatch, Rejected
from eddyline.kafka import topics
from eddyline.kafka.topics import CLICKS, USERS
from eddyline.settings.loader import Settings
from eddyline.stores import layout
from eddyline.stores.redis import RedisStore
from eddyline.stores.state_store import LogId, StateStore
from embeddings.bundle import bundle as bundles
from embeddings.bundle.bundle import Bundle
from streams import users
from streams.clicks import handler
from streams.clicks.handler import ClickIngest
from streams.clicks.micro_steps import MicroSteps
from streams.dead_letters import KafkaForwarder, outlet_producer
from streams.fences import PartitionFences
from streams.operations import retention_gaps
from streams.operations.refill_records import People, as_sent
from streams.operations.retention_gaps import Gap
from streams.ports import Forwarder, Outcome, Record
from streams.users import UserIngest

# Ranges of offsets that an error names; there may be one for every hour.
_NAMED_MAX = 20
# So often in a row may another process' write refuse ours before we say so.
_TRIES = 5
OnProgress = Callable[[int], None]


@dataclass
class Outside:
    """Where ingest's outputs go here.

    refused: events by reason; moved: events of merges that were sent on
    """

    forwarder: Forwarder
    refused: dict[str, int] = field(default_factory=dict)
    moved: int = 0

    def put(self, record: Record, rejected: Rejected) -> None:
        """Count an event that was accepted once and is refused by the present settings."""
        self.refused[rejected.reason] = self.refused.get(rejected.reason, 0) + 1

    def forward(self, record: Record, key: bytes, value: bytes, partition: int) -> None:
        """Send an event that a merge moves, unless nobody is left to get it."""
        if not getattr(record, "to_nobody", False):
            self.forwarder.forward(record, key, value, partition)
            self.moved += 1

    def flush(self) -> None:
        """Return once everything that was sent is stored."""
        if self.moved:
            self.forwarder.flush()


def run(settings: Settings, *, skip_lost: bool) -> None:
    """Fill every gap and say what was done.

    skip_lost: go on without offsets that the archive lacks, too; else nothing is done and they are named
    Raises LogMismatch, Unavailable, StoreRefused, BundleError, and EddylineError while an ingest runs.
    """
    topics.ensure_topics(settings)
    retention_gaps.require_no_ingest(settings)
    store = RedisStore(settings)
    try:
        store.check()
        store.claim_layout(layout.layout(settings))
        log = topics.log_ids(settings, [CLICKS])[CLICKS]
        found = retention_gaps.find(settings, store, log)
        if not found:
            console.print("nothing is missing: Kafka has all that was not applied yet")
            return
        archive = Archive(settings)
        try:
            _look(archive, found, log, skip_lost=skip_lost)
            _fill_all(settings, archive, store, found)
        except OSError as error:
            raise ArchiveUnavailable(f"archive at {archive.url}: {error}") from None
    finally:
        store.close()


def _look(archive: Archive, found: Sequence[Gap], log: LogId, *, skip_lost: bool) -> None:
    """Refuse an archive of another log, or one that lacks offsets; say what an old file cannot tell."""
    lacking: list[str] = []
    records = old = 0
    for gap in found:
        mine = [
            f
            for f in archive.files(CLICKS, gap.partition)
            if gap.first <= f.last and f.first <= gap.last
        ]
        old += sum(archive.since(file) is None for file in mine)
        if mine and archive.log_id(mine[-1]) != log:
            raise LogMismatch(
                f"the archive at {archive.url} is not of this log (cluster {log.cluster_id}, topic id "
                f"{log.topic_id}): its offsets are other events. Set EDDYLINE_ARCHIVE_URL to the one that is"
            )
        for first, last in archive.lacking(CLICKS, gap.partition, gap.first, gap.last):
            lacking.append(f"{CLICKS}/{gap.partition} offsets {first} to {last}")
            records += last - first + 1
    if lacking:
        more = f" and {len(lacking) - _NAMED_MAX} more" if len(lacking) > _NAMED_MAX else ""
        told = f"the archive at {archive.url} lacks {records:,}: {'; '.join(lacking[:_NAMED_MAX])}{more}"
        if not skip_lost:
            raise LogMismatch(
                f"{told}. Nothing was applied. `eddyline refill --skip-lost` applies what is there and goes "
                "on without the rest"
            )
        console.print(told)
    if old:
        console.print(
            f"{old:,} files were written before merges were archived: who was merged then keeps his list"
        )


def _fill_all(
    settings: Settings, archive: Archive, store: StateStore, found: Sequence[Gap]
) -> None:
    towers = bundles.recorded(settings, generations.active_generation(settings))
    producer = outlet_producer(settings)
    outside = Outside(KafkaForwarder(settings, producer))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    try:
        filling = Filling(settings, archive, store, towers, generations.known(settings), outside)
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("offsets", total=sum(gap.last - gap.first + 1 for gap in found))
            for gap in found:
                filling.fill(gap, lambda offsets: bar.advance(task, offsets))
    finally:
        producer.close(timeout=settings.kafka_timeout_ms / 1000)
    done = filling.outcome
    console.print(
        f"{done.applied:,} events applied, {filling.people.applied:,} profiles, {done.steps:,} steps"
    )
    if done.duplicates:
        console.print(
            f"{done.duplicates:,} dropped as sent again: dedupe_window_events was smaller then"
        )
    for reason, count in sorted(outside.refused.items()):
        console.print(f"{count:,} refused by the present settings: {reason}")
    if outside.moved:
        console.print(f"of merges: {outside.moved:,} events sent on")
    console.print("ingest can start")


class Filling:
    """Fills gaps one after the other. Thread rule: one thread.

    known: all generations, whose embeddings go with a forgotten user
    """

    def __init__(
        self,
        settings: Settings,
        archive: Archive,
        store: StateStore,
        towers: Bundle,
        known: Sequence[str],
        outside: Outside,
    ) -> None:
        ids = topics.log_ids(settings, [CLICKS, USERS])
        self.outcome, self.people = Outcome(), Outcome()
        self._settings, self._archive, self._store, self._log = (
            settings,
            archive,
            store,
            ids[CLICKS],
        )
        self._told = retention_gaps.read_upto(settings)
        self._people = People(settings, archive, store)
        self._ends = topics.end_offsets(settings, USERS)
        of_clicks = PartitionFences(
            store,
            settings.prefixed(CLICKS),
            lambda p: handler.sources(settings, p),
            lambda: ids[CLICKS],
        )
        of_users = PartitionFences(
            store,
            settings.prefixed(USERS),
            lambda p: users.sources(settings, p),
            lambda: ids[USERS],
        )
        self._by_clicks = ClickIngest(
            settings, store, of_clicks, outside, outside, MicroSteps(towers)
        )
        told = self._by_clicks.profiles_written
        self._by_users = UserIngest(settings, store, of_users, outside, known, told)

    def fill(self, gap: Gap, on_progress: OnProgress = lambda _: None) -> None:
        """Apply what the archive has of the gap, then close it.

        on_progress: told how many offsets were passed
        Raises EddylineError where another process writes all the time, Unavailable, OSError.
        """
        at, tries = gap.first, 0
        self._people.reset(gap.partition)
        while True:
            try:
                for record in self._apply(gap):
                    on_progress(max(0, record.offset + 1 - at))
                    at, tries = max(at, record.offset + 1), 0
                retention_gaps.close(self._settings, self._store, self._log, gap)
                break
            except FenceMoved as error:
                tries += 1
                if tries == _TRIES:
                    raise EddylineError(
                        f"another process writes, an ingest perhaps: {error}"
                    ) from None
        on_progress(max(0, gap.last + 1 - at))

    def _apply(self, gap: Gap) -> Iterator[Record]:
        """Apply from the fences on; the last click of every chunk that was applied."""
        partition, clicks_topic = gap.partition, self._settings.prefixed(CLICKS)
        self._by_clicks.opened(partition)
        first = self._by_clicks.positions.open({partition: (0, gap.end)}, self._told)[partition]
        self._by_users.positions.open({partition: (0, self._ends[partition])})
        last_ms = self._last_ms(gap)
        if last_ms is None:
            return
        first_user = self._people.next(USERS, partition)
        in_kafka = self._people.in_kafka(partition, first_user)
        with closing(in_kafka):
            people = takewhile(
                lambda r: r.timestamp <= last_ms, self._people.of(partition, first_user, in_kafka)
            )
            mine = self._clicks(partition, first, gap.last)
            merged = heapq.merge(people, mine, key=lambda record: record.timestamp)
            for topic, run_ in groupby(merged, key=lambda record: record.topic):
                while part := list(islice(run_, self._settings.chunk_records_max)):
                    if topic == clicks_topic:
                        self.outcome.add(
                            self._by_clicks.ingest(partition, part, time.time_ns() // 1_000)
                        )
                        yield part[-1]
                    else:
                        self.people.add(self._by_users.ingest(partition, part, 0))
        self._by_clicks.counts.write(partition)

    def _last_ms(self, gap: Gap) -> int | None:
        """When the last click of the gap that the archive has was appended; None where it has none."""
        last_ms = None
        for file in reversed(self._archive.files(CLICKS, gap.partition)):
            if file.first <= gap.last and file.last >= gap.first:
                for event in self._archive.events(file):
                    if gap.first <= event.offset <= gap.last:
                        last_ms = event.appended_ms
                if last_ms is not None:
                    break
        return last_ms

    def _clicks(self, partition: int, first: int, last: int) -> Iterator[Record]:
        """The archive's clicks and merges of a partition, by offset."""
        parts = (self._archive.read(topic, partition, first=first) for topic in (CLICKS, MERGES))
        topic = self._settings.prefixed(CLICKS)
        for found in heapq.merge(*parts, key=lambda event: event.offset):
            if found.offset > last:
                return
            yield as_sent(topic, found)
