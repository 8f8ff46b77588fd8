"""Wire format of `item-vectors.<generation>`, the compacted topic that workers index.

Key: the item id, UTF-8. Value, little-endian, 40 bytes and the parts:

    offset size  what
    0      2     magic b"EV"
    2      1     version, 1
    3      1     flags: bit 0 the item is deleted or unavailable (no vector follows)
    4      4     source partition (int32) of the `items` topic
    8      8     source offset (int64): the item's version
    16     8     at_ms (int64), the item's own event time
    24     8     written_us (int64), the clock of the ingest process that wrote the record
    32     2     dimension d (uint16), 0 where bit 0 is set
    34     2     0, reserved
    36     4     length n of the attributes (uint32)
    40     4·d   float32[d], unit norm
    …      n     MessagePack map: the attributes that filters need (categories, tags, attributes)

A delete is a flagged record, not null: compaction keeps it and every replica reads it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from eddyline.errors import Rejected
from eddyline.schema.events import Item

_HEADER = struct.Struct("<2sBBiqqqHHI")
_MAGIC = b"EV"
_VERSION = 1
_RETIRED = 1
DIMENSION_MAX = 4_096
# The largest valid item (64 each of categories, tags and attributes, every text at its limit,
# four-byte characters) takes 454,000 bytes.
ATTRIBUTES_BYTES_MAX = 524_288


@dataclass(frozen=True, slots=True)
class ItemRecord:
    """One item of the index. vector: float32 (d,), unit norm; None if the item is retired."""

    item_id: str
    partition: int
    offset: int
    at_ms: int
    written_us: int
    vector: npt.NDArray[np.float32] | None
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def retired(self) -> bool:
        """Deleted or unavailable: no query returns it."""
        return self.vector is None


def attributes_of(item: Item) -> dict[str, Any]:
    """The fields of an item that filters read, without empty ones."""
    parts = {"categories": item.categories, "tags": item.tags, "attributes": item.attributes}
    return {name: part for name, part in parts.items() if part}


def encode_record(record: ItemRecord) -> bytes:
    """The value of the Kafka record; its key is `record.item_id` in UTF-8."""
    vector = b"" if record.vector is None else np.ascontiguousarray(record.vector, "<f4").tobytes()
    attributes = msgspec.msgpack.encode(record.attributes) if record.attributes else b""
    header = _HEADER.pack(
        _MAGIC,
        _VERSION,
        _RETIRED if record.vector is None else 0,
        record.partition,
        record.offset,
        record.at_ms,
        record.written_us,
        len(vector) // 4,
        0,
        len(attributes),
    )
    return header + vector + attributes


def decode_record(key: bytes, value: bytes) -> ItemRecord:
    """The item; its vector is a read-only view into `value`. Raises Rejected if malformed."""
    if len(value) < _HEADER.size or value[:2] != _MAGIC:
        raise Rejected("bad_record", "magic", f"{len(value)} bytes, not an item record")
    _, version, flags, partition, offset, at_ms, written_us, d, _, n = _HEADER.unpack_from(value)
    if version != _VERSION:
        raise Rejected("bad_record", "version", f"{version}, this reader knows {_VERSION}")
    if d > DIMENSION_MAX or n > ATTRIBUTES_BYTES_MAX or len(value) != _HEADER.size + 4 * d + n:
        raise Rejected(
            "bad_record", "length", f"{len(value)} bytes for d={d} and {n} of attributes"
        )
    if bool(flags & _RETIRED) != (d == 0):
        raise Rejected("bad_record", "flags", f"{flags} with dimension {d}")
    vector = None if d == 0 else np.frombuffer(value, "<f4", count=d, offset=_HEADER.size)
    try:
        attributes = (
            msgspec.msgpack.decode(value[_HEADER.size + 4 * d :], type=dict[str, Any]) if n else {}
        )
        item_id = key.decode()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Rejected("bad_record", "attributes", str(error)) from None
    return ItemRecord(item_id, partition, offset, at_ms, written_us, vector, attributes)
