"""The query worker, wired together: `python -m serving`.

Exit codes: 0 a wanted stop · 1 an error that a restart may heal · 2 a bad setting, or the port is taken · 3 a
person has to decide (the store refuses to be used).
"""

from __future__ import annotations

import os

# Before numpy: queries run side by side already, and one product is too small to be worth more threads.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import logging
import signal
import sys
import threading
import time
from pathlib import Path

import msgspec

from eddyline import kafka, logs, start
from eddyline import settings as settings_
from eddyline.errors import BundleError, LogMismatch, SettingsError, StoreRefused
from eddyline.local import endpoints
from eddyline.settings import Settings
from eddyline.start import Patience, Stopped
from eddyline.stores.redis import RedisStore
from embeddings import bundle
from embeddings.bundle import Bundle
from embeddings.user_tower import query_vector
from index.guard import RecallGuard
from index.live import LiveIndex
from index.mains.choose import main_index
from index.mains.port import MainIndex
from serving import presence
from serving.paths.popular import PopularPath
from serving.paths.towers import TowersPath
from serving.published import wait_until_published
from serving.replica import Replica, load_bundle
from serving.retrieve import Retriever
from serving.server import PortTaken, WorkerServer
from serving.service import Ready, Service
from serving.snapshots import Snapshots
from serving.users import UserReader

log = logging.getLogger(__name__)

# Running calls end within their deadline, one second by default.
GRACE_S = 5.0


def main() -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit code."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        loaded = settings_.load()
        logs.configure(loaded, "worker")
        settings = endpoints.resolve(loaded)
        main = main_index(
            settings.index_main,
            m=settings.index_m,
            ef_construction=settings.index_ef_construction,
            ef=settings.index_ef,
        )
        service = Service(settings)
        server = WorkerServer(settings, service)
    except (SettingsError, PortTaken) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"worker listens on {server.address}\n")
    sys.stdout.flush()
    try:
        _run(settings, main, service, server, stop)
    except Stopped:
        pass
    except (LogMismatch, StoreRefused) as error:
        log.error(str(error))
        return 3
    except BundleError as error:
        log.error(str(error))
        return 1
    finally:
        server.stop(GRACE_S)
    log.info("stopped")
    return 0


def _run(
    settings: Settings, main: MainIndex, service: Service, server: WorkerServer, stop: threading.Event
) -> None:
    patience = Patience(settings, stop, service.waiting_for)
    # Half of a query's time for Redis: where it hangs, the other half is enough to answer without it.
    timeout_ms = max(10, min(settings.redis_timeout_ms, settings.query_timeout_ms // 2))
    store = RedisStore(msgspec.structs.replace(settings, redis_timeout_ms=timeout_ms))
    patience.until("Redis", store.check)
    patience.until("Redis", lambda: store.claim_layout(start.layout(settings)))
    manifest = patience.until("Kafka and an active generation", lambda: start.active_generation(settings))
    topic = kafka.item_vectors(manifest.generation)
    patience.until("Kafka", lambda: kafka.ensure_topics(settings, [*kafka.SOURCES, topic]))
    generation = bundle.load(settings.bundles / manifest.bundle)
    if generation.generation != manifest.generation:
        raise BundleError(
            f"{manifest.bundle} holds generation {generation.generation}, not {manifest.generation}"
        )
    index = _index(settings, main, generation.dimension)
    logs_now = patience.until("Kafka", lambda: kafka.log_ids(settings, [topic, kafka.CLICKS]))
    log_id = logs_now[topic]
    snapshots = Snapshots(settings, generation, f"{log_id.cluster_id}/{log_id.topic_id}", index)
    positions = snapshots.load()
    if positions is None:
        load_bundle(index, generation)
    replica = Replica(settings, manifest.generation, index, positions=positions)
    popular = _popular(settings, store, index)
    announced: Path | None = None
    try:
        service.waiting_for("ingest to publish the last changes of items")
        wait_until_published(settings, store, manifest.generation, stop)
        replica.start()
        snapshots.start(replica.positions)
        popular.start()
        service.waiting_for("the end of the item vectors")
        while not replica.wait_caught_up(0.05):
            if stop.is_set():
                raise Stopped
        users = UserReader(
            store,
            clicks_partitions=settings.clicks_partitions,
            generation=generation.generation,
            log=logs_now[kafka.CLICKS],
        )
        service.serve(_ready(settings, store, users, generation, index, replica, popular))
        server.set_serving(True)
        now_ms = time.time_ns() // 1_000_000
        worker = presence.Worker(
            address=server.address, pid=os.getpid(), generation=generation.generation, started_ms=now_ms
        )
        announced = presence.announce(settings, worker)
        log.info("worker serves", extra={"address": server.address, "items": index.stats().live})
        while not stop.wait(60.0):
            pass
        server.set_serving(False)
        server.stop(GRACE_S)
    finally:
        if announced is not None:
            announced.unlink(missing_ok=True)
        replica.close()
        snapshots.close()
        popular.close()
        index.close()
        store.close()


def _index(settings: Settings, main: MainIndex, dimension: int) -> LiveIndex:
    index = LiveIndex(
        dimension,
        main.build,
        breadth=settings.index_ef,
        exact_below=settings.index_exact_below,
        fresh_max=settings.index_fresh_max,
    )
    if settings.index_recall_share:
        RecallGuard(
            index,
            share=settings.index_recall_share,
            floor=settings.index_recall_floor,
            samples=settings.index_recall_samples,
            breadth_max=settings.index_ef_max,
            cpu_share=settings.index_recall_cpu_percent_max / 100,
        )
    return index


def _ready(
    settings: Settings, store: RedisStore, users: UserReader, generation: Bundle, index: LiveIndex,
    replica: Replica, popular: PopularPath,
) -> Ready:  # fmt: skip
    retriever = Retriever(
        store=store,
        index=index,
        users=users,
        by_towers=TowersPath(generation.user_tower, query_vector, index),
        by_popularity=popular,
        item_slots=settings.item_slots,
        index_missing=replica.missing,
    )
    return Ready(generation.generation, retriever, index, popular, replica.state)


def _popular(settings: Settings, store: RedisStore, index: LiveIndex) -> PopularPath:
    return PopularPath(
        store,
        index,
        slots=[f"i{n}" for n in range(settings.item_slots)],
        bucket_s=settings.popular_bucket_s,
        half_life_s=settings.popular_half_life_s,
        limit=settings.popular_limit,
        refresh_ms=settings.popular_refresh_ms,
        backoff_ms_max=settings.backoff_ms_max,
    )


if __name__ == "__main__":
    sys.exit(main())
