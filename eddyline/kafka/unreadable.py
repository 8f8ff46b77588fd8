"""Batches that cannot be decoded: which offsets they have, and why.

Where a fetch has such a batch, both clients return an `UnreadableBatch` in place of its records
(`aiokafka_decoding`, `kafka_python_decoding`). It is the only element of the partition's records:
those in front of the batch come with the fetch before, so that no other batch can be meant. The
position stays in front of the batch. So an error has its partition, and the records of the
other partitions are not lost.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from kafka.record.util import calc_crc32c

from eddyline.errors import EddylineError

# Base offset, length, leader epoch, magic, CRC, attributes, last offset delta, times and producer
# (30 bytes), number of records.
_HEAD = struct.Struct(">qiibIhi30xi")
# Base offset and length, which the length does not count.
_OVERHEAD = 12
_MAGIC_AT = 16
_CHECKED_FROM = 21
# Errors of the broker for one partition of a fetch, by code: it cannot read what it has.
BROKER_ERRORS = {
    -1: "UNKNOWN_SERVER_ERROR",
    2: "CORRUPT_MESSAGE",
    76: "UNSUPPORTED_COMPRESSION_TYPE",
    87: "INVALID_RECORD",
}
# The reason of such a batch. The error may pass, so readers try again.
BROKER = "broker"
# Format 0 has no times.
_FORMATS = (1, 2)


@dataclass(frozen=True, slots=True)
class UnreadableBatch:
    """A batch that cannot be decoded.

    base:   offset of its first record; at most `first`
    first:  the first offset that is not read
    last:   the last offset; None if the head of the batch is damaged
    reason: `codec`, `checksum`, `format`, `damaged` or `broker`
    detail: the decoder's message
    data:   the bytes of the batch
    """

    topic: str
    partition: int
    base: int
    first: int
    last: int | None
    reason: str
    detail: str
    data: bytes

    @property
    def offset(self) -> int:
        """`first`: clients compare it as a record's offset."""
        return self.first

    @property
    def at(self) -> str:
        """`topic/partition/offset`, as `eddyline dead-letters skip` takes it."""
        return f"{self.topic}/{self.partition}/{self.first}"

    def __str__(self) -> str:
        """One sentence with the coordinates, the reason and the command."""
        offsets = (
            f"the batch at offset {self.first}"
            if self.last is None
            else f"the batch of offsets {self.first} to {self.last}"
        )
        return (
            f"topic {self.topic}, partition {self.partition}: {offsets} cannot be read "
            f"({self.reason}: {self.detail}). This partition stops there; to go on without these "
            f"offsets: eddyline dead-letters skip {self.at}"
        )


class BatchUnreadable(EddylineError):
    """A reader met a batch that it cannot decode, and must not leave it out."""

    def __init__(self, batch: UnreadableBatch) -> None:
        super().__init__(str(batch))
        self.batch = batch


class UnknownFormat(ValueError):
    """A batch has a message format without time stamps, or one that is not known."""


def check_format(data: bytes | memoryview) -> None:
    """Raise UnknownFormat where the first batch of a fetch has such a format."""
    if len(data) > _MAGIC_AT and data[_MAGIC_AT] not in _FORMATS:
        raise UnknownFormat(f"message format {data[_MAGIC_AT]} instead of 1 or 2")


def of_broker(code: int) -> bytes:
    """What stands in a fetch for the records that the broker cannot read."""
    return bytes([code & 0xFF])


def is_cut(data: bytes | memoryview) -> bool:
    """Whether not even the first batch of a fetch is whole. Kafka never cuts the first one."""
    return bool(len(data)) and (len(data) < _OVERHEAD or _end(data, 0) > len(data))


def describe(
    topic: str, partition: int, data: bytes | memoryview, position: int, error: Exception | None
) -> UnreadableBatch:
    """The batch that could not be decoded, of a fetch without a decoded record.

    data:     the batches of the fetch
    position: the offset that was fetched
    error:    what the decoder raised; None where the batch is not whole
    """
    if len(data) == 1:
        code = int.from_bytes(data, "big", signed=True)
        detail = f"the broker answers {BROKER_ERRORS.get(code, code)}"
        return UnreadableBatch(topic, partition, position, position, None, BROKER, detail, b"")
    at = 0
    while _is_empty(data, at):
        at = _end(data, at)
    reason, detail = _reason(error), str(error) or type(error).__name__
    if error is None:
        detail = "the batch is shorter than its head says"
    base, first, last, end = position, position, None, len(data)
    if at + _HEAD.size <= len(data):
        base, _, _, magic, _, _, delta, _ = _HEAD.unpack_from(data, at)
        first = max(base, position)
        if at + _HEAD.size <= _end(data, at) <= len(data):
            end = _end(data, at)
            if magic == 2 and base + delta >= first:
                last = base + delta
                if (following := _checked_base(data, end)) is not None:
                    last = min(last, following - 1)
    return UnreadableBatch(
        topic, partition, min(base, first), first, last, reason, detail, bytes(data[at:end])
    )


def _end(data: bytes | memoryview, at: int) -> int:
    """Where the batch at this place says that it ends."""
    return at + _OVERHEAD + int.from_bytes(data[at + 8 : at + 12], "big", signed=True)


def _is_empty(data: bytes | memoryview, at: int) -> bool:
    """Whether compaction left a batch without records at this place."""
    if _checked_base(data, at) is None:
        return False
    *_, count = _HEAD.unpack_from(data, at)
    return bool(count == 0)


def _reason(error: Exception | None) -> str:
    if isinstance(error, UnknownFormat):
        return "format"
    if error is not None and "Codec" in type(error).__name__:
        return "codec"
    return "checksum" if "crc" in str(error).lower() else "damaged"


def _checked_base(data: bytes | memoryview, at: int) -> int | None:
    """Base offset of the batch at this place, if it is whole and its checksum is right."""
    if at + _HEAD.size > len(data):
        return None
    base, _, _, magic, crc, *_ = _HEAD.unpack_from(data, at)
    end = _end(data, at)
    if magic != 2 or not at + _HEAD.size <= end <= len(data):
        return None
    found: int = base
    return found if calc_crc32c(bytes(data[at + _CHECKED_FROM : end])) == crc else None
