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
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from eddyline.errors import SettingsError
from eddyline.kafka import topics
from eddyline.process import discovery, lifecycle, logs
from eddyline.process.retry import Retry, Stopped
from eddyline.settings import loader
from eddyline.settings.loader import Settings
from eddyline.stores.redis import RedisStore
from embeddings.bundle.bundle import Bundle
from embeddings.towers.user_tower import query_vector
from index.backends.base import AnnBackend
from index.factory import ann_backend, guard_recall
from index.live import LiveIndex
from serving import dependencies, metrics, registry
from serving.answer.retriever import Retriever
from serving.answer.user_reader import UserReader
from serving.recall.popular import PopularPath
from serving.recall.towers import TowersPath
from serving.rpc.backends import ShardBackend, WorkerBackend
from serving.rpc.retrieval_service import RetrievalService
from serving.rpc.server import PortTaken, SharedPort, WorkerServer
from serving.rpc.shard_service import ShardService, ShardServicer
from serving.sharding import ShardAssignment, shard_of
from serving.worker.prefork import Prefork, run_niced
from serving.worker.publish_barrier import wait_until_published
from serving.worker.replica import Replica
from serving.worker.startup import OpenedIndex, open_index

log = logging.getLogger(__name__)

# Running calls end within their deadline, one second by default.
GRACE_S = 5.0


def main() -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit code."""
    stop = threading.Event()
    lifecycle.stop_on_signals(stop)
    try:
        loaded = loader.load()
        logs.configure(loaded, "worker")
        settings = discovery.resolve(loaded)
        backend = ann_backend(settings)
        share = shard_of(settings)
        if settings.worker_processes > 1:
            return lifecycle.run_until_exit(_many(settings, backend, share, stop))
        service, shard = RetrievalService(settings), ShardService(share)
        server = WorkerServer(settings, service, shard)
    except (SettingsError, PortTaken) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    _say(f"worker listens on {server.address}")
    retry = Retry(settings, stop, service.waiting_for)
    try:
        return lifecycle.run_until_exit(
            lambda: _run(
                settings,
                service,
                shard,
                retry,
                stop,
                lambda: server,
                lambda: open_index(settings, backend, share, retry),
            )
        )
    finally:
        server.stop(GRACE_S)


def _many(
    settings: Settings, backend: AnnBackend, share: ShardAssignment, stop: threading.Event
) -> Callable[[], int]:
    """Runs the processes of a worker, see `serving.worker.prefork`. Raises SettingsError, PortTaken."""
    port = SharedPort(settings)
    _say(f"{settings.worker_processes} worker processes listen on {port.address}")
    retry = Retry(settings, stop)
    held: list[OpenedIndex] = []  # the one whose graph is being built; a stop ends the building

    def give_up() -> None:
        for opened in held:
            opened.index.close()

    lifecycle.stop_on_signals(stop, give_up)

    def opened() -> OpenedIndex:
        held[:] = [open_index(settings, backend, share, retry)]
        return held[0]

    def built(opened: OpenedIndex) -> bool:
        large = opened.index.stats().live > settings.index_exact_below
        return large and run_niced(opened.index.rebuild)

    def serve(opened: OpenedIndex, place: int, ready: Callable[[], None]) -> int:
        service, shard = RetrievalService(settings), ShardService(share)
        made: list[WorkerServer] = []

        def bind() -> WorkerServer:
            made.append(WorkerServer(settings, service, shard, port=port))
            return made[0]

        try:
            return lifecycle.run_until_exit(
                lambda: _run(
                    settings,
                    service,
                    shard,
                    Retry(settings, stop),
                    stop,
                    bind,
                    lambda: opened,
                    place=place,
                    ready=ready,
                )
            )
        finally:
            for server in made:
                server.stop(GRACE_S)

    keeper = Prefork(
        settings.worker_processes,
        opened,
        built,
        serve,
        stop,
        renew_s=settings.worker_renew_s,
        backoff_s_max=settings.backoff_ms_max / 1000,
    )
    return keeper.run


def _run(
    settings: Settings,
    service: RetrievalService,
    shard: ShardService,
    retry: Retry,
    stop: threading.Event,
    bind: Callable[[], WorkerServer],
    opening: Callable[[], OpenedIndex],
    *,
    place: int = 0,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve what `opening` gives.

    place: which of several processes this is; the first one writes snapshots. ready: called once it serves
    """
    share = shard.share
    unmeasured = metrics.serve(settings, service, place)
    store = dependencies.open_store(settings, retry)
    opened = opening()
    generation, index, snapshots = opened.generation, opened.index, opened.snapshots
    replica = Replica(
        settings, generation.generation, index, positions=opened.positions, share=share
    )
    popular = dependencies.popular_path(settings, store)
    announced: Path | None = None
    try:
        guard_recall(settings, index)
        index.begin()
        service.waiting_for("ingest to publish the last changes of items")
        wait_until_published(settings, store, generation.generation, stop)
        replica.start()
        if place == 0:
            snapshots.start(replica.positions)
        if share.whole:
            popular.start()
        service.waiting_for("the end of the item vectors")
        while not replica.wait_caught_up(0.05):
            if stop.is_set():
                raise Stopped
        shard.serve(ShardServicer(generation.generation, index, replica.missing))
        if share.whole:
            users = dependencies.user_reader(
                settings, store, generation.generation, opened.logs[topics.CLICKS]
            )
            service.serve(_ready(settings, store, users, generation, index, replica, popular))
        else:
            held = ShardBackend(generation.generation, share, index, replica.state, replica.missing)
            service.serve(held)
        server = bind()
        server.set_serving(True)
        announced = registry.announce(settings, _present(server.address, generation, share))
        told = {
            "address": server.address,
            "items": index.stats().live,
            "holds": share.name or "all items",
        }
        log.info("worker serves", extra=told)
        ready()
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
        unmeasured()


def _say(what: str) -> None:
    sys.stdout.write(f"{what}\n")
    sys.stdout.flush()


def _ready(
    settings: Settings,
    store: RedisStore,
    users: UserReader,
    generation: Bundle,
    index: LiveIndex,
    replica: Replica,
    popular: PopularPath,
) -> WorkerBackend:
    retriever = Retriever(
        store=store,
        index=index,
        users=users,
        by_towers=TowersPath(generation.user_tower, query_vector),
        by_popularity=popular,
        item_slots=settings.item_slots,
        index_missing=replica.missing,
    )
    return WorkerBackend(generation.generation, retriever, index, popular, replica.state)


def _present(address: str, generation: Bundle, share: ShardAssignment) -> registry.RegisteredWorker:
    now_ms = time.time_ns() // 1_000_000
    return registry.RegisteredWorker(
        address=address,
        pid=os.getpid(),
        generation=generation.generation,
        started_ms=now_ms,
        answers=share.whole,
    )


if __name__ == "__main__":
    sys.exit(main())
