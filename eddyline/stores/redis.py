"""State in Redis (or Valkey), behind fences.

Key schema; `<ns>` is empty or the namespace and a colon, `{…}` is the slot tag (Redis Cluster's hash tag):

    <ns>layout                          JSON of `ports.Layout`
    <ns>fence:{u3}:clicks:3             "offset|cluster id|topic id" of the last record applied
    <ns>{u3}:window                     list of blobs: accepted event ids and their offsets, see `user_state`
    <ns>{u3}:h:<user>                   the newest behaviours and their stamps, see `eddyline.schema.user_history`
    <ns>{u3}:o:<user>                   the older behaviours, of a list that is longer than that
    <ns>{u3}:e:<generation>:<user>      user-ID embedding: steps (uint32), float32[d], little-endian
    <ns>{u3}:p:<user>                   profile attributes, MessagePack map
    <ns>fence:{i0}:clicks:3             the same partition's fence for the popularity counts
    <ns>fence:{i0}:items:0, …:items@1:0 items applied to the cards; items published for generation 1
    <ns>{i0}:c:<item>                   card: partition (int32), offset (int64), the item as JSON or nothing
    <ns>{i0}:buckets                    sorted set of the popularity buckets kept
    <ns>{i0}:popular:<bucket>           sorted set: item by milli_counts of clicks in that bucket

Every write is one Lua script that compares and moves the fence first: all of it or nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import struct
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from itertools import chain
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import msgspec
from redis.exceptions import NoPermissionError, NoScriptError, RedisError

from eddyline.errors import EddylineError, FenceMoved, StoreRefused, StoreUnavailable
from eddyline.schema.partitioning import item_slot
from eddyline.settings.loader import Settings
from eddyline.stores import redis_client, user_codec
from eddyline.stores.log_reset import Logs, accept_in_redis
from eddyline.stores.redis_errors import translate_error
from eddyline.stores.redis_url import target
from eddyline.stores.state_store import (
    Fence,
    ItemMetadata,
    ItemMetadataWrite,
    Layout,
    SlotRead,
    Source,
    UserEffects,
    UserQuery,
    UserRead,
    UserState,
    UserWrite,
)

_CARD = struct.Struct("<iq")
_PAGE = 1_000  # blobs of a window read at once
_SCRIPTS = ("write_users", "write_profiles", "count_clicks", "write_item_metadata")
_P = ParamSpec("_P")
_R = TypeVar("_R")


def _translated(
    method: Callable[Concatenate[RedisStore, _P], _R],
) -> Callable[Concatenate[RedisStore, _P], _R]:
    """Raise Redis' errors as ours; the address is named, the password never."""

    @functools.wraps(method)
    def call(self: RedisStore, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        if self._closed:
            raise StoreUnavailable("the store is closed")
        try:
            return method(self, *args, **kwargs)
        except RedisError as error:
            raise translate_error(error, self._target) from None

    return call


class RedisStore:
    """A `StateStore` in Redis. Thread rule: any thread; each call takes a connection of the pool."""

    def __init__(self, settings: Settings) -> None:
        """Connects when it is first used. Raises SettingsError."""
        self._target = target(settings)
        self.address = self._target.shown
        self._closed = False
        self._ns = f"{settings.namespace}:" if settings.namespace else ""
        self._redis = redis_client.client(settings)
        self._scripts = {name: redis_client.Script(self._redis, _script(name)) for name in _SCRIPTS}

    @_translated
    def check(self) -> None:
        """Raise StoreRefused where Redis, or any node of it, may drop keys or cannot be written to."""
        redis_client.check_servers(self._redis, self._target)

    @_translated
    def claim_layout(self, layout: Layout) -> None:
        """See `StateStore.claim_layout`."""
        key, mine = f"{self._ns}layout", msgspec.json.encode(layout)
        stored = self.layout()
        if stored is None:
            try:
                self._redis.set(key, mine, nx=True)
            except NoPermissionError:  # a query worker that may only read
                raise StoreUnavailable(
                    f"Redis at {self.address} has no layout yet, which ingest writes, and this user may not"
                ) from None
            stored = self.layout()
        if stored != layout:
            older = stored is not None and stored.version != layout.version
            way = (
                ". Another version wrote it: empty it, ingest fills it again from Kafka"
                if older
                else ""
            )
            raise StoreRefused(
                f"Redis at {self.address} is laid out as {stored}, settings say {layout}{way}"
            )

    @_translated
    def layout(self) -> Layout | None:
        """See `StateStore.layout`."""
        stored = cast("bytes | None", self._redis.get(f"{self._ns}layout"))
        return None if stored is None else msgspec.json.decode(stored, type=Layout)

    @_translated
    def fences(self, source: Source, slots: Sequence[str]) -> dict[str, Fence | None]:
        """See `StateStore.fences`."""
        return {
            s: _fence(cast("bytes | None", self._redis.get(self._fence_key(s, source))))
            for s in slots
        }

    @_translated
    def read_users(
        self,
        slot: str,
        source: Source,
        event_ids: Sequence[str],
        user_ids: Sequence[str],
        generations: Sequence[str] = (),
    ) -> UserRead:
        """See `StateStore.read_users`."""
        [read] = self.read_many([UserQuery(slot, source, user_ids, generations)])
        if not event_ids:
            return read
        window = self.read_slot(slot, source)
        if window.fence != read.fence:
            raise FenceMoved(
                self._fence_key(slot, source), str(read.fence or ""), str(window.fence or "")
            )
        found = {e: window.accepted[e] for e in event_ids if e in window.accepted}
        return dataclasses.replace(read, accepted_at=found)

    @_translated
    def read_slot(self, slot: str, source: Source) -> SlotRead:
        """See `StateStore.read_slot`. Page by page: only the owner of the fence writes to the window."""
        key, profiles = f"{self._ns}{{{slot}}}:window", Source("users", source.partition)
        before, theirs = (self._redis.get(self._fence_key(slot, s)) for s in (source, profiles))
        blobs: list[bytes] = []
        while page := cast(
            "list[bytes]", self._redis.lrange(key, len(blobs), len(blobs) + _PAGE - 1)
        ):
            blobs += page
        after = self._redis.get(self._fence_key(slot, source))
        if after != before:
            raise FenceMoved(self._fence_key(slot, source), repr(before), repr(after))
        text = "" if theirs is None else cast(bytes, theirs).decode()
        return SlotRead(_fence(cast("bytes | None", before)), text, user_codec.accepted(blobs))

    @_translated
    def read_many(self, queries: Sequence[UserQuery]) -> list[UserRead]:
        """See `StateStore.read_many`."""
        with self._redis.pipeline(transaction=False) as pipe:
            for query in queries:
                tag = f"{self._ns}{{{query.slot}}}"
                names = user_codec.keys(tag, query.user_ids, query.generations)
                pipe.mget([self._fence_key(query.slot, query.source), *names])
            answers = pipe.execute()
        return [
            user_codec.read(_fence(values[0]), query.user_ids, query.generations, values[1:], {})
            for query, values in zip(queries, answers, strict=True)
        ]

    @_translated
    def write_users(
        self, slot: str, source: Source, expected: Fence | None, new: Fence, effects: UserEffects
    ) -> int:
        """See `StateStore.write_users`."""
        return int(
            self._write("write_users", *self._users_written(slot, source, expected, new, effects))
        )

    @_translated
    def write_many(self, writes: Sequence[UserWrite]) -> list[int | EddylineError]:
        """See `StateStore.write_many`."""
        asked = [
            self._users_written(w.slot, w.source, w.expected, w.new, w.effects) for w in writes
        ]
        return [
            end if isinstance(end, EddylineError) else int(end)
            for end in self._all("write_users", asked)
        ]

    def _all(
        self, script: str, asked: Sequence[tuple[list[str], list[Any]]]
    ) -> list[bytes | EddylineError]:
        """What each of several calls of a script returned or raised, in one round trip."""
        with self._redis.pipeline(transaction=False) as pipe:
            for keys, args in asked:
                pipe.evalsha(self._scripts[script].sha, len(keys), *keys, *args)
            answers = pipe.execute(raise_on_error=False)
        return [
            self._settled(script, one, answer) for one, answer in zip(asked, answers, strict=True)
        ]

    def _settled(
        self, script: str, asked: tuple[list[str], list[Any]], answer: Any
    ) -> bytes | EddylineError:
        """What became of one write of several."""
        try:
            if isinstance(answer, NoScriptError):
                return self._again(script, asked)
            if isinstance(answer, Exception):
                self._raise(answer)
            return _stood(answer, *asked)
        except (FenceMoved, StoreUnavailable) as error:
            return error

    @_translated
    def _again(self, script: str, asked: tuple[list[str], list[Any]]) -> bytes:
        return self._write(script, *asked)

    @_translated
    def _raise(self, error: Exception) -> None:
        raise error

    def _users_written(
        self, slot: str, source: Source, expected: Fence | None, new: Fence, effects: UserEffects
    ) -> tuple[list[str], list[Any]]:
        keys, args = user_codec.writing(f"{self._ns}{{{slot}}}", effects)
        theirs = "-" if effects.profiles is None else effects.profiles
        keys = [
            self._fence_key(slot, source),
            self._fence_key(slot, Source("users", source.partition)),
            *keys,
        ]
        return keys, [str(expected or ""), str(new), theirs, *args]

    @_translated
    def write_profiles(
        self,
        slot: str,
        source: Source,
        expected: Fence | None,
        new: Fence,
        profiles: Mapping[str, Mapping[str, object] | None],
        generations: Sequence[str],
        until_ms: Mapping[str, int] | None = None,
    ) -> None:
        """See `StateStore.write_profiles`."""
        tag = f"{self._ns}{{{slot}}}"
        kept = {user: profile for user, profile in profiles.items() if profile is not None}
        gone = [user for user, profile in profiles.items() if profile is None]
        kinds = ["p", "h", "o", *(f"e:{generation}" for generation in generations)]
        keys = [f"{tag}:p:{user}" for user in kept] + [
            f"{tag}:{kind}:{u}" for u in gone for kind in kinds
        ]
        args: list[Any] = [
            len(kept),
            len(kinds),
            *(msgspec.msgpack.encode(p) for p in kept.values()),
        ]
        args += [(until_ms or {}).get(user, "") for user in gone]
        self._write("write_profiles", *self._fenced(slot, source, expected, new, keys, args))

    @_translated
    def count_clicks(
        self,
        slot: str,
        source: Source,
        expected: Fence | None,
        new: Fence,
        counts: Mapping[int, Mapping[str, int]],
        buckets_kept: int,
        items_max: int = 1_000_000,
    ) -> None:
        """See `StateStore.count_clicks`."""
        tag = f"{self._ns}{{{slot}}}"
        args: list[Any] = [buckets_kept, f"{tag}:popular:", items_max]
        for bucket, items in counts.items():
            args += (bucket, len(items), *chain.from_iterable(items.items()))
        # Every key that is added to is named: a cluster that moves the slot then refuses the whole script.
        keys = [f"{tag}:buckets", *(f"{tag}:popular:{bucket}" for bucket in counts)]
        self._write("count_clicks", *self._fenced(slot, source, expected, new, keys, args))

    @_translated
    def read_item_metadata(
        self, item_ids: Sequence[str], item_slots: int
    ) -> dict[str, ItemMetadata]:
        """See `StateStore.read_item_metadata`."""
        with self._redis.pipeline(transaction=False) as pipe:
            for item_id in item_ids:
                pipe.get(f"{self._ns}{{{item_slot(item_id, item_slots)}}}:c:{item_id}")
            values = pipe.execute()
        cards = {}
        for item_id, value in zip(item_ids, values, strict=True):
            if value is not None:
                partition, offset = _CARD.unpack_from(value)
                cards[item_id] = ItemMetadata(partition, offset, value[_CARD.size :])
        return cards

    @_translated
    def write_item_metadata(
        self,
        slot: str,
        source: Source,
        expected: Fence | None,
        new: Fence,
        cards: Mapping[str, ItemMetadata],
    ) -> None:
        """See `StateStore.write_item_metadata`."""
        self._write(
            "write_item_metadata",
            *self._cards_written(ItemMetadataWrite(slot, source, expected, new, cards)),
        )

    @_translated
    def write_item_metadata_many(
        self, writes: Sequence[ItemMetadataWrite]
    ) -> list[EddylineError | None]:
        """See `StateStore.write_item_metadata_many`."""
        ends = self._all("write_item_metadata", [self._cards_written(write) for write in writes])
        return [end if isinstance(end, EddylineError) else None for end in ends]

    def _cards_written(self, write: ItemMetadataWrite) -> tuple[list[str], list[Any]]:
        args: list[Any] = []
        for card in write.cards.values():
            args += (card.offset, _CARD.pack(card.partition, card.offset) + card.body)
        keys = [f"{self._ns}{{{write.slot}}}:c:{item_id}" for item_id in write.cards]
        return self._fenced(write.slot, write.source, write.expected, write.new, keys, args)

    @_translated
    def read_user(self, slot: str, partition: int, user_id: str, generation: str) -> UserState:
        """See `StateStore.read_user`."""
        names = user_codec.keys(f"{self._ns}{{{slot}}}", [user_id], [generation or "-"])
        fence_key = self._fence_key(slot, Source("clicks", partition))
        fence, *values = cast("list[bytes | None]", self._redis.mget(fence_key, *names))
        return user_codec.state(_fence(fence), *values)

    @_translated
    def popular(self, slot: str, limit: int) -> dict[int, dict[str, int]]:
        """See `StateStore.popular`."""
        tag = f"{self._ns}{{{slot}}}"
        buckets = [int(b) for b in cast("list[bytes]", self._redis.zrange(f"{tag}:buckets", 0, -1))]
        with self._redis.pipeline(transaction=False) as pipe:
            for bucket in buckets:
                pipe.zrevrange(f"{tag}:popular:{bucket}", 0, limit - 1, withscores=True)
            answers = pipe.execute()
        return {
            b: {item.decode(): int(n) for item, n in counted}
            for b, counted in zip(buckets, answers, strict=True)
            if counted
        }

    @_translated
    def accept_log(self, logs: Logs) -> int:
        """See `StateStore.accept_log`."""
        return accept_in_redis(self._redis, self._ns, _CARD, logs)

    def close(self) -> None:
        """See `StateStore.close`."""
        self._closed = True
        self._redis.close()

    def _write(self, script: str, keys: list[str], args: list[Any]) -> bytes:
        return _stood(
            cast("tuple[int, bytes]", self._scripts[script](keys=keys, args=args)), keys, args
        )

    def _fenced(
        self,
        slot: str,
        source: Source,
        expected: Fence | None,
        new: Fence,
        keys: list[str],
        args: list[Any],
    ) -> tuple[list[str], list[Any]]:
        return [self._fence_key(slot, source), *keys], [str(expected or ""), str(new), *args]

    def _fence_key(self, slot: str, source: Source) -> str:
        return f"{self._ns}fence:{{{slot}}}:{source.name}:{source.partition}"


def _script(name: str) -> str:
    folder = files("eddyline.stores") / "scripts"
    parts = ["users_fence", "fence", name] if name == "write_users" else ["fence", name]
    return "".join((folder / f"{part}.lua").read_text(encoding="utf-8") for part in parts)


def _stood(answer: tuple[int, bytes], keys: list[str], args: list[Any]) -> bytes:
    """What a script returned. Raises FenceMoved where it refused."""
    if not answer[0]:
        raise FenceMoved(keys[0], args[0], answer[1].decode())
    return answer[1]


def _fence(value: bytes | None) -> Fence | None:
    return None if value is None else Fence.parse(value.decode())
