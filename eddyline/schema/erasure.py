"""The erasure rule: which events and profiles of a forgotten user go. One rule for every reader.

A null record in `users` at broker time T asks to forget the user. Its `events.Forget` in `clicks`
is the boundary. Before it everything goes, except events whose time proves that they were appended
after the request. After it, an event that happened or was first appended at or before T is dropped.
Redis keeps an `Erasure` for each forgotten user, under a hash of the id. ADR 17 has the reasons.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

from eddyline.schema.events import Forget

DAY_MS = 86_400_000
# Old Forget records do not say when they end.
OLD_KEPT_MS = 400 * DAY_MS
_LAYOUT = struct.Struct("<qqq")


@dataclass(frozen=True, slots=True, order=True)
class Erasure:
    """What is kept of a forgotten user.

    until_ms:     broker's time stamp T of the null record
    users_offset: offset of the null record in `users`; -1: unknown
    ends_ms:      records appended later are not checked any more
    """

    until_ms: int
    users_offset: int
    ends_ms: int

    @classmethod
    def of(cls, forget: Forget) -> Erasure:
        """The erasure that a Forget record starts."""
        ends_ms = forget.ends_ms
        if ends_ms is None:
            ends_ms = forget.forget_until_ms + OLD_KEPT_MS
        return cls(forget.forget_until_ms, forget.users_offset, ends_ms)

    def repeats(self, known: Erasure | None, appended_ms: int) -> bool:
        """Whether a Forget with this content only repeats `known`: it has no effect then.

        appended_ms: the broker's time stamp of that Forget
        """
        if known is None or appended_ms > known.ends_ms:
            return False
        return (self.until_ms, self.users_offset) <= (known.until_ms, known.users_offset)

    def after(self, known: Erasure | None) -> Erasure:
        """The erasure to keep where `known` was kept before."""
        if known is None:
            return self
        return Erasure(
            max(self.until_ms, known.until_ms),
            max(self.users_offset, known.users_offset),
            max(self.ends_ms, known.ends_ms),
        )

    def covers_profile(self, offset: int, first_ms: int) -> bool:
        """Whether a profile is older than the null record.

        offset: of the profile in `users`, -1 for one that was forwarded or replayed
        first_ms: broker's time stamp of its first append
        Both are compared: offsets start again in a topic that was created anew. Without an offset,
        a profile of the same millisecond stays: it may stand after the null record.
        """
        until_ms = self.until_ms if offset >= 0 else self.until_ms - 1
        return offset < self.users_offset and first_ms <= until_ms

    def encode(self) -> bytes:
        """The stored form: three int64, little-endian."""
        return _LAYOUT.pack(self.until_ms, self.users_offset, self.ends_ms)

    @classmethod
    def decode(cls, value: bytes) -> Erasure:
        """The reverse of `encode`."""
        return cls(*_LAYOUT.unpack(value))


def erased_before(keep_after_ms: int, at_ms: int) -> bool:
    """Whether an event that stands before the Forget goes.

    An event may be dated `far_future_ms_max` after its append at most. So one that is dated later
    than `keep_after_ms` was appended after the request, by a user who returned.

    >>> erased_before(1_300, 1_300), erased_before(1_300, 1_301)
    (True, False)
    """
    return at_ms <= keep_after_ms


def erased_after(
    known: Erasure | None, at_ms: int, appended_ms: int, origin_ms: int | None
) -> bool:
    """Whether an event that stands after the Forget is dropped.

    known:       the user's erasure at the event's place
    appended_ms: the broker's time stamp of the record
    origin_ms:   that of its first append, if it was forwarded or replayed

    >>> known = Erasure(1_000, 7, 9_000)
    >>> [erased_after(known, at_ms, 2_000, None) for at_ms in (1_000, 1_001)]
    [True, False]
    >>> erased_after(known, 1_001, 2_000, 1_000), erased_after(known, 1_000, 9_001, None)
    (True, False)
    """
    if known is None or appended_ms > known.ends_ms:
        return False
    return at_ms <= known.until_ms or (origin_ms is not None and origin_ms <= known.until_ms)


def is_outdated(place: tuple[int, int], stored: tuple[int, int]) -> bool:
    """Whether a profile was forwarded or replayed, and is older than the stored profile.

    place, stored: (offset in `users`, -1 for such a profile; ms of the first append)
    """
    return place[0] < 0 and place[1] < stored[1]


def digest(user_id: str) -> str:
    """What is kept of a forgotten user's id: its SHA-256, in hexadecimal."""
    return hashlib.sha256(user_id.encode()).hexdigest()
