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

from eddyline import kafka, logs, start
from eddyline import settings as settings_
from eddyline.errors import SettingsError
from eddyline.local import endpoints
from eddyline.settings import Settings
from eddyline.start import Patience
from embeddings.user_tower import query_vector
from serving import metrics, presence, wiring
from serving.coordinator.answers import OfAllShards
from serving.coordinator.shards import Shards, parse
from serving.paths.towers import TowersPath
from serving.server import PortTaken, WorkerServer
from serving.service import Service

log = logging.getLogger(__name__)

# Running calls end within their deadline, one second by default.
GRACE_S = 5.0


def main() -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit code."""
    stop = threading.Event()
    start.stop_on_signals(stop)
    try:
        loaded = settings_.load()
        logs.configure(loaded, "coordinator")
        addresses = parse(loaded.shard_addresses)
        settings = endpoints.resolve(loaded)
        service = Service(settings)
        server = WorkerServer(settings, service, role="coordinator")
    except (SettingsError, PortTaken) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"coordinator listens on {server.address}\n")
    sys.stdout.flush()
    unmeasured = metrics.serve(settings, service, own_index=False)
    try:
        return start.ended(lambda: _run(settings, addresses, service, server, stop))
    finally:
        unmeasured()
        server.stop(GRACE_S)


def _run(
    settings: Settings, addresses: list[str], service: Service, server: WorkerServer, stop: threading.Event
) -> None:
    patience = Patience(settings, stop, service.waiting_for)
    store = wiring.open_store(settings, patience)
    bundle = wiring.open_generation(settings, patience)
    # The tower alone: item vectors are the shards' business.
    generation, dimension, tower = bundle.generation, bundle.dimension, bundle.user_tower
    del bundle
    logs_now = patience.until("Kafka", lambda: kafka.log_ids(settings, [kafka.CLICKS]))
    popular = wiring.popular_path(settings, store)
    shards = Shards(
        addresses, generation, timeout_ms=settings.shard_timeout_ms, backoff_ms_max=settings.backoff_ms_max,
        threads=settings.worker_threads, changed=server.set_serving,
    )  # fmt: skip
    announced: Path | None = None
    try:
        popular.start()
        answers = OfAllShards(
            generation=generation,
            dimension=dimension,
            shards=shards,
            store=store,
            users=wiring.user_reader(settings, store, generation, logs_now[kafka.CLICKS]),
            towers=TowersPath(tower, query_vector),
            popular=popular,
            item_slots=settings.item_slots,
        )
        service.waiting_for("the first look at the shards")
        shards.start()
        service.serve(answers)
        worker = presence.Worker(
            address=server.address, pid=os.getpid(), generation=generation,
            started_ms=time.time_ns() // 1_000_000,
        )  # fmt: skip
        announced = presence.announce(settings, worker)
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
