"""The coordinator of shards, wired together: `python -m serving.coordinator`.

Exit codes: as the query worker's, see `serving.__main__`.
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
from pathlib import Path

from eddyline.errors import SettingsError
from eddyline.kafka import topics
from eddyline.process import discovery, lifecycle, logs
from eddyline.process.retry import Retry
from eddyline.settings import loader
from eddyline.settings.loader import Settings
from embeddings.towers.user_tower import query_vector
from serving import dependencies, metrics, registry
from serving.coordinator.backend import CoordinatorBackend
from serving.coordinator.shards import Shards, parse
from serving.recall.towers import TowersPath
from serving.rpc.retrieval_service import RetrievalService
from serving.rpc.server import PortTaken, WorkerServer

log = logging.getLogger(__name__)

# Running calls end within their deadline, one second by default.
GRACE_S = 5.0


def main() -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit code."""
    stop = threading.Event()
    lifecycle.stop_on_signals(stop)
    try:
        loaded = loader.load()
        logs.configure(loaded, "coordinator")
        addresses = parse(loaded.shard_addresses)
        settings = discovery.resolve(loaded)
        service = RetrievalService(settings)
        server = WorkerServer(settings, service, role="coordinator")
    except (SettingsError, PortTaken) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"coordinator listens on {server.address}\n")
    sys.stdout.flush()
    unmeasured = metrics.serve(settings, service, own_index=False)
    try:
        return lifecycle.run_until_exit(lambda: _run(settings, addresses, service, server, stop))
    finally:
        unmeasured()
        server.stop(GRACE_S)


def _run(
    settings: Settings,
    addresses: list[str],
    service: RetrievalService,
    server: WorkerServer,
    stop: threading.Event,
) -> None:
    retry = Retry(settings, stop, service.waiting_for)
    store = dependencies.open_store(settings, retry)
    bundle = dependencies.open_generation(settings, retry)
    # The tower alone: item vectors are the shards' business.
    generation, dimension, tower = bundle.generation, bundle.dimension, bundle.user_tower
    del bundle
    logs_now = retry.wait_for("Kafka", lambda: topics.log_ids(settings, [topics.CLICKS]))
    popular = dependencies.popular_path(settings, store)
    shards = Shards(
        addresses,
        generation,
        timeout_ms=settings.shard_timeout_ms,
        backoff_ms_max=settings.backoff_ms_max,
        threads=settings.worker_threads,
        changed=server.set_serving,
    )
    announced: Path | None = None
    try:
        popular.start()
        answers = CoordinatorBackend(
            generation=generation,
            dimension=dimension,
            shards=shards,
            store=store,
            users=dependencies.user_reader(settings, store, generation, logs_now[topics.CLICKS]),
            towers=TowersPath(tower, query_vector),
            popular=popular,
            item_slots=settings.item_slots,
        )
        service.waiting_for("the first look at the shards")
        shards.start()
        service.serve(answers)
        worker = registry.RegisteredWorker(
            address=server.address,
            pid=os.getpid(),
            generation=generation,
            started_ms=time.time_ns() // 1_000_000,
        )
        announced = registry.announce(settings, worker)
        told = {"address": server.address, "shards": len(addresses), "generation": generation}
        log.info("coordinator serves", extra=told)
        while not stop.wait(60.0):
            pass
        server.stop(GRACE_S)
    finally:
        if announced is not None:
            announced.unlink(missing_ok=True)
        shards.close()
        popular.close()
        store.close()


if __name__ == "__main__":
    sys.exit(main())
