"""The ingest process, wired together: `python -m streams`.

Exit codes: 0 a wanted stop · 1 an error that a restart may heal · 2 a bad setting · 3 a person has to decide
(Kafka is another log than the state was written for, or refuses us, or the store refuses to be used).
"""

from __future__ import annotations

import os

# Before numpy: the tiles are too small to be worth a second thread, and determinism wants one.
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

from eddyline import alive, generations, kafka, logs, start
from eddyline import settings as settings_
from eddyline.errors import SettingsError
from eddyline.local import endpoints
from eddyline.ports import LogId
from eddyline.settings import Settings
from eddyline.start import Patience
from eddyline.stores.redis import RedisStore
from embeddings import bundle
from embeddings.bundle import Bundle
from streams import clicks, item_cards, membership, metrics, refusals, users
from streams.app import IngestApp
from streams.applying import Lane
from streams.clicks import ClickIngest
from streams.dead_letters import KafkaDeadLetters, KafkaForwarder, outlet_producer
from streams.items import ItemIngest
from streams.micro_steps import MicroSteps
from streams.positions import Positions
from streams.publisher import TransactionalPublisher
from streams.users import UserIngest

log = logging.getLogger(__name__)

# Chunks are made of many small objects without cycles; the usual (700, 10, 10) looks for some all the time.
_GARBAGE = (50_000, 20, 100)
# One script with this many clicks of one partition takes 0.4 ms of Redis, where 256 take 1.6; the partitions
# together fill a chunk all the same, so it costs nothing.
_PART_MAX = 48
# A stop that takes longer than this is no good stop: the fences make a hard one harmless.
_STOP_S_MAX = 10.0
_TALKATIVE = ("aiokafka", "aiokafka.consumer.fetcher", "aiokafka.consumer.group_coordinator", "aiokafka.conn")


def main() -> int:
    """Run until SIGTERM or SIGINT. Returns the exit code."""
    signal.signal(signal.SIGTERM, _leave)  # until the event loop has its own handler
    try:
        settings = endpoints.resolve(settings_.load())
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    logs.configure(settings, "ingest")
    for handler in logging.getLogger().handlers:
        handler.addFilter(refusals.Untraced())
    for name in _TALKATIVE:
        logging.getLogger(name).addFilter(_Sparse())
    return start.ended(lambda: _run(settings))


def _run(settings: Settings) -> None:
    patience = Patience(settings)
    patience.until("Kafka", lambda: kafka.ensure_topics(settings))
    store = RedisStore(settings)
    patience.until("Redis", store.check)
    patience.until("Redis", lambda: store.claim_layout(start.layout(settings)))
    manifest = patience.until("an active generation", lambda: start.active_generation(settings))
    topic = kafka.item_vectors(manifest.generation)
    patience.until("Kafka", lambda: kafka.ensure_topics(settings, [topic]))
    towers = bundle.recorded(settings, manifest)
    producer = patience.until("Kafka", lambda: outlet_producer(settings))
    publisher = TransactionalPublisher(settings, towers.generation)
    folder = Path(settings.data_dir) / "ingest"
    member = membership.take(folder)
    # Forgetting a user deletes his embeddings of every generation that was ever recorded.
    known = patience.until("Kafka", lambda: generations.known(settings))
    lanes = _lanes(settings, store, towers, known, producer, publisher)
    try:
        # Before anything is applied: profiles must not run ahead of clicks that the archive has to bring.
        patience.until("Kafka", lambda: _refuse_lost(settings, lanes[0]))
        _tuned()
        asyncio.run(_serve(settings, lanes, member.name, folder, store, publisher))
    finally:
        for lane in lanes:
            lane.executor.shutdown(wait=False, cancel_futures=True)
        publisher.close()
        producer.close(timeout=1)
        store.close()
        member.close()
        alive.end(settings, "ingest")


def _refuse_lost(settings: Settings, of_clicks: Lane) -> None:
    """Raise LogMismatch where retention removed clicks, of any partition, before they were applied."""
    begins = kafka.beginning_offsets(settings, kafka.CLICKS)
    # Their ends are looked at later: another ingest may be moving them.
    of_clicks.ingest.positions.open({partition: (begin, 2**62) for partition, begin in begins.items()})


async def _serve(
    settings: Settings, lanes: list[Lane], member: str, folder: Path, store: RedisStore,
    publisher: TransactionalPublisher,
) -> None:  # fmt: skip
    limit = threading.Timer(_STOP_S_MAX, os._exit, (1,))
    limit.daemon = True
    app = IngestApp(
        settings, lanes, member, folder / "faust", stopping=limit.start,
        claim=lambda: store.claim_layout(start.layout(settings)),
    )  # fmt: skip
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
    watching = asyncio.create_task(refusals.watch(settings, lambda: app.thread))
    watching.add_done_callback(lambda task: None if task.cancelled() else app.end(_reason(task)))
    try:
        await app.run()
    except KafkaError as error:
        raise refusals.meant(settings, error) from error
    finally:
        watching.cancel()
        await publisher.leave()
        await asyncio.to_thread(unmeasured)


def _reason(task: asyncio.Task[None]) -> Exception:
    error = task.exception()
    return error if isinstance(error, Exception) else RuntimeError(repr(error))


def _lanes(
    settings: Settings, store: RedisStore, towers: Bundle, known: list[str], producer: KafkaProducer,
    publisher: TransactionalPublisher,
) -> list[Lane]:  # fmt: skip
    """Clicks and users write the same slots, so they share a thread; a slow transaction delays no click."""
    people = ThreadPoolExecutor(1, "people")
    goods = ThreadPoolExecutor(1, "items")

    def letters() -> KafkaDeadLetters:
        return KafkaDeadLetters(settings, producer)

    def log_id(name: str) -> Callable[[], LogId]:
        return lambda: kafka.log_ids(settings, [name])[name]

    def topic(name: str) -> str:
        return settings.prefixed(name)

    of_clicks = Positions(
        store, topic(kafka.CLICKS), lambda p: clicks.sources(settings, p), log_id(kafka.CLICKS)
    )
    of_users = Positions(store, topic(kafka.USERS), lambda p: users.sources(settings, p), log_id(kafka.USERS))
    of_items = Positions(
        store,
        topic(kafka.ITEMS),
        lambda p: item_cards.sources(settings, towers.generation, p),
        log_id(kafka.ITEMS),
    )
    forwarder = KafkaForwarder(settings, producer)
    micro = MicroSteps(towers)
    by_clicks = ClickIngest(settings, store, of_clicks, letters(), forwarder, micro)
    by_users = UserIngest(
        settings, store, of_users, letters(), known, by_clicks.profiles_written,
        KafkaForwarder(settings, producer),
    )  # fmt: skip
    by_items = ItemIngest(
        settings, store, of_items, letters(), publisher, towers, _clock_us, item_cards.CARDS_S
    )

    def opened(partition: int) -> None:
        by_items.opened(partition)
        publisher.open(partition)

    return [
        Lane(
            topic(kafka.CLICKS),
            by_clicks,
            people,
            before_open=by_clicks.opened,
            deferred=by_clicks.counts,
            quick=True,
            many=by_clicks.ingest_many,
            part_max=_PART_MAX,
        ),
        Lane(topic(kafka.USERS), by_users, people, quick=True),
        Lane(
            topic(kafka.ITEMS),
            by_items,
            goods,
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
