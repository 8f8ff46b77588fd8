"""The ingest process, wired together: `python -m streams`.

Exit codes: 0 an intended stop · 1 an error that a restart may resolve · 2 a bad setting · 3 a
person has to decide (Kafka is another log than the state was written for, or refuses us, or the
store refuses to be used).
"""

from __future__ import annotations

import os

# Before numpy: the products are too small to be worth a second thread, and results must be
# deterministic.
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
from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

from aiokafka.errors import KafkaError
from typing_extensions import override

from eddyline import generations
from eddyline.generations import Manifest
from eddyline.kafka import reading, topic_checks, topics
from eddyline.kafka.kept import KeptKafka
from eddyline.kafka.topics import CLICKS, GENERATIONS, ITEMS, USERS
from eddyline.process import heartbeat, lifecycle
from eddyline.process.retry import Retry
from eddyline.settings.loader import Settings
from eddyline.stores import layout
from eddyline.stores.redis import RedisStore
from embeddings.bundle import bundle
from streams import metrics, static_membership
from streams.app import IngestApp
from streams.clicks.handler import ClickHandler
from streams.consumer import errors
from streams.dead_letters import outlet_producer
from streams.deleted_items import DeletedItems
from streams.dispatcher import HandlerThread, TopicPipeline
from streams.ended_generations import EndedGenerations
from streams.generation import Generation
from streams.handlers import Handlers, Outputs
from streams.idle_users import IdleUsers
from streams.items.publisher import TransactionalPublisher

log = logging.getLogger(__name__)

# Batches consist of many small objects without cycles; with the usual (700, 10, 10) the collector
# runs often.
_GARBAGE = (50_000, 20, 100)
_STOP_CHECK_S = 1.0
# A start that a signal ends may be in a call that waits for a server; nothing is applied yet. The
# app has a limit of its own.
_START_STOP_S_MAX = 5.0
_TALKATIVE = (
    "aiokafka",
    "aiokafka.consumer.fetcher",
    "aiokafka.consumer.group_coordinator",
    "aiokafka.conn",
)


def main() -> int:
    """Run until SIGTERM or SIGINT. Returns the exit code."""
    return lifecycle.run("ingest", _run, stop_limit_s=_START_STOP_S_MAX)


def _run(settings: Settings, stop: threading.Event) -> None:
    for handler in logging.getLogger().handlers:
        handler.addFilter(errors.WithoutTraceback())
    for name in _TALKATIVE:
        logging.getLogger(name).addFilter(_RateLimit())
    retry = Retry(settings, stop, lambda _: heartbeat.beat(settings, "ingest"))
    retry.wait_for("Kafka", lambda: topics.ensure_topics(settings, topics.OF_INGEST))
    for finding in retry.wait_for("Kafka", lambda: topic_checks.check_topics(settings)):
        log.warning(str(finding))
    with ExitStack() as closes:
        closes.callback(heartbeat.end, settings, "ingest")
        folder = Path(settings.data_dir) / "ingest"
        member = static_membership.take(folder)
        closes.callback(member.close)
        store = RedisStore(settings)
        closes.callback(store.close)
        retry.wait_for("Redis", store.check)
        retry.wait_for("Redis", store.check_rights)
        retry.wait_for("Redis", lambda: store.claim_layout(layout.layout(settings)))
        manifest = retry.wait_for(
            "an active generation", lambda: generations.active_generation(settings)
        )
        producer = retry.wait_for("Kafka", lambda: outlet_producer(settings))
        closes.callback(producer.close, timeout=1)
        live = [retry.wait_for("Kafka", lambda: _open_generation(settings, manifest))]
        for generation in live:
            closes.callback(generation.close)
        # Forgetting a user deletes the embeddings of every generation that was ever recorded.
        known = retry.wait_for("Kafka", lambda: generations.known(settings))
        kept = KeptKafka(settings)
        closes.callback(kept.close)
        outputs = Outputs.to_kafka(settings, producer, kept)
        kept_ms = retry.wait_for(
            "Kafka", lambda: topics.delete_retention_ms(settings, (USERS, ITEMS))
        )
        handlers = Handlers(
            settings, store, kept, live, outputs, known, delete_retention_ms=kept_ms
        )
        # First of all: profiles must not run ahead of clicks that the archive has to supply.
        retry.wait_for("Kafka", lambda: _refuse_lost(settings, handlers.clicks))
        # Clicks and users write the same slots, so they share a thread; publishing items delays no
        # click.
        user_thread, item_thread = HandlerThread("user_executor"), HandlerThread("items")
        closes.callback(user_thread.close)
        closes.callback(item_thread.close)
        pipelines = [
            TopicPipeline(settings.prefixed(CLICKS), handlers.clicks, user_thread),
            TopicPipeline(settings.prefixed(USERS), handlers.users, user_thread),
            TopicPipeline(settings.prefixed(ITEMS), handlers.items, item_thread),
        ]
        _tune()
        asyncio.run(
            _serve(settings, stop, handlers, pipelines, live, store, member.name, folder, kept)
        )


def _open_generation(settings: Settings, manifest: Manifest) -> Generation:
    """Load the bundle of a recorded generation and publish to its topic, which is made if need be.

    Raises BundleError, KafkaUnavailable, KafkaRefused.
    """
    topics.ensure_topics(settings, [topics.item_vectors(manifest.generation)])
    towers = bundle.recorded(settings, manifest)
    return Generation(towers, TransactionalPublisher(settings, towers.generation))


def _refuse_lost(settings: Settings, clicks: ClickHandler) -> None:
    """Raise LogMismatch where retention removed clicks of any partition that were not applied."""
    begins = topics.beginning_offsets(settings, CLICKS)
    # The ends are read later: another ingest may be moving them.
    clicks.fences.open({partition: (begin, 2**62) for partition, begin in begins.items()})


async def _serve(
    settings: Settings,
    stop: threading.Event,
    handlers: Handlers,
    pipelines: Sequence[TopicPipeline],
    live: Sequence[Generation],
    store: RedisStore,
    member: str,
    folder: Path,
    kept: KeptKafka,
) -> None:
    app = IngestApp(
        settings,
        pipelines,
        store,
        member,
        folder / "faust",
        lambda: reading.skips(settings, kept.latest(GENERATIONS)),
    )
    loop = asyncio.get_running_loop()
    ended = EndedGenerations(
        settings,
        store,
        handlers.clicks.cache,
        pipelines[0].thread.lock,
        [generation.name for generation in live],
        lambda error: _end_from_thread(loop, app, error),
    )
    idle = IdleUsers(settings, store, handlers.clicks.cache, pipelines[0].thread.lock)
    deleted = DeletedItems(settings, store, handlers.items.fences)
    clicks = handlers.clicks
    stop_metrics = metrics.serve(
        settings, app, clicks.cache, ended, idle, deleted, clicks.co_visits, store
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, app.end, None)
    # A signal that came before these handlers has set the event, or does so at once.
    loop.call_later(_STOP_CHECK_S, lambda: app.end(None) if stop.is_set() else None)
    log.info(
        "ingest starts",
        extra={
            "member": member,
            "kafka": settings.kafka_bootstrap_servers,
            "loop": type(loop).__module__,
        },
    )
    watching = asyncio.create_task(errors.watch_consumer(settings, app))
    watching.add_done_callback(lambda task: None if task.cancelled() else app.end(_reason(task)))
    async with AsyncExitStack() as closes:
        closes.push_async_callback(asyncio.to_thread, stop_metrics)
        for generation in live:
            generation.attach(loop)
            closes.push_async_callback(generation.detach)
        closes.callback(watching.cancel)
        removals: Sequence[EndedGenerations | IdleUsers | DeletedItems] = (ended, idle, deleted)
        for removal in removals:
            closes.push_async_callback(asyncio.to_thread, removal.close)
            removal.start()
        try:
            await app.run()
        except KafkaError as error:
            raise errors.translate_error(settings, error) from error
        finally:
            # A call in a thread may end after the loop: nobody waits for it, and its callback
            # would print a stack trace behind the reason of the end.
            logging.getLogger("concurrent.futures").setLevel(logging.CRITICAL)


def _end_from_thread(loop: asyncio.AbstractEventLoop, app: IngestApp, error: Exception) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: the process ends already
        loop.call_soon_threadsafe(app.end, error)


def _reason(task: asyncio.Task[None]) -> Exception:
    error = task.exception()
    return error if isinstance(error, Exception) else RuntimeError(repr(error))


def _tune() -> None:
    """Use uvloop for both event loops; the collector skips the objects that exist now."""
    with contextlib.suppress(ImportError):  # not on Windows
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GARBAGE)


class _RateLimit(logging.Filter):
    """Passes one line of each kind in ten seconds: aiokafka logs every try while Kafka is away."""

    def __init__(self) -> None:
        super().__init__()
        self._next: dict[object, float] = {}

    @override
    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        if now < self._next.get(record.msg, 0.0):
            return False
        self._next[record.msg] = now + 10
        return True


if __name__ == "__main__":
    sys.exit(main())
