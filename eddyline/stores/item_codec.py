"""The stored form of item metadata, little-endian.

int32, int64    partition and offset of the item's record
uint8           1 + flags: 1 a stray, 2 with a refused record, 4 with one more time
int64           milliseconds of the first append
int64           the other time, if there is one: ms of the birth; of a deleted item, of its end
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
_TIME = struct.Struct("<q")
# Flags of the mark, which is one more. write_item_metadata.lua reads `_WITH_REFUSED`,
# remove_deleted_items.lua all of a deleted item.
_STRAY, _WITH_REFUSED, _WITH_TIME = 1, 2, 4
_MARKS = range(1, 9)
# Deleted items of older versions do not say when they end: this long after the first append.
OLD_KEPT_MS = 2_592_000_000
_REFUSED = struct.Struct("<iqq?B")
# Reasons are ours and short.
_REASON_BYTES_MAX = 255
# Enough for `has_body`.
HEAD_BYTES = VERSION.size + _FIRST.size + _TIME.size


def encode(item: ItemMetadata) -> bytes:
    """The stored form; a deleted item has no body."""
    mark, more = _MARKS[0] + _STRAY * item.stray, b""
    if item.born_ms or item.deleted:
        more = _TIME.pack(item.ends_ms if item.deleted else item.born_ms)
        mark += _WITH_TIME
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
        return ItemMetadata(partition, offset, rest, ends_ms=0 if rest else OLD_KEPT_MS)
    mark, first_ms = _FIRST.unpack_from(rest)
    flags, at = mark - _MARKS[0], _FIRST.size
    time_ms, refused = 0, None
    if flags & _WITH_TIME:
        (time_ms,) = _TIME.unpack_from(rest, at)
        at += _TIME.size
    if flags & _WITH_REFUSED:
        where, of, appended_ms, hidden, size = _REFUSED.unpack_from(rest, at)
        at += _REFUSED.size + size
        reason = rest[at - size : at].decode("utf-8", "replace")
        refused = RefusedRecord(where, of, appended_ms, reason, hidden)
    stray = bool(flags & _STRAY)
    if body := rest[at:]:
        return ItemMetadata(partition, offset, body, first_ms, stray, refused, time_ms)
    ends_ms = time_ms if flags & _WITH_TIME else first_ms + OLD_KEPT_MS
    return ItemMetadata(partition, offset, b"", first_ms, stray, ends_ms=ends_ms)


def has_body(head: bytes) -> bool:
    """Whether the item is not deleted. head: the first `HEAD_BYTES` + 1 bytes of a value."""
    rest = head[VERSION.size :]
    if len(rest) < _FIRST.size or rest[0] not in _MARKS:
        return bool(rest)
    # A deleted item has no refused record.
    with_time = (rest[0] - _MARKS[0]) & _WITH_TIME
    return len(rest) > _FIRST.size + (_TIME.size if with_time else 0)
