"""Header names that are not UTF-8, in kafka-python; `aiokafka_header_names` has the other client.

Kafka stores any bytes as the name of a header. Both clients decode names strictly, so one such
record stops every reader of its partition for good. `read_any_name` makes kafka-python decode such
a record again, with U+FFFD for what is not UTF-8. Other records cost nothing more.
"""

from __future__ import annotations

from typing import Any

import kafka.record.memory_records
from kafka.record.default_records import DefaultRecordBatch
from typing_extensions import override


class _Name(bytearray):
    """A part of a record; decodes whatever it holds."""

    @override
    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return super().decode(encoding, "replace")


class Lenient(bytearray):
    """The bytes of a batch, whose slices decode."""

    @override
    def __getitem__(self, at: Any) -> Any:
        found = super().__getitem__(at)
        return _Name(found) if isinstance(at, slice) else found


class LenientBatch(DefaultRecordBatch):  # type: ignore[misc]
    """A batch of kafka-python."""

    _buffer: Any

    def _read_msg(self) -> Any:
        try:
            return super()._read_msg()
        except UnicodeDecodeError:
            self._buffer = Lenient(self._buffer)
            return super()._read_msg()


def read_any_name() -> None:
    """Make every consumer of this process read such records. Idempotent; any thread."""
    kafka.record.memory_records.DefaultRecordBatch = LenientBatch
