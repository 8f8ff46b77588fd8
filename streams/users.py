"""User profiles in: a whole profile replaces the stored one, a null record forgets the user.

Forgetting deletes at once, and is told to `clicks` as well (`events.Forget`), before the fence moves: clicks
that are read again, because Redis was emptied or went back, forget him at the same place once more.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from eddyline.errors import Rejected
from eddyline.kafka.topics import USERS
from eddyline.schema import validation
from eddyline.schema.partitioning import user_slot
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import Fence, Source, StateStore
from streams.fences import PartitionFences
from streams.ports import DeadLetterSink, ForgetSink, Outcome, Record


class UserIngest:
    """Applies chunks of user profiles. Thread rule: one thread, the same as its `positions`.

    generations: whose embeddings are deleted with a forgotten user
    written:     told of every write, in the same thread: the partition, its fence before and after, the users
    forgetting:  tells `clicks` of forgotten users; None where nobody will read them from there
    """

    def __init__(
        self,
        settings: Settings,
        store: StateStore,
        positions: PartitionFences,
        dead_letters: DeadLetterSink,
        generations: Sequence[str],
        written: Callable[[int, Fence | None, Fence, Collection[str]], None] = lambda *_: None,
        forgetting: ForgetSink | None = None,
    ) -> None:
        self.positions = positions
        self._settings = settings
        self._store = store
        self._dead_letters = dead_letters
        self._generations = generations
        self._written = written
        self._forgetting = forgetting

    def ingest(self, partition: int, records: Sequence[Record], read_us: int) -> Outcome:
        """Apply consecutive records of one partition, oldest first; the last of each user stands.

        read_us: not used; the same for every kind of chunk
        Raises FenceMoved, StoreUnavailable and KafkaUnavailable, as `ClickIngest.ingest` does.
        """
        self.positions.begin(partition, records[0].offset, records[-1].offset)
        source, slot = Source(USERS, partition), user_slot(partition)
        outcome = Outcome(records=len(records))
        profiles: dict[str, Mapping[str, object] | None] = {}
        until_ms: dict[str, int] = {}
        sent = self.positions.forwarded_up_to(partition)
        for record in records:
            try:
                user_id, profile = validation.profile(
                    self._settings, partition, record.key, record.value, record.timestamp
                )
            except Rejected as rejected:
                self._dead_letters.put(record, rejected)
                outcome.rejected += 1
                continue
            attributes = None if profile is None else profile.attributes
            if profile is None and self._forgetting is not None and record.offset > sent:
                self._forgetting.forget(record, user_id)
            forgotten_before = user_id in profiles and profiles[user_id] is None
            if forgotten_before and attributes is not None:
                # The new profile must not hide that list and embedding have to go.
                self._write(source, slot, profiles, until_ms, record.offset - 1)
                profiles = {}
            profiles[user_id] = attributes
            until_ms[user_id] = record.timestamp
            outcome.applied += 1
        self._write(source, slot, profiles, until_ms, records[-1].offset)
        return outcome

    def _write(
        self,
        source: Source,
        slot: str,
        profiles: dict[str, Mapping[str, object] | None],
        until_ms: Mapping[str, int],
        offset: int,
    ) -> None:
        self._dead_letters.flush()
        if self._forgetting is not None:
            self._forgetting.flush()
        expected, new = self.positions.expected(source, slot), self.positions.fence(offset)
        self._store.write_profiles(
            slot, source, expected, new, profiles, self._generations, until_ms
        )
        self.positions.moved(source, slot, new)
        self._written(source.partition, expected, new, profiles)


def sources(settings: Settings, partition: int) -> dict[Source, list[str]]:
    """The sources of a users partition, each with the slots that have a fence of it."""
    return {Source(USERS, partition): [user_slot(partition)]}
