"""Which Kafka and which Redis a process takes, and what it says where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from eddyline.errors import LocalServerError, SettingsError
from eddyline.process import discovery
from eddyline.process.discovery import LocalServer, LocalServers
from eddyline.process.files import write_atomically
from eddyline.process.locks import try_lock
from eddyline.settings.loader import Settings
from sandbox.servers import status


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=str(tmp_path))


@contextmanager
def held(settings: Settings) -> Iterator[None]:
    lock = try_lock(discovery.lock_file(settings))
    assert lock is not None
    yield
    lock.release()


def servers(tmp_path: Path, **more: object) -> LocalServers:
    fields = {"owner": "test", "pid": 1, "data_dir": str(tmp_path), "state": "ready"}
    kafka = LocalServer(address="127.0.0.1:1", version="Apache Kafka 4.3.0", pid=2, log="k")
    redis = LocalServer(address="redis://127.0.0.1:2/0", version="Valkey 9", pid=3, log="v")
    servers = {"kafka": kafka, "redis": redis}
    return LocalServers(**{**fields, **servers, **more})  # type: ignore[arg-type]


def test_what_the_settings_name_wins(settings: Settings) -> None:
    named = msgspec.structs.replace(
        settings, kafka_bootstrap_servers="k:1", redis_url="redis://r:2/0"
    )
    assert discovery.resolve(named) is named


def test_without_anything_the_sentence_says_what_to_do(settings: Settings) -> None:
    with pytest.raises(
        SettingsError, match="no Kafka: set KAFKA_BOOTSTRAP_SERVERS or run `eddyline up`"
    ):
        discovery.resolve(settings)
    with pytest.raises(SettingsError, match="no Redis: set REDIS_URL or run `eddyline up`"):
        discovery.resolve(msgspec.structs.replace(settings, kafka_bootstrap_servers="k:1"))


def test_who_uses_no_redis_needs_no_address_of_one(settings: Settings, tmp_path: Path) -> None:
    alone = msgspec.structs.replace(settings, kafka_bootstrap_servers="k:1")
    assert discovery.resolve(alone, redis=False) == alone
    with pytest.raises(SettingsError, match="no Kafka"):
        discovery.resolve(settings, redis=False)
    with held(settings):
        write_atomically(
            discovery.servers_file(settings),
            msgspec.json.encode(servers(tmp_path, namespace="demo")),
        )
        found = discovery.resolve(settings, redis=False)
    assert (found.kafka_bootstrap_servers, found.namespace) == ("127.0.0.1:1", "demo")


def test_a_file_counts_only_while_its_writer_lives(settings: Settings, tmp_path: Path) -> None:
    lock = try_lock(discovery.lock_file(settings))
    assert lock is not None
    write_atomically(discovery.servers_file(settings), msgspec.json.encode(servers(tmp_path)))
    assert discovery.is_held(settings)
    assert try_lock(discovery.lock_file(settings)) is None
    found = discovery.resolve(settings)
    assert (found.kafka_bootstrap_servers, found.redis_url) == (
        "127.0.0.1:1",
        "redis://127.0.0.1:2/0",
    )
    lock.release()  # as the kernel does when the writer is killed
    assert not discovery.is_held(settings)
    with pytest.raises(SettingsError, match="no Kafka"):
        discovery.resolve(settings)


def test_servers_that_are_starting_are_not_used_yet(settings: Settings, tmp_path: Path) -> None:
    with held(settings):
        write_atomically(
            discovery.servers_file(settings),
            msgspec.json.encode(servers(tmp_path, state="starting")),
        )
        assert discovery.running(settings) is not None
        with pytest.raises(SettingsError, match="no Kafka"):
            discovery.resolve(settings)


def test_a_file_of_another_shape_is_named(settings: Settings) -> None:
    with held(settings):
        assert discovery.running(settings) is None
        write_atomically(discovery.servers_file(settings), b'{"owner": 3}')
        with pytest.raises(LocalServerError, match=r"servers\.json"):
            discovery.running(settings)


def test_where_says_why_and_hides_the_password(settings: Settings, tmp_path: Path) -> None:
    mixed = msgspec.structs.replace(settings, redis_url="redis://app:secret@127.0.0.1:1/0")
    with held(settings):
        write_atomically(discovery.servers_file(settings), msgspec.json.encode(servers(tmp_path)))
        kafka, redis = status.server_status(mixed)
    assert kafka.version == "Apache Kafka 4.3.0" and "started by `test`" in kafka.why
    assert "REDIS_URL" in redis.why and "does not answer" in redis.version
    assert "secret" not in repr((kafka, redis))
