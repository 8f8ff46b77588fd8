"""The partitions of the topics as one log, in the order of event time.

Records of one time make a group, which is complete once no partition can bring another record of
that time. A record that comes later than its time is a group of its own, at the moment it comes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import NamedTuple

from eddyline.errors import Rejected
from eddyline.kafka.topics import ANSWERS, CLICKS, ITEMS, USERS
from eddyline.schema import answers, events, validation
from eddyline.schema.answers import RecordedAnswer
from eddyline.schema.events import Forget, Item, UserProfile
from eddyline.schema.records import Record
from eddyline.schema.validation import UserEvent
from eddyline.settings.loader import Settings

# (topic without prefix, partition)
Place = tuple[str, int]


class LogRecord(NamedTuple):
    """A record and its place in the merged log.

    at_ms:  event time; of a record without one the append time, or 0 for an item or a profile that
            was there before the judge
    events: of a record of `clicks`, those that lie in their users' partition
    ignored: ingest makes nothing of the record here
    read_s: when it was read, on the monotonic clock
    answer: of a record of `answers`
    """

    topic: str
    record: Record
    at_ms: int
    events: tuple[UserEvent, ...]
    ignored: bool
    read_s: float
    answer: RecordedAnswer | None = None


@dataclass(slots=True)
class Group:
    """The records of one time, in the order of each partition."""

    at_ms: int
    records: list[LogRecord] = field(default_factory=list)


class Decoder:
    """Makes log records. Thread rule: one thread.

    rejected: records that ingest refuses, and answers that are none
    """

    def __init__(self, settings: Settings, follows: Callable[[str], bool], since_ms: int) -> None:
        """follows: whether the records of `users` on this user count

        since_ms: items and profiles without a time that were appended before count from the start
        """
        self._settings = settings
        self._follows = follows
        self._since_ms = since_ms
        self._map = validation.map_of(settings, CLICKS)
        self.rejected = 0

    def decode(self, topic: str, record: Record, read_s: float) -> LogRecord:
        """The record at its time."""
        if topic == ANSWERS:
            return self._answer(record, read_s)
        times: list[int]
        found: tuple[UserEvent, ...] = ()
        try:
            if topic == CLICKS:
                made = validation.user_events(self._settings, record, self._map)
                found = tuple(event for _, event, own in made if own)
                ignored = not found
                times = [event.at_ms for event in found if not isinstance(event, Forget)]
            elif topic == USERS:
                profiles = validation.profiles(self._settings, record)
                ignored = not any(own and self._follows(user) for user, _, own in profiles)
                times = [self._time(profile, record) for _, profile, _ in profiles]
            else:
                changes = validation.item_changes(self._settings, record)
                ignored = not any(own for _, _, own in changes)
                times = [
                    self._time(item if isinstance(item, Item) else None, record)
                    for _, item, _ in changes
                ]
        except Rejected:
            self.rejected += 1
            # A refused record of an item may hide the item; ingest decides.
            ignored, times = topic != ITEMS, []
        at_ms = min([record.timestamp, *times])
        return LogRecord(topic, record, at_ms, found, ignored, read_s)

    def _answer(self, record: Record, read_s: float) -> LogRecord:
        """At its append time; ingest ignores it."""
        found = None
        try:
            found = answers.decode_answer(record.value, key=events.decode_key(record.key))
        except Rejected:
            self.rejected += 1
        return LogRecord(ANSWERS, record, record.timestamp, (), True, read_s, found)

    def _time(self, found: Item | UserProfile | None, record: Record) -> int:
        if found is None:
            return record.timestamp
        return found.at_ms or (0 if record.timestamp < self._since_ms else record.timestamp)


class Merge:
    """Records of all partitions, until they leave in groups. Thread rule: one thread.

    frontier_ms: the largest time of a group so far
    """

    def __init__(self, places: Collection[Place], wait_s: float, size_max: int = 1_000_000) -> None:
        """wait_s: how long a partition at its end may still bring a record of a time

        size_max: a partition with so many records that wait is not waited for
        """
        self._filled: dict[Place, deque[LogRecord]] = {}
        self._empty = set(places)
        # So that a group has the same order whatever was read first.
        self._number = {place: number for number, place in enumerate(places)}
        self._wait_s = wait_s
        self._size_max = size_max
        self.frontier_ms = 0

    def add(self, place: Place, records: Collection[LogRecord]) -> None:
        """Add the next records of a partition."""
        if records:
            self._filled.setdefault(place, deque()).extend(records)
            self._empty.discard(place)

    def size(self, place: Place) -> int:
        """Records of a partition that wait."""
        return len(self._filled.get(place, ()))

    def oldest_ms(self) -> int | None:
        """The smallest append time of a record that waits; None without any."""
        heads = [waiting[0].record.timestamp for waiting in self._filled.values()]
        return min(heads, default=None)

    def next(self, ended: AbstractSet[Place], now_s: float, now_ms: int) -> Group | None:
        """The next group; None while records of its time may come, or without any.

        ended:  partitions that were read to their end
        now_s:  the monotonic clock; now_ms: milliseconds since 1970
        """
        if not self._filled:
            return None
        at_ms = min([waiting[0].at_ms for waiting in self._filled.values()])
        if at_ms > self.frontier_ms and self._may_grow(at_ms, ended, now_s, now_ms):
            return None
        group = Group(at_ms)
        mine = [place for place, waiting in self._filled.items() if waiting[0].at_ms == at_ms]
        for place in sorted(mine, key=self._number.__getitem__):
            waiting = self._filled[place]
            while waiting and waiting[0].at_ms == at_ms:
                group.records.append(waiting.popleft())
            if not waiting:
                del self._filled[place]
                self._empty.add(place)
        self.frontier_ms = max(self.frontier_ms, at_ms)
        return group

    def _may_grow(self, at_ms: int, ended: AbstractSet[Place], now_s: float, now_ms: int) -> bool:
        """Whether a partition may bring another record of this time."""
        if not self._empty <= ended:
            return True
        first_read_s, open_ = now_s, bool(self._empty)
        for place, waiting in self._filled.items():
            if waiting[0].at_ms != at_ms:
                continue
            first_read_s = min(first_read_s, waiting[0].read_s)
            if waiting[-1].at_ms == at_ms and all(one.at_ms == at_ms for one in waiting):
                if place not in ended and len(waiting) < self._size_max:
                    return True
                open_ = True
        if not open_ or at_ms + self._wait_s * 1_000 <= now_ms:
            return False
        return first_read_s + self._wait_s > now_s
