"""Records of a topic, as every reader of ingest has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

# Kafka allows a header without a value.
Headers = Sequence[tuple[str, bytes | None]]


class Record(Protocol):
    """One record of a topic, as aiokafka returns it."""

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


@dataclass(frozen=True, slots=True)
class Restored:
    """A newer state of a key, to be appended again after an outdated record.

    offset:    of the outdated record, so that the header `origin` names it
    timestamp: first append of the newer one
    """

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Headers = ()

    @classmethod
    def after(cls, outdated: Record, key: str, newer_ms: int, value: bytes | None) -> Restored:
        """What to append again after an outdated record."""
        at = outdated.topic, outdated.partition, outdated.offset
        return cls(*at, newer_ms, key.encode(), value)


def is_forwarded(record: Record) -> bool:
    """Whether the record comes from another partition."""
    for name, value in record.headers:
        if name == "origin" and value is not None:
            found = value.decode("utf-8", "replace").rsplit("/", 2)
            return len(found) == 3 and found[1] != str(record.partition)
    return False


def coordinates(record: Record) -> str:
    """The record's `topic/partition/offset`: its name in headers, messages and dead letters."""
    return f"{record.topic}/{record.partition}/{record.offset}"
