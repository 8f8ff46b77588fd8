"""Records of a topic, as every reader of ingest has them."""

from __future__ import annotations

from collections.abc import Sequence
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


def coordinates(record: Record) -> str:
    """The record's `topic/partition/offset`: its name in headers, messages and dead letters."""
    return f"{record.topic}/{record.partition}/{record.offset}"
