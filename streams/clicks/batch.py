"""A batch of clicks: its decoded events, which of them count, and which are strays.

Re-sent events do not count. A stray belongs to another partition; the handler forwards it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from eddyline.errors import Rejected
from eddyline.kafka.topics import CLICKS
from eddyline.schema import events, validation
from eddyline.schema.deduplication import DedupeWindow
from eddyline.schema.events import Merge
from eddyline.schema.mapping.mapper import Mapper
from eddyline.schema.partitioning import user_slot
from eddyline.schema.records import Record
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import Fence, Source, UserRead
from streams.clicks.popularity import Event
from streams.clicks.user_cache import CachedUser
from streams.clicks.user_updates import UserUpdates
from streams.ports import Outcome, RecordBatch


@dataclass(slots=True)
class DecodedEvents:
    """The records of a batch by their kind; events in the order of the log.

    events:  those of this partition; stray: those of another one
    ignored: records that have no event for the map of the topic
    """

    events: list[Event] = field(default_factory=list)
    stray: list[Event] = field(default_factory=list)
    rejected: list[tuple[Record, Rejected]] = field(default_factory=list)
    ignored: int = 0


@dataclass(slots=True)
class ClickBatch:
    """One batch while it is applied.

    source, slot: the partition of clicks, and its user slot
    fence:    the user slot's fence before the batch: records up to `done` were applied to the users
    profiles: the fence of `users` under which the cached users were read
    accepted: the events that count, those up to `done` included; entering: ids that enter the
              window
    users:    users of the events beyond `done`, None for those that have to be read, who are in
              `missing`
    seen_of:  users whose seen items are read: a merge moves them, a Forget keeps some
    read:     the users in `missing`, and what `seen_of` names; None where nothing had to be read
    updates:  the users with the events applied
    error:    the error that ended the batch; `outcome` is meaningless then
    """

    batch: RecordBatch
    source: Source
    slot: str
    fence: Fence | None = None
    decoded: DecodedEvents = field(default_factory=DecodedEvents)
    profiles: str = ""
    accepted: list[Event] = field(default_factory=list)
    entering: dict[str, int] = field(default_factory=dict)
    users: dict[str, CachedUser | None] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    seen_of: list[str] = field(default_factory=list)
    read: UserRead | None = None
    updates: UserUpdates | None = None
    outcome: Outcome = field(default_factory=Outcome)
    error: Exception | None = None

    @classmethod
    def of(cls, batch: RecordBatch) -> ClickBatch:
        """A batch before anything is known of it."""
        return cls(batch, Source(CLICKS, batch.partition), user_slot(batch.partition))

    @property
    def done(self) -> int:
        """The offset up to which the users have every event; −1 for none."""
        return -1 if self.fence is None else self.fence.offset

    @property
    def forwards(self) -> bool:
        """Whether any record may go to another topic or partition before the fence moves."""
        return bool(self.decoded.rejected or self.decoded.stray) or any(
            isinstance(event, Merge) for _, event in self.accepted
        )


def narrow(batch: RecordBatch, width: int) -> Iterator[RecordBatch]:
    """The batch in parts, each with offsets of less than `width` apart."""
    part: list[Record] = []
    for record in batch.records:
        if part and record.offset - part[0].offset >= width:
            yield replace(batch, records=part)
            part = []
        part.append(record)
    yield replace(batch, records=part)


def decode(settings: Settings, batch: RecordBatch) -> DecodedEvents:
    """Decode the records of a batch and sort them by kind."""
    decoded = DecodedEvents()
    by_map = validation.map_of(settings, CLICKS)
    if by_map is not None:
        for record in batch.records:
            _map(settings, by_map, record, decoded)
        return decoded
    for record in batch.records:
        try:
            event, here = validation.user_event(
                settings,
                batch.partition,
                record.value,
                record.timestamp,
                events.origin_ms(record.headers),
            )
        except Rejected as rejected:
            decoded.rejected.append((record, rejected))
            continue
        if here:
            decoded.events.append((record, event))
        else:
            decoded.stray.append((record, event))
    return decoded


def _map(settings: Settings, by_map: Mapper, record: Record, decoded: DecodedEvents) -> None:
    """Decode a record of a topic with a map: it has any number of events."""
    try:
        found = validation.user_events(settings, record, by_map)
    except Rejected as rejected:
        decoded.rejected.append((record, rejected))
        return
    decoded.ignored += not found
    for one, event, here in found:
        (decoded.events if here else decoded.stray).append((one, event))


def deduplicate(
    window: int, decoded: Sequence[Event], known: Mapping[str, int], done: int
) -> tuple[list[Event], dict[str, int]]:
    """Return (events that count, ids that enter the window). Arguments as for `DedupeWindow`."""
    deduped = DedupeWindow(window, known, done)
    counts = [(r, event) for r, event in decoded if deduped.accept(event.event_id, r.offset)]
    return counts, deduped.accepted
