"""A whole Eddyline to break: its own Kafka and Valkey, ingest processes, a query worker, and the
proxy between them and Redis.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from cli.commands import replay_file
from eddyline.errors import LocalServerError, Unavailable
from eddyline.generations import Manifest
from eddyline.kafka import topics
from eddyline.kafka.producers import now_ms
from eddyline.settings.loader import Settings
from sandbox.datasets.dataset import Dataset
from sandbox.processes import Deployment, free_port, wait_until_applied
from sandbox.servers import free_ports, kafka_jars, valkey
from sandbox.servers import kafka_broker as broker
from sandbox.servers.supervisor import Child, Supervisor
from serving.rpc.client import is_ready
from tests.chaos.proxy import Proxy

# Small limits, so that the run reaches each: full histories, events that come too late.
CUT = {
    "clicks_partitions": 4,
    "items_partitions": 2,
    "history_length_max": 50,
    "lateness_s_max": 3_600,
    "redis_timeout_ms": 500,
    "kafka_timeout_ms": 5_000,
    "backoff_ms_max": 500,
    "snapshot_interval_s": 20,
}
# Valkey's start command: a folder `next` replaces the files. So the swap happens between the end of
# one server and the start of the next, however fast the supervisor is.
SWAP = 'if [ -d next ]; then rm -rf appendonlydir && mv next appendonlydir; fi; exec "$@"'


class Scene:
    """Thread rule: the faults' threads may call everything but `start` and `stop`.

    settings: with the address of Redis itself, not of the proxy
    """

    def __init__(self, folder: Path, bundle_dir: Path, manifest: Manifest, ingests: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.address = ""
        self.names = [f"ingest-{number}" for number in range(1, ingests + 1)]
        self.supervisor = Supervisor(folder / "logs")
        self.settings = Settings(
            data_dir=str(folder),
            bundle_dir=str(bundle_dir),
            namespace="chaos",
            worker_port=0,
            **CUT,
        )
        self.proxy: Proxy
        self._manifest = manifest
        self._home = folder / "valkey"
        self._frozen: dict[int, int] = {}  # pid -> how many faults hold it
        self._lock = threading.Lock()

    def start(self, dataset: Dataset) -> None:
        """Start everything and apply the data set's items. Raises LocalServerError."""
        chosen = free_ports.choose_ports(self.folder / "run", ("kafka", "controller", "redis"))
        server, _ = valkey.program()
        redis = valkey.prepare(self.folder, chosen["redis"], server)
        redis = _with_argv(redis, ["sh", "-c", SWAP, "valkey", *redis.argv])
        classpath = kafka_jars.fetch()
        self.supervisor.start(
            redis, broker.prepare(self.folder, chosen["kafka"], chosen["controller"], classpath)
        )
        self.proxy = Proxy(chosen["redis"])
        self.settings = msgspec.structs.replace(
            self.settings,
            kafka_bootstrap_servers=f"127.0.0.1:{chosen['kafka']}",
            redis_url=f"redis://127.0.0.1:{chosen['redis']}/0",
        )
        through = msgspec.structs.replace(
            self.settings, redis_url=f"redis://127.0.0.1:{self.proxy.port}/0"
        )
        deployment = Deployment(through, self.supervisor)
        deployment.prepare(self._manifest)
        replay_file.send(self.settings, dataset.items)
        more = {name: str(value) for name, value in CUT.items()}
        worker, self.address = deployment.worker_child(is_ready, port=free_port(), **more)
        self.supervisor.start(
            *(deployment.ingest_child(name, **more) for name in self.names), worker
        )
        self.caught_up(60)

    def stop(self) -> None:
        """Stop all processes."""
        with contextlib.suppress(AttributeError):
            self.proxy.clear()
        self.wake_all()
        self.supervisor.stop()
        with contextlib.suppress(AttributeError):
            self.proxy.close()

    def caught_up(self, timeout_s: float) -> None:
        """Return once everything in the topics is applied, records forwarded meanwhile included.

        Raises LocalServerError if nothing is applied for `timeout_s`, or if a process has failed.
        """
        before, deadline = None, time.monotonic() + 10 * timeout_s
        while time.monotonic() < deadline:
            self.supervisor.check()
            try:
                ends = {name: topics.end_offsets(self.settings, name) for name in topics.SOURCES}
                if ends == before:
                    return
                wait_until_applied(self.settings, timeout_s=timeout_s, check=self.supervisor.check)
                before = ends
            except Unavailable:
                time.sleep(0.2)
        raise LocalServerError(f"the topics did not come to rest in {10 * timeout_s:.0f} s")

    # ---- building blocks of faults

    def kill(self, name: str) -> bool:
        """kill -9; False if the process is not running."""
        return self._signal(self._pid(name), signal.SIGKILL)

    @contextlib.contextmanager
    def frozen(self, name: str) -> Iterator[bool]:
        """SIGSTOP, then SIGCONT unless another fault still holds it; False if it is not running."""
        pid = self._pid(name)
        with self._lock:
            stopped = self._signal(pid, signal.SIGSTOP)
            self._frozen[pid] = self._frozen.get(pid, 0) + stopped
        try:
            yield stopped
        finally:
            with self._lock:
                self._frozen[pid] -= stopped
                if stopped and not self._frozen[pid]:
                    self._signal(pid, signal.SIGCONT)

    def wake_all(self) -> None:
        """Send SIGCONT to all processes."""
        for pid in self.supervisor.pids().values():
            self._signal(pid, signal.SIGCONT)

    def copy_files(self, name: str) -> Path:
        """Copy Valkey's append-only files, as they are at one instant."""
        copy = self._home / f"copy-{name}"
        with self.frozen("valkey"):
            for _ in range(5):
                try:
                    shutil.copytree(self._home / "appendonlydir", copy, dirs_exist_ok=True)
                    return copy
                except (OSError, shutil.Error):  # the server is just being replaced: try again
                    shutil.rmtree(copy, ignore_errors=True)
                    time.sleep(0.1)
        raise LocalServerError("Valkey's append-only files could not be copied")

    def swap_files(self, copy: Path | None) -> None:
        """kill -9 of Valkey; it restarts with the copy, or with nothing."""
        ready = self._home / "ready"
        with self._lock:
            shutil.rmtree(ready, ignore_errors=True)
            if copy is None:
                ready.mkdir()
            else:
                copy.rename(ready)
            shutil.rmtree(self._home / "next", ignore_errors=True)
            ready.rename(self._home / "next")
        self.kill("valkey")

    def _pid(self, name: str) -> int:
        return self.supervisor.pids().get(name, 0)

    @staticmethod
    def _signal(pid: int, number: signal.Signals) -> bool:
        if not pid:
            return False
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return False
        return True


def small_generation(folder: Path, dataset: Dataset) -> Manifest:
    """Train generation 1 of the data set's history, briefly, into `<folder>/1`."""
    from embeddings.data.examples import TrainingData
    from embeddings.models.base import Recipe
    from embeddings.training.trainer import train

    profiles = {user: dict(profile.attributes) for user, profile in dataset.profiles.items()}
    data = TrainingData(items=dataset.items, profiles=profiles, clicks=dataset.clicks)
    train(data, folder / "1", "1", recipe=Recipe(epochs=2, seed=1, threads=2))
    return Manifest(generation="1", bundle="1", dimension=64, created_ms=now_ms())


def _with_argv(child: Child, argv: list[str]) -> Child:
    return Child(
        name=child.name,
        argv=argv,
        ready=child.ready,
        cwd=child.cwd,
        ready_timeout_s=child.ready_timeout_s,
        stop_timeout_s=child.stop_timeout_s,
    )
