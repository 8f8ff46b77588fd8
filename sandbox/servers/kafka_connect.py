"""Kafka Connect with Debezium: one worker on the loopback address that reads PostgreSQL's changes.

Files in `<data_dir>/connect`: the worker's and the connectors' properties, written at every start,
and `offsets`, how far each connector has read. Without that file the next start takes a snapshot.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from sandbox.servers.kafka_broker import LOG_FLAGS, java
from sandbox.servers.supervisor import Child

JVM_FLAGS = ("-Xmx384m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
MAIN = "org.apache.kafka.connect.cli.ConnectStandalone"
JSON_CONVERTER = "org.apache.kafka.connect.json.JsonConverter"
UNWRAP = "io.debezium.transforms.ExtractNewRecordState"
READY_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 20.0
PROBE_S = 2.0
# The worker is on the loopback address: no proxy of the environment reaches it.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))

# Properties of a connector, besides those of `debezium`, by the form of its records: the envelope
# with a schema in each record, and the row alone.
WITH_SCHEMAS = {"value.converter": JSON_CONVERTER, "value.converter.schemas.enable": "true"}
UNWRAPPED = {
    "transforms": "unwrap",
    "transforms.unwrap.type": UNWRAP,
    "transforms.unwrap.delete.tombstone.handling.mode": "rewrite",
    "transforms.unwrap.add.fields": "op,source.ts_ms",
}


def debezium(
    name: str, port: int, table: str, *, topic_prefix: str, partitions: int
) -> dict[str, str]:
    """The properties of a connector that reads one table of the local PostgreSQL.

    name:         also of its slot and its publication: lower-case letters, digits, `_`
    topic_prefix: the topic is `<topic_prefix>.public.<table>`
    """
    return {
        "name": name,
        "connector.class": "io.debezium.connector.postgresql.PostgresConnector",
        "plugin.name": "pgoutput",
        "database.hostname": "127.0.0.1",
        "database.port": str(port),
        "database.user": "postgres",
        "database.dbname": "postgres",
        "topic.prefix": topic_prefix,
        "table.include.list": f"public.{table}",
        "slot.name": name,
        "publication.name": name,
        "publication.autocreate.mode": "filtered",
        # PostgreSQL may notice seconds later that a connector was killed; the default waits 10 s.
        "slot.retry.delay.ms": "1000",
        "slot.max.retries": "60",
        "decimal.handling.mode": "string",
        "poll.interval.ms": "50",
        "topic.creation.default.replication.factor": "1",
        "topic.creation.default.partitions": str(partitions),
    }


def worker_properties(kafka: str, port: int) -> dict[str, str]:
    """The worker's properties. kafka: the brokers' addresses; port: of its REST interface."""
    return {
        "bootstrap.servers": kafka,
        "listeners": f"http://127.0.0.1:{port}",
        "plugin.discovery": "service_load",
        "offset.storage.file.filename": "offsets",
        # What was read since the last flush is read again after a kill -9.
        "offset.flush.interval.ms": "5000",
        **{
            f"{part}.converter{key}": value
            for part in ("key", "value")
            for key, value in (("", JSON_CONVERTER), (".schemas.enable", "false"))
        },
    }


def prepare(
    data_dir: Path,
    kafka: str,
    port: int,
    classpath: Sequence[Path],
    connectors: Sequence[Mapping[str, str]],
) -> Child:
    """The worker as a child process. It is ready when every connector's task runs.

    classpath: the jars of kafka.lock and connect.lock. Raises LocalServerError without Java.
    """
    home = data_dir.absolute() / "connect"
    home.mkdir(parents=True, exist_ok=True)
    files = {"worker": worker_properties(kafka, port)}
    files |= {f"source-{one['name']}": dict(one) for one in connectors}
    for name, values in files.items():
        text = "".join(f"{key}={value}\n" for key, value in values.items())
        (home / f"{name}.properties").write_text(text, encoding="utf-8")
    program, _version = java()
    jars = ":".join(map(str, classpath))
    return Child(
        name="connect",
        argv=[
            *(str(program), *JVM_FLAGS, *LOG_FLAGS, "-cp", jars, MAIN),
            *(f"{name}.properties" for name in files),
        ],
        ready=lambda: all(_is_running(port, one["name"]) for one in connectors),
        cwd=home,
        ready_timeout_s=READY_TIMEOUT_S,
        stop_timeout_s=STOP_TIMEOUT_S,
    )


def _is_running(port: int, name: str) -> bool:
    address = f"http://127.0.0.1:{port}/connectors/{name}/status"
    try:
        with _OPENER.open(address, timeout=PROBE_S) as answer:
            tasks = json.load(answer)["tasks"]
    except urllib.error.HTTPError:  # 404: not yet configured
        return False
    return [task["state"] for task in tasks] == ["RUNNING"]
