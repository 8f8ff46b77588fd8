"""Settings of Redis: address, TLS, layout."""

from __future__ import annotations

from typing import Annotated

import msgspec

from eddyline.settings.field import within


class RedisSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Redis, or Valkey, that holds the state."""

    redis_url: str = ""
    """Redis' address, `redis://user:password@host:port/0`; `rediss://` is TLS. With Sentinel its
    addresses and the primary's name: `redis+sentinel://host:port,host:port/mymaster/0`. Empty: the
    local Valkey that `eddyline up` or the demo started."""
    redis_cluster: bool = False
    """`redis_url` is a Redis Cluster; it may name several nodes then,
    `redis://host:port,host:port`."""
    redis_ca_file: str = ""
    """PEM file of the only CA whose certificates Redis may show. Empty: those this machine
    trusts."""
    redis_cert_file: str = ""
    """PEM file of our own certificate, if Redis demands one."""
    redis_key_file: str = ""
    """PEM file of its key, without a pass phrase. Empty: it is in `redis_cert_file`."""
    redis_sentinel_user: str = ""
    """The user that Sentinel itself demands, where it does."""
    redis_sentinel_password: str = ""
    """The password that Sentinel itself demands, where it does."""
    redis_timeout_ms: Annotated[int, within(10, 60_000)] = 2_000
    """How long one call to Redis may take; in a query worker at most half of `query_timeout_ms`."""
    item_slots: Annotated[int, within(1, 1_024)] = 1
    """Hash shards of the item state in Redis; above 1 only for Redis Cluster."""
