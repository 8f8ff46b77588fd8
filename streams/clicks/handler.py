"""Clicks in: decode, drop re-sends, bring lists and embeddings up to date, count popularity.

All effects of a chunk of clicks partition p on its users are one fenced write to slot `u{p}`; its popularity
counts are one more to each item slot, see `click_counts`. Each slot has its own fence, so a process may die
between two of them: records at or below a slot's fence are skipped for that slot. Chunks of several
partitions share their round trips and the numpy work, and fail each for itself. The same log gives the same
state, whatever the chunks were.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import msgspec

from eddyline.errors import FenceMoved, Unavailable
from eddyline.kafka.topics import CLICKS
from eddyline.schema import events
from eddyline.schema.events import Click
from eddyline.schema.partitioning import partition_of, user_slot
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import Fence, Source, StateStore, UserRead, UserWrite
from streams.clicks.batch import ClickBatch, decode, deduplicate
from streams.clicks.micro_steps import MicroSteps
from streams.clicks.popularity import PopularityCounts
from streams.clicks.user_cache import UserCache, check
from streams.clicks.user_updates import UserUpdates
from streams.fences import PartitionFences
from streams.ports import DeadLetterSink, Forwarder, Outcome, Record, RecordBatch

log = logging.getLogger(__name__)


class ClickIngest:
    """Applies chunks of clicks. Thread rule: one thread, the same as its `positions`.

    micro:   the active generation's micro-steps; None leaves embeddings alone
    clock_s: only says when waiting popularity counts are due; no effect depends on it
    """

    def __init__(
        self,
        settings: Settings,
        store: StateStore,
        positions: PartitionFences,
        dead_letters: DeadLetterSink,
        forwarder: Forwarder,
        micro: MicroSteps | None,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.positions = positions
        self.counts = PopularityCounts(settings, store, positions, clock_s)
        self.cache = UserCache(
            store, micro.generation if micro else "", settings.history_cache_entries_max
        )
        self._settings = settings
        self._store = store
        self._dead_letters = dead_letters
        self._forwarder = forwarder
        self._micro = micro

    def ingest(self, partition: int, records: Sequence[Record], read_us: int) -> Outcome:
        """Apply consecutive records of one partition, oldest first. Nothing is done twice.

        read_us: when the chunk was read, microseconds since 1970
        Raises FenceMoved (go back to the lowest fence), StoreUnavailable and KafkaUnavailable (try the
        chunk again later). Whatever is raised, nothing is lost and what was written is written once.
        """
        [outcome] = self.ingest_many([RecordBatch(partition, records, read_us)])
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def ingest_many(self, parts: Sequence[RecordBatch]) -> list[Outcome | Exception]:
        """Apply one chunk each of different partitions. What `ingest` would raise is in the chunk's place."""
        ends: dict[int, Outcome | Exception] = {}
        works: list[ClickBatch] = []
        for number, part in enumerate(parts):
            with self._ending(ends, number, part.partition):
                works.append(self._begin(number, part))
        new = self._drafted([work for work in works if work.is_new], ends)
        embeddings = self._step(new)
        writes = [(work, self._effects(work, embeddings)) for work in new]
        self._write(self._sent_on(writes, ends), ends)
        for work in works:
            if work.number not in ends:
                with self._ending(ends, work.number, work.source.partition):
                    self.counts.add(work.source, work.last, work.accepted)
                    ends[work.number] = work.outcome
        return [ends[number] for number in range(len(parts))]

    def count(self, partition: int) -> None:
        """Count the partition's clicks that wait for it. Raises as `ingest` does."""
        self.counts.write(partition)

    def opened(self, partition: int) -> None:
        """Forget what is known of a partition: it is read again from its lowest fence."""
        self.counts.opened(partition)
        self.cache.drop(user_slot(partition))

    def profiles_written(
        self, partition: int, before: Fence | None, fence: Fence, user_ids: Collection[str]
    ) -> None:
        """Profiles were just written, or users forgotten, by this process; in the same thread."""
        self.cache.profiles_written(user_slot(partition), before, fence, user_ids)

    def _begin(self, number: int, part: RecordBatch) -> ClickBatch:
        """Sort a chunk's records and decide which events count."""
        partition, records = part.partition, part.records
        self.positions.begin(partition, records[0].offset, records[-1].offset)
        source, slot = Source(CLICKS, partition), user_slot(partition)
        fence = self.positions.expected(source, slot)
        done = -1 if fence is None else fence.offset
        found = decode(self._settings, partition, records)
        known = self.cache.slot(slot, source, fence)
        accepted, entering = deduplicate(
            self._settings.dedupe_window_events, found.events, known.window.known, done
        )
        applied = [event.user_id for record, event in accepted if record.offset > done]
        fresh = (
            len(found.events)
            if records[0].offset > done
            else sum(r.offset > done for r, _ in found.events)
        )
        outcome = Outcome(
            records=len(records),
            applied=len(applied),
            duplicates=fresh - len(applied),
            repeated=0 if records[0].offset > done else sum(r.offset <= done for r in records),
        )
        return ClickBatch(
            number,
            source,
            slot,
            part.read_us,
            fence,
            self.positions.fence(records[-1].offset),
            found,
            known.profiles,
            accepted,
            entering,
            *self.cache.look(slot, applied),
            outcome,
        )

    def _drafted(
        self, works: Sequence[ClickBatch], ends: dict[int, Outcome | Exception]
    ) -> list[ClickBatch]:
        """Read the users that are not known, all in one round trip, and apply the events to them."""
        reads: dict[int, UserRead] = {}
        # What is sent on cannot be taken back: then the fence is looked at first, users or none.
        asked = [w for w in works if w.missing or w.sends_on]
        with self._all_ending(ends, asked):
            queries = [self.cache.query(w.slot, w.source, w.missing) for w in asked]
            found = self._store.read_many(queries) if queries else []
            reads = {w.number: read for w, read in zip(asked, found, strict=True)}
        for work in works:
            if work.number in ends:
                continue
            with self._ending(ends, work.number, work.source.partition):
                read = reads.get(work.number)
                if read is not None:
                    check(work.slot, work.source, work.fence, read)
                users = self.cache.take(work.users, read)
                drafts = work.drafts = UserUpdates(self._settings, self._micro, users)
                done = work.done
                for record, event in work.accepted:
                    if record.offset > done:
                        drafts.apply(record, event)
        return [work for work in works if work.number not in ends]

    def _step(self, works: Sequence[ClickBatch]) -> dict[str, tuple[int, bytes]]:
        """The micro-steps of all chunks together; their users are different ones."""
        if self._micro is None:
            return {}
        steps, counts = [], {}
        stored: dict[str, tuple[int, bytes]] = {}
        profiles: dict[str, Mapping[str, object]] = {}
        for drafts in (work.drafts for work in works):
            if drafts is not None:
                steps += drafts.steps
                mine = drafts.counts()
                counts.update(mine)
                for user in mine:
                    draft = drafts.users[user]
                    profiles[user] = draft.profile
                    if draft.vector is not None:
                        stored[user] = (draft.steps, draft.vector)
        return self._micro.run(steps, counts, stored, profiles)

    def _effects(self, work: ClickBatch, embeddings: Mapping[str, tuple[int, bytes]]) -> UserWrite:
        drafts, last = work.drafts, work.last
        if drafts is None:
            raise LookupError(f"nothing was drafted for {work.source}")
        effects = drafts.effects(work.read_us, embeddings)
        effects.accepted, effects.profiles = work.entering, work.profiles
        # Ids accepted below can no longer be met: the next record lies at least one offset further.
        effects.window_floor = last.offset + 1 - self._settings.dedupe_window_events
        work.outcome.steps, work.outcome.late = len(drafts.steps), drafts.late
        return UserWrite(work.slot, work.source, work.fence, last, effects)

    def _sent_on(
        self, writes: list[tuple[ClickBatch, UserWrite]], ends: dict[int, Outcome | Exception]
    ) -> list[tuple[ClickBatch, UserWrite]]:
        """Deliver refused, stray and moved events, before a fence says that they are dealt with."""
        senders = []
        for work, _ in writes:
            with self._ending(ends, work.number, work.source.partition):
                self._send_on(work)
            if work.outcome.rejected or work.outcome.forwarded:
                senders.append(work)
        with self._all_ending(ends, senders):
            if any(work.outcome.rejected for work in senders):
                self._dead_letters.flush()
            if any(work.outcome.forwarded for work in senders):
                self._forwarder.flush()
        return [(work, write) for work, write in writes if work.number not in ends]

    def _send_on(self, work: ClickBatch) -> None:
        found = work.found
        for record, rejected in found.rejected:
            if record.offset > work.done:
                self._dead_letters.put(record, rejected)
                work.outcome.rejected += 1
        sent = max(work.done, self.positions.forwarded_up_to(work.source.partition))
        for record, event in found.stray:
            if record.offset > sent:
                at, value = (
                    f"{record.topic}/{record.partition}/{record.offset}",
                    record.value or b"",
                )
                if isinstance(event, Click) and event.event_id is None:
                    # The origin stands for the id, so that forwarding twice counts once.
                    value = events.encode(msgspec.structs.replace(event, event_id=at))
                log.warning(
                    "click in a wrong partition forwarded; its producer needs a key and Kafka's murmur2 "
                    "partitioner",
                    extra={"at": at},
                )
                self._forward(record, event.user_id, value, work.outcome)
        for record, click in work.drafts.moved if work.drafts else ():
            if record.offset > sent:
                self._forward(record, click.user_id, events.encode(click), work.outcome)

    def _forward(self, record: Record, user_id: str, value: bytes, outcome: Outcome) -> None:
        partition = partition_of(user_id, self._settings.clicks_partitions)
        self._forwarder.forward(record, user_id.encode(), value, partition)
        outcome.forwarded += 1

    def _write(
        self, writes: list[tuple[ClickBatch, UserWrite]], ends: dict[int, Outcome | Exception]
    ) -> None:
        """One fenced write to each slot, all in one round trip."""
        if not writes:
            return
        with self._all_ending(ends, [work for work, _ in writes]):
            answers = self._store.write_many([write for _, write in writes])
            for (work, write), answer in zip(writes, answers, strict=True):
                with self._ending(ends, work.number, work.source.partition):
                    if isinstance(answer, Exception):
                        raise answer
                    self.positions.moved(work.source, work.slot, work.last)
                    known = self.cache.slot(work.slot, work.source, work.last)
                    known.window.add(work.entering, write.effects.window_floor)
                    if work.drafts is not None:
                        self.cache.give_back(work.slot, work.drafts.users)

    @contextmanager
    def _ending(
        self, ends: dict[int, Outcome | Exception], number: int, partition: int
    ) -> Iterator[None]:
        """Where this raises, the chunk ends with it, and nothing that was known of its slot is kept."""
        try:
            yield
        except (FenceMoved, Unavailable) as error:
            ends[number] = error
            self.cache.drop(user_slot(partition))
        except BaseException:
            self.cache.drop(user_slot(partition))
            raise

    @contextmanager
    def _all_ending(
        self, ends: dict[int, Outcome | Exception], works: Sequence[ClickBatch]
    ) -> Iterator[None]:
        """As `_ending`, for something that these chunks do together."""
        try:
            yield
        except BaseException as error:
            for work in works:
                self.cache.drop(work.slot)
                if isinstance(error, FenceMoved | Unavailable):
                    ends[work.number] = error
            if not isinstance(error, FenceMoved | Unavailable):
                raise


def sources(settings: Settings, partition: int) -> dict[Source, list[str]]:
    """The sources of a clicks partition, each with the slots that have a fence of it."""
    item_slots = [f"i{shard}" for shard in range(settings.item_slots)]
    return {Source(CLICKS, partition): [user_slot(partition), *item_slots]}
