"""Publishing item records: transactions, errors, and the private members of aiokafka in use."""

from __future__ import annotations

import asyncio
import inspect
import threading
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from aiokafka.errors import KafkaTimeoutError, ProducerFenced
from aiokafka.producer import sender
from aiokafka.producer.producer import AIOKafkaProducer
from aiokafka.producer.transaction_manager import TransactionManager

from eddyline.errors import EddylineError, KafkaUnavailable
from eddyline.schema.item_record import ItemRecord
from eddyline.settings.loader import Settings
from streams.items import publisher
from streams.items.publisher import TransactionalPublisher
from streams.ports import PartitionLost

RECORD = ItemRecord("i", 0, 1, 0, 0, None)
SETTINGS = Settings(kafka_bootstrap_servers="127.0.0.1:1", kafka_timeout_ms=1_000)


class FakeProducer:
    """Notes its calls. error: the result of every record's delivery"""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.calls = error, list[Any]()
        self._txn_manager = SimpleNamespace(
            transactional_id=None,
            wait_for_transaction_end=lambda: None,
            maybe_add_partition_to_txn=lambda at: self.calls.append(("add", at.partition)),
        )
        self.client = self

    async def send(self, topic: str, value: Any, key: bytes, partition: int) -> Any:
        self.calls.append(("send", topic, partition))
        delivery = asyncio.get_running_loop().create_future()
        if self.error:
            delivery.set_exception(self.error)
        else:
            delivery.set_result(None)
        return delivery

    async def begin_transaction(self) -> None:
        assert self._txn_manager.transactional_id
        self.calls.append("begin")

    async def commit_transaction(self) -> None:
        self.calls.append("commit")

    async def stop(self) -> None:
        self.calls.append("stop")


def made(settings: Settings, *producers: FakeProducer) -> TransactionalPublisher:
    result = TransactionalPublisher(settings, "g")
    for partition, producer in enumerate(producers):
        result._producers[partition] = producer
        result._confirmed_s[partition] = publisher._since_boot_s()
    return result


def test_records_are_sent_under_the_epoch_and_now_and_then_in_a_transaction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = 1_000.0
    monkeypatch.setattr(publisher, "_since_boot_s", lambda: now_s)
    producer = FakeProducer()
    out = made(msgspec.structs.replace(SETTINGS, items_fence_s=60), producer)
    sent = ("send", "item-vectors.g", 0)
    assert out.publish({0: [RECORD, RECORD]}) == {} and producer.calls == [sent, sent]
    now_s += 59.9
    producer.calls.clear()
    assert out.publish({0: [RECORD]}) == {} and producer.calls == [sent]
    now_s += 0.1
    producer.calls.clear()
    assert out.publish({0: [RECORD]}) == {}
    assert producer.calls == ["begin", sent, "commit", "begin", ("add", 0), "commit"]
    assert producer._txn_manager.transactional_id is None
    producer.calls.clear()
    assert out.publish({0: [RECORD]}) == {} and producer.calls == [sent]
    out.close()
    assert producer.calls[-1] == "stop"


def test_each_batch_may_have_a_transaction_of_its_own() -> None:
    producer = FakeProducer()
    out = made(msgspec.structs.replace(SETTINGS, items_fence_s=0), producer)
    for _ in range(2):
        assert out.publish({0: [RECORD]}) == {}
    assert producer.calls == ["begin", ("send", "item-vectors.g", 0), "commit"] * 2
    assert producer._txn_manager.transactional_id == "eddyline-items-g-0"
    out.close()


@pytest.mark.parametrize(
    ("error", "meant"),
    [(ProducerFenced("f"), PartitionLost), (KafkaTimeoutError("t"), KafkaUnavailable)],
)
def test_a_failure_is_its_partitions_own_and_drops_its_producer(
    error: Exception, meant: type[EddylineError]
) -> None:
    bad, good = FakeProducer(error), FakeProducer()
    out = made(SETTINGS, bad, good)
    failed = out.publish({0: [RECORD], 1: [RECORD]})
    assert {partition: type(why) for partition, why in failed.items()} == {0: meant}
    assert bad.calls[-1] == "stop" and list(out._producers) == [1]
    out.close()


def test_in_a_loop_that_runs_anyway_tasks_and_other_threads_publish_by_the_same_producers() -> None:
    async def run() -> None:
        producer = FakeProducer()
        out = made(SETTINGS, producer)
        out.attach(asyncio.get_running_loop())
        async with asyncio.timeout(5):
            assert await out.publish_async({0: [RECORD]}) == {}
            assert await asyncio.to_thread(out.publish, {0: [RECORD, RECORD]}) == {}
            assert producer.calls == [("send", "item-vectors.g", 0)] * 3
            with pytest.raises(KafkaUnavailable):
                await asyncio.to_thread(out.open, 1)
            await out.detach()
        assert producer.calls[-1] == "stop" and not out._producers
        out.close()

    asyncio.run(run())


class Hangs(FakeProducer):
    """Delivers nothing."""

    async def send(self, topic: str, value: Any, key: bytes, partition: int) -> Any:
        self.calls.append("sending")
        return asyncio.get_running_loop().create_future()


async def sending(producer: FakeProducer) -> None:
    async with asyncio.timeout(5):
        while "sending" not in producer.calls:
            await asyncio.sleep(0.001)


def test_a_producer_that_was_cancelled_in_the_midst_of_something_is_let_go() -> None:
    async def run() -> None:
        producer = Hangs()
        out = made(SETTINGS, producer)
        out.attach(asyncio.get_running_loop())
        publishing = asyncio.create_task(out.publish_async({0: [RECORD]}))
        await sending(producer)
        publishing.cancel()
        await asyncio.gather(publishing, return_exceptions=True)
        assert publishing.cancelled()
        await out.detach()
        assert producer.calls[-1] == "stop" and not out._producers
        out.close()

    asyncio.run(run())


def test_a_connection_that_was_given_up_inside_is_kafka_that_is_away() -> None:
    class GivenUp(FakeProducer):
        async def send(self, topic: str, value: Any, key: bytes, partition: int) -> Any:
            delivery = asyncio.get_running_loop().create_future()
            delivery.cancel()
            return delivery

    out = made(SETTINGS, GivenUp())
    failed = out.publish({0: [RECORD]})
    assert isinstance(failed[0], KafkaUnavailable) and not out._producers
    out.close()


def test_no_thread_waits_for_a_loop_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher, "_LOOP_CHECK_S", 0.05)
    producer = Hangs()
    out = made(msgspec.structs.replace(SETTINGS, kafka_timeout_ms=60_000), producer)
    ends: list[BaseException] = []

    def publish() -> None:
        try:
            out.publish({0: [RECORD]})
        except BaseException as error:
            ends.append(error)

    loop = asyncio.new_event_loop()
    out.attach(loop)
    threads = [threading.Thread(target=publish, daemon=True) for _ in range(3)]
    threads[0].start()
    loop.run_until_complete(sending(producer))
    # Its call is left unanswered, as what comes in while a loop ends.
    out._detached = True
    threads[0].join(5)
    threads[1].start()
    threads[1].join(5)
    while left := asyncio.all_tasks(loop):
        loop.run_until_complete(asyncio.wait(left, timeout=5))
    loop.close()
    threads[2].start()
    threads[2].join(5)
    assert not any(thread.is_alive() for thread in threads)
    assert [type(error) for error in ends] == [KafkaUnavailable] * 3
    out.close()


def test_what_it_needs_of_aiokafka_is_there() -> None:
    """Before a new version: read `Sender`, `TransactionManager` and `MessageAccumulator`."""
    assert version("aiokafka") == "0.14.0"
    TransactionalPublisher(SETTINGS, "g").close()
    assert sender.BACKOFF_OVERRIDE == publisher._CONCURRENT_RETRY_S
    assert "return BACKOFF_OVERRIDE" in inspect.getsource(sender.AddPartitionsToTxnHandler)
    assert "self._txn_manager = TransactionManager(" in inspect.getsource(AIOKafkaProducer.__init__)
    assert "if self.transactional_id is None:\n            return" in inspect.getsource(
        TransactionManager.maybe_add_partition_to_txn
    )
