"""State in Redis (or Valkey), behind fences.

Key schema; `<ns>` is empty or the namespace and a colon, `{…}` is the slot tag (Redis Cluster's hash tag):

    <ns>layout                          JSON of `ports.Layout`
    <ns>fence:{u3}:clicks:3             "offset|cluster id|topic id" of the last record applied
    <ns>{u3}:window                     sorted set: accepted event id by its offset in clicks partition 3
    <ns>{u3}:h:<user>                   behaviour list and its stamps, see `eddyline.behaviour`
    <ns>{u3}:e:<generation>:<user>      user-ID embedding: steps (uint32), float32[d], little-endian
    <ns>{u3}:p:<user>                   profile attributes, MessagePack map
    <ns>fence:{i0}:clicks:3             the same partition's fence for the popularity counts
    <ns>fence:{i0}:items:0, …:items@1:0 items applied to the cards; items published for generation 1
    <ns>{i0}:c:<item>                   card: partition (int32), offset (int64), the item as JSON or nothing
    <ns>{i0}:buckets                    sorted set of the popularity buckets kept
    <ns>{i0}:popular:<bucket>           sorted set: item by thousandths of clicks in that bucket

Every write is one Lua script that compares and moves the fence first: all of it or nothing.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import msgspec
import redis
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    NoPermissionError,
    RedisError,
    ResponseError,
)
from redis.retry import Retry

from eddyline import behaviour
from eddyline.errors import FenceMoved, StoreRefused, StoreUnavailable
from eddyline.logs import without_password
from eddyline.ports import Card, Fence, Layout, Source, UserEffects, UserRead, UserState
from eddyline.settings import Settings
from eddyline.slots import item_slot
from eddyline.stores.acceptance import Logs, accept_in_redis

_CARD = struct.Struct("<iq")
_STEPS = struct.Struct("<I")
_SCRIPTS = ("write_users", "write_profiles", "count_clicks", "write_cards")
# Answers that time may heal; any other refusal (a key of another type, an error in a script) stays one.
_PASSING = (
    "OOM",
    "LOADING",
    "BUSY",
    "MISCONF",
    "READONLY",
    "MASTERDOWN",
    "NOREPLICAS",
    "CLUSTERDOWN",
    "TRYAGAIN",
)
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
        except (AuthenticationError, AuthorizationError, NoPermissionError) as error:
            raise StoreRefused(f"Redis at {self.address} refuses these credentials: {error}") from None
        except ResponseError as error:
            text = str(error)
            if text.startswith(_PASSING):
                raise StoreUnavailable(f"Redis at {self.address}: {text}") from None
            raise StoreRefused(f"Redis at {self.address} refuses what it is asked: {text}") from None
        except RedisError as error:
            raise StoreUnavailable(f"Redis at {self.address}: {type(error).__name__}: {error}") from None

    return call


class RedisStore:
    """A `StateStore` in Redis. Thread rule: any thread; each call takes a connection of the pool."""

    def __init__(self, settings: Settings) -> None:
        self.address = without_password(settings.redis_url)
        self._closed = False
        self._ns = f"{settings.namespace}:" if settings.namespace else ""
        timeout_s = settings.redis_timeout_ms / 1000
        # One retry, at once, and only where the connection broke: a pooled connection that died with the
        # server. A fenced write that was applied before its answer was lost is then refused, never doubled.
        retry = Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,))
        try:
            self._redis = redis.Redis.from_url(
                settings.redis_url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=retry
            )
        except ValueError as error:
            raise StoreRefused(f"redis_url {self.address!r}: {error}") from None
        self._scripts = {name: self._redis.register_script(_script(name)) for name in _SCRIPTS}

    @_translated
    def check(self) -> None:
        """Raise StoreRefused where Redis may drop keys or cannot be written to."""
        info = self._redis.info()
        policy = info.get("maxmemory_policy", "noeviction")
        if policy != "noeviction":
            raise StoreRefused(
                f"Redis at {self.address} has maxmemory-policy {policy} and may drop keys when memory is "
                "full; lists and fences would be lost. Set it: CONFIG SET maxmemory-policy noeviction"
            )
        if info.get("role", "master") != "master":
            raise StoreRefused(f"Redis at {self.address} is a replica and cannot be written to")

    @_translated
    def claim_layout(self, layout: Layout) -> None:
        """See `StateStore.claim_layout`."""
        key, mine = f"{self._ns}layout", msgspec.json.encode(layout)
        if self._redis.set(key, mine, nx=True):
            return
        stored = self.layout()
        if stored != layout:
            raise StoreRefused(f"Redis at {self.address} is laid out as {stored}, settings say {layout}")

    @_translated
    def layout(self) -> Layout | None:
        """See `StateStore.layout`."""
        stored = cast("bytes | None", self._redis.get(f"{self._ns}layout"))
        return None if stored is None else msgspec.json.decode(stored, type=Layout)

    @_translated
    def fences(self, source: Source, slots: Sequence[str]) -> dict[str, Fence | None]:
        """See `StateStore.fences`."""
        return {s: _fence(cast("bytes | None", self._redis.get(self._fence_key(s, source)))) for s in slots}

    @_translated
    def read_users(
        self, slot: str, source: Source, event_ids: Sequence[str], user_ids: Sequence[str], generation: str
    ) -> UserRead:
        """See `StateStore.read_users`."""
        tag = f"{self._ns}{{{slot}}}"
        kinds = ["h", "p", f"e:{generation}"] if generation else ["h", "p"]
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.get(self._fence_key(slot, source))
            if event_ids:
                pipe.zmscore(f"{tag}:window", list(event_ids))
            if user_ids:
                pipe.mget([f"{tag}:{kind}:{user}" for kind in kinds for user in user_ids])
            answers = pipe.execute()
        scores = answers[1] if event_ids else []
        values = answers[-1] if user_ids else []
        n = len(user_ids)
        lists, profiles, vectors = values[:n], values[n : 2 * n], values[2 * n :]
        return UserRead(
            fence=_fence(answers[0]),
            accepted_at={e: int(s) for e, s in zip(event_ids, scores, strict=False) if s is not None},
            behaviours={u: behaviour.decode(v)[0] for u, v in zip(user_ids, lists, strict=False) if v},
            embeddings={u: _embedding(v) for u, v in zip(user_ids, vectors, strict=False) if v},
            profiles={
                u: msgspec.msgpack.decode(v, type=dict)
                for u, v in zip(user_ids, profiles, strict=False)
                if v is not None
            },
        )

    @_translated
    def write_users(
        self, slot: str, source: Source, expected: Fence | None, new: Fence, effects: UserEffects
    ) -> int:
        """See `StateStore.write_users`."""
        tag = f"{self._ns}{{{slot}}}"
        keys = [f"{tag}:window"]
        keys += [f"{tag}:h:{user}" for user in effects.behaviours]
        keys += [f"{tag}:e:{effects.generation}:{user}" for user in effects.embeddings]
        kinds = ["h", f"e:{effects.generation}"]
        keys += [f"{tag}:{kind}:{user}" for user in effects.emptied for kind in kinds]
        args: list[Any] = [effects.window_floor, len(effects.accepted)]
        args += [len(effects.behaviours), len(effects.embeddings)]
        for event_id, offset in effects.accepted.items():
            args += (offset, event_id)
        args += [behaviour.encode(b) for b in effects.behaviours.values()]
        args += [_STEPS.pack(steps) + vector for steps, vector in effects.embeddings.values()]
        return int(self._write("write_users", slot, source, expected, new, keys, args))

    @_translated
    def write_profiles(
        self, slot: str, source: Source, expected: Fence | None, new: Fence,
        profiles: Mapping[str, Mapping[str, object] | None], generations: Sequence[str],
    ) -> None:  # fmt: skip
        """See `StateStore.write_profiles`."""
        tag = f"{self._ns}{{{slot}}}"
        kept = {user: profile for user, profile in profiles.items() if profile is not None}
        kinds = ["h", "p", *(f"e:{generation}" for generation in generations)]
        gone = [f"{tag}:{kind}:{u}" for u, profile in profiles.items() if profile is None for kind in kinds]
        keys = [f"{tag}:p:{user}" for user in kept] + gone
        args = [len(kept), len(gone), *(msgspec.msgpack.encode(p) for p in kept.values())]
        self._write("write_profiles", slot, source, expected, new, keys, args)

    @_translated
    def count_clicks(
        self, slot: str, source: Source, expected: Fence | None, new: Fence,
        counts: Mapping[int, Mapping[str, int]], buckets_kept: int, items_max: int = 1_000_000,
    ) -> None:  # fmt: skip
        """See `StateStore.count_clicks`."""
        tag = f"{self._ns}{{{slot}}}"
        args: list[Any] = [buckets_kept, f"{tag}:popular:", items_max]
        for bucket, items in counts.items():
            for item_id, thousandths in items.items():
                args += (bucket, item_id, thousandths)
        self._write("count_clicks", slot, source, expected, new, [f"{tag}:buckets"], args)

    @_translated
    def read_cards(self, item_ids: Sequence[str], item_slots: int) -> dict[str, Card]:
        """See `StateStore.read_cards`."""
        with self._redis.pipeline(transaction=False) as pipe:
            for item_id in item_ids:
                pipe.get(f"{self._ns}{{{item_slot(item_id, item_slots)}}}:c:{item_id}")
            values = pipe.execute()
        cards = {}
        for item_id, value in zip(item_ids, values, strict=True):
            if value is not None:
                partition, offset = _CARD.unpack_from(value)
                cards[item_id] = Card(partition, offset, value[_CARD.size :])
        return cards

    @_translated
    def write_cards(
        self, slot: str, source: Source, expected: Fence | None, new: Fence, cards: Mapping[str, Card]
    ) -> None:
        """See `StateStore.write_cards`."""
        args: list[Any] = []
        for card in cards.values():
            args += (card.offset, _CARD.pack(card.partition, card.offset) + card.body)
        keys = [f"{self._ns}{{{slot}}}:c:{item_id}" for item_id in cards]
        self._write("write_cards", slot, source, expected, new, keys, args)

    @_translated
    def read_user(self, slot: str, partition: int, user_id: str, generation: str) -> UserState:
        """See `StateStore.read_user`."""
        tag = f"{self._ns}{{{slot}}}"
        fence, seen, vector, profile = cast(
            "list[bytes | None]",
            self._redis.mget(
                self._fence_key(slot, Source("clicks", partition)),
                f"{tag}:h:{user_id}", f"{tag}:e:{generation}:{user_id}", f"{tag}:p:{user_id}",
            ),
        )  # fmt: skip
        decoded, applied_us = (behaviour.EMPTY, 0) if seen is None else behaviour.decode(seen)
        return UserState(
            fence=_fence(fence),
            behaviour=decoded,
            applied_us=applied_us,
            embedding=None if vector is None else _embedding(vector),
            profile={} if profile is None else msgspec.msgpack.decode(profile, type=dict),
        )

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

    def _write(
        self, script: str, slot: str, source: Source, expected: Fence | None, new: Fence,
        keys: list[str], args: list[Any],
    ) -> bytes:  # fmt: skip
        fence_key, before = self._fence_key(slot, source), str(expected or "")
        try:
            ok, answer = cast(
                "tuple[int, bytes]",
                self._scripts[script](keys=[fence_key, *keys], args=[before, str(new), *args]),
            )
        except ResponseError as error:
            if "OOM" not in str(error):
                raise
            raise StoreUnavailable(f"Redis at {self.address} is full: {error}") from None
        if not ok:
            raise FenceMoved(fence_key, before, answer.decode())
        return answer

    def _fence_key(self, slot: str, source: Source) -> str:
        return f"{self._ns}fence:{{{slot}}}:{source.name}:{source.partition}"


def _script(name: str) -> str:
    folder = files("eddyline.stores") / "scripts"
    return (folder / "fence.lua").read_text() + (folder / f"{name}.lua").read_text()


def _fence(value: bytes | None) -> Fence | None:
    return None if value is None else Fence.parse(value.decode())


def _embedding(value: bytes) -> tuple[int, bytes]:
    return _STEPS.unpack_from(value)[0], value[_STEPS.size :]
