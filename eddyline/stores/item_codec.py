"""The stored form of item metadata.

Partition (int32) and offset (int64) of the item's record, a mark (1; 2 for a stray), milliseconds
of the first append (int64), the item as JSON (nothing if deleted). Little-endian.
"""

from __future__ import annotations

import struct

from eddyline.stores.state_store import ItemMetadata

VERSION = struct.Struct("<iq")
# No body begins with such a mark. Values of older versions have none.
_FIRST = struct.Struct("<Bq")
_DIRECT, _STRAY = 1, 2
# Enough to see whether there is a body.
HEAD_BYTES = VERSION.size + _FIRST.size


def encode(item: ItemMetadata) -> bytes:
    """The stored form; a deleted item has no body."""
    first = _FIRST.pack(_STRAY if item.stray else _DIRECT, item.first_ms)
    return VERSION.pack(item.partition, item.offset) + first + item.body


def decode(value: bytes) -> ItemMetadata:
    """The reverse, also of what older versions stored."""
    partition, offset = VERSION.unpack_from(value)
    rest = value[VERSION.size :]
    if len(rest) < _FIRST.size or rest[0] not in (_DIRECT, _STRAY):
        return ItemMetadata(partition, offset, rest)
    mark, first_ms = _FIRST.unpack_from(rest)
    return ItemMetadata(partition, offset, rest[_FIRST.size :], first_ms, mark == _STRAY)
