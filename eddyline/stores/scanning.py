"""A scan of all keys, one page at a call, of a server or of all primaries of a cluster.

`scan_iter` goes on to the next key that matches, however many others it has to pass: a caller that
leaves pauses for other clients needs pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import redis
from redis.exceptions import ConnectionError

from eddyline.stores import redis_client
from eddyline.stores.redis_cluster import RedisCluster


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where a scan stands.

    node, at: number of the server, and its own cursor
    owners:   the slots of the cluster at the beginning; None before it, and for a single server
    """

    node: int = 0
    at: int = 0
    owners: Any = None


BEGIN = Cursor()
# (None after the last page, the page's keys that match)
Page = tuple[Cursor | None, list[bytes]]


def page(store: redis.Redis, cursor: Cursor, match: str, count: int) -> Page:
    """The next page: of about `count` keys those that match.

    Raises redis-py's errors, and ConnectionError if slots moved: keys may be missing.
    """
    owners = cursor.owners
    if isinstance(store, RedisCluster):
        now = store.map(fresh=cursor.at == 0).owners
        owners = now if owners is None else owners
        if now != owners:
            raise ConnectionError("hash slots moved during a scan of all keys; do it again")
    nodes = redis_client.primaries(store)
    scanned = nodes[cursor.node].scan(cursor.at, match=match, count=count)
    at, keys = scanned[0], cast("list[bytes]", scanned[1])
    if at:
        return Cursor(cursor.node, int(at), owners), keys
    after = cursor.node + 1
    return (Cursor(after, 0, owners) if after < len(nodes) else None), keys
