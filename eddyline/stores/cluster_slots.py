"""The slot map of a Redis Cluster, and the hash slot of a command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import ClusterDownError

from eddyline.addresses import joined

Address = tuple[str, int]
# Commands whose first key is their third argument.
_KEY_THIRD = {"EVAL", "EVALSHA"}
# Commands without a key.
_KEYLESS = {"PING", "INFO", "CONFIG", "CLUSTER", "TIME", "DBSIZE", "COMMAND", "ACL", "SCRIPT"}


@dataclass(frozen=True)
class SlotMap:
    """Hash slots and nodes, as reported by one node. Replaced as a whole.

    owners: primary by hash slot; None if no node serves the slot
    """

    owners: tuple[Address | None, ...]
    primaries: tuple[Address, ...]
    replicas: tuple[Address, ...]

    def owner(self, slot: int) -> Address:
        """The primary of a hash slot. Raises ClusterDownError if there is none."""
        found = self.owners[slot]
        if found is None:
            raise ClusterDownError(f"hash slot {slot} is served by no node")
        return found

    @property
    def uncovered(self) -> int:
        """Number of hash slots without a node."""
        return self.owners.count(None)


def parse_slots(rows: Sequence[Sequence[Any]], source: Address) -> SlotMap:
    """The slot map from the raw answer of `source` to CLUSTER SLOTS.

    A node that does not know its own host leaves it out; then it is the host of `source`.

    >>> rows = [[0, 1, [b"10.0.0.1", 7000, b"id"], [b"", 7001, b"id"]]]
    >>> parse_slots(rows, ("here", 7000)).replicas
    (('here', 7001),)
    """
    owners: list[Address | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
    primaries: dict[Address, None] = {}
    replicas: dict[Address, None] = {}
    for first, last, *nodes in rows:
        found = [address_of(node[0], int(node[1]), source) for node in nodes]
        primaries[found[0]] = None
        replicas |= dict.fromkeys(found[1:])
        owners[first : last + 1] = [found[0]] * (last + 1 - first)
    return SlotMap(tuple(owners), tuple(primaries), tuple(replicas))


def named(address: Address) -> str:
    """`host:port`; a host with colons is in brackets."""
    return joined(*address)


def slot_of(args: Sequence[Any]) -> int | None:
    """The hash slot of a command's first key; None for a command without a key.

    >>> slot_of(("GET", "a{u3}b")) == slot_of(("EVALSHA", "sha", 1, "{u3}:window"))
    True
    >>> slot_of(("INFO",))
    """
    name = str(args[0]).partition(" ")[0].upper()
    if name in _KEYLESS:
        return None
    key = args[3 if name in _KEY_THIRD else 1]
    return key_slot(key if isinstance(key, bytes) else str(key).encode())


def address_of(host: Any, port: int, source: Address) -> Address:
    """An address that `source` reported; its own host if it left the host out."""
    text = host.decode() if isinstance(host, bytes) else str(host or "")
    return (source[0] if text in ("", "?") else text, port)
