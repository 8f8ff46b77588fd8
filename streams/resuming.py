"""Checks where reading resumes: whether the log still has what the fences say was applied.

A fence carries a mark of the last record that was applied. Reading resumes at that record, not
after it: if another record has its offset by now, the log lost its end and has grown again.
Compacted topics keep delete records for `delete.retention.ms`. Where the state is older and records
came since, deletes may have been removed before they were applied.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from eddyline.errors import LogMismatch
from eddyline.kafka.producers import now_ms
from eddyline.kafka.topics import CLICKS
from eddyline.schema.records import Record
from eddyline.stores.state_store import Fence, Mark


def mark_of(record: Record) -> Mark:
    """The mark of a record."""
    checksum = zlib.crc32(record.key or b"", record.timestamp & 0xFFFFFFFF)
    return Mark(record.offset, record.timestamp, zlib.crc32(record.value or b"", checksum))


@dataclass(slots=True)
class Resume:
    """What is to be checked at the next batch of one partition.

    topic:    without prefix
    mark:     of the lowest fence; None where it has none
    done:     the lowest fence's offset
    compare:  whether reading resumes at the mark's record
    stale_ms: deletes appended before this time may be gone; None where that is of no concern
    """

    topic: str
    partition: int
    mark: Mark | None
    done: int
    compare: bool
    stale_ms: int | None

    @classmethod
    def of(
        cls,
        topic: str,
        partition: int,
        fences: Collection[Fence | None],
        bounds: tuple[int, int],
        retention_ms: int | None,
    ) -> Resume:
        """bounds: (offset of the oldest record kept, offset the next record will get)

        retention_ms: `delete.retention.ms` of a compacted topic
        """
        begin, end = bounds
        found = [fence for fence in fences if fence is not None]
        lowest = min(found, key=lambda fence: fence.offset, default=None)
        if lowest is None or lowest.mark is None:
            return cls(topic, partition, None, -1 if lowest is None else lowest.offset, False, None)
        done, mark = lowest.offset, lowest.mark
        stale_ms = None
        if retention_ms is not None and end > done + 1:
            stale_ms = now_ms() - retention_ms
        compare = len(found) == len(fences) and begin <= mark.offset <= done
        return cls(topic, partition, mark, done, compare, stale_ms)

    @property
    def pending(self) -> bool:
        """Whether anything is to be checked."""
        return self.compare or self.stale_ms is not None

    def check(self, records: Sequence[Record]) -> int:
        """Check the first records of a partition; how many of them were applied before.

        records: consecutive, at least one. Raises LogMismatch.
        """
        mark, first, applied = self.mark, records[0], 0
        if self.compare and mark is not None:
            self.compare = False
            gone = first.offset > mark.offset and self.topic == CLICKS
            other = first.offset == mark.offset and mark_of(first).checksum != mark.checksum
            if gone or other:
                raise self._replaced(mark)
            applied = sum(record.offset <= self.done for record in records)
        after = next((record for record in records if record.offset > self.done), None)
        if after is not None:
            # The record after the fence is as old as the oldest delete that may be missing.
            follows = after.offset == self.done + 1 and after.timestamp >= 0
            self.check_age(after.timestamp if follows else None)
        return applied

    def check_age(self, since_ms: int | None = None) -> None:
        """Raise LogMismatch where deletes since then may be gone. Default: since the mark.

        A mark without a time stamp shows no age.
        """
        stale_ms, mark = self.stale_ms, self.mark
        if stale_ms is None or mark is None:
            return
        self.stale_ms = None
        since_ms = mark.appended_ms if since_ms is None else since_ms
        if 0 <= since_ms < stale_ms:
            days = (now_ms() - since_ms) / 86_400_000
            raise LogMismatch(
                f"topic {self.topic}, partition {self.partition}: the state has everything up to "
                f"offset {self.done}, which is {days:.1f} days old. Kafka removes delete records "
                f"after {(now_ms() - stale_ms) / 86_400_000:.1f} days (delete.retention.ms), so "
                "deletes may be lost. Stop every ingest and run `eddyline resync`: it deletes what "
                "the topic no longer has"
            )

    def _replaced(self, mark: Mark) -> LogMismatch:
        return LogMismatch(
            f"topic {self.topic}, partition {self.partition}: the record at offset {mark.offset} "
            "is not the one that was applied: the log lost its end and has grown again. The "
            f"records up to offset {self.done} that replaced the lost ones are not applied. To go "
            "on without them, stop every ingest and run `eddyline accept-log`; to apply the log as "
            "it is now, empty Redis"
        )
