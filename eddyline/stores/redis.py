"""State in Redis (or Valkey), behind fences.

Key schema. `<ns>` is empty or the namespace and a colon; `{…}` is the slot tag, a cluster's hash
tag:

    <ns>layout                          JSON of `state_store.Layout`
    <ns>fence:{u3}:clicks:3             "offset|cluster id|topic id|mark" of the last record applied
    <ns>{u3}:window                     list of blobs: accepted event ids, see `user_codec`
    <ns>{u3}:h:<user>                   *recent* history and stamps, see `schema.user_history`
    <ns>{u3}:o:<user>                   *older* history, absent if the history is short
    <ns>{u3}:seen:<user>                what the user had beyond these, see `schema.seen_items`
    <ns>{u3}:e:<generation>:<user>      user-ID embedding: steps (uint32), float32[d], little-endian
    <ns>{u3}:p:<user>                   profile: offset in `users` (int64), ms of its first append
                                        (int64), attributes (MessagePack map)
    <ns>{u3}:f:<SHA-256 of user>        erasure of a forgotten user, see `schema.erasure`; expires
    <ns>{u3}:visits                     list of blobs: visits for the co-visitation rows, see
                                        `outbox`
    <ns>{u3}:generations                MessagePack map: generation with embeddings here -> its
                                        `schema.step_ranges.StepRanges`
    <ns>fence:{i0}:clicks:3             fence of the same partition for the popularity counts
    <ns>fence:{i0}:items:0              fence of the item metadata
    <ns>fence:{i0}:items@1:0            fence of the item vectors published for generation 1
    <ns>{i0}:c:<item>                   item metadata, see `item_codec`
    <ns>{i0}:refused                    set of the items whose metadata has a refused record
    <ns>{i0}:buckets                    sorted set of the kept popularity buckets
    <ns>{i0}:popular:<bucket>           sorted set: item by thousandths of clicks in that bucket
    <ns>{i0}:version:<bucket>           changes with every write to that bucket; opaque
    <ns>fence:{i0}:co-visits:3          fence of the same partition for the co-visitation rows
    <ns>{i0}:after:<item>               row of the items visited after it, see `schema.co_visits`
    <ns>{i0}:before:<item>              row of the items visited before it
    <ns>{i0}:trend                      sorted set: "events" by the events that were counted by
                                        `schema.event_decay`; half-life by that number when it was
                                        written last
    <ns>{i0}:trend:<half-life>:<0|1>    sorted set: item by its sum, of the newest epoch with an
                                        even or odd number

Every write is one Lua script, see `write_scripts`: it applies whole or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, cast

import msgspec
from redis.exceptions import NoPermissionError
from typing_extensions import override

from eddyline.errors import EddylineError, FenceMoved, StoreRefused, StoreUnavailable
from eddyline.schema import co_visits
from eddyline.schema.co_visits import CoVisits, DamagedRow
from eddyline.schema.event_decay import EventDecay
from eddyline.schema.partitioning import item_slot
from eddyline.stores import (
    item_codec,
    outbox,
    popularity_codec,
    redis_client,
    removal,
    user_codec,
    write_scripts,
)
from eddyline.stores.layout import Layout
from eddyline.stores.log_reset import Logs, accept_in_redis
from eddyline.stores.popularity import NO_TREND, PopularBucket, SlotTrend
from eddyline.stores.redis_cluster import RedisCluster
from eddyline.stores.redis_writes import FencedWrites, translated
from eddyline.stores.state_store import (
    Fence,
    ItemMetadata,
    ItemMetadataWrite,
    ProfilePlace,
    SlotRead,
    Source,
    StateStore,
    UserEffects,
    UserPlace,
    UserQuery,
    UserRead,
    UserState,
    UserWrite,
)
from eddyline.stores.stored_ids import settle

_COMMANDS = sorted(frozenset().union(*map(write_scripts.commands, write_scripts.NAMES)))
_PAGE = 1_000  # blobs of a list per read
_KEYS_A_SCAN = 1_000


class RedisStore(FencedWrites, StateStore):
    """A `StateStore` in Redis. Thread rule: any thread; each call takes a pooled connection."""

    @override
    @translated
    def check(self) -> None:
        redis_client.check_servers(self._redis, self._target)

    @override
    @translated
    def check_eviction(self) -> None:
        redis_client.check_eviction(self._redis, self._target)

    @override
    @translated
    def check_rights(self) -> None:
        key = self._fence_key("u0", Source("clicks", 0))
        for node in redis_client.primaries(self._redis):
            denied = cast("list[bytes]", node.eval(write_scripts.DENIED, 0, key, *_COMMANDS))
            if denied:
                raise StoreRefused(
                    f"Redis at {self.address}: this user has no permissions to run "
                    f"{', '.join(repr(name.decode()) for name in denied)}; "
                    "docs/security.md lists what each process may do"
                )

    @override
    @translated
    def claim_layout(self, layout: Layout) -> None:
        stored = self.layout()
        if stored is None:
            try:
                self._redis.set(f"{self._ns}layout", msgspec.json.encode(layout), nx=True)
            except NoPermissionError:  # a query worker that may only read
                raise StoreUnavailable(
                    f"Redis at {self.address} has no layout yet, which ingest writes; "
                    "this user may only read"
                ) from None
            stored = self.layout()
        if stored is None:
            raise StoreUnavailable(f"Redis at {self.address} lost its layout while it was written")
        if stored != layout:
            settle(self._redis, self._ns, self.address, stored, layout)

    @override
    @translated
    def layout(self) -> Layout | None:
        stored = cast("bytes | None", self._redis.get(f"{self._ns}layout"))
        return None if stored is None else msgspec.json.decode(stored, type=Layout)

    @override
    @translated
    def fences(self, source: Source, slots: Sequence[str]) -> dict[str, Fence | None]:
        return {slot: _fence(self._redis.get(self._fence_key(slot, source))) for slot in slots}

    @override
    @translated
    def read_slot(self, slot: str, source: Source) -> SlotRead:
        # Reading page by page is exact: only the owner of the fence writes to the lists.
        tag, users = f"{self._ns}{{{slot}}}", Source("users", source.partition)
        before, users_fence = (self._redis.get(self._fence_key(slot, s)) for s in (source, users))
        generations = cast("bytes | None", self._redis.get(f"{tag}:generations"))
        window, visits = self._blobs(f"{tag}:window"), self._blobs(f"{tag}:visits")
        after = self._redis.get(self._fence_key(slot, source))
        if after != before:
            raise FenceMoved(self._fence_key(slot, source), repr(before), repr(after))
        text = "" if users_fence is None else cast(bytes, users_fence).decode()
        fence = _fence(before)
        done = -1 if fence is None else fence.offset
        accepted = user_codec.decode_accepted(window, done)
        ranges = user_codec.decode_step_ranges(generations)
        return SlotRead(fence, text, accepted, ranges, *outbox.decode(visits, done))

    def _blobs(self, key: str) -> list[bytes]:
        blobs: list[bytes] = []
        while page := cast(
            "list[bytes]", self._redis.lrange(key, len(blobs), len(blobs) + _PAGE - 1)
        ):
            blobs += page
        return blobs

    @translated
    def user_ids(self, slot: str, kind: Literal["h", "p"]) -> set[str]:
        """The users of a slot that have a history ("h") or a profile ("p"), by a scan of all keys.

        A user that is written meanwhile may be absent.
        """
        head = f"{self._ns}{{{slot}}}:{kind}:"
        keys = self._redis.scan_iter(match=f"{head}*", count=_KEYS_A_SCAN)
        return {key.decode().removeprefix(head) for key in keys}

    @translated
    def drop_profiles(self, slot: str, source: Source) -> None:
        """Delete the profiles of a slot, by a scan of all keys, and their fence."""
        # The fence first: what is left of the profiles is then read again.
        self._redis.delete(self._fence_key(slot, source))
        for key in self._redis.scan_iter(match=f"{self._ns}{{{slot}}}:p:*", count=_KEYS_A_SCAN):
            self._redis.delete(key)

    @translated
    def live_item_ids(self) -> set[str]:
        """The items of all slots that are not deleted, by a scan of all keys; as `user_ids`."""
        # Matched exactly: an id may look like one of our keys.
        ours = re.compile(rf"{re.escape(self._ns)}\{{i\d+\}}:c:(.*)", re.DOTALL)
        keys = self._redis.scan_iter(match=f"{self._ns}{{i*}}:c:*", count=_KEYS_A_SCAN)
        found = ((key, at[1]) for key in keys if (at := ours.fullmatch(key.decode())))
        heads = ((self._redis.getrange(key, 0, item_codec.HEAD_BYTES), i) for key, i in found)
        return {item_id for head, item_id in heads if item_codec.has_body(cast(bytes, head))}

    @override
    @translated
    def read_many(self, queries: Sequence[UserQuery]) -> list[UserRead]:
        with self._redis.pipeline(transaction=False) as pipe:
            for query in queries:
                tag = f"{self._ns}{{{query.slot}}}"
                names = user_codec.user_keys(tag, query.user_ids, query.generations)
                names += user_codec.erasure_keys(tag, query.user_ids)
                names += user_codec.seen_keys(tag, query.seen_of)
                pipe.mget([self._fence_key(query.slot, query.source), *names])
            answers = pipe.execute()
        return [
            user_codec.decode_users(
                _fence(fence), query.user_ids, query.generations, values, query.seen_of
            )
            for query, (fence, *values) in zip(queries, answers, strict=True)
        ]

    @override
    @translated
    def write_users(
        self, slot: str, source: Source, expected: Fence | None, new: Fence, effects: UserEffects
    ) -> int:
        keys, args = self._users_call(UserWrite(slot, source, expected, new, effects))
        return int(self._write("write_users", keys, args))

    @override
    @translated
    def write_many(self, writes: Sequence[UserWrite]) -> list[int | EddylineError]:
        results = self._write_all("write_users", [self._users_call(write) for write in writes])
        return [r if isinstance(r, EddylineError) else int(r) for r in results]

    def _users_call(self, write: UserWrite) -> tuple[list[str], list[Any]]:
        keys, args = user_codec.encode_users(
            f"{self._ns}{{{write.slot}}}", write.effects, self._garbage_ms
        )
        users_fence = self._fence_key(write.slot, Source("users", write.source.partition))
        expected = "-" if write.effects.profiles is None else write.effects.profiles
        return self._fenced(
            write.slot,
            write.source,
            write.expected,
            write.new,
            [users_fence, *keys],
            [expected, *args],
        )

    @override
    @translated
    def write_profiles(
        self,
        slot: str,
        source: Source,
        expected: Fence | None,
        new: Fence,
        profiles: Mapping[str, Mapping[str, object] | None],
        generations: Sequence[str],
        until_ms: Mapping[str, int] | None = None,
        places: Mapping[str, ProfilePlace] | None = None,
    ) -> None:
        tag = f"{self._ns}{{{slot}}}"
        kept = {user: profile for user, profile in profiles.items() if profile is not None}
        gone = [user for user, profile in profiles.items() if profile is None]
        kinds = ["p", "h", "o", "seen", *(f"e:{generation}" for generation in generations)]
        keys = [f"{tag}:p:{user}" for user in kept]
        keys += user_codec.erasure_keys(tag, kept)
        keys += [f"{tag}:{kind}:{u}" for u in gone for kind in kinds]
        args: list[Any] = [len(kept), len(kinds)]
        args += [
            user_codec.encode_profile(profile, (places or {}).get(user, (new.offset, 0)))
            for user, profile in kept.items()
        ]
        args += [(until_ms or {}).get(user, "") for user in gone]
        self._write("write_profiles", *self._fenced(slot, source, expected, new, keys, args))

    @override
    @translated
    def count_clicks(
        self,
        slot: str,
        source: Source,
        expected: Fence | None,
        new: Fence,
        counts: Mapping[int, Mapping[str, int]],
        buckets_kept: int,
        items_max: int = 1_000_000,
        clicked: Sequence[str] = (),
        decays: Sequence[EventDecay] = (),
    ) -> None:
        keys, args = popularity_codec.count_call(
            f"{self._ns}{{{slot}}}", counts, buckets_kept, items_max, clicked, decays
        )
        self._write("count_clicks", *self._fenced(slot, source, expected, new, keys, args))

    @override
    @translated
    def append_co_visits(
        self,
        slot: str,
        source: Source,
        expected: Fence | None,
        new: Fence,
        after: Mapping[str, bytes],
        before: Mapping[str, bytes],
        row_max: int,
        idle_ms: int = 0,
        renewed: Collection[tuple[str, str]] | None = None,
    ) -> None:
        tag = f"{self._ns}{{{slot}}}"
        rows = {f"{tag}:after:{item}": more for item, more in after.items()}
        rows |= {f"{tag}:before:{item}": more for item, more in before.items()}
        first = {*rows} if renewed is None else {f"{tag}:{kind}:{item}" for kind, item in renewed}
        keys = [key for key in rows if key in first]
        args: list[Any] = [row_max, idle_ms, len(keys)]
        keys += [key for key in rows if key not in first] if len(keys) < len(rows) else ()
        args += map(rows.__getitem__, keys)
        self._write("append_co_visits", *self._fenced(slot, source, expected, new, keys, args))

    @override
    @translated
    def read_co_visits(
        self, after: Sequence[str], before: Sequence[str], item_slots: int
    ) -> tuple[list[CoVisits], list[CoVisits]]:
        rows = [("after", item) for item in after] + [("before", item) for item in before]
        slots = [item_slot(item, item_slots) for _, item in rows]
        names = [
            f"{self._ns}{{{slot}}}:{kind}:{item}"
            for slot, (kind, item) in zip(slots, rows, strict=True)
        ]
        by_slot: dict[str, list[int]] = {}
        for at, slot in enumerate(slots):
            by_slot.setdefault(slot, []).append(at)
        with self._redis.pipeline(transaction=False) as pipe:
            for places in by_slot.values():
                pipe.mget([names[at] for at in places])
            answers = pipe.execute()
        stored: list[bytes | None] = [None] * len(rows)
        for places, values in zip(by_slot.values(), answers, strict=True):
            for at, value in zip(places, values, strict=True):
                stored[at] = value
        try:
            found = co_visits.decode_all(stored)
        except DamagedRow as error:
            raise StoreRefused(
                f"{names[error.place]}: {error}; delete the key, and the row fills again"
            ) from None
        return found[: len(after)], found[len(after) :]

    @override
    @translated
    def read_item_metadata(
        self, item_ids: Sequence[str], item_slots: int
    ) -> dict[str, ItemMetadata]:
        with self._redis.pipeline(transaction=False) as pipe:
            for item_id in item_ids:
                pipe.get(f"{self._ns}{{{item_slot(item_id, item_slots)}}}:c:{item_id}")
            values = pipe.execute()
        found = zip(item_ids, values, strict=True)
        return {i: item_codec.decode(value) for i, value in found if value is not None}

    @override
    @translated
    def write_item_metadata(
        self,
        slot: str,
        source: Source,
        expected: Fence | None,
        new: Fence,
        metadata: Mapping[str, ItemMetadata],
    ) -> None:
        call = self._items_call(ItemMetadataWrite(slot, source, expected, new, metadata))
        self._write("write_item_metadata", *call)

    @override
    @translated
    def write_item_metadata_many(
        self, writes: Sequence[ItemMetadataWrite]
    ) -> list[EddylineError | None]:
        calls = [self._items_call(write) for write in writes]
        results = self._write_all("write_item_metadata", calls)
        return [r if isinstance(r, EddylineError) else None for r in results]

    @override
    def refused_items(self, slot: str) -> Iterator[list[str]]:
        cursor = -1
        while cursor:
            cursor, members = self._refused_page(slot, max(cursor, 0))
            yield [member.decode() for member in members]

    @translated
    def _refused_page(self, slot: str, cursor: int) -> tuple[int, list[bytes]]:
        key = f"{self._ns}{{{slot}}}:refused"
        return cast("tuple[int, list[bytes]]", self._redis.sscan(key, cursor, count=_PAGE))

    @override
    @translated
    def count_refused_items(self, slots: Sequence[str]) -> int:
        with self._redis.pipeline(transaction=False) as pipe:
            for slot in slots:
                pipe.scard(f"{self._ns}{{{slot}}}:refused")
            return sum(pipe.execute())

    def _items_call(self, write: ItemMetadataWrite) -> tuple[list[str], list[Any]]:
        head = f"{self._ns}{{{write.slot}}}:c:"
        args: list[Any] = [len(head.encode())]
        for item in write.metadata.values():
            args += (item.offset, item_codec.encode(item))
        keys = [f"{self._ns}{{{write.slot}}}:refused", *(head + one for one in write.metadata)]
        return self._fenced(write.slot, write.source, write.expected, write.new, keys, args)

    @override
    @translated
    def read_user(self, slot: str, partition: int, user_id: str, generation: str) -> UserState:
        keys = self._user_keys(UserPlace(slot, partition, user_id), generation)
        return user_codec.decode_query(self._redis.mget(keys))

    @override
    @translated
    def read_users(self, users: Sequence[UserPlace], generation: str) -> list[UserState]:
        with self._redis.pipeline(transaction=False) as pipe:
            for user in users:
                pipe.mget(self._user_keys(user, generation))
            return [*map(user_codec.decode_query, pipe.execute())]

    def _user_keys(self, user: UserPlace, generation: str) -> list[str]:
        fence_key = self._fence_key(user.slot, Source("clicks", user.partition))
        tag = f"{self._ns}{{{user.slot}}}"
        return [fence_key, *user_codec.query_keys(tag, user.user_id, generation)]

    @override
    def server_of(self, slot: str) -> str:
        if isinstance(self._redis, RedisCluster):
            return self._redis.server_of(f"{self._ns}{{{slot}}}")
        return ""

    @override
    @translated
    def popular_buckets(
        self, slot: str, limit: int, known: Mapping[int, bytes]
    ) -> dict[int, PopularBucket]:
        return popularity_codec.read_buckets(self._redis, f"{self._ns}{{{slot}}}", limit, known)

    @override
    @translated
    def popular_trend(
        self, slot: str, decays: Sequence[EventDecay], limit: int, known: SlotTrend = NO_TREND
    ) -> SlotTrend:
        return popularity_codec.read_trend(
            self._redis, f"{self._ns}{{{slot}}}", decays, limit, known
        )

    @override
    def remove_embeddings(self, generation: str, slots: Collection[str]) -> Iterator[int]:
        return self._pages(removal.embeddings(self._redis, self._ns, generation, slots))

    @override
    def remove_idle_users(self, slots: Collection[str], slack_ms: int) -> Iterator[int]:
        script = self._scripts["remove_idle_users"]
        fences = {slot: self._fence_key(slot, Source("clicks", int(slot[1:]))) for slot in slots}
        return self._pages(removal.idle_users(self._redis, self._ns, script, fences, slack_ms))

    @override
    def remove_deleted_items(
        self, slots: Collection[str], partitions: int, slack_ms: int
    ) -> Iterator[int]:
        script = self._scripts["remove_deleted_items"]
        fences = {
            slot: [self._fence_key(slot, Source("items", p)) for p in range(partitions)]
            for slot in slots
        }
        return self._pages(removal.deleted_items(self._redis, self._ns, script, fences, slack_ms))

    def _pages(self, pages: Iterator[int]) -> Iterator[int]:
        while (count := self._next(pages)) is not None:
            yield count

    @translated
    def _next(self, pages: Iterator[int]) -> int | None:
        return next(pages, None)

    @override
    @translated
    def drop_fences(self, slot: str, sources: Sequence[Source]) -> None:
        if sources:
            self._redis.delete(*(self._fence_key(slot, source) for source in sources))

    @override
    @translated
    def accept_log(self, logs: Logs) -> int:
        return accept_in_redis(self._redis, self._ns, logs)

    @override
    def close(self) -> None:
        self._closed = True
        self._redis.close()


def _fence(value: Any) -> Fence | None:
    return None if value is None else Fence.parse(value.decode())
