"""The query worker, wired together: `python -m serving`.

Exit codes: 0 a requested stop · 1 an error that a restart may heal · 2 a bad setting, or the port
is taken · 3 an operator has to decide (the store or Kafka refuses the worker).
"""

from __future__ import annotations

import os

# Before numpy: queries run in parallel already, and one product is too small for more threads.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import gc
import logging
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

import msgspec
from typing_extensions import override

from eddyline.errors import GenerationEnded, LogReplaced
from eddyline.generations import Manifest
from eddyline.process import lifecycle, logs
from eddyline.process.retry import Retry
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import LogId
from embeddings.bundle import bundle
from index.backends.base import AnnBackend
from index.factory import ann_backend
from serving import dependencies, metrics, running_workers
from serving.answer.impression_sender import ImpressionSender
from serving.answer.impressions import Impressions
from serving.generation_watch import GenerationWatch
from serving.rpc.retrieval_service import RetrievalService
from serving.rpc.server import SharedPort, WorkerServer
from serving.rpc.shard_service import ShardService
from serving.sharding import ShardAssignment, shard_of
from serving.worker.generation import GenerationRuntime
from serving.worker.prefork import RENEW, ForkedWork, Prefork

log = logging.getLogger(__name__)

# Running calls end within their deadline, one second by default.
GRACE_S = 5.0
# How often a serving worker looks whether it must end.
CHECK_S = 1.0
# A stop writes the last snapshot and ends at the latest after this. One that comes before the
# worker serves has nothing to write, and may be in a call that waits for a server or its name.
STOP_S_MAX = 50.0
START_STOP_S_MAX = 5.0


def main() -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit code."""
    serves = threading.Event()
    return lifecycle.run(
        "worker",
        lambda settings, stop: _serve(settings, stop, serves),
        stop_limit_s=lambda: STOP_S_MAX if serves.is_set() else START_STOP_S_MAX,
    )


def _serve(settings: Settings, stop: threading.Event, serves: threading.Event) -> int:
    ann = ann_backend(settings)
    assignment = shard_of(settings)
    if settings.worker_processes > 1:
        processes = WorkerProcesses(settings, ann, assignment, stop)
        lifecycle.stop_on_signals(stop, processes.give_up)
        return Prefork(settings, processes, stop).run()
    worker = Worker(settings, ann, assignment, stop)
    worker.listen()
    return worker.run(ready=serves.set)


class Worker:
    """One serving process: its gRPC server, and the generation that it answers from."""

    def __init__(
        self,
        settings: Settings,
        ann: AnnBackend,
        assignment: ShardAssignment,
        stop: threading.Event,
        *,
        place: int = 0,
        port: SharedPort | None = None,
    ) -> None:
        """place: number of this process in its worker; port: shared with the other processes."""
        self._settings = settings
        self._ann = ann
        self._assignment = assignment
        self._stop = stop
        self._place = place
        self._port = port
        self._service = RetrievalService(settings)
        answers_coordinator = settings.shard_service or not assignment.whole
        self._shard = ShardService(assignment, settings.k_max) if answers_coordinator else None
        self._server: WorkerServer | None = None

    def listen(self) -> WorkerServer:
        """Bind the port; calls get UNAVAILABLE until the worker is ready. Raises PortTaken."""
        self._server = WorkerServer(self._settings, self._service, self._shard, port=self._port)
        if self._port is None:
            logs.announce(self._settings, f"worker listens on {self._server.address}")
        return self._server

    def run(
        self,
        runtime: GenerationRuntime | None = None,
        ready: Callable[[], None] | None = None,
        *,
        may_build: bool = True,
    ) -> int:
        """Serve until the stop. Returns the exit code; raises GenerationEnded, LogReplaced.

        runtime: opened already; None: the active generation is opened. ready: called once it serves
        may_build: False: no graph is built in this process
        """
        settings, service, stop = self._settings, self._service, self._stop
        retry = Retry(settings, stop, service.waiting_for)
        with ExitStack() as closing:
            closing.callback(self._stop_server)
            # A shard answers no users.
            impressions = Impressions(settings.answers_sample if self._assignment.whole else 0.0)
            closing.callback(
                metrics.serve(
                    settings, service, self._place, shard=self._shard, impressions=impressions
                )
            )
            store = dependencies.open_store(settings, retry)
            closing.callback(store.close)
            if runtime is None:
                runtime = GenerationRuntime.open(settings, self._ann, self._assignment, retry)
            closing.callback(runtime.close)
            if may_build:
                runtime.build_graph()
            service.waiting_for("ingest to publish the last changes of items")
            runtime.wait_published(store, stop)
            backend = runtime.start(
                store, write_snapshots=self._place == 0, impressions=impressions
            )
            service.waiting_for("the end of the item vectors")
            runtime.wait_caught_up(stop)
            # A collection of all that is loaded now would hold the interpreter lock, and so every
            # thread: 55 ms of CPU with 100,000 items, several times that on busy cores.
            gc.collect()
            gc.freeze()
            if self._shard is not None:
                self._shard.serve(backend.held)
            sender = ImpressionSender(settings, impressions)
            sender.start()
            closing.callback(sender.close)
            service.serve(backend)
            server = self._server or self.listen()
            announced = running_workers.announce(settings, self._registered(server, runtime))
            closing.callback(announced.unlink, missing_ok=True)
            server.set_serving(True)
            serves = {
                "address": server.address,
                "items": runtime.index.stats().live,
                "holds": self._assignment.name or "all items",
            }
            log.info("worker serves", extra=serves)
            if ready is not None:
                ready()
            watch = GenerationWatch(settings, runtime.generation, stop.set)
            watch.start()
            closing.callback(watch.close)
            try:
                while not stop.wait(CHECK_S):
                    runtime.check_log()
            finally:
                self._stop_server()
            watch.raise_ended()
        return 0

    def _stop_server(self) -> None:
        """End the running calls, before what answers them is closed; again: does nothing."""
        server, self._server = self._server, None
        if server is not None:
            server.set_serving(False)
            server.stop(GRACE_S)

    def _registered(
        self, server: WorkerServer, runtime: GenerationRuntime
    ) -> running_workers.RegisteredWorker:
        return running_workers.RegisteredWorker(
            address=server.address,
            pid=os.getpid(),
            generation=runtime.generation,
            started_ms=time.time_ns() // 1_000_000,
            answers=self._assignment.whole,
        )


class _Checked(msgspec.Struct, frozen=True):
    """What the keeper opens, as Kafka names it."""

    manifest: Manifest
    logs: dict[str, LogId]


class WorkerProcesses(ForkedWork[GenerationRuntime]):
    """The processes of one worker; they share the memory of the keeper's generation."""

    def __init__(
        self,
        settings: Settings,
        ann: AnnBackend,
        assignment: ShardAssignment,
        stop: threading.Event,
    ) -> None:
        """Reserve the port. Raises PortTaken."""
        self._settings = settings
        self._ann = ann
        self._assignment = assignment
        self._stop = stop
        self._port = SharedPort(settings)
        self._opened: GenerationRuntime | None = None
        logs.announce(
            settings, f"{settings.worker_processes} worker processes listen on {self._port.address}"
        )

    def give_up(self) -> None:
        """End the building of the graph."""
        if self._opened is not None:
            self._opened.index.close()

    @override
    def check(self) -> bytes:
        retry = Retry(self._settings, self._stop)
        manifest = dependencies.active_manifest(self._settings, retry)
        opened = bundle.recorded(self._settings, manifest)
        return msgspec.json.encode(
            _Checked(manifest, GenerationRuntime.logs_of(self._settings, opened, retry))
        )

    @override
    def open(self, checked: bytes) -> GenerationRuntime:
        found = msgspec.json.decode(checked, type=_Checked)
        opened = bundle.recorded(self._settings, found.manifest)
        self._opened = GenerationRuntime(
            self._settings, opened, found.logs, self._ann, self._assignment
        )
        return self._opened

    @override
    def build(self, shared: GenerationRuntime) -> bool | None:
        if not self._large(shared):
            return None
        return shared.index.rebuild()

    @override
    def serve(
        self, shared: GenerationRuntime, place: int, ready: Callable[[], None], *, may_build: bool
    ) -> int:
        worker = Worker(
            self._settings, self._ann, self._assignment, self._stop, place=place, port=self._port
        )
        # Without a graph to come a worker builds one if its index outgrows exact search.
        builds = may_build or not self._large(shared)

        def run() -> int:
            try:
                return worker.run(shared, ready, may_build=builds)
            except (GenerationEnded, LogReplaced) as error:
                log.error(str(error))
                return RENEW

        return lifecycle.run_until_exit(run)

    def _large(self, shared: GenerationRuntime) -> bool:
        return shared.index.stats().live > self._settings.index_exact_below


if __name__ == "__main__":
    sys.exit(main())
