"""Clients of Redis from settings (one server, Sentinel, a cluster; user, TLS); their check."""

from __future__ import annotations

import contextlib
import hashlib
import math
import select
import socket
import ssl
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, cast

import redis
from redis.backoff import NoBackoff
from redis.connection import Connection, ConnectionPool, SSLConnection, UnixDomainSocketConnection
from redis.exceptions import ConnectionError, NoScriptError, ReadOnlyError, TimeoutError
from redis.retry import Retry
from redis.sentinel import Sentinel, SentinelConnectionPool, SentinelManagedConnection

from eddyline.errors import StoreRefused, StoreUnavailable
from eddyline.settings.loader import Settings
from eddyline.stores.cluster_slots import Address, named
from eddyline.stores.redis_cluster import RedisCluster
from eddyline.stores.redis_errors import cluster_not_set
from eddyline.stores.redis_url import Target, target, tls

# Servers send a session ticket at once. With one that sends none, each new connection takes so much
# longer.
_ALERT_WAIT_MS = 30
# How long a connection may answer reads from a primary that was demoted.
_ROLE_S = 1.0


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
        options |= {"connection_class": _UnixConnection, "path": to.path}
        return redis.Redis.from_pool(ConnectionPool(**options))
    options |= {"socket_connect_timeout": timeout_s, "socket_keepalive": True}
    context = tls(settings, to)
    if context:
        options["context"] = context
    if to.service:
        options["connection_class"] = _SentinelTlsConnection if context else _SentinelConnection
        make: Any = SentinelConnectionPool  # redis-py has no types for it
        return redis.Redis.from_pool(
            make(to.service, _sentinel(settings, to, timeout_s), **options)
        )
    if to.cluster:
        # A replica of a cluster sends every command on to its primary: no role to check.
        options["connection_class"] = _TlsConnection if context else Connection
    else:
        options["connection_class"] = _PrimaryTlsConnection if context else _PrimaryConnection

    def node(address: Address) -> redis.Redis:
        host, port = address
        return redis.Redis.from_pool(ConnectionPool(host=host, port=port, **options))

    return RedisCluster(to.addresses, node, timeout_s) if to.cluster else node(to.addresses[0])


def _sentinel(settings: Settings, to: Target, timeout_s: float) -> Sentinel:
    """Sentinel's clients; the first of them that answers names the primary."""
    options: dict[str, Any] = {
        "username": settings.redis_sentinel_user or None,
        "password": settings.redis_sentinel_password or None,
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
    }
    if to.tls:
        options |= {
            "ssl": True,
            "ssl_ca_certs": settings.redis_ca_file or None,
            "ssl_certfile": settings.redis_cert_file or None,
            "ssl_keyfile": settings.redis_key_file or settings.redis_cert_file or None,
        }
    make: Any = Sentinel  # redis-py has no types for it
    return cast(Sentinel, make(list(to.addresses), sentinel_kwargs=options))


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


class _PrimaryOnly:
    """A connection that leaves a server which is no primary any more.

    A server that is demoted keeps its connections: it refuses writes, but answers reads with what
    it had. So the role is read once a second where the connection is used, and a connection that
    found a replica looks at it again as soon as it is connected: the address may name another
    server by then. Mixed into a connection of redis-py's.
    """

    _look_s = math.inf  # not before the first command

    def check_health(self: Any) -> None:
        """Before a command. Raises redis-py's ConnectionError if the server is a replica."""
        super().check_health()  # type: ignore[misc]
        now = time.monotonic()
        if now < self._look_s < math.inf:
            return
        first, self._look_s = self._look_s == math.inf, now + _ROLE_S
        if first:
            return  # a replica that the settings name is refused at start, with the reason
        self.send_command("INFO", "replication", check_health=False)
        if b"role:slave" in self.read_response(disable_decoding=True):
            self._leave()

    def read_response(self: Any, *args: Any, **options: Any) -> Any:
        try:
            return super().read_response(*args, **options)  # type: ignore[misc]
        except ReadOnlyError:
            self._leave()

    def _leave(self: Any) -> NoReturn:
        self.disconnect()
        self._look_s = 0.0
        raise ConnectionError("the server is a replica by now")


class _PrimaryConnection(_PrimaryOnly, Connection):
    pass


class _PrimaryTlsConnection(_PrimaryOnly, _TlsConnection):
    pass


class _UnixConnection(_PrimaryOnly, UnixDomainSocketConnection):
    pass


class _SentinelConnection(_PrimaryOnly, SentinelManagedConnection):
    pass


class _SentinelTlsConnection(_PrimaryOnly, SentinelManagedConnection, _TlsConnection):
    pass


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
