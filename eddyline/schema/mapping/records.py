"""Records before and after a map, and the mark of records in Eddyline's own format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

Headers = Sequence[tuple[str, bytes | None]]

# Header of a record in Eddyline's own format: in a topic with a map, what Eddyline forwards,
# merges and forgets lies among records of the map's format.
FORMAT = "eddyline_format"
OWN = (FORMAT, b"1")
# Of a record that a map made: it lies where the record lies that it was made from.
MAPPED = (FORMAT, b"mapped")
ONLY_MAPPED: Headers = (MAPPED,)


class RawRecord(Protocol):
    """One record of a topic, as every reader has it (`streams.records`)."""

    @property
    def topic(self) -> str:
        """The topic's name in Kafka."""

    @property
    def partition(self) -> int:
        """The record's partition."""

    @property
    def offset(self) -> int:
        """The record's offset in its partition."""

    @property
    def timestamp(self) -> int:
        """The broker's clock at the append, milliseconds since 1970."""

    @property
    def key(self) -> bytes | None:
        """The key, as sent."""

    @property
    def value(self) -> bytes | None:
        """The value, as sent."""

    @property
    def headers(self) -> Headers:
        """Names and values."""


class MappedRecord(msgspec.Struct, frozen=True):
    """A record in Eddyline's own format, at the place of the record that it was made from.

    headers: those of the record that Eddyline reads, and the mark
    """

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Headers


def marks(map_name: str) -> list[tuple[str, bytes]]:
    """The mark of a record in Eddyline's own format, as headers; none for a topic without a map.

    map_name: the setting `clicks_map`, `items_map` or `users_map`
    """
    return [OWN] if map_name else []


def mark_of(headers: Headers) -> bytes | None:
    """The mark of a record in Eddyline's own format; None for any other."""
    for name, value in headers:
        if name == FORMAT:
            return value
    return None
