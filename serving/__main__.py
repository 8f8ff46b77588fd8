"""The query worker, wired together: `python -m serving`.

Exit codes: 0 a wanted stop · 1 an error that a restart may heal · 2 a bad setting, or the port is taken · 3 a
person has to decide (the store refuses to be used, or Kafka refuses us).
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

from eddyline import kafka, logs, start
from eddyline import settings as settings_
from eddyline.errors import SettingsError
from eddyline.local import endpoints
from eddyline.settings import Settings
from eddyline.start import Patience, Stopped
from eddyline.stores.redis import RedisStore
from embeddings.bundle import Bundle
from embeddings.user_tower import query_vector
from index.guard import RecallGuard
from index.live import LiveIndex
from index.mains.choose import main_index
from index.mains.port import MainIndex
from serving import presence, wiring
from serving.paths.popular import PopularPath
from serving.paths.towers import TowersPath
from serving.published import wait_until_published
from serving.replica import Replica, load_bundle
from serving.retrieve import Retriever
from serving.server import PortTaken, WorkerServer
from serving.service import OfShard, Ready, Service
from serving.shard import Held, ShardService
from serving.share import Share, share_of
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
        shard = ShardService(share_of(settings))
        server = WorkerServer(settings, service, shard)
    except (SettingsError, PortTaken) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"worker listens on {server.address}\n")
    sys.stdout.flush()
    try:
        return start.ended(lambda: _run(settings, main, service, shard, server, stop))
    finally:
        server.stop(GRACE_S)


def _run(
    settings: Settings, main: MainIndex, service: Service, shard: ShardService, server: WorkerServer,
    stop: threading.Event,
) -> None:  # fmt: skip
    patience, share = Patience(settings, stop, service.waiting_for), shard.share
    store = wiring.open_store(settings, patience)
    generation = wiring.open_generation(settings, patience)
    topic = kafka.item_vectors(generation.generation)
    patience.until("Kafka", lambda: kafka.ensure_topics(settings, [*kafka.SOURCES, topic]))
    index = _index(settings, main, generation.dimension)
    logs_now = patience.until("Kafka", lambda: kafka.log_ids(settings, [topic, kafka.CLICKS]))
    log_id = logs_now[topic]
    snapshots = Snapshots(settings, generation, f"{log_id.cluster_id}/{log_id.topic_id}", index, share=share)
    positions = snapshots.load()
    if positions is None:
        load_bundle(index, generation, share)
    replica = Replica(settings, generation.generation, index, positions=positions, share=share)
    popular = wiring.popular_path(settings, store)
    announced: Path | None = None
    try:
        service.waiting_for("ingest to publish the last changes of items")
        wait_until_published(settings, store, generation.generation, stop)
        replica.start()
        snapshots.start(replica.positions)
        if share.whole:
            popular.start()
        service.waiting_for("the end of the item vectors")
        while not replica.wait_caught_up(0.05):
            if stop.is_set():
                raise Stopped
        shard.serve(Held(generation.generation, index, replica.missing))
        if share.whole:
            users = wiring.user_reader(settings, store, generation.generation, logs_now[kafka.CLICKS])
            service.serve(_ready(settings, store, users, generation, index, replica, popular))
        else:
            held = OfShard(generation.generation, share, index, replica.state, replica.missing)
            service.serve(held)
        server.set_serving(True)
        announced = presence.announce(settings, _present(server.address, generation, share))
        told = {"address": server.address, "items": index.stats().live, "holds": share.name or "all items"}
        log.info("worker serves", extra=told)
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
        tier_above=settings.index_tier_above,
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
        by_towers=TowersPath(generation.user_tower, query_vector),
        by_popularity=popular,
        item_slots=settings.item_slots,
        index_missing=replica.missing,
    )
    return Ready(generation.generation, retriever, index, popular, replica.state)


def _present(address: str, generation: Bundle, share: Share) -> presence.Worker:
    now_ms = time.time_ns() // 1_000_000
    return presence.Worker(
        address=address, pid=os.getpid(), generation=generation.generation, started_ms=now_ms,
        answers=share.whole,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
