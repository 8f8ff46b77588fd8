"""The coordinator of shards, wired together: `python -m serving.coordinator`.

Exit codes: as the query worker's, see `serving.__main__`.
"""

from __future__ import annotations

import os

# Before numpy: queries run in parallel already, and one product is too small for more threads.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import logging
import sys
import threading
import time
from contextlib import ExitStack

from eddyline.kafka import topics
from eddyline.process import lifecycle, logs
from eddyline.process.retry import Retry
from eddyline.settings.loader import Settings
from serving import dependencies, metrics, running_workers
from serving.answer.impression_sender import ImpressionSender
from serving.answer.impressions import Impressions
from serving.coordinator.backend import CoordinatorBackend
from serving.coordinator.shards import Shards, parse
from serving.generation_watch import GenerationWatch
from serving.rpc.retrieval_service import RetrievalService
from serving.rpc.server import WorkerServer
from serving.worker.log_watch import LogWatch

log = logging.getLogger(__name__)

# Running calls end within their deadline, one second by default.
GRACE_S = 5.0
# A stop that waits for a server's name or a thread ends after this, within a grace of 20 s.
STOP_S_MAX = 15.0


def main() -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit code."""
    return lifecycle.run("coordinator", _serve, stop_limit_s=STOP_S_MAX)


def _serve(settings: Settings, stop: threading.Event) -> None:
    addresses = parse(settings.shard_addresses)
    service = RetrievalService(settings)
    server = WorkerServer(settings, service, role="coordinator")
    logs.announce(settings, f"coordinator listens on {server.address}")
    retry = Retry(settings, stop, service.waiting_for)
    with ExitStack() as closing:
        closing.callback(server.stop, GRACE_S)
        impressions = Impressions(settings.answers_sample)
        closing.callback(metrics.serve(settings, service, own_index=False, impressions=impressions))
        store = dependencies.open_store(settings, retry)
        closing.callback(store.close)
        bundle = dependencies.open_bundle(settings, retry)
        # The tower alone: the item vectors are in the shards.
        generation, dimension, tower = bundle.generation, bundle.dimension, bundle.user_tower
        del bundle
        log_ids = retry.wait_for("Kafka", lambda: topics.log_ids(settings, [topics.CLICKS]))
        retriever = dependencies.start_retriever(
            settings,
            store,
            generation=generation,
            tower=tower,
            clicks=log_ids[topics.CLICKS],
            closing=closing,
        )
        shards = Shards(settings, addresses, generation, server)
        closing.callback(shards.close)
        service.waiting_for("the first check of the shards")
        shards.start()
        watch = LogWatch(settings, log_ids)
        watch.start()
        closing.callback(watch.close)
        sender = ImpressionSender(settings, impressions)
        sender.start()
        closing.callback(sender.close)
        backend = CoordinatorBackend(
            generation,
            dimension,
            shards,
            retriever,
            watch,
            settings.filter_text_names,
            impressions=impressions,
        )
        service.serve(backend)
        worker = running_workers.RegisteredWorker(
            address=server.address,
            pid=os.getpid(),
            generation=generation,
            started_ms=time.time_ns() // 1_000_000,
        )
        announced = running_workers.announce(settings, worker)
        closing.callback(announced.unlink, missing_ok=True)
        serves = {"address": server.address, "shards": len(addresses), "generation": generation}
        log.info("coordinator serves", extra=serves)
        ended = GenerationWatch(settings, generation, stop.set)
        ended.start()
        closing.callback(ended.close)
        while not stop.wait(60.0):
            pass
        server.stop(GRACE_S)
        ended.raise_ended()


if __name__ == "__main__":
    sys.exit(main())
