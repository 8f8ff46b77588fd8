"""`item-vectors.<generation>` as the replica reads it: aiokafka's consumer, used from one thread.

No consumer group; committed records only. The event loop runs only while a call waits: nothing
here works in the background, and a record is applied on the thread that fetched it. kafka-python
does the same with its own thread and parses each record in Python, for twice the CPU (docs/LOG.md).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from aiokafka import AIOKafkaConsumer
from aiokafka.errors import KafkaError
from aiokafka.structs import TopicPartition

from eddyline.errors import EddylineError, KafkaUnavailable, Unavailable
from eddyline.kafka import aiokafka_decoding, aiokafka_internals, clients, reading, security, topics
from eddyline.kafka.skips import Stops
from eddyline.kafka.unreadable import UnreadableBatch
from eddyline.settings.loader import Settings

# Time limit of an answer of Kafka: connecting, the ends, the positions.
ANSWER_S = 2.0
# The broker holds a fetch this long if there is no record.
_FETCH_WAIT_MS = 500
# Most records of one poll: applying them takes about ten milliseconds.
POLL_RECORDS = 2_000
_T = TypeVar("_T")
aiokafka_decoding.install()


class ItemVectorLog:
    """A connection to the topic's partitions. Thread rule: one thread, also for `close`."""

    def __init__(self, settings: Settings, generation: str) -> None:
        """Connect. Raises KafkaRefused, SettingsError; Unavailable without Kafka or the topic."""
        self._settings = settings
        self._topic = settings.prefixed(topics.item_vectors(generation))
        self._partitions = [
            TopicPartition(self._topic, p) for p in range(settings.items_partitions)
        ]
        self._stops = Stops(reading.skips(settings))
        self._runner = asyncio.Runner()
        self._consumer: Any = None
        try:
            self._consumer = clients.connect(settings, self._connected)
            if self._topic not in self._answer(self._consumer.topics):
                topics.check_seen(settings, topics.item_vectors(generation))
                raise Unavailable(f"there is no topic {self._topic}")
        except BaseException:
            self.close()
            raise

    def begin(self, positions: Mapping[int, int]) -> None:
        """Seek to these offsets, and to the beginning of the other partitions.

        A position that the log no longer has is replaced by the beginning.
        """

        async def seek() -> None:
            consumer = self._consumer
            consumer.assign(self._partitions)
            first = await consumer.beginning_offsets(self._partitions)
            ends = await consumer.end_offsets(self._partitions)
            for at in self._partitions:
                offset = positions.get(at.partition, first[at])
                # Checked here: the consumer takes a position as valid until its first fetch fails.
                consumer.seek(at, offset if first[at] <= offset <= ends[at] else first[at])

        self._answer(seek)

    def poll(self, timeout_ms: int) -> dict[int, Sequence[Any]]:
        """Partition -> its next records, each with `partition`, `offset`, `key` and `value`.

        Returns once there is a record; {} after the time-out or while Kafka is away (see `ends`).
        """
        if aiokafka_internals.fetching_ended(self._consumer):
            raise KafkaUnavailable("the fetches ended")
        self._stops.resume_skipped(self._consumer, lambda: reading.skips(self._settings))
        found = self._run(self._consumer.getmany(timeout_ms=timeout_ms, max_records=POLL_RECORDS))
        kept = {
            at.partition: self._stops.readable(self._consumer, at, records)
            for at, records in found.items()
        }
        return {partition: records for partition, records in kept.items() if records}

    def stopped(self) -> dict[int, UnreadableBatch]:
        """Partitions that stand in front of a batch that cannot be read; the others go on."""
        return {at[1]: batch for at, batch in self._stops.stopped.items()}

    def positions(self) -> dict[int, int]:
        """Partition -> offset of the next fetch: behind polled records and transaction markers."""

        async def read() -> dict[int, int]:
            return {at.partition: await self._consumer.position(at) for at in self._partitions}

        return self._answer(read)

    def ends(self) -> dict[int, int]:
        """Partition -> end of the committed records. Raises KafkaUnavailable without an answer."""
        found = self._answer(lambda: self._consumer.end_offsets(self._partitions))
        return {at.partition: offset for at, offset in found.items()}

    def close(self) -> None:
        """Close the connection; a running fetch is dropped."""
        try:
            with contextlib.suppress(EddylineError, OSError):
                if self._consumer is not None:
                    self._answer(self._consumer.stop)
        finally:
            self._runner.close()

    def _connected(self, **_: Any) -> Any:
        """A started consumer. Ignores kafka-python's options, which aiokafka does not know."""

        async def start() -> Any:
            consumer = AIOKafkaConsumer(
                **security.client_options(self._settings),
                bootstrap_servers=self._settings.kafka_bootstrap_servers.split(","),
                request_timeout_ms=max(self._settings.kafka_timeout_ms, 1_000),
                group_id=None,
                enable_auto_commit=False,
                isolation_level="read_committed",
                auto_offset_reset="earliest",
                fetch_max_wait_ms=_FETCH_WAIT_MS,
            )
            try:
                async with asyncio.timeout(ANSWER_S):
                    await consumer.start()
            except BaseException:
                await consumer.stop()
                raise
            return consumer

        try:
            return self._runner.run(start())
        except (KafkaError, TimeoutError) as error:
            raise clients.translate_error(self._settings, error) from None

    def _answer(self, call: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        """Kafka's answer, within `ANSWER_S`."""

        async def in_time() -> _T:
            async with asyncio.timeout(ANSWER_S):
                return await call()

        return self._run(in_time())

    def _run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        try:
            return self._runner.run(coroutine)
        except TimeoutError:
            raise KafkaUnavailable(f"no answer in {ANSWER_S:.0f} s") from None
        except (
            asyncio.CancelledError
        ):  # by one of aiokafka's own tasks; this module cancels nothing
            raise KafkaUnavailable("the connection was given up") from None
        except KafkaError as error:
            if clients.lacks_right(error):
                raise clients.translate_error(self._settings, error) from None
            raise KafkaUnavailable(f"{type(error).__name__}: {error}") from None
