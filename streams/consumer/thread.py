"""The consumer's thread: it owns aiokafka's consumer, fetches, seeks and commits.

aiokafka's private members are used through `eddyline/kafka/aiokafka_internals.py` alone (ADR 18).
The thread has an event loop of its own, so heartbeats continue whatever the app's loop does.
`streams/consumer/consumer.py` explains epochs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from aiokafka import AIOKafkaConsumer
from aiokafka.coordinator.assignors.range import RangePartitionAssignor
from aiokafka.errors import KafkaError, NoOffsetForPartitionError, OffsetOutOfRangeError
from aiokafka.structs import OffsetAndMetadata
from faust.transport.consumer import ensure_TPset
from faust.transport.drivers import aiokafka as driver
from faust.types import TP
from mode import get_logger
from typing_extensions import override

from eddyline.kafka import aiokafka_internals
from eddyline.kafka.aiokafka_internals import FetchGate

_logger = get_logger("faust.batches")
# How long one fetch waits for the first record. A seek waits for the running fetch, so it is short.
_FETCH_WAIT_MS = 250


@dataclass(frozen=True, slots=True)
class EmptyTail:
    """Offsets without a record: transaction markers, or what compaction or an abort removed.

    epoch:    the partition's seek count
    taken:    offset of the last record that was taken since that seek; before the first one, the
              sought offset minus one
    position: the next offset to fetch; no record lies between `taken` and it
    """

    epoch: int
    taken: int
    position: int


class ThreadOwner(Protocol):
    """What the thread uses of its consumer, `streams.consumer.consumer.BatchConsumer`.

    epochs:    by partition, the number of seeks; changes in the thread's loop only
    committed: by partition, the highest offset that the group has committed
    taken:     by partition, see `EmptyTail`; changes in the thread's loop only
    small_max: after a fetch of more records aiokafka reads ahead
    """

    epochs: dict[TP, int]
    taken: dict[TP, int]
    committed: dict[TP, int]
    small_max: int

    def sought(self, at: TP) -> None:
        """The thread has just sought this partition."""

    def unread(self, taken: Mapping[TP, int]) -> None:
        """Records of these partitions and epochs were fetched and lost; in the app's loop."""


class ConsumerThread(driver.AIOKafkaConsumerThread):
    """The thread that owns the aiokafka consumer. Seeks and epochs change in its loop only."""

    logger = _logger
    consumer: ThreadOwner  # type: ignore[assignment]  # a port, not the consumer: no circle
    _gate: FetchGate | None = None

    @override
    def _create_worker_consumer(self, transport: Any) -> AIOKafkaConsumer:
        conf = self.app.conf
        return AIOKafkaConsumer(
            client_id=conf.broker_client_id,
            group_id=conf.id,
            group_instance_id=conf.consumer_group_instance_id,
            bootstrap_servers=driver.server_list(transport.url, transport.default_port),
            # Range gives partition p of clicks and of users to one process: one writer of the slot
            # `u{p}`.
            partition_assignment_strategy=[RangePartitionAssignor],
            enable_auto_commit=False,
            # Retention that overtakes us, or a log that lost its end: the fences decide what that
            # means.
            auto_offset_reset="none",
            # Records of an aborted transaction do not exist (a dead letter's replay that was
            # killed).
            isolation_level="read_committed",
            fetch_max_wait_ms=_FETCH_WAIT_MS,
            max_poll_records=conf.broker_max_poll_records,
            max_poll_interval_ms=int((conf.broker_max_poll_interval or 0) * 1000),
            max_partition_fetch_bytes=conf.consumer_max_fetch_size,
            check_crcs=conf.broker_check_crcs,
            request_timeout_ms=int(conf.broker_request_timeout * 1000),
            session_timeout_ms=int(conf.broker_session_timeout * 1000),
            rebalance_timeout_ms=int(conf.broker_rebalance_timeout * 1000),
            heartbeat_interval_ms=int(conf.broker_heartbeat_interval * 1000),
            metadata_max_age_ms=conf.consumer_metadata_max_age_ms,
            connections_max_idle_ms=conf.consumer_connections_max_idle_ms,
            **driver.credentials_to_aiokafka_auth(conf.broker_credentials, conf.ssl_context),
        )

    @override
    async def _fetch_records(
        self,
        consumer: Any,
        active_partitions: Any,
        timeout: float | None = None,
        max_records: int | None = None,
    ) -> Any:
        epochs = self.consumer.epochs
        gate = self._gate
        if gate is None or not gate.holds(consumer):
            gate = self._gate = FetchGate(consumer)
        gate.open()
        try:
            records = await super()._fetch_records(
                consumer, active_partitions, timeout, max_records
            )
        except (OffsetOutOfRangeError, NoOffsetForPartitionError) as error:
            named = error.args[0]
            lost = {
                TP(*at): epochs[TP(*at)] for at in (named if isinstance(named, dict) else [named])
            }
            self.parent_loop.call_soon_threadsafe(self.consumer.unread, lost)
            return {}
        for at, fetched in records.items():
            self.consumer.taken[TP(*at)] = fetched[-1].offset
        if records and sum(map(len, records.values())) <= self.consumer.small_max:
            gate.hold()
        return {at: (epochs[at], taken) for at, taken in records.items()}

    @override
    async def getmany(self, active_partitions: Any, timeout: float) -> Any:
        """Fetch in the thread's loop directly: Faust's queue of calls costs more than the fetch."""
        answer = self.parent_loop.create_future()
        consumer = self._ensure_consumer()

        def begin() -> None:
            fetch = self._fetch_records(
                consumer, active_partitions, timeout, self.app.conf.broker_max_poll_records
            )
            self.thread_loop.create_task(fetch).add_done_callback(
                lambda task: self.parent_loop.call_soon_threadsafe(self._answer, answer, task)
            )

        self.thread_loop.call_soon_threadsafe(begin)
        return await answer

    def _answer(self, answer: asyncio.Future[Any], task: asyncio.Task[Any]) -> None:
        """Return what was fetched; read it again where the caller is gone. In the app's loop."""
        if task.cancelled():
            answer.cancel()
        elif (error := task.exception()) is not None:
            if not answer.done():
                answer.set_exception(error)
        elif not answer.done():
            answer.set_result(task.result())
        else:
            self.consumer.unread({TP(*at): epoch for at, (epoch, _) in task.result().items()})

    def has_consumer(self) -> bool:
        """Whether the thread has made its consumer. Any thread."""
        return self._consumer is not None

    def owns(self, at: TP) -> bool:
        """Whether the partition is assigned to this process. Any thread."""
        return at in self._ensure_consumer().assignment()  # a named tuple equals aiokafka's

    def highwater_seen(self, at: TP) -> int | None:
        """The partition's end at the last fetch; None where it is not assigned or unknown.

        Any thread.
        """
        try:
            found: int | None = self._ensure_consumer().highwater(driver.ensure_aiokafka_TP(at))
        except (AssertionError, AttributeError):  # not assigned, or no longer by now
            return None
        return found

    def fetching_ended(self) -> bool:
        """Whether aiokafka has stopped to fetch: an error of its own ends that silently.

        Any thread.
        """
        return self._consumer is not None and aiokafka_internals.fetching_ended(self._consumer)

    async def check_group(self) -> None:
        """Raise the KafkaError that ended the work in the consumer group, if any."""
        if self._consumer is not None:
            await self.call_thread(self._check_group)

    async def _check_group(self) -> None:
        aiokafka_internals.check_group(self._consumer)

    async def seek_to(self, offsets: Mapping[TP, int]) -> None:
        """Read on at these offsets; partitions that were lost meanwhile are skipped."""
        await self.call_thread(self._seek_to, offsets)

    async def _seek_to(self, offsets: Mapping[TP, int]) -> None:
        consumer = self._ensure_consumer()
        mine = ensure_TPset(consumer.assignment())
        for at, offset in offsets.items():
            if at in mine:
                consumer.seek(driver.ensure_aiokafka_TP(at), offset)
                self.consumer.taken[at] = offset - 1
                self.consumer.sought(at)

    async def read_empty_tails(self) -> dict[TP, EmptyTail]:
        """The partitions whose position is more than one offset after the last record taken."""
        found: dict[TP, EmptyTail] = await self.call_thread(self._read_empty_tails)
        return found

    async def _read_empty_tails(self) -> dict[TP, EmptyTail]:
        tails: dict[TP, EmptyTail] = {}
        for named, position in aiokafka_internals.positions(self._ensure_consumer()).items():
            at = TP(*named)
            taken = self.consumer.taken.get(at)
            if taken is not None and position > taken + 1:
                tails[at] = EmptyTail(self.consumer.epochs[at], taken, position)
        return tails

    async def read_committed(self, partitions: Collection[TP]) -> dict[TP, int]:
        """The offsets that the group has committed; partitions without one are absent."""
        found: dict[TP, int] = await self.call_thread(self._read_committed, partitions)
        return found

    async def _read_committed(self, partitions: Collection[TP]) -> dict[TP, int]:
        places = [driver.ensure_aiokafka_TP(at) for at in partitions]
        found = await aiokafka_internals.committed(self._ensure_consumer(), places)
        return {TP(*at): offset for at, offset in found.items()}

    @override
    async def _commit(self, offsets: Mapping[TP, int]) -> bool:
        """Commit, for those who observe the lag; a failure does not stop the process.

        An offset never goes back: records that are read again, as Redis was emptied, were forwarded
        before.
        """
        mine, before = self.assignment(), self.consumer.committed
        higher = {
            at: offset
            for at, offset in offsets.items()
            if at in mine and offset > before.get(at, -1)
        }
        if not higher:
            return True
        commits = {
            driver.ensure_aiokafka_TP(at): OffsetAndMetadata(offset, "")
            for at, offset in higher.items()
        }
        try:
            await asyncio.wait_for(
                self._ensure_consumer().commit(commits), self.app.conf.broker_request_timeout
            )
        except (KafkaError, TimeoutError) as error:
            self.log.info("offsets not committed, the fences stand: %r", error)
            return False
        before.update(higher)
        return True

    @override
    async def on_thread_stop(self) -> None:
        """Leave the group, so that others take over at once; a static member would not."""
        if self._consumer is not None:
            aiokafka_internals.leave_at_stop(self._consumer)
        await super().on_thread_stop()
