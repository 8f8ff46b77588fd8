"""How kafka-python decodes records, for every consumer of this process.

* Header names that are not UTF-8: Kafka stores any bytes as the name of a header. Both clients
  decode names strictly, so one such record stops every reader of its partition for good. Here it is
  decoded again, with U+FFFD for what is not UTF-8. Other records cost nothing more.
* A batch that cannot be decoded becomes an `UnreadableBatch`, the only element of its partition.
  So does a partition that the broker itself cannot read; kafka-python raises an error for all.

`aiokafka_decoding` has the other client, and uses what both share.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import kafka.consumer.fetcher
import kafka.record.memory_records
from kafka.consumer.fetcher import Fetcher
from kafka.record import MemoryRecords
from kafka.record.default_records import DefaultRecordBatch
from typing_extensions import override

from eddyline.kafka import unreadable


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


class _LenientBatch(DefaultRecordBatch):  # type: ignore[misc]
    """A batch of kafka-python."""

    _buffer: Any

    def _read_msg(self) -> Any:
        try:
            return super()._read_msg()
        except UnicodeDecodeError:
            self._buffer = Lenient(self._buffer)
            return super()._read_msg()


def keeping_bytes(memory_records: Any) -> Any:
    """The records of one fetch of either client, with their bytes."""

    class KeptRecords(memory_records):  # type: ignore[misc]
        """cut: not even the first batch is whole."""

        def __init__(self, data: bytes) -> None:
            super().__init__(data)
            self.data = data
            self.cut = unreadable.is_cut(data)

        def has_next(self) -> bool:
            """Whether there is a batch, a cut one included."""
            return self.cut or bool(super().has_next())

    return KeptRecords


_PartitionRecords: Any = Fetcher.PartitionRecords


class _AttributedRecords(_PartitionRecords):  # type: ignore[misc]
    """The records of one fetch of a partition."""

    def _unpack_records(self, at: Any, records: Any, *deserializers: Any) -> Iterator[Any]:
        try:
            if records.cut:
                error = None
            else:
                unreadable.check_format(records.data)
                yield from super()._unpack_records(at, records, *deserializers)
                return
        except Exception as raised:
            error = raised
        # Where records were decoded before it, the next fetch begins with the batch.
        if self.next_fetch_offset == self.fetch_offset:
            yield unreadable.describe(
                at.topic, at.partition, records.data, self.fetch_offset, error
            )
        self.drain()


_parse_fetched_data = Fetcher._parse_fetched_data


def _with_broker_errors(fetcher: Any, fetched: Any) -> Any:
    """Parse what was fetched of a partition; what the broker cannot read is a batch of it."""
    found = fetched.partition_data
    if found.error_code in unreadable.BROKER_ERRORS:
        found.records = unreadable.of_broker(found.error_code)
        found.error_code = 0
    return _parse_fetched_data(fetcher, fetched)


def install() -> None:
    """Make every consumer of this process decode so. Idempotent; any thread."""
    kafka.record.memory_records.DefaultRecordBatch = _LenientBatch
    kafka.consumer.fetcher.MemoryRecords = keeping_bytes(MemoryRecords)
    Fetcher.PartitionRecords = _AttributedRecords
    Fetcher._parse_fetched_data = _with_broker_errors
