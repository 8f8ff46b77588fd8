"""Header names that are not UTF-8, in aiokafka; see `header_names`.

aiokafka's records are compiled. After the first record that they cannot decode, the rest of its
fetch is decoded by aiokafka's own Python code. `tests/unit/eddyline/test_header_names.py` fails
where a member that is used here changes.
"""

from __future__ import annotations

from typing import Any

import aiokafka.consumer.fetcher
from aiokafka.consumer.fetcher import PartitionRecords
from aiokafka.record.default_records import _DefaultRecordBatchPy
from aiokafka.record.memory_records import MemoryRecords, _MemoryRecordsPy
from typing_extensions import override

from eddyline.kafka.header_names import Lenient


class _LenientBatch(_DefaultRecordBatchPy):  # type: ignore[misc]
    _buffer: Any

    def _maybe_uncompress(self) -> None:
        super()._maybe_uncompress()
        self._buffer = Lenient(self._buffer)


class _KeptRecords(MemoryRecords):  # type: ignore[misc]
    """The records of one fetch, with their bytes."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.data = data


class _RecordsFrom(_MemoryRecordsPy):  # type: ignore[misc]
    """The batches of a fetch that have offsets from `first` on."""

    def __init__(self, data: bytes, first: int) -> None:
        super().__init__(data)
        while self.has_next() and _LenientBatch(self._next_slice).next_offset <= first:
            self._cache_next()

    @override
    def next_batch(self, *_: Any) -> Any:
        found = self._next_slice
        self._cache_next()
        return _LenientBatch(found)


class _LenientPartitionRecords(PartitionRecords):  # type: ignore[misc]
    """The iterator over the records of one fetch of a partition."""

    _records: Any

    @override
    def __next__(self) -> Any:
        try:
            return super().__next__()
        except UnicodeDecodeError:
            self._records = _RecordsFrom(self._records.data, self.next_fetch_offset)
            self._records_iterator = self._unpack_records()
            return super().__next__()


def read_any_name() -> None:
    """Make every consumer of this process read such records. Idempotent; any thread."""
    aiokafka.consumer.fetcher.MemoryRecords = _KeptRecords
    aiokafka.consumer.fetcher.PartitionRecords = _LenientPartitionRecords
