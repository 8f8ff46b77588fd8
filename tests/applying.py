"""Apply records by a handler, as the dispatcher does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from streams.ports import Handler, Outcome, RecordBatch


def batch_of(
    records: Sequence[Any], partition: int | None = None, read_us: int = 0, epoch: int = 0
) -> RecordBatch:
    """A batch of records of one partition."""
    where = records[0].partition if partition is None else partition
    return RecordBatch(records[0].topic, where, records, read_us, epoch)


def ingest(handler: Handler, partition: int, records: Sequence[Any], read_us: int = 0) -> Outcome:
    """Apply consecutive records of one partition. Raises what ended the batch."""
    return handler.apply_one(batch_of(records, partition, read_us))
