"""Eddyline's processes on real servers, for the demo, the benchmarks and the tests.

The processes are started as a user starts them and are reached through Kafka and gRPC alone. This
room imports no serving: callers pass the check that says whether a worker is ready.
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

# Given a worker's address, whether it answers queries.
IsReady = Callable[[str], bool]
# A worker waits for Kafka, Redis and the end of the item vectors before it is ready.
READY_S = 60.0
# Exit codes after which a person has to decide (docs/operations.md): no restart.
FINAL_CODES = frozenset({2, 3})
# Another process of this data folder may be starting the servers now.
SERVERS_READY_S = 90.0
# Settings that every child gets from the deployment, besides the folders.
_FEEDS = (
    *(f"{name}_{what}" for name in topics.SOURCES for what in ("topic", "map")),
    *(f"registry_{what}" for what in ("url", "user", "password", "ca_file")),
)
# All processes have to agree on them.
_OF_PATHS = (
    "recall_paths",
    "path_state",
    "popular_fast_half_life_events",
    "popular_slow_half_life_events",
)
_PASSED_ON = (
    "kafka_bootstrap_servers",
    "redis_url",
    "namespace",
    *SECURITY_NAMES,
    *REDIS_NAMES,
    *_FEEDS,
    *_OF_PATHS,
)


@dataclass
class Deployment:
    """Running servers, and Eddyline's processes on them as children of one supervisor.

    settings: with both addresses and the namespace; log files are in `supervisor.log_dir`
    """

    settings: Settings
    supervisor: Supervisor

    def child(self, name: str, module: str, ready: Callable[[], bool], **more: str) -> Child:
        """`python -m module` on these servers. more: settings of this process alone."""
        values = {setting: str(getattr(self.settings, setting)) for setting in _PASSED_ON} | {
            "data_dir": str(Path(self.settings.data_dir).absolute()),
            "bundle_dir": str(self.settings.bundles.absolute()),
        }
        return Child(
            name=name,
            argv=[sys.executable, "-m", module],
            env={f"EDDYLINE_{key.upper()}": value for key, value in (values | more).items()},
            ready=ready,
            ready_timeout_s=READY_S,
            final_codes=FINAL_CODES,
        )

    def ingest_child(self, name: str = "ingest", **more: str) -> Child:
        """An ingest process. It is ready at once: `wait_until_applied` waits for its work."""
        return self.child(name, "streams", lambda: True, **more)

    def worker_child(
        self, is_ready: IsReady, name: str = "worker", port: int = 0, **more: str
    ) -> tuple[Child, str]:
        """(a query worker, its address)."""
        port = port or free_port()
        address = f"127.0.0.1:{port}"
        ready = partial(is_ready, address)
        return self.child(name, "serving", ready, worker_port=str(port), **more), address

    def sharded_children(
        self, count: int, is_ready: IsReady, **more: str
    ) -> tuple[list[Child], list[str], str]:
        """(`count` workers of one shard each and their coordinator, the shards' addresses, its
        address).

        is_ready: also called for the coordinator
        """
        workers = [
            self.worker_child(
                is_ready,
                f"shard-{n}",
                0,
                shard=str(n),
                shards=str(count),
                shard_service="true",
                **more,
            )
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
        """Create the topics, and activate the generation if it is not active."""
        topics.ensure_topics(self.settings)
        if generations.active(self.settings) != manifest:
            generations.publish(self.settings, manifest)


@contextlib.contextmanager
def running_servers(settings: Settings, on_step: Callable[[str], None]) -> Iterator[Deployment]:
    """A deployment on the servers of the settings, on those that run here, or on new ones.

    New servers and all children end with the block.
    """
    supervisor = Supervisor(log_dir(settings))
    try:
        if _wait_for_running_servers(settings, on_step):
            yield Deployment(discovery.resolve(settings), supervisor)
            return
        with local_servers(settings, supervisor, owner="eddyline demo", on_step=on_step) as made:
            yield Deployment(made, supervisor)
    finally:
        supervisor.stop()


def _wait_for_running_servers(settings: Settings, on_step: Callable[[str], None]) -> bool:
    """Whether another process runs this data folder's servers; waits until they are ready."""
    deadline = time.monotonic() + SERVERS_READY_S
    while (found := discovery.running(settings)) is not None:
        if found.state == "ready":
            return True
        if time.monotonic() > deadline:
            raise LocalServerError(f"`{found.owner}` (pid {found.pid}) is still at: {found.step}")
        on_step(f"waiting for `{found.owner}`, which is {found.step or 'starting'}")
        time.sleep(0.1)
    return False


def free_port() -> int:
    """A free port of the loopback interface."""
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
    """Return once ingest has applied every record that is in `clicks`, `items` and `users` now.

    check: called at each turn; raises to end the wait, as `Supervisor.check` does
    Raises LocalServerError if nothing is applied for `timeout_s`.
    """
    store = RedisStore(settings)
    logs = topics.log_ids(settings, topics.SOURCES)
    by_topic = {name: topics.end_offsets(settings, name) for name in topics.SOURCES}
    ends = {(name, p): end for name, found in by_topic.items() for p, end in found.items() if end}
    total, last, progress_s = sum(ends.values()), -1, time.monotonic()
    # Partitions that were at their end are read once more at the last, all together.
    done: set[tuple[str, int]] = set()
    try:
        while True:
            check()
            applied, whole = 0, not done
            for (name, p), end in ends.items():
                if (name, p) in done:
                    applied += end
                    continue
                found = min(_applied(store, name, p, logs[name]), end)
                applied += found
                if found == end:
                    done.add((name, p))
            on_progress(applied, total)
            if applied == total:
                if whole:
                    return
                done.clear()
                continue
            if applied != last:
                last, progress_s = applied, time.monotonic()
            if time.monotonic() - progress_s > timeout_s:
                raise LocalServerError(
                    f"ingest has applied {applied:,} of {total:,} records and makes no progress; "
                    f"see {log_dir(settings) / 'ingest.log'}"
                )
            time.sleep(0.02)
    finally:
        store.close()


def _applied(store: StateStore, name: str, partition: int, log: LogId) -> int:
    slots = ["i0"] if name == topics.ITEMS else [user_slot(partition)]
    slots += ["i0"] if name == topics.CLICKS else []
    fences = store.fences(Source(name, partition), slots).values()
    return min(fence.offset + 1 if fence and fence.log == log else 0 for fence in fences)


def with_namespace(settings: Settings, dataset: Dataset) -> Settings:
    """The settings with the data set's own namespace, unless one is set: data sets do not mix."""
    if settings.namespace:
        return settings
    return msgspec.structs.replace(settings, namespace=f"demo-{dataset.name}")
