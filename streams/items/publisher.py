"""Item records out: one transactional producer per `items` partition, all partitions at once.

The transactional id belongs to the partition. Whoever opens it anew gets a higher epoch, and Kafka refuses
the producer that had it before. So a process that lost the partition without noticing cannot write an older
record behind a newer one, and compaction never keeps the older.

The epoch does that, not the transaction: what a zombie wrote before its successor's first record lies in
front of it, where it does no harm, and half a chunk that is published is published again. A transaction is
four round trips and 2 ms of the broker's CPU, however few records it has. So records are sent without one,
under the epoch of the partition's id. But Kafka forgets epochs: a partition those of a producer that was
silent for a day, the coordinator an id that was not used for a week. So a producer whose last proof is older
than `items_fence_s` sends its next chunk in a transaction: the coordinator refuses it to whoever is not the
last that opened.

Leans on insides of aiokafka, see `tests/unit/test_publisher.py`.
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

from eddyline.errors import EddylineError, KafkaUnavailable
from eddyline.kafka import security
from eddyline.kafka.clients import translate_error
from eddyline.kafka.topics import item_vectors
from eddyline.schema.item_record import ItemRecord, encode_record
from eddyline.settings.loader import Settings
from streams.ports import PartitionLost

log = logging.getLogger(__name__)
_T = TypeVar("_T")

_FENCED = (ProducerFenced, InvalidProducerEpoch, InvalidTxnState, InvalidProducerIdMapping)
# Kafka aborts a transaction that its process left open after this time; readers wait for it that long.
_TRANSACTION_TIMEOUT_MS = 15_000
# Opening anew waits for the end of the transaction that the one before left, some ms.
_RETRY_MS = 5
# Kafka answers "concurrent transactions" until the last one's markers are written, a few ms. aiokafka's 20 ms
# between tries were the p99 of a commit.
_AGAIN_S = 0.002
# How often a call from another thread looks whether its loop still runs.
_LOOK_S = 0.5
_ENDS = "this process ends"
# A producer that is let go has nothing left that counts.
_CLOSE_S = 1.0


class TransactionalPublisher:
    """A `RecordPublisher` to `item-vectors.<generation>`. Thread rule: one call at a time.

    Partition p of `items` goes to partition p of the topic. The producers live in an event loop that runs
    while a call waits for it, in the caller's thread: handing each step to another thread costs more. Or,
    from `live_in` on, in a loop that runs anyway; then `publishing` is for its tasks, the rest for other
    threads.
    """

    def __init__(self, settings: Settings, generation: str) -> None:
        sender.BACKOFF_OVERRIDE = _AGAIN_S
        self._settings = settings
        self._generation = generation
        self._topic = settings.prefixed(item_vectors(generation))
        self._timeout_s = settings.kafka_timeout_ms / 1000
        self._loop = asyncio.new_event_loop()
        self._host: asyncio.AbstractEventLoop | None = None
        self._left = False
        self._dropping: set[asyncio.Task[None]] = set()
        self._producers: dict[int, AIOKafkaProducer] = {}
        self._proven_s: dict[int, float] = {}

    def live_in(self, loop: asyncio.AbstractEventLoop) -> None:
        """From here on the producers live in this loop. Before anything is opened."""
        self._host = loop

    def open(self, partition: int) -> None:
        """See `RecordPublisher.open`. Raises KafkaUnavailable, KafkaRefused."""
        self._call(self._open(partition))

    def publish(self, records: Mapping[int, Sequence[ItemRecord]]) -> dict[int, EddylineError]:
        """See `RecordPublisher.publish`."""
        return self._call(self.publishing(records))

    async def leave(self) -> None:
        """Let go of all producers, in the loop that they live in; whoever calls from now on is refused."""
        self._left = True
        for end in await self._drop_all():
            if isinstance(end, BaseException):
                log.warning("a producer did not close", extra={"reason": repr(end)})

    def close(self) -> None:
        """Let go of all producers; open transactions are aborted by Kafka."""
        if self._loop.is_running() or self._loop.is_closed():
            return  # a call is under way in another thread: it ends with its process
        if self._host is None:
            self._loop.run_until_complete(self._drop_all())
        self._loop.close()

    def _call(self, call: Coroutine[Any, Any, _T]) -> _T:
        if self._host is None:
            return self._loop.run_until_complete(call)
        try:
            waiting = asyncio.run_coroutine_threadsafe(call, self._host)
        except RuntimeError:  # the loop is closed
            call.close()
            raise KafkaUnavailable(_ENDS) from None
        while True:
            try:
                return waiting.result(_LOOK_S)
            except TimeoutError:
                # A loop that ends may leave a call unanswered.
                if waiting.done():
                    raise
                if self._left:
                    waiting.cancel()
                    raise KafkaUnavailable(_ENDS) from None
            except futures.CancelledError:
                raise KafkaUnavailable(_ENDS) from None

    async def _open(self, partition: int) -> None:
        if self._left:
            raise KafkaUnavailable(_ENDS)
        await self._drop(partition)
        began_s = _since_boot_s()
        producer = self._producer(self._name(partition))
        try:
            await asyncio.wait_for(producer.start(), self._timeout_s)
        except (KafkaError, TimeoutError) as error:
            await _end(producer)
            raise await self._trouble(error) from error
        except BaseException:
            await _end(producer)
            raise
        if self._left:
            await _end(producer)
            raise KafkaUnavailable(_ENDS)
        if self._settings.items_fence_s:
            producer._txn_manager.transactional_id = None
        self._producers[partition], self._proven_s[partition] = producer, began_s

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

    async def publishing(
        self, records: Mapping[int, Sequence[ItemRecord]]
    ) -> dict[int, EddylineError]:
        """`publish`, for tasks of the loop that the producers live in."""
        ends = await asyncio.gather(
            *(self._chunk(partition, some) for partition, some in records.items()),
            return_exceptions=True,
        )
        failed: dict[int, EddylineError] = {}
        for partition, end in zip(records, ends, strict=True):
            if isinstance(end, EddylineError):
                failed[partition] = end
            elif isinstance(end, BaseException):
                raise end
        return failed

    async def _chunk(self, partition: int, records: Sequence[ItemRecord]) -> None:
        if partition not in self._producers:
            await self._open(partition)
        producer, now_s = self._producers[partition], _since_boot_s()
        try:
            async with asyncio.timeout(self._timeout_s):
                if now_s < self._proven_s[partition] + self._settings.items_fence_s:
                    await self._send(producer, partition, records)
                else:
                    await self._transaction(producer, partition, records)
                    self._proven_s[partition] = now_s
        except _FENCED as error:
            await self._drop(partition)
            raise PartitionLost(
                f"items partition {partition}: {type(error).__name__}: {error}"
            ) from error
        except (KafkaError, TimeoutError) as error:
            # The transaction may or may not stand. Opening anew ends it, and repeating it does no harm.
            await self._drop(partition)
            raise await self._trouble(error) from error
        except asyncio.CancelledError:
            # In the midst of something: it must not be used any more.
            dropping = asyncio.create_task(self._drop(partition))
            self._dropping.add(dropping)
            dropping.add_done_callback(self._dropping.discard)
            task = asyncio.current_task()
            if task is None or not task.cancelling():  # one of aiokafka's own tasks ended so
                raise KafkaUnavailable("the connection was given up") from None
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
            # Nothing may be sent outside of it before its end is in the log. That is so when the next one may
            # begin; this one is empty.
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
        return await asyncio.gather(*drops, *self._dropping, return_exceptions=True)

    async def _trouble(self, error: Exception) -> EddylineError:
        return await asyncio.to_thread(
            translate_error, self._settings, error, f"topic {self._topic}"
        )


async def _end(producer: AIOKafkaProducer) -> None:
    """Let go of a producer, whatever state it is in."""
    ending = producer._txn_manager.wait_for_transaction_end()
    if ending is not None and ending.done() and not ending.cancelled():
        ending.exception()  # told already; asyncio would tell it once more
    try:
        await asyncio.wait_for(producer.stop(), _CLOSE_S)
    except (KafkaError, TimeoutError) as error:
        log.info("a producer did not close in good order", extra={"reason": str(error)})
        with suppress(KafkaError, TimeoutError):
            await asyncio.wait_for(producer.client.close(), _CLOSE_S)


def _since_boot_s() -> float:
    """A clock that goes on while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
