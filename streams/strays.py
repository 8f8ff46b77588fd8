"""Records of `items` and `users` in a wrong partition, and newer states appended again (ADR 23).

A record under another spelling of its id is forwarded as well, to the id itself (ADR 31).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from eddyline.errors import Rejected
from eddyline.schema.records import Record
from streams.fences import PartitionFences
from streams.ports import DeadLetterSink, Forwarder, Outcome
from streams.records import Restored, coordinates

log = logging.getLogger(__name__)


class Strays:
    """Appends a handler's records to the partitions of their keys. Thread rule: the handler's.

    forwarder: None leaves every record where it is
    what:      `item` or `user`, for log lines
    """

    def __init__(
        self, forwarder: Forwarder | None, dead_letters: DeadLetterSink, what: str
    ) -> None:
        self._forwarder = forwarder
        self._dead_letters = dead_letters
        self._what = what
        self._dispute_logged = False

    @property
    def forwarded(self) -> bool:
        """Whether records in a wrong partition are sent to their own."""
        return self._forwarder is not None

    def forward(
        self, record: Record, key: str, value: bytes | None, partition: int, outcome: Outcome
    ) -> None:
        """Send a record to the partition of its key; a too large one is a dead letter."""
        if self._forwarder is None:
            return
        try:
            self._forwarder.forward(record, key.encode(), value, partition)
        except Rejected as rejected:
            self._dead_letters.put(record, rejected)
            outcome.rejected += 1
            return
        outcome.forwarded += 1
        if outcome.forwarded == 1:  # once a batch
            log.warning(
                "%ss in a wrong partition are forwarded; their producer needs Kafka's murmur2 "
                "partitioner, and keys without outer blanks in Unicode NFC",
                self._what,
                extra={"at": coordinates(record)},
            )

    def restore(
        self,
        newer: Iterable[Restored],
        fences: PartitionFences,
        sent: int,
        disputed: int,
        outcome: Outcome,
    ) -> None:
        """Append newer states again after outdated ones, as compaction keeps the last.

        Raises FenceMoved if the store went back meanwhile: it may have decided by what it lost, and
        no such state may enter the log.

        sent:     the offset up to which this was done before
        disputed: forwarded records of keys that another producer sends to their own partition
        """
        unsent = [record for record in newer if record.offset > sent]
        if self._forwarder is not None and unsent:
            fences.check(unsent[0].partition)
            for record in unsent:
                self._forwarder.forward(record, record.key or b"", record.value, record.partition)
                outcome.forwarded += 1
        outcome.disputed = disputed
        if disputed and not self._dispute_logged:
            self._dispute_logged = True
            log.warning(
                "two producers send the same %s to different partitions; their times decide, and "
                "only as exactly as the brokers' clocks. Further ones are counted as `disputed`",
                self._what,
            )

    def flush(self) -> None:
        """Return once Kafka has all records."""
        if self._forwarder is not None:
            self._forwarder.flush()
