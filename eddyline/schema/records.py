"""Records of `clicks`, `items` and `users`, and the mark of those in Eddyline's own format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

# Names and values; Kafka allows a header without a value.
Headers = Sequence[tuple[str, bytes | None]]

# Header of a record in Eddyline's own format: in a topic with a map, what Eddyline forwards,
# merges and forgets lies among records of the map's format.
FORMAT = "eddyline_format"
OWN = (FORMAT, b"1")
# Of a record that a map made: it lies where the record lies that it was made from.
MAPPED = (FORMAT, b"mapped")
ONLY_MAPPED: Headers = (MAPPED,)


class Record(Protocol):
    """One record of a topic, as every reader has it; Kafka's clients return such records."""

    @property
    def topic(self) -> str:
        """The topic's name in Kafka, prefix included."""

    @property
    def partition(self) -> int:
        """The partition that holds the record."""

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
        """The value, as sent; None for a null record."""

    @property
    def headers(self) -> Headers:
        """Names and values; a value may be None."""


class BuiltRecord(msgspec.Struct, frozen=True):
    """A record that Eddyline makes itself: of another record by a map, of a file, of a dead letter.

    Its fields are those of `Record`. A record that a map made has the place of the original one.
    """

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Headers = ()


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
