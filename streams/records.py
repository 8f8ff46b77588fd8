"""What ingest knows of a record by its headers, and records that it appends again."""

from __future__ import annotations

from eddyline.schema.records import BuiltRecord, Record

_OFFSET_DIGITS_MAX = 18


class Restored(BuiltRecord, frozen=True):
    """A newer state of a key, to be appended again after an outdated record.

    offset:    of the outdated record, so that the header `origin` names it
    timestamp: first append of the newer one
    """

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


def appended_after(record: Record) -> int | None:
    """Offset, in its own partition, of the record that a `Restored` was appended after.

    None for any other record.
    """
    for name, value in record.headers:
        if name == "origin" and value is not None:
            at, _, offset = value.decode("utf-8", "replace").rpartition("/")
            mine = at == f"{record.topic}/{record.partition}"
            if mine and offset.isdecimal() and len(offset) <= _OFFSET_DIGITS_MAX:
                return int(offset)
    return None


def coordinates(record: Record) -> str:
    """The record's `topic/partition/offset`: its name in headers, messages and dead letters."""
    return f"{record.topic}/{record.partition}/{record.offset}"
