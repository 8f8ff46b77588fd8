"""A chunk of clicks on its way: what its records are, and which of its events count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from eddyline.errors import Rejected
from eddyline.schema import validation
from eddyline.schema.deduplication import DedupeWindow
from eddyline.schema.events import Merge
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
    for record in records:
        try:
            event, right = validation.user_event(
                settings, partition, record.value, record.timestamp
            )
        except Rejected as rejected:
            found.rejected.append((record, rejected))
            continue
        if not right and len(record.value or b"") > FORWARD_BYTES_MAX:
            detail = "lies in a wrong partition and is too large to be forwarded with its origin"
            found.rejected.append((record, Rejected("too_large", "", detail)))
            continue
        (found.events if right else found.stray).append((record, event))
    return found


def deduplicate(
    window: int, found: Sequence[Event], known: Mapping[str, int], done: int
) -> tuple[list[Event], dict[str, int]]:
    """(events that count, ids that enter the window). Arguments as for `DedupeWindow`."""
    deduped = DedupeWindow(window, known, done)
    counts = [
        (record, event) for record, event in found if deduped.accept(event.event_id, record.offset)
    ]
    return counts, deduped.accepted
