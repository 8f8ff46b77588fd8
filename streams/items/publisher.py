"""Item records out: one transactional producer per `items` partition, all partitions at once.

The transactional id belongs to the partition. The process that opens it gets a higher epoch, and
Kafka refuses the earlier producer. So a process that lost the partition without noticing cannot
write an older record behind a newer one, and compaction never keeps the older.

The epoch is what protects, not the transaction: records that a zombie wrote before its successor's
first one lie in front of it and do no harm, and a half-published batch is published again. A
transaction costs four round trips and 2 ms of the broker's CPU, however few records it has. So
records are sent without one, under the epoch of the partition's id. But Kafka expires epochs: a
partition drops those of a producer that was silent for a day, the coordinator an id that was not
used for a week. So a producer whose epoch was last confirmed more than `items_fence_s` ago sends
its next batch in a transaction, which the coordinator refuses to all but the last process that
opened the id.

All uses of private members of aiokafka's producer are in this file; see
`tests/unit/streams/test_publisher.py`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Mapping, Sequence
from concurrent import futures
from contextlib import suppress
from typing import Any, TypeVar

from aiokafka import AIOKafkaProducer
from aiokafka.errors import (
    InvalidProducerEpoch,
    InvalidProducerIdMapping,
    InvalidTxnState,
    KafkaError,
    ProducerFenced,
)
from aiokafka.producer import sender
from aiokafka.structs import TopicPartition
from typing_extensions import override

from eddyline.errors import EddylineError, KafkaRefused, KafkaUnavailable, Rejected
from eddyline.kafka import security
from eddyline.kafka.clients import translate_error
from eddyline.kafka.topics import item_vectors
from eddyline.schema.item_record import ItemRecord, encode_record
from eddyline.settings.loader import Settings
from streams.ports import PartitionLost, RecordPublisher

log = logging.getLogger(__name__)
_T = TypeVar("_T")

_FENCED = (ProducerFenced, InvalidProducerEpoch, InvalidTxnState, InvalidProducerIdMapping)
# Kafka aborts a transaction that its process left open after this time; readers wait for it that
# long.
_TRANSACTION_TIMEOUT_MS = 15_000
# Opening waits for the end of the transaction that the previous producer left, some ms.
_RETRY_MS = 5
# Kafka answers "concurrent transactions" until the last one's markers are written, a few ms.
# aiokafka's pause of 20 ms was the p99 of a commit.
_CONCURRENT_RETRY_S = 0.002
# How often a call from another thread checks that its loop still runs.
_LOOP_CHECK_S = 0.5
_ENDING = "this process ends"
# A producer that is closed has no records left that matter.
_CLOSE_S = 1.0


class TransactionalPublisher(RecordPublisher):
    """Publishes to `item-vectors.<generation>`. Thread rule: one call at a time.

    Partition p of `items` goes to partition p of the topic. The producers use an event loop that
    runs during a call, in the caller's thread: a thread of its own costs more. After `attach` they
    use a loop that runs anyway; then `publish_async` is for its tasks, the other methods are for
    other threads.
    """

    def __init__(self, settings: Settings, generation: str) -> None:
        sender.BACKOFF_OVERRIDE = _CONCURRENT_RETRY_S
        self._settings = settings
        self._generation = generation
        self._topic = settings.prefixed(item_vectors(generation))
        self._timeout_s = settings.kafka_timeout_ms / 1000
        self._loop = asyncio.new_event_loop()
        self._attached: asyncio.AbstractEventLoop | None = None
        self._detached = False
        self._drops: set[asyncio.Task[None]] = set()
        self._producers: dict[int, AIOKafkaProducer] = {}
        self._confirmed_s: dict[int, float] = {}

    @override
    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        self._attached = loop

    @override
    def open(self, partition: int) -> None:
        """Raises KafkaUnavailable, KafkaRefused."""
        self._call(self._open(partition))

    @override
    def publish(self, records: Mapping[int, Sequence[ItemRecord]]) -> dict[int, EddylineError]:
        return self._call(self.publish_async(records))

    @override
    async def detach(self) -> None:
        self._detached = True
        for end in await self._drop_all():
            if isinstance(end, BaseException):
                log.warning("a producer did not close", extra={"reason": repr(end)})

    @override
    def close(self) -> None:
        """Kafka aborts open transactions."""
        if self._loop.is_running() or self._loop.is_closed():
            return  # a call is running in another thread: it ends with its process
        if self._attached is None:
            self._loop.run_until_complete(self._drop_all())
        self._loop.close()

    def _call(self, call: Coroutine[Any, Any, _T]) -> _T:
        if self._attached is None:
            return self._loop.run_until_complete(call)
        try:
            future = asyncio.run_coroutine_threadsafe(call, self._attached)
        except RuntimeError:  # the loop is closed
            call.close()
            raise KafkaUnavailable(_ENDING) from None
        while True:
            try:
                return future.result(_LOOP_CHECK_S)
            except TimeoutError:
                # An ending loop may leave a call unanswered.
                if future.done():
                    raise
                if self._detached:
                    future.cancel()
                    raise KafkaUnavailable(_ENDING) from None
            except futures.CancelledError:
                raise KafkaUnavailable(_ENDING) from None

    async def _open(self, partition: int) -> None:
        if self._detached:
            raise KafkaUnavailable(_ENDING)
        await self._drop(partition)
        began_s = _since_boot_s()
        producer = self._producer(self._name(partition))
        try:
            await asyncio.wait_for(producer.start(), self._timeout_s)
        except (KafkaError, TimeoutError) as error:
            await _end(producer)
            raise await self._translate(error) from error
        except BaseException:
            await _end(producer)
            raise
        if self._detached:
            await _end(producer)
            raise KafkaUnavailable(_ENDING)
        if self._settings.items_fence_s:
            producer._txn_manager.transactional_id = None
        self._producers[partition], self._confirmed_s[partition] = producer, began_s

    def _name(self, partition: int) -> str:
        return self._settings.prefixed(f"eddyline-items-{self._generation}-{partition}")

    def _producer(self, name: str) -> AIOKafkaProducer:
        settings = self._settings
        return AIOKafkaProducer(
            **security.client_options(settings),
            bootstrap_servers=settings.kafka_bootstrap_servers.split(","),
            client_id=settings.prefixed("eddyline-ingest"),
            request_timeout_ms=max(settings.kafka_timeout_ms, 1_000),
            transactional_id=name,
            transaction_timeout_ms=_TRANSACTION_TIMEOUT_MS,
            retry_backoff_ms=_RETRY_MS,
        )

    @override
    async def publish_async(
        self, records: Mapping[int, Sequence[ItemRecord]]
    ) -> dict[int, EddylineError]:
        ends = await asyncio.gather(
            *(self._publish(partition, batch) for partition, batch in records.items()),
            return_exceptions=True,
        )
        failed: dict[int, EddylineError] = {}
        for partition, end in zip(records, ends, strict=True):
            if isinstance(end, EddylineError):
                failed[partition] = end
            elif isinstance(end, BaseException):
                raise end
        return failed

    async def _publish(self, partition: int, records: Sequence[ItemRecord]) -> None:
        if partition not in self._producers:
            await self._open(partition)
        producer, now_s = self._producers[partition], _since_boot_s()
        try:
            async with asyncio.timeout(self._timeout_s):
                if now_s < self._confirmed_s[partition] + self._settings.items_fence_s:
                    await self._send(producer, partition, records)
                else:
                    await self._transaction(producer, partition, records)
                    self._confirmed_s[partition] = now_s
        except _FENCED as error:
            await self._drop(partition)
            raise PartitionLost(
                f"items partition {partition}: {type(error).__name__}: {error}"
            ) from error
        except (KafkaError, TimeoutError) as error:
            # The transaction may or may not be committed. Opening again ends it; repeating is
            # harmless.
            await self._drop(partition)
            raise await self._translate(error) from error
        except asyncio.CancelledError:
            # The producer is in an unknown state: it must not be used again.
            dropping = asyncio.create_task(self._drop(partition))
            self._drops.add(dropping)
            dropping.add_done_callback(self._drops.discard)
            task = asyncio.current_task()
            if task is None or not task.cancelling():  # aiokafka cancelled a task of its own
                raise KafkaUnavailable("aiokafka closed the connection") from None
            raise

    async def _transaction(
        self, producer: AIOKafkaProducer, partition: int, records: Sequence[ItemRecord]
    ) -> None:
        manager = producer._txn_manager
        manager.transactional_id = self._name(partition)
        await producer.begin_transaction()
        await self._send(producer, partition, records)
        await producer.commit_transaction()
        if self._settings.items_fence_s:
            # No record may be sent outside the transaction before its end is in the log. It is
            # there when the next transaction may begin; this one is empty.
            await producer.begin_transaction()
            manager.maybe_add_partition_to_txn(TopicPartition(self._topic, partition))
            await producer.commit_transaction()
            manager.transactional_id = None

    async def _send(
        self, producer: AIOKafkaProducer, partition: int, records: Sequence[ItemRecord]
    ) -> None:
        sent = [
            await producer.send(
                self._topic, encode_record(record), key=record.item_id.encode(), partition=partition
            )
            for record in records
        ]
        await asyncio.gather(*sent)

    async def _drop(self, partition: int) -> None:
        producer = self._producers.pop(partition, None)
        if producer is not None:
            await _end(producer)

    async def _drop_all(self) -> list[BaseException | None]:
        drops = (self._drop(partition) for partition in list(self._producers))
        return await asyncio.gather(*drops, *self._drops, return_exceptions=True)

    async def _translate(self, error: Exception) -> EddylineError:
        found = await asyncio.to_thread(
            translate_error, self._settings, error, f"topic {self._topic}"
        )
        # Of a topic that Eddyline did not make: the item is sound, the topic is not.
        return KafkaRefused(found.detail) if isinstance(found, Rejected) else found


async def _end(producer: AIOKafkaProducer) -> None:
    """Close a producer, whatever its state."""
    ending = producer._txn_manager.wait_for_transaction_end()
    if ending is not None and ending.done() and not ending.cancelled():
        ending.exception()  # raised already; asyncio would log it
    try:
        await asyncio.wait_for(producer.stop(), _CLOSE_S)
    except (KafkaError, TimeoutError) as error:
        log.info("a producer was closed by force", extra={"reason": str(error)})
        with suppress(KafkaError, TimeoutError):
            await asyncio.wait_for(producer.client.close(), _CLOSE_S)


def _since_boot_s() -> float:
    """A clock that continues while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
