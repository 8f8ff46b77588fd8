"""The stored form of item metadata, little-endian.

int32, int64    partition and offset of the item's record
uint8           1; 2 for a stray; 3 and 4: the same, and a refused record follows
int64           milliseconds of the first append
refused record  int32, int64, int64: partition, offset, milliseconds of the first append;
                uint8: 1 if the item is hidden; uint8 n and n bytes: the reason, UTF-8
the rest        the item as JSON; nothing if it is deleted
"""

from __future__ import annotations

import struct

from eddyline.stores.state_store import ItemMetadata, RefusedRecord

VERSION = struct.Struct("<iq")
# No body begins with such a mark. Values of older versions have none.
_FIRST = struct.Struct("<Bq")
_DIRECT, _STRAY = 1, 2
# Added to the mark if a refused record follows. write_item_metadata.lua compares with it.
_WITH_REFUSED = 2
_REFUSED = struct.Struct("<iqq?B")
# Reasons are ours and short.
_REASON_BYTES_MAX = 255
# Enough for `has_body`.
HEAD_BYTES = VERSION.size + _FIRST.size


def encode(item: ItemMetadata) -> bytes:
    """The stored form; a deleted item has no body."""
    mark = _STRAY if item.stray else _DIRECT
    if item.refused is None:
        first = _FIRST.pack(mark, item.first_ms)
        return VERSION.pack(item.partition, item.offset) + first + item.body
    one, first = item.refused, _FIRST.pack(mark + _WITH_REFUSED, item.first_ms)
    reason = one.reason.encode()[:_REASON_BYTES_MAX]
    refused = _REFUSED.pack(one.partition, one.offset, one.first_ms, one.hidden, len(reason))
    return VERSION.pack(item.partition, item.offset) + first + refused + reason + item.body


def decode(value: bytes) -> ItemMetadata:
    """The reverse, also of what older versions stored."""
    partition, offset = VERSION.unpack_from(value)
    rest = value[VERSION.size :]
    if len(rest) < _FIRST.size or not _DIRECT <= rest[0] <= _STRAY + _WITH_REFUSED:
        return ItemMetadata(partition, offset, rest)
    mark, first_ms = _FIRST.unpack_from(rest)
    rest, refused = rest[_FIRST.size :], None
    if mark > _WITH_REFUSED:
        mark -= _WITH_REFUSED
        where, at, appended_ms, hidden, size = _REFUSED.unpack_from(rest)
        end = _REFUSED.size + size
        reason = rest[_REFUSED.size : end].decode("utf-8", "replace")
        refused, rest = RefusedRecord(where, at, appended_ms, reason, hidden), rest[end:]
    return ItemMetadata(partition, offset, rest, first_ms, mark == _STRAY, refused)


def has_body(head: bytes) -> bool:
    """Whether the item is not deleted. head: the first `HEAD_BYTES` + 1 bytes of a value."""
    rest = head[VERSION.size :]
    old = len(rest) < _FIRST.size or not _DIRECT <= rest[0] <= _STRAY + _WITH_REFUSED
    return len(rest) > (0 if old else _FIRST.size)
