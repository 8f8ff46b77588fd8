"""Keeps every committed record of the source topics, also what the topics lose later."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError

from eddyline.kafka import clients, topics
from eddyline.settings.loader import Settings

EVERY_S = 2.0


class Recorder:
    """Reads in a thread of its own until `stop`. Thread rule: any thread.

    Retention and compaction remove records; the comparison at the end needs them all.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._records: dict[str, dict[tuple[int, int], Any]] = {n: {} for n in topics.SOURCES}
        self._next: dict[TopicPartition, int] = {}
        self._consumer: KafkaConsumer | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._thread.start()

    def records(self, name: str) -> list[Any]:
        """What was read of a topic, by partition and offset."""
        with self._lock:
            return [record for _, record in sorted(self._records[name].items())]

    def advance(self, timeout_s: float) -> dict[TopicPartition, int]:
        """Read to the topics' ends of now. Returns the next offsets; raises TimeoutError."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                with self._lock:
                    return self._read(deadline)
            except (KafkaError, OSError, ValueError):  # the broker is away: open a new consumer
                self._close()
            if time.monotonic() > deadline:
                raise TimeoutError(f"the topics could not be read in {timeout_s:.0f} s")
            time.sleep(0.2)

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join(60)
        self._close()

    def _run(self) -> None:
        while not self._stop.wait(EVERY_S):
            with contextlib.suppress(TimeoutError):
                self.advance(10)

    def _read(self, deadline: float) -> dict[TopicPartition, int]:
        consumer = self._opened()
        ends = consumer.end_offsets(sorted(consumer.assignment()))
        while any(consumer.position(at) < end for at, end in ends.items()):
            if time.monotonic() > deadline:
                raise TimeoutError("the topics could not be read to their ends")
            for at, batch in consumer.poll(timeout_ms=200).items():
                name = at.topic.removeprefix(self._settings.prefixed(""))
                self._records[name].update({(r.partition, r.offset): r for r in batch})
            self._next = {at: consumer.position(at) for at in ends}
        return dict(self._next)

    def _opened(self) -> KafkaConsumer:
        if self._consumer is None:
            consumer = KafkaConsumer(
                **clients.client_options(self._settings),
                group_id=None,
                isolation_level="read_committed",
                auto_offset_reset="earliest",
            )
            self._consumer = consumer
            names = [self._settings.prefixed(name) for name in topics.SOURCES]
            parts = [
                TopicPartition(n, p) for n in names for p in consumer.partitions_for_topic(n) or ()
            ]
            consumer.assign(parts)
            for at in parts:
                consumer.seek(at, self._next.get(at, 0))
        return self._consumer

    def _close(self) -> None:
        with self._lock:
            consumer, self._consumer = self._consumer, None
            if consumer is not None:
                with contextlib.suppress(Exception):
                    consumer.close()
