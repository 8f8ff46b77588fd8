"""The outbox of co-visits in a user slot: visits whose rows are written later, to item slots.

A list of blobs, one blob a write: int64 last offset, int64 floor (little-endian), then MessagePack
of the visits, `[[offset, item, [older items]], …]`. Visits below the floor of the newest blob are
in the rows of every item slot.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

import msgspec

from eddyline.schema.co_visits import Visit

_HEAD = struct.Struct("<qq")
_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(list[Visit])


def encode(visits: Sequence[Visit], floor: int) -> bytes:
    """One blob; b"" for no visits. visits: by offset."""
    return _HEAD.pack(visits[-1][0], floor) + _pack(visits) if visits else b""


def decode(blobs: Iterable[bytes], done: int) -> tuple[list[Visit], int]:
    """(the visits, the floor of the newest blob); 0 for no blob.

    done: offset of the slot's fence; a blob that ends above it is of a write that failed
    """
    found: list[Visit] = []
    floor = 0
    for blob in blobs:
        last, its_floor = _HEAD.unpack_from(blob)
        if last <= done:
            floor = its_floor
            found += _unpack.decode(memoryview(blob)[_HEAD.size :])
    return found, floor
