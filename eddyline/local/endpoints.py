"""Which Kafka and which Redis: those of the settings, else the local ones that run on this data folder.

`<data_dir>/run/servers.json` is written by whoever runs the local servers (pair.py), who holds a lock on
`<data_dir>/run/lock` for as long as he lives. So a file left by a killed process is never believed, and no
process id is taken for another's.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO, Literal

import msgspec

from eddyline.errors import KafkaRefused, LocalServerError, SettingsError, StoreRefused, Unavailable
from eddyline.local.files import read
from eddyline.logs import without_password
from eddyline.settings import Settings


class Server(msgspec.Struct, frozen=True, kw_only=True):
    """One local server.

    address: `host:port` of Kafka, `redis://host:port/0` of Redis; version: "Apache Kafka 4.3.0".
    """

    address: str
    version: str
    pid: int
    log: str


class Servers(msgspec.Struct, frozen=True, kw_only=True):
    """What servers.json holds.

    owner:     the command that runs them; step: what it does now, for whoever waits
    namespace: the one its owner works in, so that commands beside a running demo need not name it
    """

    owner: str
    pid: int
    data_dir: str
    state: Literal["starting", "ready"]
    step: str = ""
    namespace: str = ""
    kafka: Server | None = None
    redis: Server | None = None


class Where(msgspec.Struct, frozen=True, kw_only=True):
    """One server for people: what it is, its address (without password), and why this one."""

    name: Literal["kafka", "redis"]
    version: str
    address: str
    why: str


def run_dir(settings: Settings) -> Path:
    """The folder of servers.json, ports.json and the lock."""
    return Path(settings.data_dir).absolute() / "run"


def servers_file(settings: Settings) -> Path:
    """`<data_dir>/run/servers.json`."""
    return run_dir(settings) / "servers.json"


def try_lock(settings: Settings, *, shared: bool = False) -> IO[bytes] | None:
    """The open lock file, locked until it is closed; None where another process holds it.

    shared: only to look; any number may at once.
    """
    path = run_dir(settings) / "lock"
    try:
        if shared:
            file: IO[bytes] = path.open("rb")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("ab")
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError as error:
        raise LocalServerError(f"{path}: {error.strerror}; `data_dir` names another place") from None
    return file


def held(settings: Settings) -> bool:
    """Whether a living process runs, or is starting, the local servers of this data folder."""
    if not (run_dir(settings) / "lock").exists():
        return False
    lock = try_lock(settings, shared=True)
    if lock is None:
        return True
    lock.close()
    return False


def running(settings: Settings) -> Servers | None:
    """The local servers of this data folder, ready or starting; None where nobody runs them."""
    if not held(settings):
        return None
    content = read(servers_file(settings))
    if content is None:
        return None
    try:
        return msgspec.json.decode(content, type=Servers)
    except msgspec.DecodeError as error:
        raise LocalServerError(
            f"{servers_file(settings)}: {error}; `eddyline down`, then `eddyline up` writes it anew"
        ) from None


def resolve(settings: Settings, *, redis: bool = True) -> Settings:
    """The settings with both addresses, and the namespace, filled in where they are empty.

    redis: False for a process that uses none (archive, trainer): its address may stay empty then
    Raises SettingsError, with what to do, where neither the settings nor local servers give one, and where
    the settings of Redis cannot be right.
    """
    from eddyline.stores import connect

    found = _resolve(settings, needs_redis=redis)
    if redis:
        connect.check(found)
    return found


def _resolve(settings: Settings, *, needs_redis: bool) -> Settings:
    if settings.kafka_bootstrap_servers and settings.redis_url:
        return settings
    local = running(settings)
    if local is not None and local.state != "ready":
        local = None
    kafka = settings.kafka_bootstrap_servers or (local.kafka.address if local and local.kafka else "")
    redis = settings.redis_url or (local.redis.address if local and local.redis else "")
    if not kafka:
        raise SettingsError("no Kafka: set KAFKA_BOOTSTRAP_SERVERS or run `eddyline up`")
    if not redis and needs_redis:
        raise SettingsError("no Redis: set REDIS_URL or run `eddyline up`")
    namespace = settings.namespace or (local.namespace if local else "")
    return msgspec.structs.replace(
        settings, kafka_bootstrap_servers=kafka, redis_url=redis, namespace=namespace
    )


def where(settings: Settings) -> list[Where]:
    """Kafka and Redis as people want to see them.

    Asks servers that the settings name for their version, two seconds at most each.
    settings: as loaded, not as resolved. Raises SettingsError as resolve() does.
    """
    resolved = resolve(settings)
    local = running(settings)
    rows: list[Where] = []
    if settings.kafka_bootstrap_servers or local is None or local.kafka is None:
        address = resolved.kafka_bootstrap_servers
        rows.append(
            Where(
                name="kafka",
                version=_kafka_version(resolved),
                address=address,
                why="KAFKA_BOOTSTRAP_SERVERS names it",
            )
        )
    else:
        rows.append(_local("kafka", local.kafka, local))
    if settings.redis_url or local is None or local.redis is None:
        rows.append(
            Where(
                name="redis",
                version=_redis_version(resolved),
                address=without_password(resolved.redis_url),
                why="REDIS_URL names it",
            )
        )
    else:
        rows.append(_local("redis", local.redis, local))
    return rows


def _local(name: Literal["kafka", "redis"], server: Server, local: Servers) -> Where:
    folder = os.path.relpath(local.data_dir)
    shown = local.data_dir if folder.startswith("..") else folder
    why = f"no address is set; started by `{local.owner}`, data in {shown}"
    return Where(name=name, version=server.version, address=server.address, why=why)


def _kafka_version(settings: Settings) -> str:
    from kafka import KafkaAdminClient
    from kafka.errors import KafkaError

    from eddyline.kafka import connected

    try:
        client = connected(settings, KafkaAdminClient, request_timeout_ms=2_000, bootstrap_timeout_ms=2_000)
    except KafkaRefused as refused:
        return f"Kafka ({refused})"
    except (Unavailable, ValueError):
        return "Kafka (does not answer)"
    try:
        brokers = len(client.describe_cluster()["brokers"])
    except KafkaError:
        return "Kafka (does not answer)"
    finally:
        client.close()
    return f"Kafka ({brokers} broker{'s' if brokers != 1 else ''})"


def _redis_version(settings: Settings) -> str:
    import redis

    from eddyline.stores import connect
    from eddyline.stores.address import target
    from eddyline.stores.refusals import translated

    client = connect.client(settings, timeout_ms=2_000)
    try:
        found = client.info("server")
    except redis.RedisError as error:
        refused = translated(error, target(settings))
        return f"Redis ({refused})" if isinstance(refused, StoreRefused) else "Redis (does not answer)"
    except StoreRefused as error:
        return f"Redis ({error})"
    finally:
        client.close()
    assert isinstance(found, dict)
    kind = "Valkey" if "valkey_version" in found else "Redis"
    return f"{kind} {found.get('valkey_version') or found['redis_version']}"
