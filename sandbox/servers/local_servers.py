"""One Kafka and one Valkey on a data folder, as children of this process's supervisor.

    with Supervisor(log_dir(settings)) as supervisor:
        with local_servers(settings, supervisor, owner="eddyline demo") as settings:
            ...  # settings have both addresses; other processes call discovery.resolve()

A server that the settings name is not started. The data survive. One process at a time may run the
servers of a data folder.
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

# Another process that only checks the lock holds it for microseconds.
LOCK_TIMEOUT_S = 1.0


def log_dir(settings: Settings) -> Path:
    """`<data_dir>/logs`: the output of every supervised process."""
    return Path(settings.data_dir).absolute() / "logs"


def needed(settings: Settings) -> tuple[bool, bool]:
    """(start Kafka, start Redis): the ones that the settings do not name."""
    return not settings.kafka_bootstrap_servers, not settings.redis_url


@contextlib.contextmanager
def local_servers(
    settings: Settings,
    supervisor: Supervisor,
    *,
    owner: str,
    on_step: Callable[[str], None] = lambda step: None,
) -> Iterator[Settings]:
    """Start the servers that the settings do not name; yields the settings with both addresses.

    owner:   the command that runs them, for messages
    on_step: called with a few words before every step that may take a second
    At the end the supervisor stops all its children, the last started first; then the data folder
    is free. Raises LocalServerError if another process runs this folder's servers, or if one cannot
    be fetched or started.
    """
    lock = _locked(settings)
    startup = _Startup(settings, supervisor, owner, on_step)
    try:
        yield startup.start()
    finally:
        supervisor.stop()
        servers_file(settings).unlink(missing_ok=True)
        lock.release()


class _Startup:
    """Starts the servers and keeps servers.json up to date, also when a server gets a new pid."""

    def __init__(
        self, settings: Settings, supervisor: Supervisor, owner: str, on_step: Callable[[str], None]
    ) -> None:
        self.settings = settings
        self.supervisor = supervisor
        self.on_step = on_step
        self.servers = LocalServers(
            owner=owner,
            pid=os.getpid(),
            data_dir=str(run_dir(settings).parent),
            namespace=settings.namespace,
            state="starting",
        )

    def start(self) -> Settings:
        needs_kafka, needs_redis = needed(self.settings)
        names = ("kafka", "controller") * needs_kafka + ("redis",) * needs_redis
        chosen = free_ports.choose_ports(run_dir(self.settings), names)
        data_dir = Path(self.settings.data_dir)
        children: list[Child] = []
        servers: dict[str, LocalServer] = {}
        if needs_redis:
            program, version = valkey.program()
            children.append(valkey.prepare(data_dir, chosen["redis"], program))
            servers["redis"] = self._server(
                f"redis://127.0.0.1:{chosen['redis']}/0", version, "valkey"
            )
        if needs_kafka:
            self._step("checking Apache Kafka's jars")
            classpath = kafka_jars.fetch(
                lambda done, total: self._step(f"fetching Apache Kafka's jars: {done} of {total}")
            )
            self._step("preparing Kafka's data folder")
            children.append(
                kafka_broker.prepare(data_dir, chosen["kafka"], chosen["controller"], classpath)
            )
            servers["kafka"] = self._server(
                f"127.0.0.1:{chosen['kafka']}", f"Apache Kafka {kafka_jars.VERSION}", "kafka"
            )
        self._step(f"starting {' and '.join(child.name.capitalize() for child in children)}")
        self.supervisor.start(*children)
        self.servers = msgspec.structs.replace(self.servers, state="ready", step="", **servers)
        self._write()
        self.supervisor.listen(self._write)
        return msgspec.structs.replace(
            self.settings,
            kafka_bootstrap_servers=self.settings.kafka_bootstrap_servers
            or servers["kafka"].address,
            redis_url=self.settings.redis_url or servers["redis"].address,
        )

    def _server(self, address: str, version: str, name: str) -> LocalServer:
        return LocalServer(
            address=address, version=version, pid=0, log=str(self.supervisor.log_file(name))
        )

    def _step(self, step: str) -> None:
        self.on_step(step)
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
        own = {name: pid for name, pid in pids.items() if name not in ("kafka", "valkey")}
        servers = msgspec.structs.replace(servers, processes=own)
        write_atomically(
            servers_file(self.settings),
            msgspec.json.format(msgspec.json.encode(servers), indent=2) + b"\n",
        )


def _locked(settings: Settings) -> FileLock:
    path = lock_file(settings)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, LOCK_TIMEOUT_S, thread_local=False, fallback_to_soft=False)
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
