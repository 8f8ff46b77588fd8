"""User profiles in: a whole profile replaces the stored one, a null record forgets the user.

Forgetting deletes at once and appends an `events.Forget` to `clicks` before the fence moves: clicks
that are read again (Redis was emptied, or went back) forget the user at the same place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from typing_extensions import override

from eddyline.errors import FenceMoved, Rejected, Unavailable
from eddyline.kafka.topics import USERS
from eddyline.schema import events, validation
from eddyline.schema.erasure import is_outdated
from eddyline.schema.events import UserProfile
from eddyline.schema.partial import Omitted
from eddyline.schema.partitioning import user_slot
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import ProfilePlace, Source, StateStore
from streams.clicks.user_cache import UserCache
from streams.fences import PartitionFences
from streams.ports import DeadLetterSink, ForgetSink, Handler, Outcome, RecordBatch
from streams.records import Record


class UserHandler(Handler):
    """Applies batches of user profiles. Thread rule: one thread, that of the `user_cache`.

    generations: whose embeddings are deleted with a forgotten user
    user_cache:  the cache of the clicks handler, which learns of every write
    forgets:     appends forgotten users to `clicks`; None where no ingest reads them from there
    """

    def __init__(
        self,
        settings: Settings,
        store: StateStore,
        fences: PartitionFences,
        dead_letters: DeadLetterSink,
        generations: Sequence[str],
        user_cache: UserCache,
        forgets: ForgetSink | None = None,
    ) -> None:
        self.fences = fences
        self.omitted = Omitted()
        self._settings = settings
        self._store = store
        self._dead_letters = dead_letters
        self._generations = generations
        self._user_cache = user_cache
        self._forgets = forgets

    @override
    def open(self, partition: int) -> None:
        pass

    @override
    def move_fences(self, partition: int, offset: int) -> None:
        self._write(partition, {}, {}, {}, offset)

    @override
    def apply(self, batches: Sequence[RecordBatch]) -> list[Outcome | Exception]:
        results: list[Outcome | Exception] = []
        for batch in batches:
            try:
                results.append(self._apply(batch))
            except (FenceMoved, Unavailable) as error:
                results.append(error)
        return results

    def _apply(self, batch: RecordBatch) -> Outcome:
        """The last profile of each user is written."""
        partition, records = batch.partition, batch.records
        self.fences.begin(partition, batch.records)
        outcome = Outcome(records=len(records))
        profiles: dict[str, Mapping[str, object] | None] = {}
        until_ms: dict[str, int] = {}
        places: dict[str, ProfilePlace] = {}
        sent = self.fences.forwarded_up_to(partition)
        changes: list[tuple[Record, str, UserProfile | None]] = []
        for record in records:
            try:
                found = validation.profiles(self._settings, record, self.omitted)
            except Rejected as rejected:
                self._dead_letters.put(record, rejected)
                outcome.rejected += 1
                continue
            outcome.ignored += not found
            changes += [(record, *change) for change in found]
        for record, user_id, profile in changes:
            outcome.applied += 1
            attributes = None if profile is None else profile.attributes
            place = _place(record)
            if attributes is not None and profiles.get(user_id) is not None:
                if is_outdated(place, places[user_id]):
                    continue
            if profile is None and self._forgets is not None and record.offset > sent:
                self._forgets.forget(record, user_id)
            forgotten_before = user_id in profiles and profiles[user_id] is None
            if forgotten_before and attributes is not None:
                # The new profile must not hide that the list and the embedding are to be deleted.
                self._write(partition, profiles, until_ms, places, record.offset - 1)
                profiles = {}
            profiles[user_id] = attributes
            until_ms[user_id] = record.timestamp
            places[user_id] = place
        self._write(partition, profiles, until_ms, places, batch.last)
        return outcome

    def _write(
        self,
        partition: int,
        profiles: dict[str, Mapping[str, object] | None],
        until_ms: Mapping[str, int],
        places: Mapping[str, ProfilePlace],
        offset: int,
    ) -> None:
        self._dead_letters.flush()
        if self._forgets is not None:
            self._forgets.flush()
        source, slot = Source(USERS, partition), user_slot(partition)
        expected, new = self.fences.expected(source, slot), self.fences.fence(partition, offset)
        self._store.write_profiles(
            slot, source, expected, new, profiles, self._generations, until_ms, places
        )
        self.fences.moved(source, slot, new)
        self._user_cache.profiles_written(slot, expected, new, profiles)


def _place(record: Record) -> ProfilePlace:
    """A replayed dead letter is as old as its first append, wherever it stands now."""
    origin_ms = events.origin_ms(record.headers)
    return (record.offset, record.timestamp) if origin_ms is None else (-1, origin_ms)
