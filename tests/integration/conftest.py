"""A whole Eddyline for the integration tests: real servers, real processes, a tiny trained
generation.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import pytest
from kafka import KafkaConsumer, TopicPartition

from cli.commands import replay_file
from eddyline.generations import Manifest
from eddyline.kafka import clients, producers
from eddyline.kafka.producers import now_ms, sent_to
from eddyline.schema.events import Click, Item, shifted_to_now
from eddyline.settings.loader import Settings
from eddyline.stores.redis import RedisStore
from sandbox import processes
from sandbox.datasets import synthetic
from sandbox.datasets.dataset import Dataset
from sandbox.processes import Deployment
from sandbox.servers.local_servers import local_servers, log_dir
from sandbox.servers.supervisor import Supervisor
from serving.rpc.client import Client, is_ready
from tests.conftest import once_per_run
from tests.decayed_events import NO_DECAY


@dataclass
class Live:
    """One namespace with its processes. Every wait in it ends."""

    settings: Settings
    deployment: Deployment
    dataset: Dataset
    address: str = ""
    producer: Any = None
    opened: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def supervisor(self) -> Supervisor:
        return self.deployment.supervisor

    def client(self, address: str = "") -> Client:
        return self.opened.enter_context(Client(address or self.address))

    def click(self, user: str, item: str, **more: Any) -> tuple[int, int]:
        """Send one click; its token (partition, offset)."""
        click = Click(
            **{"user_id": user, "item_id": item, "at_ms": now_ms(), "event_id": uuid.uuid4().hex}
            | more
        )
        return sent_to(producers.send_click(self.producer, self.settings, click), self.settings)

    def item(self, item: Item) -> tuple[int, int]:
        return sent_to(producers.send_item(self.producer, self.settings, item), self.settings)

    def delete(self, item_id: str) -> tuple[int, int]:
        return sent_to(producers.send_delete(self.producer, self.settings, item_id), self.settings)

    def raw(
        self, topic: str, value: bytes | None, key: bytes | None = None, **more: Any
    ) -> tuple[int, int]:
        sent = self.producer.send(self.settings.prefixed(topic), value, key=key, **more)
        return sent_to(sent, self.settings)

    def applied(self, timeout_s: float = 60) -> None:
        """Wait until ingest has applied all that was sent."""
        processes.wait_until_applied(self.settings, timeout_s=timeout_s)

    def reads_clicks(self, name: str) -> bool:
        """Whether this ingest process has opened partitions of `clicks`."""
        log = self.supervisor.log_file(name).read_text(encoding="utf-8")
        return re.search(r"reading from.*clicks:\d", log) is not None

    def kill(self, name: str, sig: signal.Signals = signal.SIGKILL) -> int:
        pid = self.supervisor.pids()[name]
        os.kill(pid, sig)
        return pid

    def read(self, topic: str, timeout_s: float = 60) -> list[Any]:
        """Every committed record of a topic, by partition and offset."""
        name = self.settings.prefixed(topic)
        consumer = KafkaConsumer(
            **clients.client_options(self.settings), group_id=None, isolation_level="read_committed"
        )
        try:
            at = [TopicPartition(name, p) for p in consumer.partitions_for_topic(name) or ()]
            consumer.assign(at)
            consumer.seek_to_beginning(*at)
            ends, records = consumer.end_offsets(at), []
            deadline = time.monotonic() + timeout_s
            while any(consumer.position(p) < end for p, end in ends.items()):
                assert time.monotonic() < deadline, f"{name} could not be read to its end"
                records += [r for batch in consumer.poll(timeout_ms=200).values() for r in batch]
            return sorted(records, key=lambda r: (r.partition, r.offset))
        finally:
            consumer.close()

    def wait_for(self, what: str, check: Callable[[], Any], timeout_s: float = 60) -> Any:
        """Ask until the check gives something true."""
        deadline, pause_s = time.monotonic() + timeout_s, 0.02
        while not (found := check()):
            assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s for: {what}"
            time.sleep(pause_s)  # a check may cost milliseconds of both cores
            pause_s = min(1.1 * pause_s, 0.1)
        return found


@pytest.fixture(scope="session")
def dataset() -> Dataset:
    return synthetic.generate(items=300, users=120, clicks=6_000, seed=7)


@pytest.fixture(scope="session")
def bundle(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """(the folder of bundles, generation 1): trained for real, if briefly."""

    def make(folder: Path) -> None:
        from embeddings.data.examples import TrainingData
        from embeddings.models.base import Recipe
        from embeddings.training.trainer import train

        profiles = {user: dict(profile.attributes) for user, profile in dataset.profiles.items()}
        data = TrainingData(items=dataset.items, profiles=profiles, clicks=dataset.clicks)
        train(data, folder / "1", "1", recipe=Recipe(epochs=2, seed=1))

    folder = once_per_run(tmp_path_factory, "generations", make)
    return folder, Manifest(generation="1", bundle="1", dimension=64, created_ms=now_ms())


@contextlib.contextmanager
def living(
    settings: Settings,
    dataset: Dataset,
    bundle: tuple[Path, Manifest],
    *,
    with_items: bool = True,
    with_worker: bool = True,
    worker: Mapping[str, str] = MappingProxyType({}),
    **ingest: str,
) -> Iterator[Live]:
    """Topics, generation, ingest and one worker in a namespace of their own; all ends with the
    block.

    with_items:  the data set's items are sent and applied
    with_worker: False for a test that sends no query; it starts sooner
    worker, ingest: more settings of these processes
    """
    folder, manifest = bundle
    settings = msgspec.structs.replace(
        settings, bundle_dir=str(folder), path_state="all", popular_fast_half_life_events=NO_DECAY
    )
    supervisor = Supervisor(Path(settings.data_dir) / "logs")
    live = Live(settings, Deployment(settings, supervisor), dataset)
    more = {
        "clicks_partitions": str(settings.clicks_partitions),
        "items_partitions": str(settings.items_partitions),
        "redis_timeout_ms": "1000",
        "kafka_timeout_ms": "5000",
        "backoff_ms_max": "500",
    }
    try:
        live.deployment.prepare(manifest)
        live.producer = producers.make_producer(settings)
        live.opened.callback(live.producer.close, timeout=5)
        if with_items:
            replay_file.send(settings, dataset.items)
        children = [live.deployment.ingest_child(**more, **ingest)]
        if with_worker:
            child, live.address = live.deployment.worker_child(is_ready, **more, **worker)
            children.append(child)
        supervisor.start(*children)
        live.applied()
        yield live
    finally:
        live.opened.close()
        supervisor.stop()


@pytest.fixture(scope="session")
def live(
    servers: Settings,
    dataset: Dataset,
    bundle: tuple[Path, Manifest],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Live]:
    """One system for all tests that leave its processes alone; each uses users and items of its
    own.
    """
    folder = tmp_path_factory.mktemp("live")
    settings = msgspec.structs.replace(
        servers, namespace=f"t-{uuid.uuid4().hex[:12]}", data_dir=str(folder)
    )
    with living(settings, dataset, bundle) as made:
        replay_file.send(settings, shifted_to_now(dataset.clicks, now_ms()))
        made.applied()
        yield made


@pytest.fixture
def make_live(
    fresh_settings: Settings, dataset: Dataset, bundle: tuple[Path, Manifest]
) -> Iterator[Callable[..., Live]]:
    """A system of the test's own, to break."""
    with contextlib.ExitStack() as stack:

        def make(servers: OwnServers | None = None, **more: Any) -> Live:
            """A system on these or on the shared servers. more: see `living`."""
            settings = servers.settings if servers else fresh_settings
            return stack.enter_context(living(settings, dataset, bundle, **more))

        yield make


class OwnServers:
    """Servers of one test's own, to kill."""

    def __init__(self, settings: Settings, supervisor: Supervisor) -> None:
        self.settings = settings
        self.supervisor = supervisor

    def pid(self, name: str) -> int:
        return self.supervisor.pids()[name]

    def kill(self, name: str) -> None:
        os.kill(self.pid(name), signal.SIGKILL)

    def pause(self, name: str) -> None:
        os.kill(self.pid(name), signal.SIGSTOP)

    def resume(self, name: str) -> None:
        os.kill(self.pid(name), signal.SIGCONT)

    def up(self, name: str) -> bool:
        return self.supervisor.states()[name][0] == "ready"


@contextlib.contextmanager
def started(settings: Settings, folder: Path) -> Iterator[OwnServers]:
    """Local servers for what the settings do not name."""
    base = msgspec.structs.replace(settings, data_dir=str(folder))
    supervisor = Supervisor(log_dir(base))
    with local_servers(base, supervisor, owner="a test") as found:
        yield OwnServers(found, supervisor)


@pytest.fixture
def own_servers(tmp_path: Path) -> Iterator[OwnServers]:
    """A Kafka and a Redis, whatever the environment names: this test kills Kafka."""
    base = Settings(clicks_partitions=4, items_partitions=2, worker_port=0)
    with started(base, tmp_path / "own") as made:
        yield made


@pytest.fixture
def own_valkey(fresh_settings: Settings, tmp_path: Path) -> Iterator[OwnServers]:
    """The shared Kafka and a Redis, whatever the environment names: this test kills Redis alone."""
    base = msgspec.structs.replace(fresh_settings, redis_url="")
    with started(base, tmp_path / "own") as made:
        yield made


@pytest.fixture
def store(live: Live) -> Iterator[RedisStore]:
    made = RedisStore(live.settings)
    yield made
    made.close()
