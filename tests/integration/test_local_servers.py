"""Real Apache Kafka and Valkey: they survive kill -9 with their data and stop on request."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import redis
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import NewTopic
from rich.console import Console
from typer.testing import CliRunner

from cli.commands.servers import down, up
from cli.main import app
from eddyline.errors import LocalServerError, SettingsError
from eddyline.process.discovery import is_held, resolve, running, servers_file
from eddyline.settings.loader import Settings, load
from sandbox.processes import free_port
from sandbox.servers.local_servers import local_servers, log_dir
from sandbox.servers.supervisor import Supervisor

TOPIC = TopicPartition("kept", 0)
# kafka-python 3.0.12 does not close the socket of a connection that is refused.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=str(tmp_path / "data"))


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def taken_down(settings: Settings) -> Iterator[None]:
    """Stops the servers that the test leaves running."""
    yield
    if is_held(settings):
        down(settings, console=Console(file=io.StringIO()))


def text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def eventually(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)


def gone(pid: int) -> bool:
    try:
        return (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
            == "Z"
        )
    except FileNotFoundError:
        return True


def make_topic(settings: Settings) -> None:
    admin = KafkaAdminClient(bootstrap_servers=settings.kafka_bootstrap_servers)
    big = {"max.message.bytes": "2097152"}
    admin.create_topics(
        [NewTopic("kept", num_partitions=1, replication_factor=1, topic_configs=big)]
    )
    admin.close()


def send(settings: Settings, *values: bytes) -> None:
    producer = KafkaProducer(
        bootstrap_servers=settings.kafka_bootstrap_servers, acks="all", max_request_size=2_097_152
    )
    for value in values:
        producer.send("kept", value).get(timeout=20)
    producer.close()


def read_all(settings: Settings, count: int) -> list[bytes]:
    consumer = KafkaConsumer(
        bootstrap_servers=settings.kafka_bootstrap_servers,
        auto_offset_reset="earliest",
        group_id=None,
    )
    consumer.assign([TOPIC])
    found: list[bytes] = []
    deadline = time.monotonic() + 20
    while len(found) < count and time.monotonic() < deadline:
        for records in consumer.poll(timeout_ms=500).values():
            found += [record.value for record in records]
    consumer.close()
    return found


def redis_of(settings: Settings) -> redis.Redis:
    return redis.Redis.from_url(settings.redis_url, socket_timeout=5)


@pytest.mark.long
def test_killed_servers_come_back_with_their_data(settings: Settings) -> None:
    large = b"x" * 1_500_000
    with (
        Supervisor(log_dir(settings)) as supervisor,
        local_servers(settings, supervisor, owner="the test") as found,
    ):
        make_topic(found)
        send(found, b"one", large)
        with redis_of(found) as client:
            client.set("kept", "1")
            assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        before = supervisor.pids()
        for pid in before.values():
            os.kill(pid, signal.SIGKILL)
        eventually(
            lambda: all(supervisor.pids().get(name, pid) != pid for name, pid in before.items())
        )
        supervisor.wait("kafka", "valkey", timeout_s=40)

        send(found, b"two")
        assert read_all(found, 3) == [b"one", large, b"two"]
        with redis_of(found) as client:
            assert client.get("kept") == b"1"
        # The file for other processes has the new pids and the old addresses.
        eventually(lambda: pids_of(settings) == supervisor.pids())
        assert resolve(settings) == found
        last = supervisor.pids()
    assert all(gone(pid) for pid in last.values())
    assert not servers_file(settings).exists()


def pids_of(settings: Settings) -> dict[str, int]:
    servers = running(settings)
    assert servers is not None and servers.kafka is not None and servers.redis is not None
    return {"kafka": servers.kafka.pid, "valkey": servers.redis.pid}


@pytest.mark.long
@pytest.mark.usefixtures("taken_down")
def test_up_down_and_up_again_on_another_port(settings: Settings, console: Console) -> None:
    with pytest.raises(SettingsError, match="eddyline up"):
        resolve(settings)
    up(settings, console=console)
    first = resolve(settings)
    make_topic(first)
    send(first, b"kept")
    supervisor_pid = running(settings).pid  # type: ignore[union-attr]

    up(settings, console=console)  # a second one changes nothing
    assert "Already up" in text(console)
    assert running(settings).pid == supervisor_pid  # type: ignore[union-attr]
    with (
        Supervisor(log_dir(settings)) as other,
        pytest.raises(LocalServerError, match="another process"),
        local_servers(settings, other, owner="a second one"),
    ):
        pass

    pids = pids_of(settings).values()
    down(settings, console=console)
    assert all(gone(pid) for pid in pids)
    eventually(
        lambda: gone(supervisor_pid), timeout_s=5
    )  # it has only its interpreter left to leave
    down(settings, console=console)
    assert "Nothing is up" in text(console)

    # Somebody else took Kafka's port meanwhile: another one is used, and the log is the same.
    host, port = first.kafka_bootstrap_servers.split(":")
    with socket.socket() as foreign:
        foreign.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        foreign.bind((host, int(port)))
        foreign.listen()
        up(settings, console=console)
    second = resolve(settings)
    assert second.kafka_bootstrap_servers != first.kafka_bootstrap_servers
    assert second.redis_url == first.redis_url
    assert read_all(second, 1) == [b"kept"]

    # The supervisor itself is killed: nothing is left, and nothing believes the file it left.
    left = [*pids_of(settings).values(), running(settings).pid]  # type: ignore[union-attr]
    os.kill(left[-1], signal.SIGKILL)
    eventually(lambda: all(gone(pid) for pid in left))
    assert servers_file(settings).exists()
    with pytest.raises(SettingsError, match="eddyline up"):
        resolve(settings)
    up(settings, console=console)
    assert read_all(resolve(settings), 1) == [b"kept"]


def test_only_what_the_settings_do_not_name_is_started(settings: Settings) -> None:
    named = msgspec.structs.replace(settings, kafka_bootstrap_servers="kafka.example:9092")
    with (
        Supervisor(log_dir(named)) as supervisor,
        local_servers(named, supervisor, owner="the test") as found,
    ):
        assert list(supervisor.pids()) == ["valkey"]
        assert found.kafka_bootstrap_servers == "kafka.example:9092"
        with redis_of(found) as client:
            assert client.ping()


def test_a_start_that_is_interrupted_and_a_deleted_folder_leave_nothing(
    settings: Settings, tmp_path: Path
) -> None:
    environment = {
        **os.environ,
        "EDDYLINE_DATA_DIR": settings.data_dir,
        "KAFKA_BOOTSTRAP_SERVERS": "k:1",
    }
    environment.pop("REDIS_URL", None)

    def supervisor() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "sandbox.servers"], env=environment, stderr=subprocess.DEVNULL
        )

    with supervisor() as process:
        eventually(lambda: is_held(settings))
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert not is_held(settings)
    with supervisor() as process:
        eventually(lambda: (found := running(settings)) is not None and found.state == "ready")
        pid = json.loads(servers_file(settings).read_bytes())["redis"]["pid"]
        Path(settings.data_dir).rename(tmp_path / "moved")
        assert process.wait(20) == 0
    assert gone(pid)


@pytest.mark.usefixtures("taken_down")
def test_init_runs_processes_with_the_servers_and_none_stays(
    settings: Settings, console: Console, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EDDYLINE_WORKER_PORT", str(free_port()))
    for name in ("KAFKA_BOOTSTRAP_SERVERS", "REDIS_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match="'trainer': expected some of ingest, worker, archive"):
        up(settings, processes=["trainer"], console=console)
    (tmp_path / "films.csv").write_text("movieId,title\n1,Heat\n", encoding="utf-8")
    words = ["init", "--yes", "--data-dir", settings.data_dir, "--files", "films.csv"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, (result.output, result.exception)
    found = running(settings)
    assert found is not None and found.processes.keys() == {"ingest", "worker"}
    assert load().data_dir == settings.data_dir  # of the eddyline.toml that init wrote
    assert f"(pid {found.processes['worker']})" in result.output
    assert result.output.rstrip().endswith("then: eddyline import films.csv --train")
    up(settings, processes=["worker"], console=console)
    assert "Already up" in text(console)
    with pytest.raises(LocalServerError, match="is up without archive"):
        up(settings, processes=["archive"], console=console)

    os.kill(found.processes["ingest"], signal.SIGKILL)  # it is restarted
    eventually(
        lambda: (
            (now := running(settings)) is not None
            and now.processes.get("ingest", 0) not in (0, found.processes["ingest"])
        )
    )
    pids = [*running(settings).processes.values(), *pids_of(settings).values()]  # type: ignore[union-attr]
    down(settings, console=console)
    assert all(gone(pid) for pid in pids)
