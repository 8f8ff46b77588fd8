"""The Kafka partition of a key, the Redis slot tag of a user or an item, the shard of an item.

Partitions are those of the Java client (murmur2, positive, modulo). kafka-python and aiokafka use
the same; librdkafka needs `partitioner=murmur2_random`. The slot of a user is the partition of the
user's clicks.
"""

from __future__ import annotations

from functools import lru_cache

_M = 0x5BD1E995
_MASK = 0xFFFFFFFF


def murmur2(data: bytes) -> int:
    """Kafka's murmur2 (seed 0x9747b28c), as an unsigned 32-bit integer.

    >>> murmur2(b"ana")
    1401504040
    """
    length = len(data)
    h = 0x9747B28C ^ length
    for at in range(0, length - length % 4, 4):
        k = int.from_bytes(data[at : at + 4], "little") * _M & _MASK
        k = (k ^ (k >> 24)) * _M & _MASK
        h = (h * _M & _MASK) ^ k
    rest = data[length - length % 4 :]
    if rest:
        h = (h ^ int.from_bytes(rest, "little")) * _M & _MASK
    h = (h ^ (h >> 13)) * _M & _MASK
    return h ^ (h >> 15)


@lru_cache(maxsize=65536)
def partition_of(key: str, partitions: int) -> int:
    """The partition of a key, as every Java-compatible producer computes it."""
    return (murmur2(key.encode()) & 0x7FFFFFFF) % partitions


@lru_cache(maxsize=65536)
def partition_of_bytes(key: bytes, partitions: int) -> int:
    """`partition_of` for a key that need not be UTF-8."""
    return (murmur2(key) & 0x7FFFFFFF) % partitions


def user_slot(partition: int) -> str:
    """The slot tag of the users of a clicks partition: `u3`."""
    return f"u{partition}"


def item_slot(item_id: str, slots: int) -> str:
    """The slot tag of an item by a hash of its id: `i0` …; one slot by default."""
    return f"i{partition_of(item_id, slots) if slots > 1 else 0}"


def item_slots(slots: int) -> list[str]:
    """The slot tags of all items."""
    return [f"i{number}" for number in range(slots)]


@lru_cache(maxsize=65536)
def item_shard(item_id: str, shards: int) -> int:
    """The shard of an item, 0 … shards - 1, by a hash of its id. It never changes.

    >>> [item_shard(item_id, 4) for item_id in ("50", "heat", "ü")]
    [3, 0, 2]
    """
    return (murmur2(item_id.encode()) & 0x7FFFFFFF) % shards
