"""What the demo, the benchmarks and the tests stand on: servers, topics, a generation, processes.

All real: the processes are started as a user starts them, and spoken to through Kafka and gRPC alone.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec

from eddyline import generations
from eddyline.errors import LocalServerError
from eddyline.generations import Manifest
from eddyline.kafka import topics
from eddyline.process import discovery
from eddyline.schema.partitioning import user_slot
from eddyline.settings.kafka import SECURITY_NAMES
from eddyline.settings.loader import Settings
from eddyline.stores.redis import RedisStore
from eddyline.stores.redis_url import NAMES as REDIS_NAMES
from eddyline.stores.state_store import LogId, Source, StateStore
from sandbox.datasets.dataset import Dataset
from sandbox.servers.local_servers import local_servers, log_dir
from sandbox.servers.supervisor import Child, Supervisor

Tell = Callable[[str], None]
# A worker waits for Kafka, Redis and the end of the item vectors before it is ready.
READY_S = 60.0
# Exit codes of ingest and worker after which a person has to decide (docs/operations.md).
FINAL_CODES = frozenset({2, 3})
# Another process of this folder may be starting the servers just now.
OTHERS_READY_S = 90.0


@dataclass
class Deployment:
    """Running servers and the processes on them.

    settings: with both addresses and the namespace; log files lie in `supervisor.log_dir`
    """

    settings: Settings
    supervisor: Supervisor

    def child(self, name: str, module: str, ready: Callable[[], bool], **more: str) -> Child:
        """A process of ours, told where its servers are by its environment."""
        env = {
            "EDDYLINE_KAFKA_BOOTSTRAP_SERVERS": self.settings.kafka_bootstrap_servers,
            "EDDYLINE_REDIS_URL": self.settings.redis_url,
            "EDDYLINE_NAMESPACE": self.settings.namespace,
            "EDDYLINE_DATA_DIR": str(Path(self.settings.data_dir).absolute()),
            "EDDYLINE_BUNDLE_DIR": str(self.settings.bundles.absolute()),
        }
        env |= {f"EDDYLINE_{name.upper()}": getattr(self.settings, name) for name in SECURITY_NAMES}
        env |= {
            f"EDDYLINE_{name.upper()}": str(getattr(self.settings, name)) for name in REDIS_NAMES
        }
        env |= {f"EDDYLINE_{key.upper()}": value for key, value in more.items()}
        argv = [sys.executable, "-m", module]
        return Child(
            name=name,
            argv=argv,
            env=env,
            ready=ready,
            ready_timeout_s=READY_S,
            final_codes=FINAL_CODES,
        )

    def ingest_child(self, name: str = "ingest", **more: str) -> Child:
        """An ingest process. It is ready at once: what waits for it asks the fences, and `check`."""
        return self.child(name, "streams", lambda: True, **more)

    def worker_child(
        self, is_ready: Callable[[str], bool], name: str = "worker", port: int = 0, **more: str
    ) -> tuple[Child, str]:
        """(a query worker, its address). is_ready: given the address, whether the worker answers."""
        port = port or free_port()
        address = f"127.0.0.1:{port}"
        ready = partial(is_ready, address)
        return self.child(name, "serving", ready, worker_port=str(port), **more), address

    def sharded_children(
        self, count: int, is_ready: Callable[[str], bool], **more: str
    ) -> tuple[list[Child], list[str], str]:
        """(`count` workers of one shard each and their coordinator, the shards' addresses, its address).

        is_ready: as for `worker_child`; asked for each shard and for the coordinator
        """
        workers = [
            self.worker_child(is_ready, f"shard-{n}", 0, shard=str(n), shards=str(count), **more)
            for n in range(count)
        ]
        addresses = [address for _, address in workers]
        port = free_port()
        address = f"127.0.0.1:{port}"
        coordinator = self.child(
            "coordinator",
            "serving.coordinator",
            partial(is_ready, address),
            coordinator_port=str(port),
            shard_addresses=",".join(addresses),
            **more,
        )
        return [*(child for child, _ in workers), coordinator], addresses, address

    def prepare(self, manifest: Manifest) -> None:
        """Make the topics, and the generation the active one where it is not."""
        topics.ensure_topics(self.settings)
        if generations.active(self.settings) != manifest:
            generations.publish(self.settings, manifest)


@contextlib.contextmanager
def running_servers(settings: Settings, tell: Tell) -> Iterator[Deployment]:
    """Servers of the settings, else those that run here already, else new ones; all new ones end with it."""
    supervisor = Supervisor(log_dir(settings))
    try:
        if _wait_for_running_servers(settings, tell):
            yield Deployment(discovery.resolve(settings), supervisor)
            return
        with local_servers(settings, supervisor, owner="eddyline demo", tell=tell) as resolved:
            yield Deployment(resolved, supervisor)
    finally:
        supervisor.stop()


def _wait_for_running_servers(settings: Settings, tell: Tell) -> bool:
    """Whether another process runs this folder's servers; waits until they are ready."""
    deadline = time.monotonic() + OTHERS_READY_S
    while (found := discovery.running(settings)) is not None:
        if found.state == "ready":
            return True
        if time.monotonic() > deadline:
            raise LocalServerError(f"`{found.owner}` (pid {found.pid}) is still at: {found.step}")
        tell(f"waiting for `{found.owner}`, which is {found.step or 'starting'}")
        time.sleep(0.1)
    return False


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until_applied(
    settings: Settings,
    *,
    timeout_s: float,
    on_progress: Callable[[int, int], None] = lambda applied, total: None,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Return once ingest has applied all that lies in `clicks`, `items` and `users` now.

    check: may raise where ingest has ended for good
    Raises LocalServerError where nothing moves for `timeout_s`.
    """
    mine = RedisStore(settings)
    logs = topics.log_ids(settings, topics.SOURCES)
    names = {name: topics.end_offsets(settings, name) for name in topics.SOURCES}
    ends = {(name, p): end for name, offsets in names.items() for p, end in offsets.items() if end}
    last, since = -1, time.monotonic()
    try:
        while True:
            check()
            applied = sum(
                min(_applied(mine, name, p, logs[name]), end) for (name, p), end in ends.items()
            )
            on_progress(applied, sum(ends.values()))
            if applied == sum(ends.values()):
                return
            if applied != last:
                last, since = applied, time.monotonic()
            if time.monotonic() - since > timeout_s:
                raise LocalServerError(
                    f"ingest has applied {applied:,} of {sum(ends.values()):,} records and does not move; "
                    f"see {log_dir(settings) / 'ingest.log'}"
                )
            time.sleep(0.02)
    finally:
        mine.close()


def _applied(store: StateStore, name: str, partition: int, log: LogId) -> int:
    slots = ["i0"] if name == topics.ITEMS else [user_slot(partition)]
    slots += ["i0"] if name == topics.CLICKS else []
    fences = store.fences(Source(name, partition), slots).values()
    return min(fence.offset + 1 if fence and fence.log == log else 0 for fence in fences)


def with_namespace(settings: Settings, dataset: Dataset) -> Settings:
    """The settings with a namespace of the data set's own: data sets do not mix on the same servers."""
    if settings.namespace:
        return settings
    return msgspec.structs.replace(settings, namespace=f"demo-{dataset.name}")
