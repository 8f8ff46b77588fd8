"""Clients of Redis from settings (single server or cluster, user, TLS); the check of servers."""

from __future__ import annotations

import contextlib
import hashlib
import select
import socket
import ssl
from collections.abc import Mapping, Sequence
from typing import Any, cast

import redis
from redis.backoff import NoBackoff
from redis.connection import ConnectionPool, SSLConnection, UnixDomainSocketConnection
from redis.exceptions import ConnectionError, NoScriptError, TimeoutError
from redis.retry import Retry

from eddyline.errors import StoreRefused, StoreUnavailable
from eddyline.settings.loader import Settings
from eddyline.stores.cluster_slots import Address, named
from eddyline.stores.redis_cluster import RedisCluster
from eddyline.stores.redis_errors import cluster_not_set
from eddyline.stores.redis_url import Target, target, tls

# Servers send a session ticket at once. With one that sends none, each new connection takes so much
# longer.
_ALERT_WAIT_MS = 30


def check(settings: Settings) -> None:
    """Check the Redis settings without a server. Raises SettingsError."""
    tls(settings, target(settings))


def client(settings: Settings, *, timeout_ms: int | None = None) -> redis.Redis:
    """A client that connects on first use; a `RedisCluster` if `redis_cluster` is set.

    timeout_ms: time-out of one call; default `redis_timeout_ms`
    Raises SettingsError. Thread rule: any thread.
    """
    to = target(settings)
    timeout_s = (settings.redis_timeout_ms if timeout_ms is None else timeout_ms) / 1000
    options: dict[str, Any] = {
        "username": to.user or None,
        "password": to.password or None,
        "db": to.db,
        "socket_timeout": timeout_s,
        # One immediate retry, only if the connection broke: a pooled connection that died with the
        # server. If a fenced write was applied and its answer lost, the retry is refused, never
        # applied twice.
        "retry": Retry(NoBackoff(), 1, supported_errors=(ConnectionError,)),
        # RESP2: the same answers in every version of redis-py, and the shortest handshake.
        "protocol": 2,
    }
    if to.path:
        options |= {"connection_class": UnixDomainSocketConnection, "path": to.path}
        return redis.Redis.from_pool(ConnectionPool(**options))
    options |= {"socket_connect_timeout": timeout_s, "socket_keepalive": True}
    if context := tls(settings, to):
        options |= {"connection_class": _TlsConnection, "context": context}

    def node(address: Address) -> redis.Redis:
        host, port = address
        return redis.Redis.from_pool(ConnectionPool(host=host, port=port, **options))

    return RedisCluster(to.addresses, node, timeout_s) if to.cluster else node(to.addresses[0])


def check_servers(store: redis.Redis, to: Target) -> None:
    """Raise StoreRefused if a server may evict keys, is read-only, or is of another kind than set.

    In a cluster every node is checked, replicas too: one may become a primary. A replica that does
    not answer is skipped. Raises redis-py's errors if another server does not answer, and
    StoreUnavailable if hash slots have no node.
    """
    if not isinstance(store, RedisCluster):
        info = _info(store)
        _check_one(info, to.shown, primary=True)
        if int(info.get("cluster_enabled", 0)):
            raise cluster_not_set(to.shown)
        return
    known = store.map(fresh=True)
    if known.uncovered:
        raise StoreUnavailable(
            f"Redis at {to.shown}: {known.uncovered:,} hash slots are served by no node"
        )
    for address in known.primaries:
        _check_one(_info(store.node(address)), named(address), primary=True)
    for address in set(known.replicas) - set(known.primaries):
        with contextlib.suppress(ConnectionError, TimeoutError):
            _check_one(_info(store.node(address)), named(address), primary=False)


def check_eviction(store: redis.Redis, to: Target) -> None:
    """Raise StoreRefused if a server may evict keys. Cluster nodes that are away are skipped."""
    if not isinstance(store, RedisCluster):
        _check_one(_info(store), to.shown, primary=False)
        return
    known = store.map()
    for address in {*known.primaries, *known.replicas}:
        with contextlib.suppress(ConnectionError, TimeoutError):
            _check_one(_info(store.node(address)), named(address), primary=False)


def primaries(store: redis.Redis) -> list[redis.Redis]:
    """The clients of all servers that are written to."""
    if not isinstance(store, RedisCluster):
        return [store]
    return [store.node(address) for address in store.map().primaries]


class Script:
    """A Lua script, sent by digest; sent whole if the node does not have it.

    redis-py's `Script` loads it into a server first, which may not be the node that runs it.
    Thread rule: any thread.
    """

    def __init__(self, store: redis.Redis, text: str) -> None:
        self.sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        self._store = store
        self._text = text

    def __call__(self, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """Run it. keys: of one slot tag. Raises redis-py's errors."""
        try:
            return self._store.evalsha(self.sha, len(keys), *keys, *args)
        except NoScriptError:
            return self._store.eval(self._text, len(keys), *keys, *args)


class _TlsConnection(SSLConnection):
    """redis-py's `SSLConnection` with one context for all connections."""

    def __init__(self, *, context: ssl.SSLContext, **options: Any) -> None:
        super().__init__(**options)
        self._context = context

    def _wrap_socket_with_ssl(self, sock: socket.socket) -> ssl.SSLSocket:
        made = self._context.wrap_socket(sock, server_hostname=self.host)
        try:
            if made.version() == "TLSv1.3":
                self._await_alert(made)
        except OSError:
            made.close()
            raise
        return made

    def _await_alert(self, made: ssl.SSLSocket) -> None:
        """Raise OSError if the server refuses our certificate, or requires one.

        In TLS 1.3 the server verifies after our side of the handshake: it sends a session ticket,
        or an alert and closes. A write before that loses the alert, and with it the reason.
        """
        poll = select.poll()
        poll.register(made, select.POLLIN)
        if not poll.poll(_ALERT_WAIT_MS):
            return
        made.setblocking(False)
        try:
            if not made.recv(1):
                raise ConnectionResetError("connection closed by server")
        except ssl.SSLWantReadError:  # only a session ticket
            pass
        finally:
            made.settimeout(self.socket_timeout)


def _info(store: redis.Redis) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", store.info())


def _check_one(info: Mapping[str, Any], at: str, *, primary: bool) -> None:
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        raise StoreRefused(
            f"Redis at {at} has maxmemory-policy {policy} and may drop keys when memory is "
            "full; lists and fences would be lost. Set it: CONFIG SET maxmemory-policy noeviction"
        )
    if primary and info.get("role", "master") != "master":
        raise StoreRefused(f"Redis at {at} is a replica and cannot be written to")
