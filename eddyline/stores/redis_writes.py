"""Fenced writes to Redis: one Lua script each, see `write_scripts`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

from redis.exceptions import NoScriptError, RedisError

from eddyline.errors import EddylineError, FenceMoved, StoreUnavailable
from eddyline.settings.loader import Settings
from eddyline.stores import redis_client, write_scripts
from eddyline.stores.redis_errors import translate_error
from eddyline.stores.redis_url import target
from eddyline.stores.state_store import Fence, Source

_P = ParamSpec("_P")
_R = TypeVar("_R")
_S = TypeVar("_S", bound="FencedWrites")


def translated(method: Callable[Concatenate[_S, _P], _R]) -> Callable[Concatenate[_S, _P], _R]:
    """Raise redis-py's errors as ours. Messages name the address, never the password."""

    @functools.wraps(method)
    def call(self: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        if self._closed:
            raise StoreUnavailable("the store is closed")
        try:
            return method(self, *args, **kwargs)
        except RedisError as error:
            raise translate_error(error, self._target) from None

    return call


class FencedWrites:
    """A connection to Redis and its scripts. Thread rule: any thread."""

    def __init__(self, settings: Settings) -> None:
        """Connects on first use. Raises SettingsError."""
        self._target = target(settings)
        self.address = self._target.shown
        self._closed = False
        self._ns = settings.key_prefix
        # A record may be applied this long after its append.
        self._garbage_ms = settings.clicks_retention_h * 3_600_000
        self._redis = redis_client.client(settings)
        self._scripts = {
            name: redis_client.Script(self._redis, write_scripts.text(name))
            for name in write_scripts.NAMES
        }

    def _write_all(
        self, script: str, calls: Sequence[tuple[list[str], list[Any]]]
    ) -> list[bytes | EddylineError]:
        """The result or the error of each call of a script; all calls take one round trip."""
        with self._redis.pipeline(transaction=False) as pipe:
            for keys, args in calls:
                pipe.evalsha(self._scripts[script].sha, len(keys), *keys, *args)
            answers = pipe.execute(raise_on_error=False)
        results: list[bytes | EddylineError] = []
        for (keys, args), answer in zip(calls, answers, strict=True):
            try:
                results.append(self._result(script, keys, args, answer))
            except (FenceMoved, StoreUnavailable) as error:
                results.append(error)
        return results

    @translated
    def _result(self, script: str, keys: list[str], args: list[Any], answer: Any) -> bytes:
        if isinstance(answer, NoScriptError):
            return self._write(script, keys, args)
        if isinstance(answer, Exception):
            raise answer
        return _check_fence(answer, keys, args)

    def _write(self, script: str, keys: list[str], args: list[Any]) -> bytes:
        """The value that a script returns. Raises FenceMoved, redis-py's errors."""
        return _check_fence(self._scripts[script](keys=keys, args=args), keys, args)

    def _fenced(
        self,
        slot: str,
        source: Source,
        expected: Fence | None,
        new: Fence,
        keys: list[str],
        args: list[Any],
    ) -> tuple[list[str], list[Any]]:
        """KEYS and ARGV of a script, those of its fence first."""
        return [self._fence_key(slot, source), *keys], [str(expected or ""), str(new), *args]

    def _fence_key(self, slot: str, source: Source) -> str:
        return f"{self._ns}fence:{{{slot}}}:{source.name}:{source.partition}"


def _check_fence(answer: tuple[int, bytes], keys: list[str], args: list[Any]) -> bytes:
    """The value that a script returned. Raises FenceMoved if the stored fence differed."""
    if not answer[0]:
        raise FenceMoved(keys[0], args[0], answer[1].decode())
    return answer[1]
