"""Clicks in: decode, drop re-sends, bring lists and embeddings up to date, count popularity.

All effects of a chunk of clicks partition p on its users are one fenced write to slot `u{p}`; its popularity
counts are one more to each item slot. Each slot has its own fence, so a process may die between two of them:
records at or below a slot's fence are skipped for that slot. Counts of small chunks wait a moment and go in
one write; their fence stays behind until then, so nothing is lost with the process. The same log gives the
same state, whatever the chunks were.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from eddyline import behaviour, events
from eddyline.errors import FenceMoved, Rejected
from eddyline.events import Click, Merge
from eddyline.kafka import CLICKS
from eddyline.ports import Fence, Source, StateStore, UserRead
from eddyline.resends import is_resend
from eddyline.settings import Settings
from eddyline.slots import item_slot, partition_of, user_slot
from streams.chunk import DeadLetterSink, Forwarder, Outcome, Record
from streams.dead_letters import FORWARD_BYTES_MAX
from streams.drafts import Drafts, is_moved
from streams.micro_steps import MicroSteps
from streams.positions import Positions

log = logging.getLogger(__name__)

# Popularity may lag by this much: at low rates it saves most of the counting scripts, and query workers
# read the popular list less often than this anyway.
COUNT_S = 0.1
Event = tuple[Record, Click | Merge]


@dataclass(slots=True)
class _Sorted:
    """A chunk's records by what becomes of them; events in the order of the log."""

    events: list[Event] = field(default_factory=list)
    rejected: list[tuple[Record, Rejected]] = field(default_factory=list)
    stray: list[Event] = field(default_factory=list)


@dataclass(slots=True)
class _Tally:
    """Events of one partition that wait to be counted as popular.

    since_s: when the first of them came
    last:    all up to this fence are in here
    done:    item slot -> the offset up to which it has been counted already
    """

    since_s: float
    last: Fence | None = None
    done: dict[str, int] = field(default_factory=dict)
    counts: dict[str, dict[int, dict[str, int]]] = field(default_factory=dict)


class ClickIngest:
    """Applies chunks of clicks. Thread rule: one thread, the same as its `positions`.

    micro:   the active generation's micro-steps; None leaves embeddings alone
    clock_s: only says when waiting popularity counts are due; no effect depends on it
    """

    def __init__(
        self,
        settings: Settings,
        store: StateStore,
        positions: Positions,
        dead_letters: DeadLetterSink,
        forwarder: Forwarder,
        micro: MicroSteps | None,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.positions = positions
        self._settings = settings
        self._store = store
        self._dead_letters = dead_letters
        self._forwarder = forwarder
        self._micro = micro
        self._clock_s = clock_s
        self._tallies: dict[int, _Tally] = {}
        # Far less than the window: the decisions of all that is still to be counted must be in it.
        self._behind_max = min(settings.chunk_records_max, settings.dedupe_window_events // 2)
        self._item_slots = [f"i{shard}" for shard in range(settings.item_slots)]
        self._weights = settings.kind_weights

    def ingest(self, partition: int, records: Sequence[Record], read_us: int) -> Outcome:
        """Apply consecutive records of one partition, oldest first. Nothing is done twice.

        read_us: when the chunk was read, microseconds since 1970
        Raises FenceMoved (go back to the lowest fence), StoreUnavailable and KafkaUnavailable (try the
        chunk again later). Whatever is raised, nothing is lost and what was written is written once.
        """
        self.positions.begin(partition, records[0].offset, records[-1].offset)
        source, slot = Source(CLICKS, partition), user_slot(partition)
        fence = self.positions.expected(source, slot)
        done = -1 if fence is None else fence.offset
        found = self._sort(partition, records)
        new = [(r, c) for r, c in found.events if r.offset > done]
        read = self._read(source, slot, fence, found.events, new)
        accepted, window = self._accept(found.events, read.accepted_at, done)
        applied = [(r, c) for r, c in accepted if r.offset > done]
        outcome = Outcome(
            records=len(records),
            applied=len(applied),
            duplicates=len(new) - len(applied),
            repeated=sum(1 for r in records if r.offset <= done),
        )
        last = self.positions.fence(records[-1].offset)
        if last.offset > done:
            drafts = Drafts(self._settings, self._micro, read)
            for record, event in applied:
                drafts.apply(record, event)
            effects, outcome.steps = drafts.effects(read_us)
            outcome.late = drafts.late
            self._send_on(found, drafts.moved, done, outcome)
            effects.accepted = window
            # Ids accepted below can no longer be met: the next record lies at least one offset further.
            effects.window_floor = last.offset + 1 - self._settings.dedupe_window_events
            self._store.write_users(slot, source, fence, last, effects)
            self.positions.moved(source, slot, last)
        self._count(source, last, accepted)
        return outcome

    def opened(self, partition: int) -> None:
        """Forget what was not counted yet: the partition is read again from its lowest fence."""
        self._tallies.pop(partition, None)

    def due(self) -> list[int]:
        """The partitions whose events have waited long enough to be counted. Any thread may ask."""
        now = self._clock_s()
        return [p for p, tally in list(self._tallies.items()) if now - tally.since_s >= COUNT_S]

    def count(self, partition: int) -> None:
        """Count now what waits. Raises as `ingest` does."""
        if partition in self._tallies:
            self._write_counts(Source(CLICKS, partition), self._tallies[partition])

    def _sort(self, partition: int, records: Sequence[Record]) -> _Sorted:
        found, settings = _Sorted(), self._settings
        partitions, future_ms = settings.clicks_partitions, settings.far_future_ms_max
        for record in records:
            try:
                event = events.decode_behaviour(
                    record.value, appended_ms=record.timestamp, far_future_ms_max=future_ms
                )
            except Rejected as rejected:
                found.rejected.append((record, rejected))
                continue
            right = partition_of(event.user_id, partitions) == partition
            if not right and len(record.value or b"") > FORWARD_BYTES_MAX:
                detail = "lies in a wrong partition and is too large to be forwarded with its origin"
                found.rejected.append((record, Rejected("too_large", "", detail)))
                continue
            (found.events if right else found.stray).append((record, event))
        return found

    def _read(
        self, source: Source, slot: str, fence: Fence | None,
        found: list[Event], new: list[Event],
    ) -> UserRead:  # fmt: skip
        ids = list(dict.fromkeys(c.event_id for _, c in found if c.event_id is not None))
        users = list(dict.fromkeys(c.user_id for _, c in new))
        generation = self._micro.generation if self._micro else ""
        read = self._store.read_users(slot, source, ids, users, generation)
        if read.fence != fence:
            raise FenceMoved(f"{slot}:{source}", str(fence or ""), str(read.fence or ""))
        return read

    def _accept(
        self, found: list[Event], accepted_at: Mapping[str, int], done: int
    ) -> tuple[list[Event], dict[str, int]]:
        """(events that count, ids that enter the window).

        After `done` an event is a re-send where its id was accepted at most the window's width before.
        Up to `done` the window holds the decision: the id was accepted under this very offset, or not at all.
        That is exact for as long as an item slot is no further behind than the window is wide.
        """
        window, counts, known = self._settings.dedupe_window_events, [], dict(accepted_at)
        entering: dict[str, int] = {}
        for record, event in found:
            event_id, offset = event.event_id, record.offset
            if event_id is not None:
                before = known.get(event_id)
                if offset <= done:
                    if before != offset:
                        continue
                elif is_resend(before, offset, window):
                    continue
                else:
                    known[event_id] = entering[event_id] = offset
            counts.append((record, event))
        return counts, entering

    def _send_on(
        self, found: _Sorted, moved: list[tuple[Record, Click]], done: int, outcome: Outcome
    ) -> None:
        """Deliver refused, stray and moved events, before the fence says that they are dealt with."""
        for record, rejected in found.rejected:
            if record.offset > done:
                self._dead_letters.put(record, rejected)
                outcome.rejected += 1
        for record, event in found.stray:
            if record.offset > done:
                at, value = f"{record.topic}/{record.partition}/{record.offset}", record.value or b""
                if isinstance(event, Click) and event.event_id is None:
                    # The origin stands for the id, so that forwarding twice counts once.
                    value = events.encode(msgspec.structs.replace(event, event_id=at))
                log.warning(
                    "click in a wrong partition forwarded; its producer needs a key and Kafka's murmur2 "
                    "partitioner",
                    extra={"at": at},
                )
                self._forward(record, event.user_id, value, outcome)
        for record, click in moved:
            self._forward(record, click.user_id, events.encode(click), outcome)
        if outcome.rejected:
            self._dead_letters.flush()
        if outcome.forwarded:
            self._forwarder.flush()

    def _forward(self, record: Record, user_id: str, value: bytes, outcome: Outcome) -> None:
        partition = partition_of(user_id, self._settings.clicks_partitions)
        self._forwarder.forward(record, user_id.encode(), value, partition)
        outcome.forwarded += 1

    def _count(self, source: Source, last: Fence, accepted: list[Event]) -> None:
        """Add the events to what is to be counted; count once there is enough of it, or time to."""
        tally = self._tallies.get(source.partition)
        if tally is None:
            tally = self._tallies[source.partition] = _Tally(self._clock_s())
            for slot in self._item_slots:
                fence = self.positions.expected(source, slot)
                tally.done[slot] = -1 if fence is None else fence.offset
        for record, click in accepted:
            if isinstance(click, Merge):
                continue
            slot = item_slot(click.item_id, self._settings.item_slots)
            if record.offset > tally.done[slot] and (more := self._thousandths(click)):
                bucket = click.at_ms // (self._settings.popular_bucket_s * 1_000)
                counted = tally.counts.setdefault(slot, {}).setdefault(bucket, {})
                counted[click.item_id] = counted.get(click.item_id, 0) + more
        tally.last = last
        behind = last.offset - min(tally.done.values())
        if behind >= self._behind_max or self._clock_s() - tally.since_s >= COUNT_S:
            self._write_counts(source, tally)

    def _thousandths(self, click: Click) -> int:
        """How much the event makes its item popular; nothing for a dislike, or where it counted before."""
        if is_moved(click):
            return 0
        weight = behaviour.strength(click, self._settings.dwell_ms_full)
        return round(1_000 * weight * self._weights[click.kind])

    def _write_counts(self, source: Source, tally: _Tally) -> None:
        """One write to each item slot that has not got these events."""
        for slot in self._item_slots:
            if tally.last is None or tally.done[slot] >= tally.last.offset:
                continue
            expected, counts = self.positions.expected(source, slot), tally.counts.get(slot, {})
            limits = self._settings.popular_buckets, self._settings.popular_items_max
            self._store.count_clicks(slot, source, expected, tally.last, counts, *limits)
            self.positions.moved(source, slot, tally.last)
            tally.done[slot] = tally.last.offset
        del self._tallies[source.partition]


def sources(settings: Settings, partition: int) -> dict[Source, list[str]]:
    """The sources of a clicks partition, each with the slots that have a fence of it."""
    item_slots = [f"i{shard}" for shard in range(settings.item_slots)]
    return {Source(CLICKS, partition): [user_slot(partition), *item_slots]}
