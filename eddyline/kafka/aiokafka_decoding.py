"""How aiokafka decodes records, for every consumer of this process.

* Header names that are not UTF-8 are read; see `kafka_python_decoding`. aiokafka's records are
  compiled. After the first record that they cannot decode, the rest of its fetch is decoded by
  aiokafka's own Python code.
* A batch that cannot be decoded becomes an `UnreadableBatch`, the only element of its partition.
  aiokafka raises an error instead, which names no partition; it drops the records of the other
  partitions with it, whose positions have moved. A batch that is cut it passes silently.
* So does a partition that the broker itself cannot read. aiokafka would fetch it again at once, for
  ever.

`tests/unit/eddyline/test_decoding.py` fails where a member that is used here changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import aiokafka.consumer.consumer
import aiokafka.consumer.fetcher
from aiokafka.consumer.fetcher import Fetcher, PartitionRecords
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.record.default_records import _DefaultRecordBatchPy
from aiokafka.record.memory_records import MemoryRecords, _MemoryRecordsPy
from typing_extensions import override

from eddyline.kafka import unreadable
from eddyline.kafka.kafka_python_decoding import Lenient, keeping_bytes


class _LenientBatch(_DefaultRecordBatchPy):  # type: ignore[misc]
    _buffer: Any

    def _maybe_uncompress(self) -> None:
        super()._maybe_uncompress()
        self._buffer = Lenient(self._buffer)


class _RecordsFrom(_MemoryRecordsPy):  # type: ignore[misc]
    """The batches of a fetch that have offsets from `first` on."""

    def __init__(self, data: bytes, first: int) -> None:
        super().__init__(data)
        self.data = data
        while self.has_next() and _LenientBatch(self._next_slice).next_offset <= first:
            self._cache_next()

    @override
    def next_batch(self, *_: Any) -> Any:
        found = self._next_slice
        self._cache_next()
        return _LenientBatch(found)


class _AttributedRecords(PartitionRecords):  # type: ignore[misc]
    """The iterator over the records of one fetch of a partition."""

    _records: Any

    def _unpack_records(self) -> Iterator[Any]:
        self._first = self.next_fetch_offset
        try:
            if self._records.cut:
                yield from self._unreadable(None)
                return
            unreadable.check_format(self._records.data)
            yield from super()._unpack_records()
        except UnicodeDecodeError:
            yield from self._unpack_names()
        except Exception as error:
            yield from self._unreadable(error)

    def _unpack_names(self) -> Iterator[Any]:
        try:
            self._records = _RecordsFrom(self._records.data, self.next_fetch_offset)
            yield from super()._unpack_records()
        except Exception as error:
            yield from self._unreadable(error)

    def _unreadable(self, error: Exception | None) -> Iterator[unreadable.UnreadableBatch]:
        """The batch; nothing after decoded records: the next fetch begins with the batch."""
        if self.next_fetch_offset == self._first:
            at = self._tp
            yield unreadable.describe(
                at.topic, at.partition, self._records.data, self._first, error
            )


class _Answers:
    """aiokafka's client; what the broker cannot read is in its answers as a batch."""

    def __init__(self, client: Any) -> None:
        self._inner = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def send(self, node_id: Any, request: Any, **more: Any) -> Any:
        answer = await self._inner.send(node_id, request, **more)
        if isinstance(request, FetchRequest):
            for _, partitions in answer.topics:
                for n, (partition, code, *rest) in enumerate(partitions):
                    if code in unreadable.BROKER_ERRORS:
                        records = unreadable.of_broker(code)
                        partitions[n] = (partition, 0, *rest[:-1], records)
        return answer


class _AttributedFetcher(Fetcher):  # type: ignore[misc]
    def __init__(self, client: Any, *arguments: Any, **more: Any) -> None:
        super().__init__(_Answers(client), *arguments, **more)


def install() -> None:
    """Make every consumer of this process decode so. Idempotent; any thread."""
    aiokafka.consumer.fetcher.MemoryRecords = keeping_bytes(MemoryRecords)
    aiokafka.consumer.fetcher.PartitionRecords = _AttributedRecords
    aiokafka.consumer.consumer.Fetcher = _AttributedFetcher
