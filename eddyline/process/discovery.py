"""The addresses of Kafka and Redis: those of the settings, else of the local servers.

The process that runs the local servers (`sandbox.servers.local_servers`) writes
`<data_dir>/run/servers.json` and holds `<data_dir>/run/lock` locked while it lives. So the file of
a killed process is never believed, and a reused process id does no harm.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from eddyline.errors import LocalServerError, SettingsError
from eddyline.kafka import security
from eddyline.process.files import read_if_exists
from eddyline.process.locks import is_locked
from eddyline.settings.loader import Settings


class LocalServer(msgspec.Struct, frozen=True, kw_only=True):
    """One local server.

    address: `host:port` of Kafka, `redis://host:port/0` of Redis; version: "Apache Kafka 4.3.0".
    """

    address: str
    version: str
    pid: int
    log: str


class LocalServers(msgspec.Struct, frozen=True, kw_only=True):
    """The content of servers.json.

    owner:     the command that runs the servers
    step:      what it does now, for a process that waits
    namespace: its namespace, which commands use while the demo runs
    processes: name → pid of Eddyline's own processes that run with the servers
    """

    owner: str
    pid: int
    data_dir: str
    state: Literal["starting", "ready"]
    step: str = ""
    namespace: str = ""
    kafka: LocalServer | None = None
    redis: LocalServer | None = None
    processes: dict[str, int] = {}


def run_dir(settings: Settings) -> Path:
    """The folder of servers.json, ports.json and the lock."""
    return Path(settings.data_dir).absolute() / "run"


def servers_file(settings: Settings) -> Path:
    """`<data_dir>/run/servers.json`."""
    return run_dir(settings) / "servers.json"


def lock_file(settings: Settings) -> Path:
    """`<data_dir>/run/lock`, which the process that runs the local servers holds locked."""
    return run_dir(settings) / "lock"


def is_held(settings: Settings) -> bool:
    """Whether a living process runs, or starts, the local servers of this data folder."""
    try:
        return is_locked(lock_file(settings))
    except OSError as error:
        raise LocalServerError(
            f"{lock_file(settings)}: {error.strerror}; `data_dir` names another place"
        ) from None


def running(settings: Settings) -> LocalServers | None:
    """The local servers of this data folder, ready or starting; None if no process runs them."""
    if not is_held(settings):
        return None
    content = read_if_exists(servers_file(settings))
    if content is None:
        return None
    try:
        return msgspec.json.decode(content, type=LocalServers)
    except msgspec.DecodeError as error:
        raise LocalServerError(
            f"{servers_file(settings)}: {error}; `eddyline down`, then `eddyline up` replaces it"
        ) from None


def resolve(settings: Settings, *, redis: bool = True) -> Settings:
    """The settings, with the addresses and the namespace of the local servers where they are empty.

    redis: False for a process without Redis (archive, trainer): its address may stay empty

    Raises SettingsError, which says what to do, if an address is missing, if a file of certificates
    cannot be used, and if the settings of Redis contradict each other.
    """
    found = _resolve(settings, needs_redis=redis)
    security.tls_context(found)
    if redis:
        # redis takes 0.1 s to import, and archive and trainer do without it.
        from eddyline.stores import redis_client

        redis_client.check(found)
    return found


def _resolve(settings: Settings, *, needs_redis: bool) -> Settings:
    if settings.kafka_bootstrap_servers and settings.redis_url:
        return settings
    local = running(settings)
    if local is not None and local.state != "ready":
        local = None
    kafka = settings.kafka_bootstrap_servers or (
        local.kafka.address if local and local.kafka else ""
    )
    redis = settings.redis_url or (local.redis.address if local and local.redis else "")
    if not kafka:
        raise SettingsError("no Kafka: set KAFKA_BOOTSTRAP_SERVERS or run `eddyline up`")
    if not redis and needs_redis:
        raise SettingsError("no Redis: set REDIS_URL or run `eddyline up`")
    namespace = settings.namespace or (local.namespace if local else "")
    return msgspec.structs.replace(
        settings, kafka_bootstrap_servers=kafka, redis_url=redis, namespace=namespace
    )
