"""A chunk of clicks on its way: what its records are, and which of its events count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from eddyline.errors import Rejected
from eddyline.schema import events
from eddyline.schema.deduplication import is_resend
from eddyline.schema.events import Merge
from eddyline.schema.partitioning import partition_of
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import Fence, Source
from streams.clicks.popularity import Event
from streams.clicks.user_cache import CachedUser
from streams.clicks.user_updates import UserUpdates
from streams.dead_letters import FORWARD_BYTES_MAX
from streams.ports import Outcome, Record


@dataclass(slots=True)
class DecodedBatch:
    """A chunk's records by what becomes of them; events in the order of the log."""

    events: list[Event] = field(default_factory=list)
    rejected: list[tuple[Record, Rejected]] = field(default_factory=list)
    stray: list[Event] = field(default_factory=list)


@dataclass(slots=True)
class ClickBatch:
    """One chunk on its way.

    fence:    under which all is computed; records up to `done` were applied to the users before
    accepted: the events that count, those up to `done` included; entering: the ids that enter the window
    users:    those of the events beyond `done`; missing: those of them that have to be read
    """

    number: int
    source: Source
    slot: str
    read_us: int
    fence: Fence | None
    last: Fence
    found: DecodedBatch
    profiles: str
    accepted: list[Event]
    entering: dict[str, int]
    users: dict[str, CachedUser | None]
    missing: list[str]
    outcome: Outcome
    drafts: UserUpdates | None = None

    @property
    def done(self) -> int:
        """The offset up to which users have everything."""
        return -1 if self.fence is None else self.fence.offset

    @property
    def is_new(self) -> bool:
        """Whether there is anything to write to the users."""
        return self.last.offset > self.done

    @property
    def sends_on(self) -> bool:
        """Whether anything may go elsewhere before the fence moves."""
        return bool(self.found.rejected or self.found.stray) or any(
            isinstance(event, Merge) for _, event in self.accepted
        )


def decode(settings: Settings, partition: int, records: Sequence[Record]) -> DecodedBatch:
    """Decode a chunk's records and say what becomes of each."""
    found = DecodedBatch()
    partitions, future_ms = settings.clicks_partitions, settings.far_future_ms_max
    for record in records:
        try:
            event = events.decode_user_event(
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


def deduplicate(
    window: int, found: Sequence[Event], known: Mapping[str, int], done: int
) -> tuple[list[Event], dict[str, int]]:
    """(events that count, ids that enter the window).

    window: how many offsets back a re-send is dropped; known: the ids in it before this chunk
    done:   records up to this offset were applied before

    After `done` an event is a re-send where its id was accepted at most the window's width before.
    Up to `done` the window holds the decision: the id was accepted under this very offset, or not at all.
    That is exact for as long as an item slot is no further behind than the window is wide.
    """
    counts = []
    entering: dict[str, int] = {}
    for record, event in found:
        event_id, offset = event.event_id, record.offset
        if event_id is not None:
            before = entering.get(event_id)
            if before is None:
                before = known.get(event_id)
            if offset <= done:
                if before != offset:
                    continue
            elif is_resend(before, offset, window):
                continue
            else:
                entering.pop(event_id, None)
                entering[event_id] = offset
        counts.append((record, event))
    return counts, entering
