"""The stored form of item metadata, little-endian.

int32, int64    partition and offset of the item's record
uint8           1 + flags: 1 a stray, 2 with a refused record, 4 with the time of its birth
int64           milliseconds of the first append
int64           milliseconds of the birth, if there is one
refused record  if there is one; int32, int64, int64: partition, offset, milliseconds of the first
                append; uint8: 1 if the item is hidden; uint8 n and n bytes: the reason, UTF-8
the rest        the item as JSON; nothing if it is deleted
"""

from __future__ import annotations

import struct

from eddyline.stores.state_store import ItemMetadata, RefusedRecord

VERSION = struct.Struct("<iq")
# No body begins with such a mark. Values of older versions have none.
_FIRST = struct.Struct("<Bq")
_BORN = struct.Struct("<q")
# Flags of the mark, which is one more. write_item_metadata.lua reads `_WITH_REFUSED`.
_STRAY, _WITH_REFUSED, _WITH_BORN = 1, 2, 4
_MARKS = range(1, 9)
_REFUSED = struct.Struct("<iqq?B")
# Reasons are ours and short.
_REASON_BYTES_MAX = 255
# Enough for `has_body`.
HEAD_BYTES = VERSION.size + _FIRST.size


def encode(item: ItemMetadata) -> bytes:
    """The stored form; a deleted item has no body."""
    mark, more = _MARKS[0] + _STRAY * item.stray, b""
    if item.born_ms:
        mark, more = mark + _WITH_BORN, _BORN.pack(item.born_ms)
    if (one := item.refused) is not None:
        reason = one.reason.encode()[:_REASON_BYTES_MAX]
        refused = _REFUSED.pack(one.partition, one.offset, one.first_ms, one.hidden, len(reason))
        mark, more = mark + _WITH_REFUSED, more + refused + reason
    head = VERSION.pack(item.partition, item.offset) + _FIRST.pack(mark, item.first_ms)
    return head + more + item.body


def decode(value: bytes) -> ItemMetadata:
    """The reverse, also of what older versions stored."""
    partition, offset = VERSION.unpack_from(value)
    rest = value[VERSION.size :]
    if len(rest) < _FIRST.size or rest[0] not in _MARKS:
        return ItemMetadata(partition, offset, rest)
    mark, first_ms = _FIRST.unpack_from(rest)
    flags, at = mark - _MARKS[0], _FIRST.size
    born_ms, refused = 0, None
    if flags & _WITH_BORN:
        (born_ms,) = _BORN.unpack_from(rest, at)
        at += _BORN.size
    if flags & _WITH_REFUSED:
        where, of, appended_ms, hidden, size = _REFUSED.unpack_from(rest, at)
        at += _REFUSED.size + size
        reason = rest[at - size : at].decode("utf-8", "replace")
        refused = RefusedRecord(where, of, appended_ms, reason, hidden)
    stray = bool(flags & _STRAY)
    return ItemMetadata(partition, offset, rest[at:], first_ms, stray, refused, born_ms)


def has_body(head: bytes) -> bool:
    """Whether the item is not deleted. head: the first `HEAD_BYTES` + 1 bytes of a value."""
    rest = head[VERSION.size :]
    if len(rest) < _FIRST.size or rest[0] not in _MARKS:
        return bool(rest)
    # A deleted item has neither a refused record nor a birth.
    return len(rest) > _FIRST.size
