"""Which Kafka and which Redis are used, and why: to show to the user."""

from __future__ import annotations

import os
from typing import Literal

import msgspec

from eddyline.errors import KafkaRefused, StoreRefused, Unavailable
from eddyline.process.discovery import LocalServer, LocalServers, resolve, running
from eddyline.settings.loader import Settings
from eddyline.stores.redis_url import without_password


class ServerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A server as shown to the user: version, address (without password), and why this one."""

    name: Literal["kafka", "redis"]
    version: str
    address: str
    why: str


def server_status(settings: Settings) -> list[ServerStatus]:
    """Kafka and Redis, to show to the user.

    settings: as loaded, not as resolved
    Asks the servers that the settings name for their version, two seconds at most each. Raises
    SettingsError as `discovery.resolve` does.
    """
    resolved = resolve(settings)
    local = running(settings)
    rows: list[ServerStatus] = []
    if settings.kafka_bootstrap_servers or local is None or local.kafka is None:
        address = resolved.kafka_bootstrap_servers
        rows.append(
            ServerStatus(
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
            ServerStatus(
                name="redis",
                version=_redis_version(resolved),
                address=without_password(resolved.redis_url),
                why="REDIS_URL names it",
            )
        )
    else:
        rows.append(_local("redis", local.redis, local))
    return rows


def _local(
    name: Literal["kafka", "redis"], server: LocalServer, local: LocalServers
) -> ServerStatus:
    folder = os.path.relpath(local.data_dir)
    shown = local.data_dir if folder.startswith("..") else folder
    why = f"no address is set; started by `{local.owner}`, data in {shown}"
    return ServerStatus(name=name, version=server.version, address=server.address, why=why)


def _kafka_version(settings: Settings) -> str:
    from kafka import KafkaAdminClient
    from kafka.errors import KafkaError

    from eddyline.kafka.clients import connect

    try:
        client = connect(
            settings, KafkaAdminClient, request_timeout_ms=2_000, bootstrap_timeout_ms=2_000
        )
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

    from eddyline.stores import redis_client
    from eddyline.stores.redis_errors import translate_error
    from eddyline.stores.redis_url import target

    client = redis_client.client(settings, timeout_ms=2_000)
    try:
        found = client.info("server")
    except redis.RedisError as error:
        refused = translate_error(error, target(settings))
        return (
            f"Redis ({refused})" if isinstance(refused, StoreRefused) else "Redis (does not answer)"
        )
    except StoreRefused as error:
        return f"Redis ({error})"
    finally:
        client.close()
    assert isinstance(found, dict)
    kind = "Valkey" if "valkey_version" in found else "Redis"
    return f"{kind} {found.get('valkey_version') or found['redis_version']}"
