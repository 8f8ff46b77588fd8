"""User profiles in: a whole profile replaces the stored one, a null record forgets the user.

Forgetting deletes at once and appends an `events.Forget` to `clicks` before the fence moves: clicks
that are read again (Redis was emptied, or went back) forget the user at the same place.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from typing_extensions import override

from eddyline.errors import FenceMoved, Rejected, Unavailable
from eddyline.kafka.topics import CLICKS, USERS
from eddyline.schema import events, validation
from eddyline.schema.erasure import Erasure
from eddyline.schema.events import UserProfile
from eddyline.schema.partial import Omitted
from eddyline.schema.partitioning import partition_of, user_slot
from eddyline.schema.records import Record
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import ProfilePlace, Source, StateStore, UserQuery
from streams.clicks.user_cache import UserCache
from streams.fences import PartitionFences
from streams.ports import DeadLetterSink, ForgetSink, Forwarder, Handler, Outcome, RecordBatch
from streams.profile_order import ProfileOrder
from streams.strays import Strays

# A change of one user: its record, the user, and the profile; None forgets the user.
_Change = tuple[Record, str, UserProfile | None]


class UserHandler(Handler):
    """Applies batches of user profiles. Thread rule: one thread, that of the `user_cache`.

    generations: whose embeddings are deleted with a forgotten user
    user_cache:  the cache of the clicks handler, which learns of every write
    forgets:     appends forgotten users to `clicks`; None where no ingest reads them from there
    forwarder:   sends records in a wrong partition to their own; None leaves them
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
        forwarder: Forwarder | None = None,
    ) -> None:
        self.fences = fences
        self.omitted = Omitted()
        self._settings = settings
        self._store = store
        self._dead_letters = dead_letters
        self._generations = generations
        self._user_cache = user_cache
        self._forgets = forgets
        self._strays = Strays(forwarder, dead_letters, "user")
        self._mapped = validation.map_of(settings, USERS) is not None

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
        changes: list[_Change] = []
        strays: list[_Change] = []
        for record in records:
            try:
                found = validation.profiles(self._settings, record, self.omitted)
            except Rejected as rejected:
                self._dead_letters.put(record, rejected)
                outcome.rejected += 1
                continue
            outcome.ignored += not found
            for user_id, profile, own in found:
                if own:
                    changes.append((record, user_id, profile))
                elif record.offset > sent:
                    strays.append((record, user_id, profile))
        if self._strays.forwarded:
            self._forward(strays, outcome)
        order = self._order(partition, changes)
        for record, user_id, profile in changes:
            outcome.applied += 1
            attributes = None if profile is None else profile.attributes
            place = _place(record)
            if profile is None and self._forgets is not None and record.offset > sent:
                if not order.is_known(user_id, place):
                    self._forgets.forget(record, user_id)
            if not order.counts(user_id, record, place, attributes):
                outcome.applied -= 1
                outcome.outdated += 1
                continue
            forgotten_before = user_id in profiles and profiles[user_id] is None
            if forgotten_before and attributes is not None:
                # The new profile must not hide that the list and the embedding are to be deleted.
                self._write(partition, profiles, until_ms, places, record.offset - 1)
                profiles = {}
            profiles[user_id] = attributes
            until_ms[user_id] = events.first_append_ms(record)
            places[user_id] = order.places[user_id]
        self._strays.restore(order.restored(), self.fences, sent, order.disputed, outcome)
        self._write(partition, profiles, until_ms, places, batch.last)
        return outcome

    def _forward(self, strays: Sequence[_Change], outcome: Outcome) -> None:
        """Send records in a wrong partition to their own.

        A profile that is older than the user's erasure is dropped: behind the null record it would
        outlive it in the compacted log.
        """
        erasures = self._erasures({user for _, user, profile in strays if profile is not None})
        for record, user_id, profile in strays:
            erasure = None if profile is None else erasures.get(user_id)
            if erasure is not None and erasure.covers_profile(-1, events.first_append_ms(record)):
                outcome.forgotten += 1
                continue
            value = record.value
            if self._mapped:
                value = None if profile is None else events.encode(profile)
            to = partition_of(user_id, self._settings.clicks_partitions)
            self._strays.forward(record, user_id, value, to, outcome)

    def _erasures(self, users: Collection[str]) -> dict[str, Erasure]:
        """The erasures of users of any partition, in one round trip. Raises StoreUnavailable."""
        by_partition: dict[int, list[str]] = {}
        for user_id in users:
            to = partition_of(user_id, self._settings.clicks_partitions)
            by_partition.setdefault(to, []).append(user_id)
        queries = [
            UserQuery(user_slot(to), Source(CLICKS, to), mine, [])
            for to, mine in by_partition.items()
        ]
        reads = self._store.read_many(queries) if queries else []
        return {user_id: found for read in reads for user_id, found in read.erasures.items()}

    def _order(self, partition: int, changes: Sequence[_Change]) -> ProfileOrder:
        """What the users of forwarded records have. Raises StoreUnavailable."""
        forwarded = (user for record, user, _ in changes if _place(record)[0] < 0)
        users = list(dict.fromkeys(forwarded))
        if not users:
            return ProfileOrder({}, {}, {})
        slot, source = user_slot(partition), Source(CLICKS, partition)
        [read] = self._store.read_many([UserQuery(slot, source, users, [])])
        return ProfileOrder(dict(read.profiles), dict(read.profile_places), read.erasures)

    def _write(
        self,
        partition: int,
        profiles: dict[str, Mapping[str, object] | None],
        until_ms: Mapping[str, int],
        places: Mapping[str, ProfilePlace],
        offset: int,
    ) -> None:
        self._dead_letters.flush()
        self._strays.flush()
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
