"""Item records out: one transactional producer per `items` partition, one transaction per chunk.

The transactional id belongs to the partition. Whoever opens it anew makes Kafka refuse the producer that had
it before, so a process that lost the partition without noticing cannot write an older record behind a newer
one, and compaction never keeps the older.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from kafka import KafkaProducer
from kafka.errors import (
    InvalidProducerEpochError,
    InvalidTxnStateError,
    KafkaError,
    ProducerFencedError,
    UnknownProducerIdError,
)

from eddyline.errors import EddylineError
from eddyline.kafka import in_time, item_vectors, make_producer, trouble
from eddyline.records import ItemRecord, encode_record
from eddyline.settings import Settings
from streams.chunk import PartitionLost

log = logging.getLogger(__name__)

_FENCED = (ProducerFencedError, InvalidProducerEpochError, InvalidTxnStateError, UnknownProducerIdError)
# Kafka aborts a transaction that its process left open after this time; readers wait for it that long.
_TRANSACTION_TIMEOUT_MS = 15_000
# Kafka answers "concurrent transactions" until the last one's markers are written, a few ms; kafka-python's
# 100 ms between tries made every tenth transaction 110 ms long, and opening a producer 215 ms.
_RETRY_MS = 5


class TransactionalPublisher:
    """A `RecordPublisher` to `item-vectors.<generation>`. Thread rule: one thread.

    Partition p of `items` goes to partition p of the topic.
    """

    def __init__(self, settings: Settings, generation: str) -> None:
        self._settings = settings
        self._generation = generation
        self._topic = settings.prefixed(item_vectors(generation))
        self._timeout_s = settings.kafka_timeout_ms / 1000
        self._producers: dict[int, KafkaProducer] = {}

    def open(self, partition: int) -> None:
        """See `RecordPublisher.open`. Raises KafkaUnavailable, KafkaRefused."""
        self._drop(partition)
        name = f"eddyline-items-{self._generation}-{partition}"
        producer = make_producer(
            self._settings,
            transactional_id=self._settings.prefixed(name),
            transaction_timeout_ms=_TRANSACTION_TIMEOUT_MS,
            linger_ms=0,
            retry_backoff_ms=_RETRY_MS,
        )
        try:
            producer.init_transactions()
        except KafkaError as error:
            _close(producer)
            raise self._trouble(error) from error
        self._producers[partition] = producer

    def publish(self, partition: int, records: Sequence[ItemRecord]) -> None:
        """See `RecordPublisher.publish`."""
        if partition not in self._producers:
            self.open(partition)
        producer = self._producers[partition]
        try:
            producer.begin_transaction()
            sent = [
                producer.send(self._topic, encode_record(r), key=r.item_id.encode(), partition=partition)
                for r in records
            ]
            in_time(producer.commit_transaction, self._timeout_s)
            for future in sent:
                future.get(timeout=self._timeout_s)
        except _FENCED as error:
            self._drop(partition)
            raise PartitionLost(f"items partition {partition}: {type(error).__name__}: {error}") from error
        except (KafkaError, TimeoutError) as error:
            # The transaction may or may not stand. Opening anew ends it, and repeating it does no harm.
            self._drop(partition)
            raise self._trouble(error) from error

    def close(self) -> None:
        """Let go of all producers; open transactions are aborted by Kafka."""
        for partition in list(self._producers):
            self._drop(partition)

    def _drop(self, partition: int) -> None:
        producer = self._producers.pop(partition, None)
        if producer is not None:
            _close(producer)

    def _trouble(self, error: Exception) -> EddylineError:
        return trouble(self._settings, error, f"topic {self._topic}")


def _close(producer: KafkaProducer) -> None:
    try:
        producer.close(timeout=0)
    except KafkaError as error:
        log.info("a producer did not close in good order", extra={"reason": str(error)})
