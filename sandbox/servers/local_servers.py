"""The local pair: one Kafka and one Valkey on one data folder, run by this process through a Supervisor.

    with Supervisor(log_dir(settings)) as supervisor:
        with local_servers(settings, supervisor, owner="eddyline demo") as settings:
            ...       # settings now hold both addresses; other processes find them by endpoints.resolve()

What the settings name already is not started. The data survive; only one process at a time may run the pair
of a folder.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout

from eddyline.errors import LocalServerError
from eddyline.process.discovery import LocalServer, LocalServers, lock_file, run_dir, servers_file
from eddyline.process.files import write_atomically
from eddyline.settings.loader import Settings
from sandbox.servers import free_ports, kafka_broker, kafka_jars, valkey
from sandbox.servers.supervisor import Child, Supervisor

# Somebody who only looks (endpoints.held) holds the lock for microseconds.
LOCK_PATIENCE_S = 1.0


def log_dir(settings: Settings) -> Path:
    """`<data_dir>/logs`, where the local servers and whatever else is supervised write."""
    return Path(settings.data_dir).absolute() / "logs"


def needed(settings: Settings) -> tuple[bool, bool]:
    """(start Kafka, start Redis): those that the settings do not name."""
    return not settings.kafka_bootstrap_servers, not settings.redis_url


@contextlib.contextmanager
def local_servers(
    settings: Settings,
    supervisor: Supervisor,
    *,
    owner: str,
    tell: Callable[[str], None] | None = None,
) -> Iterator[Settings]:
    """Start what the settings do not name, wait until it answers, and yield the settings with both addresses.

    tell(step) is called with a few words before every step that may take a second. The supervisor is stopped
    on the way out (its other children with it, the last started first), before the folder is given free.
    Raises LocalServerError: another process runs this folder's servers, or one cannot be fetched or started.
    """
    lock = _locked(settings)
    record = _Record(settings, supervisor, owner, tell or (lambda _step: None))
    try:
        yield record.start()
    finally:
        supervisor.stop()
        servers_file(settings).unlink(missing_ok=True)
        lock.release()


class _Record:
    """Starts the servers and keeps servers.json true, also when a server got a new pid."""

    def __init__(
        self, settings: Settings, supervisor: Supervisor, owner: str, tell: Callable[[str], None]
    ) -> None:
        self.settings = settings
        self.supervisor = supervisor
        self.tell = tell
        self.servers = LocalServers(
            owner=owner,
            pid=os.getpid(),
            data_dir=str(run_dir(settings).parent),
            namespace=settings.namespace,
            state="starting",
        )

    def start(self) -> Settings:
        kafka_wanted, redis_wanted = needed(self.settings)
        names = ("kafka", "controller") * kafka_wanted + ("redis",) * redis_wanted
        chosen = free_ports.choose_port(run_dir(self.settings), names)
        data_dir = Path(self.settings.data_dir)
        children: list[Child] = []
        found: dict[str, LocalServer] = {}
        if redis_wanted:
            program, version = valkey.program()
            children.append(valkey.prepare(data_dir, chosen["redis"], program))
            found["redis"] = self._server(
                f"redis://127.0.0.1:{chosen['redis']}/0", version, "valkey"
            )
        if kafka_wanted:
            self._step("checking Apache Kafka's jars")
            classpath = kafka_jars.fetch(
                lambda done, total: self._step(f"fetching Apache Kafka's jars: {done} of {total}")
            )
            self._step("preparing Kafka's data folder")
            children.append(
                kafka_broker.prepare(data_dir, chosen["kafka"], chosen["controller"], classpath)
            )
            found["kafka"] = self._server(
                f"127.0.0.1:{chosen['kafka']}", f"Apache Kafka {kafka_jars.VERSION}", "kafka"
            )
        self._step(f"starting {' and '.join(child.name.capitalize() for child in children)}")
        self.supervisor.start(*children)
        self.servers = msgspec.structs.replace(self.servers, state="ready", step="", **found)
        self._write()
        self.supervisor.listen(self._write)
        return msgspec.structs.replace(
            self.settings,
            kafka_bootstrap_servers=self.settings.kafka_bootstrap_servers or found["kafka"].address,
            redis_url=self.settings.redis_url or found["redis"].address,
        )

    def _server(self, address: str, version: str, name: str) -> LocalServer:
        return LocalServer(
            address=address, version=version, pid=0, log=str(self.supervisor.log_file(name))
        )

    def _step(self, step: str) -> None:
        self.tell(step)
        self.servers = msgspec.structs.replace(self.servers, step=step)
        self._write()

    def _write(self) -> None:
        pids = self.supervisor.pids()
        servers = self.servers
        if servers.kafka:
            servers = msgspec.structs.replace(
                servers, kafka=msgspec.structs.replace(servers.kafka, pid=pids.get("kafka", 0))
            )
        if servers.redis:
            servers = msgspec.structs.replace(
                servers, redis=msgspec.structs.replace(servers.redis, pid=pids.get("valkey", 0))
            )
        write_atomically(
            servers_file(self.settings),
            msgspec.json.format(msgspec.json.encode(servers), indent=2) + b"\n",
        )


def _locked(settings: Settings) -> FileLock:
    path = lock_file(settings)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, LOCK_PATIENCE_S, thread_local=False, fallback_to_soft=False)
        lock.acquire()
    except Timeout:
        raise LocalServerError(
            f"another process runs the local servers of {settings.data_dir}; stop it (`eddyline "
            "down`, or Ctrl-C in the demo), or name another folder with EDDYLINE_DATA_DIR"
        ) from None
    except OSError as error:
        raise LocalServerError(
            f"{path}: {error.strerror}; `data_dir` names another place"
        ) from None
    return lock
