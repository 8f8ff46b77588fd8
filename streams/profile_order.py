"""Which forwarded records of `users` count: the counterpart of `streams.items.order` (ADR 23).

A null record forgets what is older than its first append. A profile that is newer stays, and is
appended again after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from eddyline.schema.erasure import Erasure, is_outdated
from eddyline.schema.records import Record
from eddyline.stores.state_store import ProfilePlace
from streams.records import Restored, appended_after, is_forwarded


@dataclass(slots=True)
class ProfileOrder:
    """The profiles at the present place of the batch; only users of forwarded records matter.

    profiles: user id -> attributes; None after a null record of this batch
    places:   user id -> place of the profile, or of that null record. What was appended again after
              a record has the offset of that record
    erasures: user id -> what is kept of a forgotten user, from before the batch
    disputed: forwarded records of users whom another producer sends to their own partition
    """

    profiles: dict[str, Mapping[str, object] | None]
    places: dict[str, ProfilePlace]
    erasures: Mapping[str, Erasure]
    disputed: int = 0
    _restored: dict[str, Restored] = field(default_factory=dict)

    def is_known(self, user_id: str, place: ProfilePlace) -> bool:
        """Whether a null record was forwarded before, and is applied."""
        erasure = self.erasures.get(user_id)
        return place[0] < 0 and erasure is not None and place[1] <= erasure.until_ms

    def counts(
        self,
        user_id: str,
        record: Record,
        place: ProfilePlace,
        attributes: Mapping[str, object] | None,
    ) -> bool:
        """Whether the record sets or deletes the profile; call it for each in the log's order."""
        if place[0] < 0 and (newer := self._newer(user_id, record, place, attributes)) is not None:
            self._restored[user_id] = newer
            return False
        self._restored.pop(user_id, None)
        if place[0] < 0 and (after := appended_after(record)) is not None:
            place = after, place[1]
        self.profiles[user_id], self.places[user_id] = attributes, place
        return True

    def restored(self) -> Iterable[Restored]:
        """What to append again: newer states than those that are last in the log."""
        return self._restored.values()

    def _newer(
        self,
        user_id: str,
        record: Record,
        place: ProfilePlace,
        attributes: Mapping[str, object] | None,
    ) -> Restored | None:
        """The user's state, if it is newer than a forwarded record."""
        stored, at = self.profiles.get(user_id), self.places.get(user_id)
        # In one millisecond, a state that was appended again after a record is that of its place.
        after = appended_after(record)
        outdated = at is not None and (
            is_outdated(place, at) or (after is not None and at[1] == place[1] and at[0] > after)
        )
        if stored is not None and at is not None:
            self.disputed += is_forwarded(record) and at[0] >= 0
            if outdated:
                profile: dict[str, Any] = {"user_id": user_id, "attributes": dict(stored)}
                return Restored.after(record, user_id, at[1], msgspec.json.encode(profile))
        if stored is None and attributes is not None:
            erasure = self.erasures.get(user_id)
            since = place[0] if after is None else after
            if erasure is not None and erasure.covers_profile(since, place[1]):
                return Restored.after(record, user_id, erasure.until_ms, None)
            if user_id in self.profiles and at is not None and outdated:
                return Restored.after(record, user_id, at[1], None)
        return None
