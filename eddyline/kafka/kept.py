"""Reads that ingest repeats at each rebalance, over connections that stay open.

A new connection costs more than a hundred milliseconds, for which the partitions would wait.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Generic, Self, TypeVar

from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition

from eddyline.errors import Unavailable
from eddyline.kafka import reading, topics
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import LogId

_C = TypeVar("_C")
_R = TypeVar("_R")


class KeptKafka:
    """An admin client and a consumer, opened at their first use. Thread rule: any thread."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._admin = _Kept[KafkaAdminClient](lambda: topics.open_admin(settings))
        self._consumer = _Kept[KafkaConsumer](lambda: reading.open_consumer(settings))
        self._values: dict[str, _Values] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getitem__(self, topic: str, /) -> LogId:
        """The id of a topic's log now; topic: without prefix. Raises KafkaUnavailable."""
        return self._admin.call(lambda admin: topics.ids_by(admin, self._settings, [topic]))[topic]

    def latest(self, name: str) -> dict[bytes, bytes]:
        """As `reading.latest`, but reads only what is new since the call before."""
        return self._consumer.call(lambda consumer: self._latest(consumer, name))

    def close(self) -> None:
        """Close the connections; a later call opens new ones."""
        self._admin.close()
        self._consumer.close()

    def _latest(self, consumer: KafkaConsumer, name: str) -> dict[bytes, bytes]:
        values = self._values.pop(name, None) or _Values()
        if not values.read_on(consumer, self._settings, name):
            values = _Values()  # the topic was made anew, or lost its end
            values.read_on(consumer, self._settings, name)
        self._values[name] = values  # not after an error: then all is read again
        return dict(values.records)


class _Values:
    """Key → value of a compacted topic, up to where it was read."""

    def __init__(self) -> None:
        self.records: dict[bytes, bytes] = {}
        # The last record of each partition. Compaction keeps it as long as no other one follows.
        self._last: dict[TopicPartition, Any] = {}

    def read_on(self, consumer: KafkaConsumer, settings: Settings, name: str) -> bool:
        """Read to the present end; False if the last record of before is not there any more."""
        topic = settings.prefixed(name)
        places = [TopicPartition(topic, p) for p in consumer.partitions_for_topic(topic)]
        if not places:
            topics.check_seen(settings, name)
            return not self._last
        begins, ends = consumer.beginning_offsets(places), consumer.end_offsets(places)
        starts = {at: self._last[at].offset if at in self._last else begins[at] for at in places}
        if any(ends[at] <= self._last[at].offset for at in places if at in self._last):
            return False
        slices = {at: (starts[at], ends[at]) for at in places}
        same = set(self._last)
        for record in reading.read_slices(
            consumer, slices, stall_s=settings.kafka_timeout_ms / 1000
        ):
            at = TopicPartition(record.topic, record.partition)
            if at in same:
                same.remove(at)
                if not _is_same(record, self._last[at]):
                    return False
                continue
            self._last[at] = record
            self.records.pop(record.key, None)
            if record.value is not None:
                self.records[record.key] = record.value
        return not same


def _is_same(record: Any, other: Any) -> bool:
    return bool(
        (record.offset, record.timestamp, record.key, record.value)
        == (other.offset, other.timestamp, other.key, other.value)
    )


class _Kept(Generic[_C]):
    """A client that stays open until a call fails. Thread rule: any thread; one call at a time."""

    def __init__(self, open_: Callable[[], AbstractContextManager[_C]]) -> None:
        """open_: a new client; its context translates the errors of calls."""
        self._open = open_
        self._client: _C | None = None
        self._stack = ExitStack()
        self._lock = threading.Lock()

    def call(self, do: Callable[[_C], _R]) -> _R:
        """Call with the client. Through one of before, a call that fails is made once again with a
        new one: brokers end idle connections.
        """
        with self._lock:
            if self._client is not None:
                try:
                    return self._call(self._client, do)
                except Unavailable:
                    pass
            self._client = self._stack.enter_context(self._open())
            return self._call(self._client, do)

    def close(self) -> None:
        """Close the client."""
        with self._lock:
            self._client = None
            self._stack.close()

    def _call(self, client: _C, do: Callable[[_C], _R]) -> _R:
        try:
            return do(client)
        except BaseException:
            self._client = None
            with self._stack.pop_all():
                raise
