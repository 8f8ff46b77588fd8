"""`item-vectors.<generation>` as the replica reads it: aiokafka's consumer, spoken to from one thread.

No consumer group, committed records only. The event loop runs while a call waits and not in between: nothing
here has to go on by itself, and a record is applied on the thread that fetched it. kafka-python does the
same with a thread of its own and parses each record in Python: twice the CPU (docs/LOG.md).
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
from eddyline.kafka import clients, security, topics
from eddyline.settings.loader import Settings

# How long Kafka may take for an answer: connecting, the ends, where to begin.
ANSWER_S = 2.0
# A fetch returns as soon as there is a record; this is how long the broker holds one where there is none.
_FETCH_WAIT_MS = 500
# At most so many records come at once: some ten milliseconds of applying, then Kafka is looked at again.
POLL_RECORDS = 2_000
_T = TypeVar("_T")


class ItemVectorLog:
    """A connection to the topic's partitions. Thread rule: one thread, also for `close`."""

    def __init__(self, settings: Settings, generation: str) -> None:
        """Connects. Raises KafkaRefused, Unavailable where Kafka or the topic is not there, SettingsError."""
        self._settings = settings
        self._topic = settings.prefixed(topics.item_vectors(generation))
        self._partitions = [
            TopicPartition(self._topic, p) for p in range(settings.items_partitions)
        ]
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
        """Go to these offsets, and to the beginning of the other partitions.

        A position that the log no longer has leads to the beginning as well.
        """

        async def sought() -> None:
            consumer = self._consumer
            consumer.assign(self._partitions)
            first = await consumer.beginning_offsets(self._partitions)
            ends = await consumer.end_offsets(self._partitions)
            for at in self._partitions:
                offset = positions.get(at.partition, first[at])
                # Looked at here: until the first fetch is refused, a position is taken for reached.
                consumer.seek(at, offset if first[at] <= offset <= ends[at] else first[at])

        self._answer(sought)

    def poll(self, timeout_ms: int) -> dict[int, Sequence[Any]]:
        """Partition -> its next records, each with `partition`, `offset`, `key` and `value`.

        Returns once there is one; {} after the time, or while Kafka is away, which `ends` tells.
        """
        if self._consumer._fetcher.error_future.done():  # it would be silent for ever
            raise KafkaUnavailable("the fetches ended")
        found = self._run(self._consumer.getmany(timeout_ms=timeout_ms, max_records=POLL_RECORDS))
        return {at.partition: records for at, records in found.items()}

    def positions(self) -> dict[int, int]:
        """Partition -> where the next record is looked for: behind all that was polled and marks after it."""

        async def asked() -> dict[int, int]:
            return {at.partition: await self._consumer.position(at) for at in self._partitions}

        return self._answer(asked)

    def ends(self) -> dict[int, int]:
        """Partition -> the end of what is committed. Raises KafkaUnavailable where no answer comes."""
        found = self._answer(lambda: self._consumer.end_offsets(self._partitions))
        return {at.partition: offset for at, offset in found.items()}

    def close(self) -> None:
        """Let go of the connection; a fetch under way is given up."""
        try:
            with contextlib.suppress(EddylineError, OSError):
                if self._consumer is not None:
                    self._answer(self._consumer.stop)
        finally:
            self._runner.close()

    def _connected(self, **_: Any) -> Any:
        """A consumer that Kafka has answered. kafka-python's options, which `kafka.connected` brings, are not
        aiokafka's.
        """

        async def started() -> Any:
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
            return self._runner.run(started())
        except (KafkaError, TimeoutError) as error:
            raise clients.translate_error(self._settings, error) from None

    def _answer(self, call: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        """What Kafka answers, in time."""

        async def in_time() -> _T:
            async with asyncio.timeout(ANSWER_S):
                return await call()

        return self._run(in_time())

    def _run(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        try:
            return self._runner.run(coroutine)
        except TimeoutError:
            raise KafkaUnavailable(f"no answer in {ANSWER_S:.0f} s") from None
        except asyncio.CancelledError:  # nobody here cancels: one of aiokafka's own tasks ended so
            raise KafkaUnavailable("the connection was given up") from None
        except KafkaError as error:
            if clients.lacks_right(error):
                raise clients.translate_error(self._settings, error) from None
            raise KafkaUnavailable(f"{type(error).__name__}: {error}") from None
