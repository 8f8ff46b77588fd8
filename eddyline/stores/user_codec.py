"""Users in Redis: keys of reads and writes, arguments of `write_users.lua`, decoding of answers.

The key schema is in `stores.redis`, the layout of a history in `schema.user_history`. The
event-id window is a list of blobs, one blob a write: int64 last offset, int64 floor
(little-endian), then MessagePack of `[first offset, ids, offsets − first]`. Ids below the floor of
the newest blob are not in the window.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from eddyline.errors import StoreRefused
from eddyline.schema import erasure, seen_items, step_ranges, user_history
from eddyline.schema.erasure import Erasure
from eddyline.schema.step_ranges import StepRanges
from eddyline.schema.user_history import StoredHistory
from eddyline.stores import outbox
from eddyline.stores.state_store import Fence, ProfilePlace, UserEffects, UserRead, UserState

_STEPS = struct.Struct("<I")
# Offset in `users` and ms of the first append; the attributes follow.
_PLACE = struct.Struct("<qq")
_BLOB = struct.Struct("<qq")
_pack = msgspec.msgpack.Encoder().encode
_blob = msgspec.msgpack.Decoder(tuple[int, list[str], list[int]])
_profile = msgspec.msgpack.Decoder(dict[str, object])
_step_ranges = msgspec.msgpack.Decoder(tuple[str, ...] | dict[str, StepRanges])
# Before ranges were kept, a slot listed the generations of its embeddings.
_UNKNOWN_RANGES = step_ranges.always("")


def user_keys(tag: str, user_ids: Sequence[str], generations: Sequence[str]) -> list[str]:
    """The keys of users, kind by kind: recent, older, profile, embedding of each generation."""
    kinds = ["h", "o", "p", *(f"e:{generation}" for generation in generations)]
    return [f"{tag}:{kind}:{user}" for kind in kinds for user in user_ids]


def erasure_keys(tag: str, user_ids: Iterable[str]) -> list[str]:
    """The keys of erasures, by a hash of the user ids."""
    return [f"{tag}:f:{erasure.digest(user)}" for user in user_ids]


def seen_keys(tag: str, user_ids: Iterable[str]) -> list[str]:
    """The keys of what users had beyond their lists."""
    return [f"{tag}:seen:{user}" for user in user_ids]


def query_keys(tag: str, user_id: str, generation: str) -> list[str]:
    """The keys that a query reads of a user besides the fence, in the order of `decode_user`."""
    return user_keys(tag, [user_id], [generation or "-"]) + seen_keys(tag, [user_id])


def encode_profile(profile: Mapping[str, object], place: ProfilePlace) -> bytes:
    """The stored form of a profile."""
    return _PLACE.pack(*place) + _pack(profile)


def decode_users(
    fence: Fence | None,
    user_ids: Sequence[str],
    generations: Sequence[str],
    values: Sequence[bytes | None],
    seen_of: Sequence[str] = (),
) -> UserRead:
    """The values of `user_keys`, `erasure_keys`, and of `seen_keys` of the users in `seen_of`.

    Raises StoreRefused for another layout.
    """
    n = len(user_ids)
    histories, recent = {}, {}
    for user, head, older in zip(user_ids, values, values[n:], strict=False):
        if head is not None:
            stored = decode_history(head, older)
            histories[user] = stored.history
            recent[user] = [user_history.compact(entry) for entry in stored.recent]
    profiles = values[2 * n : 3 * n]
    embeddings = {
        generation: {
            user: decode_embedding(value)
            for user, value in zip(user_ids, values[at * n :], strict=False)
            if value
        }
        for at, generation in enumerate(generations, 3)
    }
    erasures = values[(3 + len(generations)) * n :]
    return UserRead(
        fence=fence,
        histories=histories,
        embeddings=embeddings,
        profiles={
            u: decode_profile(v) for u, v in zip(user_ids, profiles, strict=False) if v is not None
        },
        recent=recent,
        erasures={
            u: Erasure.decode(v) for u, v in zip(user_ids, erasures, strict=False) if v is not None
        },
        profile_places={
            u: _PLACE.unpack_from(v) for u, v in zip(user_ids, profiles, strict=False) if v
        },
        seen={
            u: checked_seen(v)
            for u, v in zip(seen_of, values[(4 + len(generations)) * n :], strict=True)
            if v
        },
    )


def decode_user(
    fence: Fence | None,
    head: bytes | None,
    older: bytes | None,
    profile: bytes | None,
    vector: bytes | None,
    seen: bytes | None,
) -> UserState:
    """One user, for a query. Raises StoreRefused for another layout."""
    stored = None if head is None else decode_history(head, older)
    return UserState(
        fence=fence,
        history=user_history.EMPTY if stored is None else stored.history,
        applied_us=0 if stored is None else stored.applied_us,
        embedding=None if vector is None else decode_embedding(vector),
        profile={} if profile is None else decode_profile(profile),
        seen=checked_seen(seen or b""),
    )


def decode_query(values: Sequence[Any]) -> UserState:
    """What a query reads of a user: the fence, then the values of `query_keys`."""
    fence, *of_user = values
    found = None if fence is None else Fence.parse(fence.decode())
    return decode_user(found, *of_user).without_idle()


def checked_seen(value: bytes) -> bytes:
    """Stored seen items. Raises StoreRefused for damaged ones."""
    try:
        seen_items.check(value)
    except ValueError as error:
        raise StoreRefused(
            f"a user's seen items in Redis are damaged ({error}); delete the key `…:seen:<user>`: "
            "they begin anew"
        ) from None
    return value


def decode_history(head: bytes, older: bytes | None) -> StoredHistory:
    """A stored history. Raises StoreRefused for another layout."""
    try:
        return user_history.decode(head, older)
    except (ValueError, msgspec.MsgspecError) as error:
        raise StoreRefused(
            f"a user's history in Redis was written by another version ({error}); "
            "empty this Redis: ingest fills it again from Kafka"
        ) from None


def decode_profile(value: bytes) -> dict[str, object]:
    """The attributes of a stored profile."""
    return _profile.decode(memoryview(value)[_PLACE.size :])


def decode_embedding(value: bytes) -> tuple[int, bytes]:
    """(steps, float32[d] as bytes)."""
    return _STEPS.unpack_from(value)[0], value[_STEPS.size :]


def encode_users(
    tag: str, effects: UserEffects, garbage_ms: int = 0
) -> tuple[list[str], list[Any]]:
    """KEYS and ARGV of `write_users.lua`, after those of the fences.

    garbage_ms: how long an erasure stays in Redis after its end
    """
    recent = effects.recent
    whole = [user for user in effects.histories if user not in recent]
    names = [f"{tag}:window", f"{tag}:visits"]
    names += [f"{tag}:h:{user}" for user in effects.histories]
    names += [f"{tag}:o:{user}" for user in whole]
    names += [
        f"{tag}:e:{generation}:{user}"
        for generation, of_users in effects.embeddings.items()
        for user in of_users
    ]
    # What a user had before it was emptied is not appended to.
    begun = [user for user in effects.emptied if user in effects.seen]
    names += seen_keys(tag, begun)
    if effects.step_ranges is not None:
        names.append(f"{tag}:generations")
    written = len(names) - 2
    generations = {**dict.fromkeys(effects.embeddings), **dict.fromkeys(effects.generations)}
    kinds = ["h", "o", "seen", *(f"e:{generation}" for generation in generations)]
    emptied = (f"{tag}:{kind}:{user}" for user in effects.emptied for kind in kinds)
    deleted = sorted(set(emptied).difference(names))
    deleted += [f"{tag}:p:{user}" for user in effects.dropped_profiles]
    extended = {user: more for user, more in effects.seen.items() if user not in begun}
    names += [f"{tag}:f:{hashed}" for hashed in effects.erasures]
    names += [*seen_keys(tag, extended), *deleted]
    args: list[Any] = [
        effects.window_floor,
        encode_accepted(effects.accepted, effects.window_floor),
        effects.visits_floor,
        outbox.encode(effects.visits, effects.visits_floor),
        len(effects.histories),
        written,
        len(effects.erasures),
        garbage_ms,
        len(extended),
        effects.seen_max,
    ]
    args += [
        user_history.encode_recent(history, recent.get(user, ()))
        for user, history in effects.histories.items()
    ]
    args += [user_history.encode_older(effects.histories[user].entries) for user in whole]
    args += [
        _STEPS.pack(steps) + vector
        for of_users in effects.embeddings.values()
        for steps, vector in of_users.values()
    ]
    args += [seen_items.append(b"", effects.seen[user], effects.seen_max) for user in begun]
    if effects.step_ranges is not None:
        args.append(_pack(effects.step_ranges))
    for one in effects.erasures.values():
        args += (one.encode(), one.ends_ms)
    args += extended.values()
    return names, args


def decode_step_ranges(value: bytes | None) -> dict[str, StepRanges]:
    """The generations of which a slot may have embeddings, with their ranges."""
    found = () if value is None else _step_ranges.decode(value)
    return dict.fromkeys(found, _UNKNOWN_RANGES) if isinstance(found, tuple) else found


def encode_accepted(accepted: Mapping[str, int], floor: int) -> bytes:
    """One blob of the window; b"" for no ids. accepted: event id -> offset, by offset."""
    if not accepted:
        return b""
    offsets = list(accepted.values())
    first = offsets[0]
    return _BLOB.pack(offsets[-1], floor) + _pack(
        (first, list(accepted), [at - first for at in offsets])
    )


def decode_accepted(blobs: Iterable[bytes], done: int) -> dict[str, int]:
    """Event id -> offset of a whole window, oldest first, without ids below its floor.

    done: the fence's offset; a blob that ends above it is of a write that failed
    """
    found: dict[str, int] = {}
    floor = 0
    for blob in blobs:
        last, its_floor = _BLOB.unpack_from(blob)
        if last > done:
            continue
        floor = its_floor
        first, ids, more = _blob.decode(memoryview(blob)[_BLOB.size :])
        for event_id, offset in zip(ids, more, strict=True):
            found.pop(event_id, None)  # accepted again: it moves to the end
            found[event_id] = first + offset
    return {event_id: offset for event_id, offset in found.items() if offset >= floor}
