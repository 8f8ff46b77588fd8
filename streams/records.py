"""What ingest knows of a record by its headers, and records that it appends again."""

from __future__ import annotations

from eddyline.schema.records import BuiltRecord, Record

_OFFSET_DIGITS_MAX = 18
# Header of a record of `items` or `users` that was forwarded within its partition, since its key
# was another spelling of the id.
RESPELLED = ("respelled", b"1")


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


def is_respelled(record: Record) -> bool:
    """Whether the record comes from its own partition, where it had another spelling of its id."""
    return any(name == RESPELLED[0] for name, _ in record.headers)


def is_forwarded(record: Record) -> bool:
    """Whether the record comes from another partition, or another spelling of its id."""
    if is_respelled(record):
        return True
    for name, value in record.headers:
        if name == "origin" and value is not None:
            found = value.decode("utf-8", "replace").rsplit("/", 2)
            return len(found) == 3 and found[1] != str(record.partition)
    return False


def appended_after(record: Record) -> int | None:
    """Offset, in its own partition, of the record that a `Restored` was appended after.

    None for any other record.
    """
    if is_respelled(record):
        return None
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
