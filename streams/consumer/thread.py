"""The consumer's thread of the chunk lane: it owns aiokafka's consumer, fetches, seeks and commits.

Part of `lane.py`, whose first lines say how a chunk stays true. The consumer has an event loop of its own, so
heartbeats go on whatever the loop of the app does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from aiokafka.coordinator.assignors.range import RangePartitionAssignor
from aiokafka.errors import KafkaError, NoOffsetForPartitionError, OffsetOutOfRangeError
from aiokafka.structs import OffsetAndMetadata
from faust.transport.consumer import ensure_TPset
from faust.transport.drivers import aiokafka as driver
from faust.types import TP
from mode import get_logger

from streams.consumer.fetch_control import FetchGate

if TYPE_CHECKING:
    from streams.consumer.consumer import BatchConsumer

_logger = get_logger("faust.lane")
# How long one fetch waits for the first record. A seek waits for the fetch under way, so it is short.
_FETCH_WAIT_MS = 250


class ConsumerThread(driver.AIOKafkaConsumerThread):
    """The thread that owns the aiokafka consumer. Seeks and epochs change in its loop only."""

    logger = _logger
    consumer: BatchConsumer
    _gate: FetchGate | None = None

    def _create_worker_consumer(self, transport: Any) -> Any:
        consumer = super()._create_worker_consumer(transport)
        # Range gives partition p of clicks and of users to one process: one writer of the slot `u{p}`.
        consumer._partition_assignment_strategy = (RangePartitionAssignor,)
        consumer._fetch_max_wait_ms = _FETCH_WAIT_MS
        # A producer's aborted transaction is nothing that happened (a dead letter's replay that was killed).
        consumer._isolation_level = "read_committed"
        # Retention that overtakes us, or a log that lost its end: the fences say what that means.
        consumer._auto_offset_reset = "none"
        return consumer

    async def _fetch_records(
        self,
        consumer: Any,
        active_partitions: Any,
        timeout: float | None = None,
        max_records: int | None = None,
    ) -> Any:
        epochs = self.consumer.epochs
        gate = self._gate
        if gate is None or gate.fetcher is not consumer._fetcher:
            gate = self._gate = FetchGate(consumer._fetcher)
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
        if records and sum(map(len, records.values())) <= self.consumer.app.small_max:
            gate.hold()
        return {at: (epochs[at], taken) for at, taken in records.items()}

    async def getmany(self, active_partitions: Any, timeout: float) -> Any:
        """Fetch, straight in the thread's loop: Faust's queue of calls costs more than the fetch itself."""
        answer = self.parent_loop.create_future()
        consumer = self._ensure_consumer()

        def begin() -> None:
            fetch = self._fetch_records(
                consumer, active_partitions, timeout, consumer._max_poll_records
            )
            self.thread_loop.create_task(fetch).add_done_callback(
                lambda task: self.parent_loop.call_soon_threadsafe(self._answer, answer, task)
            )

        self.thread_loop.call_soon_threadsafe(begin)
        return await answer

    def _answer(self, answer: asyncio.Future[Any], task: asyncio.Task[Any]) -> None:
        """In the app's loop: hand over what was fetched, or have it read again where nobody waits."""
        if task.cancelled():
            answer.cancel()
        elif (error := task.exception()) is not None:
            if not answer.done():
                answer.set_exception(error)
        elif not answer.done():
            answer.set_result(task.result())
        else:
            self.consumer.unread({TP(*at): epoch for at, (epoch, _) in task.result().items()})

    def owns(self, at: TP) -> bool:
        """Whether the partition is assigned to this process; any thread."""
        return at in self._ensure_consumer().assignment()  # a named tuple equals aiokafka's

    def highwater_seen(self, at: TP) -> int | None:
        """The partition's end as the last fetch saw it; any thread. None where it is not ours or unknown."""
        state = self._ensure_consumer()._subscription.subscription
        assignment = None if state is None else state.assignment
        if assignment is None or at not in assignment.tps:
            return None
        found: int | None = assignment.state_value(driver.ensure_aiokafka_TP(at)).highwater
        return found

    def fetching_ended(self) -> bool:
        """Whether aiokafka fetches no more: an error of its own ends that without a word; any thread."""
        fetcher = None if self._consumer is None else self._consumer._fetcher
        return fetcher is not None and fetcher._fetch_task.done()

    async def seek_lane(self, offsets: Mapping[TP, int]) -> None:
        """Read on at these offsets; partitions that were lost meanwhile are left out."""
        await self.call_thread(self._seek_lane, offsets)

    async def _seek_lane(self, offsets: Mapping[TP, int]) -> None:
        consumer = self._ensure_consumer()
        mine = ensure_TPset(consumer.assignment())
        for at, offset in offsets.items():
            if at in mine:
                consumer.seek(driver.ensure_aiokafka_TP(at), offset)
                self.consumer.sought(at)

    async def read_committed(self, partitions: Collection[TP]) -> dict[TP, int]:
        """What the group has committed of these partitions; those without an offset are left out."""
        found: dict[TP, int] = await self.call_thread(self._read_committed, partitions)
        return found

    async def _read_committed(self, partitions: Collection[TP]) -> dict[TP, int]:
        asked = [driver.ensure_aiokafka_TP(at) for at in partitions]
        found = await self._ensure_consumer()._coordinator.fetch_committed_offsets(asked)
        return {TP(*at): told.offset for at, told in found.items() if told.offset >= 0}

    async def _commit(self, offsets: Mapping[TP, int]) -> bool:
        """Commit for whoever watches the lag; a failure is no reason to stop.

        Never back: what is read anew, for Redis was emptied, has been sent on before.
        """
        mine, before = self.assignment(), self.consumer.committed
        news = {
            at: offset
            for at, offset in offsets.items()
            if at in mine and offset > before.get(at, -1)
        }
        wanted = {
            driver.ensure_aiokafka_TP(at): OffsetAndMetadata(offset, "")
            for at, offset in news.items()
        }
        if not wanted:
            return True
        try:
            await asyncio.wait_for(
                self._ensure_consumer().commit(wanted), self.app.conf.broker_request_timeout
            )
        except (KafkaError, TimeoutError) as error:
            self.log.info("offsets not committed, the fences stand: %r", error)
            return False
        before.update(news)
        return True

    async def on_thread_stop(self) -> None:
        """Leave the group, so that others take over at once; a static member would not by itself."""
        if self._consumer is not None and self._consumer._coordinator is not None:
            self._consumer._coordinator._group_instance_id = None
        await super().on_thread_stop()
