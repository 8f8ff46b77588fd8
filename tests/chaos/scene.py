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
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import kafka
import msgspec
from confluent_kafka import KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from cli.commands import replay_file
from eddyline import generations
from eddyline.errors import EddylineError, LocalServerError, Unavailable
from eddyline.generations import Manifest
from eddyline.kafka import topics
from eddyline.kafka.producers import now_ms
from eddyline.schema.partitioning import user_slot
from eddyline.settings.loader import Settings
from eddyline.stores import redis_client
from eddyline.stores.redis import RedisStore
from eddyline.stores.state_store import Source
from sandbox.datasets.dataset import Dataset
from sandbox.processes import Deployment, free_port, wait_until_applied
from sandbox.servers import free_ports, kafka_jars, valkey
from sandbox.servers import kafka_broker as broker
from sandbox.servers.supervisor import Child, Supervisor
from serving.rpc.client import is_ready
from tests.chaos import foreign
from tests.chaos.proxy import Proxy, ProxyFault
from tests.chaos.recorder import Recorder
from tests.decayed_events import NO_DECAY
from tests.model.eras import Era

# Small limits, so that the run reaches each: full histories, events that come too late, idle users.
CUT = {
    "clicks_partitions": 4,
    "items_partitions": 2,
    "history_length_max": 50,
    "lateness_s_max": 3_600,
    "user_idle_s_max": 12,
    "deleted_items_kept_s": 8,
    "path_state": "all",
    "popular_fast_half_life_events": NO_DECAY,
    "clicks_map": str(foreign.MAP),
    "redis_timeout_ms": 500,
    "kafka_timeout_ms": 5_000,
    "backoff_ms_max": 500,
    "snapshot_interval_s": 20,
}
# Topics as another team makes them: small segments, compaction within seconds, other codecs.
_COMPACT = {
    "cleanup.policy": "compact",
    "segment.ms": "3000",
    "min.cleanable.dirty.ratio": "0.001",
    "max.compaction.lag.ms": "4000",
    "compression.type": "zstd",
}
FOREIGN = {
    topics.CLICKS: {"segment.bytes": "1048576", "segment.ms": "15000", "retention.ms": "86400000"},
    topics.ITEMS: _COMPACT,
    topics.USERS: _COMPACT | {"compression.type": "snappy"},
}
# A topic of patches must keep every one.
_WHOLE = {
    "cleanup.policy": "delete",
    "retention.ms": "-1",
    "segment.ms": "3000",
    "compression.type": "zstd",
}
# Generations end soon after they are outdated; ingest and worker have left them by then.
GRACE_S = 3
# Published with each generation and never active, so that the one before is outdated.
SPARE = ("a", "b")
# Killed processes and servers are back within this time.
BACK_S = 60.0
# Valkey's start command: a folder `next` replaces the files. So the swap happens between the end of
# one server and the start of the next, however fast the supervisor is.
SWAP = 'if [ -d next ]; then rm -rf appendonlydir && mv next appendonlydir; fi; exec "$@"'


class Scene:
    """Thread rule: the faults' threads may call everything but `start` and `stop`.

    settings: with the address of Redis itself, not of the proxy
    eras:     what ingest ran with; see `change_ingest`
    manifests: the generations, which `retrain` activates one after the other
    patches:  the records of `items` are patches
    """

    def __init__(
        self,
        folder: Path,
        bundle_dir: Path,
        manifests: Sequence[Manifest],
        ingests: int,
        patches: bool = False,
    ) -> None:
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
            generation_grace_s=GRACE_S,
            items_patches=patches,
            **CUT,
        )
        self.proxy: Proxy
        # One fault of the proxy at a time: two would hide each other.
        self.proxy_turn = threading.Lock()
        # Copies of Redis are made and put back before or after a change of the log or of ingest.
        self.copies = threading.Lock()
        self.eras: list[Era] = []
        self.recorder: Recorder
        self._manifests = list(manifests)
        self._ingests: list[Child] = []
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
        self._make_topics()
        deployment.prepare(self._manifests[0])
        self.eras.append(Era(self.settings, self._manifests[0].generation))
        self.recorder = Recorder(self.settings)
        replay_file.send(self.settings, dataset.items)
        more = {name: str(value) for name, value in CUT.items()}
        more["items_patches"] = str(self.settings.items_patches).lower()
        worker, self.address = deployment.worker_child(is_ready, port=free_port(), **more)
        self._ingests = [deployment.ingest_child(name, **more) for name in self.names]
        self.supervisor.start(*self._ingests, worker)
        self.caught_up(60)

    def stop(self) -> None:
        """Stop all processes."""
        with contextlib.suppress(AttributeError):
            self.proxy.clear()
        self.wake_all()
        with contextlib.suppress(AttributeError):
            self.recorder.stop()
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

    # ---- changes of the log and of ingest

    def retain(self) -> int:
        """Delete the head of every partition of `clicks`, up to its fences; the offsets deleted."""
        with self.copies:
            deadline, deleted = time.monotonic() + BACK_S, 0
            while not deleted and time.monotonic() < deadline:
                time.sleep(1)  # a Valkey that was just killed does not answer any more
                with contextlib.suppress(Unavailable, KafkaException):
                    deleted = self._retain()
            return deleted

    def _retain(self) -> int:
        applied = self._applied(topics.CLICKS)
        before = topics.beginning_offsets(self.settings, topics.CLICKS)
        read = self.recorder.advance(BACK_S)
        name = self.settings.prefixed(topics.CLICKS)
        upto = {
            at.partition: min(applied[at.partition], offset)
            for at, offset in read.items()
            if at.topic == name
        }
        admin = AdminClient({"bootstrap.servers": self.settings.kafka_bootstrap_servers})
        heads = [TopicPartition(name, p, at) for p, at in upto.items() if at > before[p]]
        for done in admin.delete_records(heads).values() if heads else ():
            done.result(timeout=BACK_S)
        return sum(at.offset - before[at.partition] for at in heads)

    def change_ingest(self, generation: str = "", **changed: int) -> None:
        """Kill all ingest processes at once; they come back with other settings or another
        generation. The new era starts where the fences are while none of them runs.
        """
        with self.copies, self.proxy_turn:
            self._await_reread()
            self.proxy.inject(ProxyFault("error", time.monotonic() + 10 * BACK_S, "LOADING"))
            try:
                if generation:
                    [manifest] = [m for m in self._manifests if m.generation == generation]
                    self._publish(manifest)
                    self._kill_worker()
                for child in self._ingests:
                    assert isinstance(child.env, dict)
                    child.env.update({f"EDDYLINE_{n.upper()}": str(v) for n, v in changed.items()})
                old = {name: self._pid(name) for name in self.names}
                for name in self.names:
                    self.kill(name)
                deadline = time.monotonic() + BACK_S
                while any(self._pid(name) in (0, old[name]) for name in self.names):
                    if time.monotonic() > deadline:
                        raise LocalServerError("the killed ingest processes do not come back")
                    time.sleep(0.05)
                starts, before = self._starts(), None
                while starts != before:  # the dead ones may have sent a write that Redis still does
                    time.sleep(0.5)
                    starts, before = self._starts(), starts
                settings = msgspec.structs.replace(self.eras[-1].settings, **changed)
                name = generation or self.eras[-1].generation
                self.eras.append(Era(settings, name, starts))
            finally:
                self.proxy.clear()

    def retrain(self) -> str:
        """Activate the next generation; ingest and worker load it. Returns its id.

        The one before ends `GRACE_S` later.
        """
        names = [manifest.generation for manifest in self._manifests]
        following = names[names.index(self.eras[-1].generation) + 1]
        self.change_ingest(following)
        return following

    def ended(self) -> set[str]:
        """The generations that have ended, once the time of all of them is over."""
        ended = generations.read(self.settings).ended
        due_ms = max((end.remove_ms for end in ended.values()), default=0)
        time.sleep(max(0, due_ms - now_ms()) / 1_000)
        return set(ended)

    def remove_ended(self, names: Collection[str], timeout_s: float) -> list[str]:
        """Return once ingest has removed what these generations left in Redis, or what is left."""
        client = redis_client.client(self.settings, timeout_ms=30_000)
        head, deadline = self.settings.key_prefix, time.monotonic() + timeout_s
        try:
            for name in self.names:  # ingest looks at its start
                self.kill(name)
            while True:
                left = [
                    key.decode()
                    for name in names
                    for of in (f"{{u*}}:e:{name}:*", f"fence:{{i*}}:items@{name}:*")
                    for key in client.scan_iter(match=head + of, count=1_000)
                ]
                if not left or time.monotonic() > deadline:
                    return sorted(left)
                time.sleep(0.5)
        finally:
            client.close()

    def _await_reread(self) -> None:
        """After an older copy of Redis came back: return once its clicks are applied again.

        What was forwarded of them follows the settings of their first application, and the model
        has one era for each record.
        """
        name, deadline = self.settings.prefixed(topics.CLICKS), time.monotonic() + BACK_S
        places = [kafka.TopicPartition(name, p) for p in range(self.settings.clicks_partitions)]
        while time.monotonic() < deadline:
            with contextlib.suppress(EddylineError):
                with topics.open_admin(self.settings) as admin:
                    group = self.settings.prefixed("eddyline-ingest")
                    committed = admin.list_group_offsets({group: places})[group]
                applied = self._applied(topics.CLICKS, users_only=True)
                if all(applied[at.partition] >= found.offset for at, found in committed.items()):
                    return
            time.sleep(0.5)

    def _kill_worker(self) -> None:
        deadline = time.monotonic() + BACK_S
        while not self.kill("worker") and time.monotonic() < deadline:
            time.sleep(0.1)

    def _publish(self, manifest: Manifest) -> None:
        name = manifest.generation
        spare = [msgspec.structs.replace(manifest, generation=f"{name}{more}") for more in SPARE]
        deadline = time.monotonic() + BACK_S
        while True:
            try:
                generations.publish(self.settings, manifest)
                for one in spare:
                    generations.publish(self.settings, one, activate=False)
                return
            except Unavailable:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)

    def _starts(self) -> dict[str, dict[int, int]]:
        return {name: self._applied(name, users_only=True) for name in topics.SOURCES}

    def _applied(self, topic: str, users_only: bool = False) -> dict[int, int]:
        """Partition -> the offset after the lowest fence of its slots; waits for Redis.

        users_only: popularity counts do not depend on what changes, and may lag
        """
        store, deadline = RedisStore(self.settings), time.monotonic() + BACK_S
        of_users = topic != topics.ITEMS
        partitions = self.settings.clicks_partitions if of_users else self.settings.items_partitions
        found: dict[int, int] = {}
        try:
            while len(found) < partitions:
                p = len(found)
                slots = [user_slot(p)] if of_users else ["i0"]
                slots += ["i0"] if topic == topics.CLICKS and not users_only else []
                try:
                    fences = store.fences(Source(topic, p), slots).values()
                    found[p] = min(f.offset + 1 if f else 0 for f in fences)
                except Unavailable:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.2)
        finally:
            store.close()
        return found

    def _make_topics(self) -> None:
        admin = AdminClient({"bootstrap.servers": self.settings.kafka_bootstrap_servers})
        made = []
        foreign = dict(FOREIGN)
        if self.settings.items_patches:
            foreign[topics.ITEMS] = _WHOLE
        for name, more in foreign.items():
            partitions, _ = topics.topic_configs(self.settings, name)
            config = {"message.timestamp.type": "LogAppendTime", **more}
            made.append(NewTopic(self.settings.prefixed(name), partitions, 1, config=config))
        for done in admin.create_topics(made).values():
            done.result(timeout=30)

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


def small_generation(folder: Path, dataset: Dataset, generation: str = "1") -> Manifest:
    """Train a generation of the data set's history, briefly, into `<folder>/<generation>`."""
    from embeddings.data.examples import TrainingData
    from embeddings.models.base import Recipe
    from embeddings.training.trainer import train

    profiles = {user: dict(profile.attributes) for user, profile in dataset.profiles.items()}
    data = TrainingData(items=dataset.items, profiles=profiles, clicks=dataset.clicks)
    recipe = Recipe(epochs=2, seed=int(generation))
    train(data, folder / generation, generation, recipe=recipe)
    return Manifest(generation=generation, bundle=generation, dimension=64, created_ms=now_ms())


def _with_argv(child: Child, argv: list[str]) -> Child:
    return Child(
        name=child.name,
        argv=argv,
        ready=child.ready,
        cwd=child.cwd,
        ready_timeout_s=child.ready_timeout_s,
        stop_timeout_s=child.stop_timeout_s,
    )
