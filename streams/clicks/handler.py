"""Clicks in: decode, deduplicate, forward strays, update users, count popularity and co-visits.

All effects of a batch on its users are one fenced write to slot `u{p}`; its popularity counts and
its co-visits are one more each to each item slot, see `popularity` and `co_visits`. Each slot has
its own fences, so a process may die between two writes: records at or below a slot's fence are
skipped for that slot. Batches of several partitions share their round trips and the numpy work, and
each fails alone. The same log gives the same state, whatever the batches were.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import msgspec
from typing_extensions import override

from eddyline.errors import FenceMoved, Rejected, Unavailable
from eddyline.kafka.topics import CLICKS
from eddyline.schema import events
from eddyline.schema.erasure import Erasure
from eddyline.schema.events import Click, Forget, Merge
from eddyline.schema.partial import Omitted
from eddyline.schema.partitioning import partition_of, user_slot
from eddyline.schema.records import Record
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import Fence, Source, StateStore, UserEffects, UserQuery, UserWrite
from streams.clicks.batch import ClickBatch, decode, deduplicate, narrow
from streams.clicks.co_visits import CoVisitWriter
from streams.clicks.micro_steps import MicroSteps, Step
from streams.clicks.popularity import PopularityCounts
from streams.clicks.step_ranges import FixedStepRanges, OpenedSlot, StepRangeRule
from streams.clicks.user_cache import Slot, UserCache, check
from streams.clicks.user_updates import UserUpdates
from streams.fences import PartitionFences
from streams.ports import DeadLetterSink, Forwarder, Handler, Outcome, RecordBatch
from streams.records import coordinates
from streams.write_behind import WriteBehindGroup

log = logging.getLogger(__name__)

# One script with this many clicks of one partition takes 0.4 ms of Redis, where 256 take 1.6. The
# partitions together still fill a batch, so it costs nothing.
PARTITION_MAX = 48


class ClickHandler(Handler):
    """Applies batches of clicks. Thread rule: one thread, that of the users handler too.

    micro:   the micro-steps of each live generation; empty leaves embeddings alone
    clock_s: decides only when pending counts and co-visits are due; no effect depends on it
    steps:   decides at which offsets each generation takes micro-steps
    follows: whether a user's list and embedding are written; the events of others count for the
             popularity of items only, not for co-visits. None: those of all users
    """

    partition_max = PARTITION_MAX
    write_behind: WriteBehindGroup

    def __init__(
        self,
        settings: Settings,
        store: StateStore,
        fences: PartitionFences,
        dead_letters: DeadLetterSink,
        forwarder: Forwarder,
        micro: Sequence[MicroSteps],
        clock_s: Callable[[], float] = time.monotonic,
        steps: StepRangeRule | None = None,
        follows: Callable[[str], bool] | None = None,
    ) -> None:
        self.fences = fences
        self.omitted = Omitted()
        self._follows = follows
        self.popularity = PopularityCounts(settings, store, fences, clock_s)
        self.co_visits = CoVisitWriter(settings, store, fences, clock_s)
        self.write_behind = WriteBehindGroup(self.popularity, self.co_visits)
        self._generations = [one.generation for one in micro]
        self.cache = UserCache(store, self._generations, settings.history_cache_entries_max)
        self._settings = settings
        self._store = store
        self._dead_letters = dead_letters
        self._forwarder = forwarder
        self._micro = micro
        self._step_ranges = steps or FixedStepRanges()

    @override
    def open(self, partition: int) -> None:
        self.write_behind.reset(partition)
        self.cache.drop(user_slot(partition))

    @override
    def prepare(self, partitions: Collection[int]) -> None:
        slots = []
        for partition in partitions:
            source, slot = Source(CLICKS, partition), user_slot(partition)
            with suppress(FenceMoved):  # the first batch finds it too
                slots.append(self._slot(source, slot))
        self._open_steps(slots)

    @override
    def move_fences(self, partition: int, offset: int) -> None:
        source, slot = Source(CLICKS, partition), user_slot(partition)
        _, expected, _ = self._slot(source, slot)
        new = self.fences.fence(partition, offset)
        self._store.write_users(slot, source, expected, new, UserEffects())
        self.fences.moved(source, slot, new)
        self.popularity.add(partition, new, [])
        self.co_visits.add(partition, new, [])
        self.write_behind.write(partition)

    def keep_erasures(self, partition: int, erasures: Mapping[str, Erasure], offset: int) -> None:
        """Apply the Forget at `offset` where no id of its user is known, so that nothing is to go.

        erasures: SHA-256 of a user id -> what is kept
        Raises FenceMoved, StoreUnavailable.
        """
        source, slot = Source(CLICKS, partition), user_slot(partition)
        _, expected, _ = self._slot(source, slot)
        new = self.fences.fence(partition, offset)
        if self.fences.done(source, slot) < offset:
            self._store.write_users(
                slot, source, expected, new, UserEffects(erasures=dict(erasures))
            )
            self.fences.moved(source, slot, new)
            self.co_visits.add(partition, new, [])
        self.popularity.add(partition, new, [])

    @override
    def apply(self, batches: Sequence[RecordBatch]) -> list[Outcome | Exception]:
        window = self._settings.dedupe_window_events
        if all(batch.last - batch.first < window for batch in batches):
            return self._apply(batches)
        return [self._apply_parts(narrow(batch, window)) for batch in batches]

    def _apply_parts(self, parts: Iterator[RecordBatch]) -> Outcome | Exception:
        """Apply the parts of one batch, until one fails.

        The write of a batch moves the floor of the window, so its own events must be above it until
        they are counted.
        """
        outcome = Outcome()
        for part in parts:
            [result] = self._apply([part])
            if isinstance(result, Exception):
                return result
            outcome.add(result)
        return outcome

    def _apply(self, batches: Sequence[RecordBatch]) -> list[Outcome | Exception]:
        clicks = [ClickBatch.of(batch) for batch in batches]
        for one in clicks:
            with self._guard([one]):
                self._decode(one)
        new = [one for one in _without_error(clicks) if one.batch.last > one.done]
        self._read_users(new)
        for one in _without_error(new):
            with self._guard([one]):
                self._update(one)
        new = _without_error(new)
        embeddings = self._step(new)
        writes = [self._user_write(one, embeddings) for one in new]
        self._forward(new)
        for one, write in zip(new, writes, strict=True):
            with self._guard([one]):
                self.popularity.write_below(one.batch.partition, write.effects.window_floor)
                self.co_visits.write_due(one.batch.partition)
        self._write([(one, w) for one, w in zip(new, writes, strict=True) if one.error is None])
        for one in _without_error(clicks):
            with self._guard([one]):
                partition = one.batch.partition
                last = self.fences.fence(partition, one.batch.last)
                self.popularity.add(partition, last, one.accepted)
        return [one.error or one.outcome for one in clicks]

    def _decode(self, one: ClickBatch) -> None:
        """Decode the records, drop re-sends and find the cached users."""
        batch = one.batch
        self.fences.begin(batch.partition, batch.records)
        _, one.fence, known = opened = self._slot(one.source, one.slot)
        done = one.done
        one.decoded = decode(self._settings, batch)
        self._open_steps([opened])
        one.profiles = known.profiles
        one.accepted, one.entering = deduplicate(
            self._settings.dedupe_window_events, one.decoded.events, known.window.known, done
        )
        applied = [event.user_id for record, event in one.accepted if record.offset > done]
        followed = applied if self._follows is None else filter(self._follows, applied)
        one.users, one.missing = self.cache.look(one.slot, followed)
        if self._settings.seen_items_max:
            one.seen_of = [
                event.user_id
                for record, event in one.accepted
                if record.offset > done and event.user_id in one.users
                if isinstance(event, Merge | Forget)
            ]
        one.outcome = Outcome(
            records=len(batch.records), applied=len(applied), ignored=one.decoded.ignored
        )
        if batch.first > done:
            one.outcome.duplicates = len(one.decoded.events) - len(applied)
        else:
            one.outcome.repeated = sum(record.offset <= done for record in batch.records)
            fresh = sum(record.offset > done for record, _ in one.decoded.events)
            one.outcome.duplicates = fresh - len(applied)

    def _slot(self, source: Source, slot: str) -> tuple[Source, Fence | None, Slot]:
        """The slot of a partition at the expected fence; visits of its outbox become pending.

        Raises FenceMoved, StoreUnavailable.
        """
        fence = self.fences.expected(source, slot)
        known = self.cache.slot(slot, source, fence)
        if known.outbox is not None:
            self.co_visits.restore(source.partition, fence, *known.outbox)
            known.outbox = None
        return source, fence, known

    def _read_users(self, clicks: Sequence[ClickBatch]) -> None:
        """Read the users that are not cached, all in one round trip."""
        # A forwarded record cannot be recalled: then the fence is checked first, whatever the
        # users.
        reading = [one for one in clicks if one.missing or one.seen_of or one.forwards]
        if not reading:
            return
        with self._guard(reading):
            reads = self._store.read_many(
                [
                    UserQuery(b.slot, b.source, b.missing, self._generations, b.seen_of)
                    for b in reading
                ]
            )
            for one, read in zip(reading, reads, strict=True):
                with self._guard([one]):
                    check(one.slot, one.source, one.fence, read)
                    one.read = read

    def _update(self, one: ClickBatch) -> None:
        """Apply the events to the users."""
        users = self.cache.complete(one.users, one.read)
        ranges = self.cache.slot(one.slot, one.source, one.fence).ranges or {}
        of_micro = [ranges[micro.generation] for micro in self._micro]
        updates = one.updates = UserUpdates(self._settings, self._micro, of_micro, users)
        done = one.done
        for record, event in one.accepted:
            if record.offset > done and event.user_id in users:
                updates.apply(record, event)
        one.outcome.forgotten = updates.forgotten
        one.outcome.applied -= updates.forgotten

    def _step(self, clicks: Sequence[ClickBatch]) -> list[dict[str, tuple[int, bytes]]]:
        """The micro-steps of all batches together, by generation; no user is in two batches."""
        results = []
        for number, micro in enumerate(self._micro):
            steps: list[Step] = []
            counts: dict[str, int] = {}
            stored: dict[str, tuple[int, bytes]] = {}
            profiles: dict[str, Mapping[str, object]] = {}
            for updates in (one.updates for one in clicks):
                if updates is not None:
                    steps += updates.steps[number]
                    for user_id, user in updates.learners(number):
                        embedding = user.embeddings[number]
                        counts[user_id] = embedding.steps
                        profiles[user_id] = user.profile
                        if embedding.vector is not None:
                            stored[user_id] = (embedding.steps, embedding.vector)
            results.append(micro.run(steps, counts, stored, profiles))
        return results

    def _user_write(
        self, one: ClickBatch, embeddings: Sequence[Mapping[str, tuple[int, bytes]]]
    ) -> UserWrite:
        updates, last = one.updates, self.fences.fence(one.batch.partition, one.batch.last)
        if updates is None:
            raise LookupError(f"no events were applied for {one.source}")
        effects = updates.effects(one.batch.read_us, embeddings)
        effects.accepted, effects.profiles = one.entering, one.profiles
        known = self.cache.slot(one.slot, one.source, one.fence)
        effects.generations = tuple(sorted(known.ranges or ()))
        effects.step_ranges = None if known.ranges == known.stored else known.ranges
        # Ids accepted below can no longer match: the next record lies at least one offset further.
        effects.window_floor = last.offset + 1 - self._settings.dedupe_window_events
        effects.seen_max = self._settings.seen_items_max
        if effects.visits:
            effects.visits_floor = self.co_visits.floor(one.batch.partition)
        one.outcome.steps, one.outcome.late = sum(map(len, updates.steps)), updates.late
        return UserWrite(one.slot, one.source, one.fence, last, effects)

    def _forward(self, clicks: Sequence[ClickBatch]) -> None:
        """Deliver rejected, stray and moved events before the fence moves beyond them."""
        sending = []
        for one in clicks:
            with self._guard([one]):
                self._send(one)
            if one.outcome.rejected or one.outcome.forwarded:
                sending.append(one)
        with self._guard(sending):
            if any(one.outcome.rejected for one in sending):
                self._dead_letters.flush()
            if any(one.outcome.forwarded for one in sending):
                self._forwarder.flush()

    def _send(self, one: ClickBatch) -> None:
        for record, rejected in one.decoded.rejected:
            if record.offset > one.done:
                self._dead_letters.put(record, rejected)
                one.outcome.rejected += 1
        sent = max(one.done, self.fences.forwarded_up_to(one.batch.partition))
        for record, event in one.decoded.stray:
            if record.offset > sent:
                at = coordinates(record)
                value = record.value or b""
                if isinstance(event, Click) and event.event_id is None:
                    # The origin serves as the id, so that forwarding twice counts once.
                    value = events.encode(msgspec.structs.replace(event, event_id=at))
                log.warning(
                    "click in a wrong partition forwarded; its producer needs a key without outer "
                    "blanks in Unicode NFC, and Kafka's murmur2 partitioner",
                    extra={"at": at},
                )
                self._forward_event(record, event.user_id, value, one.outcome)
        for record, click in one.updates.moved if one.updates else ():
            if record.offset > sent:
                self._forward_event(record, click.user_id, events.encode(click), one.outcome)

    def _forward_event(self, record: Record, user_id: str, value: bytes, outcome: Outcome) -> None:
        partition = partition_of(user_id, self._settings.clicks_partitions)
        try:
            self._forwarder.forward(record, user_id.encode(), value, partition)
        except Rejected as rejected:
            self._dead_letters.put(record, rejected)
            outcome.rejected += 1
        else:
            outcome.forwarded += 1

    def _write(self, writes: Sequence[tuple[ClickBatch, UserWrite]]) -> None:
        """One fenced write to each slot, all in one round trip."""
        if not writes:
            return
        with self._guard([one for one, _ in writes]):
            answers = self._store.write_many([write for _, write in writes])
            for (one, write), answer in zip(writes, answers, strict=True):
                with self._guard([one]):
                    if isinstance(answer, Exception):
                        raise answer
                    self.fences.moved(one.source, one.slot, write.new)
                    known = self.cache.slot(one.slot, one.source, write.new)
                    known.window.add(one.entering, write.effects.window_floor)
                    known.stored = known.ranges or {}
                    if one.updates is not None:
                        self.cache.keep(one.slot, one.updates.users)
                    self.co_visits.add(one.batch.partition, write.new, write.effects.visits)

    def _open_steps(self, opened: Sequence[tuple[Source, Fence | None, Slot]]) -> None:
        """Decide where the micro-steps of newly read slots are taken; recorded before the first."""
        new = [one for one in opened if one[2].ranges is None]
        if not new:
            return
        log_id = str(self.fences.log())
        slots = [
            OpenedSlot(source.partition, log_id, 0 if f is None else f.offset + 1, slot.stored)
            for source, f, slot in new
        ]
        found = self._step_ranges.open(slots, self._generations)
        for (_, _, slot), ranges in zip(new, found, strict=True):
            slot.ranges = ranges

    @contextmanager
    def _guard(self, clicks: Sequence[ClickBatch]) -> Iterator[None]:
        """An error drops the cached slots; FenceMoved and Unavailable end these batches only."""
        try:
            yield
        except BaseException as error:
            for one in clicks:
                self.cache.drop(one.slot)
            if not isinstance(error, FenceMoved | Unavailable):
                raise
            for one in clicks:
                one.error = error


def _without_error(clicks: Sequence[ClickBatch]) -> list[ClickBatch]:
    return [one for one in clicks if one.error is None]
