"""The present ends of a topic's partitions, read again and again over one connection."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError

from eddyline.kafka.clients import connect, translate_error
from eddyline.settings.loader import Settings


class LogEnds:
    """Connects at the first read, and again after an error. Thread rule: one thread."""

    def __init__(self, settings: Settings, name: str) -> None:
        """name: of the topic, without the namespace."""
        self._settings = settings
        self._topic = settings.prefixed(name)
        self._consumer: KafkaConsumer | None = None

    def read(self, partitions: Collection[int]) -> dict[int, int]:
        """Partition -> the offset that the next record will get.

        Raises KafkaUnavailable after `kafka_timeout_ms`, KafkaRefused.
        """
        try:
            if self._consumer is None:
                self._consumer = connect(
                    self._settings, KafkaConsumer, group_id=None, enable_auto_commit=False
                )
            found = self._consumer.end_offsets(
                [TopicPartition(self._topic, p) for p in partitions],
                timeout_ms=self._settings.kafka_timeout_ms,
            )
        except (KafkaError, OSError) as error:
            self.close()
            raise translate_error(self._settings, error) from None
        return {at.partition: end for at, end in found.items()}

    def close(self) -> None:
        """Close the connection; a later `read` connects again."""
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            with suppress(KafkaError, OSError):
                consumer.close()
