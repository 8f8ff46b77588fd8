"""The key of an item in co-visitation rows: 8 bytes, where an id may be long."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

KEY_BYTES = 8


@lru_cache(maxsize=262_144)
def key_bytes(item_id: str) -> bytes:
    """The key as stored: BLAKE2b of the id's UTF-8, 8 bytes.

    >>> key_bytes("50").hex()
    '24eb507b06b6d4ad'
    """
    return blake2b(item_id.encode(), digest_size=KEY_BYTES).digest()


def item_key(item_id: str) -> int:
    """The key as an unsigned 64-bit integer, `key_bytes` read as little-endian."""
    return int.from_bytes(key_bytes(item_id), "little")


def cached_keys_of(item_ids: Iterable[str]) -> npt.NDArray[np.uint64]:
    """uint64 (n,): the keys of items that come up again soon, from the cache."""
    return np.frombuffer(b"".join(map(key_bytes, item_ids)), "<u8").astype(np.uint64)


def keys_of(item_ids: Iterable[str]) -> npt.NDArray[np.uint64]:
    """uint64 (n,): the keys of many items, which the cache does not keep."""
    digests = [blake2b(one.encode(), digest_size=KEY_BYTES).digest() for one in item_ids]
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)
