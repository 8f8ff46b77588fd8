"""The ingest process, wired together: `python -m streams`.

Exit codes: 0 a wanted stop · 1 an error that a restart may heal · 2 a bad setting · 3 a person has to decide
(Kafka is another log than the state was written for, or refuses us, or the store refuses to be used).
"""

from __future__ import annotations

import os

# Before numpy: the products are too small to be worth a second thread.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import asyncio
import contextlib
import gc
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

from aiokafka.errors import KafkaError
from kafka import KafkaProducer

from eddyline import generations
from eddyline.errors import SettingsError
from eddyline.kafka import topics
from eddyline.process import discovery, heartbeat, lifecycle, logs
from eddyline.process.retry import Retry
from eddyline.settings import loader
from eddyline.settings.loader import Settings
from eddyline.stores import layout
from eddyline.stores.redis import RedisStore
from eddyline.stores.state_store import LogId
from embeddings.bundle import bundle
from embeddings.bundle.bundle import Bundle
from streams import metrics, static_membership, users
from streams.app import IngestApp
from streams.clicks import handler as clicks_handler
from streams.clicks.handler import ClickIngest
from streams.clicks.micro_steps import MicroSteps
from streams.consumer import errors
from streams.dead_letters import KafkaDeadLetters, KafkaForwarder, outlet_producer
from streams.dispatcher import TopicPipeline
from streams.fences import PartitionFences
from streams.items import metadata
from streams.items.handler import ItemIngest
from streams.items.publisher import TransactionalPublisher
from streams.users import UserIngest

log = logging.getLogger(__name__)

# Chunks are made of many small objects without cycles; the usual (700, 10, 10) looks for some all the time.
_GARBAGE = (50_000, 20, 100)
# One script with this many clicks of one partition takes 0.4 ms of Redis, where 256 take 1.6; the partitions
# together fill a chunk all the same, so it costs nothing.
_PART_MAX = 48
# A stop that takes longer than this is no good stop: the fences make a hard one harmless.
_STOP_S_MAX = 10.0
_TALKATIVE = (
    "aiokafka",
    "aiokafka.consumer.fetcher",
    "aiokafka.consumer.group_coordinator",
    "aiokafka.conn",
)


def main() -> int:
    """Run until SIGTERM or SIGINT. Returns the exit code."""
    signal.signal(signal.SIGTERM, _leave)  # until the event loop has its own handler
    try:
        settings = discovery.resolve(loader.load())
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    logs.configure(settings, "ingest")
    for handler in logging.getLogger().handlers:
        handler.addFilter(errors.WithoutTraceback())
    for name in _TALKATIVE:
        logging.getLogger(name).addFilter(_Sparse())
    return lifecycle.run_until_exit(lambda: _run(settings))


def _run(settings: Settings) -> None:
    retry = Retry(settings)
    retry.wait_for("Kafka", lambda: topics.ensure_topics(settings))
    store = RedisStore(settings)
    retry.wait_for("Redis", store.check)
    retry.wait_for("Redis", lambda: store.claim_layout(layout.layout(settings)))
    manifest = retry.wait_for(
        "an active generation", lambda: generations.active_generation(settings)
    )
    topic = topics.item_vectors(manifest.generation)
    retry.wait_for("Kafka", lambda: topics.ensure_topics(settings, [topic]))
    towers = bundle.recorded(settings, manifest)
    producer = retry.wait_for("Kafka", lambda: outlet_producer(settings))
    publisher = TransactionalPublisher(settings, towers.generation)
    folder = Path(settings.data_dir) / "ingest"
    member = static_membership.take(folder)
    # Forgetting a user deletes his embeddings of every generation that was ever recorded.
    known = retry.wait_for("Kafka", lambda: generations.known(settings))
    lanes = _lanes(settings, store, towers, known, producer, publisher)
    try:
        # Before anything is applied: profiles must not run ahead of clicks that the archive has to bring.
        retry.wait_for("Kafka", lambda: _refuse_lost(settings, lanes[0]))
        _tuned()
        asyncio.run(_serve(settings, lanes, member.name, folder, store, publisher))
    finally:
        for lane in lanes:
            lane.executor.shutdown(wait=False, cancel_futures=True)
        publisher.close()
        producer.close(timeout=1)
        store.close()
        member.close()
        heartbeat.end(settings, "ingest")


def _refuse_lost(settings: Settings, of_clicks: TopicPipeline) -> None:
    """Raise LogMismatch where retention removed clicks, of any partition, before they were applied."""
    begins = topics.beginning_offsets(settings, topics.CLICKS)
    # Their ends are looked at later: another ingest may be moving them.
    of_clicks.ingest.positions.open(
        {partition: (begin, 2**62) for partition, begin in begins.items()}
    )


async def _serve(
    settings: Settings,
    lanes: list[TopicPipeline],
    member: str,
    folder: Path,
    store: RedisStore,
    publisher: TransactionalPublisher,
) -> None:
    limit = threading.Timer(_STOP_S_MAX, os._exit, (1,))
    limit.daemon = True
    app = IngestApp(
        settings,
        lanes,
        member,
        folder / "faust",
        stopping=limit.start,
        claim=lambda: store.claim_layout(layout.layout(settings)),
    )
    caches = [lane.ingest.cache for lane in lanes if isinstance(lane.ingest, ClickIngest)]
    unmeasured = metrics.serve(settings, app, caches[0])
    loop = asyncio.get_running_loop()
    publisher.live_in(loop)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, app.end, None)
    log.info(
        "ingest starts",
        extra={
            "member": member,
            "kafka": settings.kafka_bootstrap_servers,
            "loop": type(loop).__module__,
        },
    )
    watching = asyncio.create_task(errors.watch_consumer(settings, lambda: app.thread))
    watching.add_done_callback(lambda task: None if task.cancelled() else app.end(_reason(task)))
    try:
        await app.run()
    except KafkaError as error:
        raise errors.translate_error(settings, error) from error
    finally:
        watching.cancel()
        await publisher.leave()
        await asyncio.to_thread(unmeasured)


def _reason(task: asyncio.Task[None]) -> Exception:
    error = task.exception()
    return error if isinstance(error, Exception) else RuntimeError(repr(error))


def _lanes(
    settings: Settings,
    store: RedisStore,
    towers: Bundle,
    known: list[str],
    producer: KafkaProducer,
    publisher: TransactionalPublisher,
) -> list[TopicPipeline]:
    """Clicks and users write the same slots, so they share a thread; a slow transaction delays no click."""
    user_executor = ThreadPoolExecutor(1, "user_executor")
    item_executor = ThreadPoolExecutor(1, "items")

    def letters() -> KafkaDeadLetters:
        return KafkaDeadLetters(settings, producer)

    def log_id(name: str) -> Callable[[], LogId]:
        return lambda: topics.log_ids(settings, [name])[name]

    def topic(name: str) -> str:
        return settings.prefixed(name)

    of_clicks = PartitionFences(
        store,
        topic(topics.CLICKS),
        lambda p: clicks_handler.sources(settings, p),
        log_id(topics.CLICKS),
    )
    of_users = PartitionFences(
        store, topic(topics.USERS), lambda p: users.sources(settings, p), log_id(topics.USERS)
    )
    of_items = PartitionFences(
        store,
        topic(topics.ITEMS),
        lambda p: metadata.sources(settings, towers.generation, p),
        log_id(topics.ITEMS),
    )
    forwarder = KafkaForwarder(settings, producer)
    micro = MicroSteps(towers)
    by_clicks = ClickIngest(settings, store, of_clicks, letters(), forwarder, micro)
    by_users = UserIngest(
        settings,
        store,
        of_users,
        letters(),
        known,
        by_clicks.profiles_written,
        KafkaForwarder(settings, producer),
    )
    by_items = ItemIngest(
        settings, store, of_items, letters(), publisher, towers, _clock_us, metadata.METADATA_WAIT_S
    )

    def opened(partition: int) -> None:
        by_items.opened(partition)
        publisher.open(partition)

    return [
        TopicPipeline(
            topic(topics.CLICKS),
            by_clicks,
            user_executor,
            before_open=by_clicks.opened,
            deferred=by_clicks.counts,
            quick=True,
            many=by_clicks.ingest_many,
            part_max=_PART_MAX,
        ),
        TopicPipeline(topic(topics.USERS), by_users, user_executor, quick=True),
        TopicPipeline(
            topic(topics.ITEMS),
            by_items,
            item_executor,
            before_open=opened,
            deferred=by_items.cards,
            quick=True,
            many=by_items.ingest_many,
            in_loop=lambda parts: by_items.ingest_in_loop(parts, publisher.publishing),
        ),
    ]


def _tuned() -> None:
    """uvloop for both event loops; and what stands here for good is no longer looked through for garbage."""
    with contextlib.suppress(ImportError):  # not on Windows
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GARBAGE)


class _Sparse(logging.Filter):
    """Lets one line of each kind through in ten seconds: aiokafka tells of every try while Kafka is away."""

    def __init__(self) -> None:
        super().__init__()
        self._next: dict[object, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        if now < self._next.get(record.msg, 0.0):
            return False
        self._next[record.msg] = now + 10
        return True


def _clock_us() -> int:
    return time.time_ns() // 1_000


def _leave(_number: int, _frame: object) -> NoReturn:
    raise SystemExit(0)


if __name__ == "__main__":
    sys.exit(main())
