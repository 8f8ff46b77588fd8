"""Kafka Connect's files, and when its connectors count as running."""

from __future__ import annotations

import json
import re
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path, PurePosixPath

import pytest

from sandbox.servers import kafka_connect, kafka_jars


@contextmanager
def rest(states: dict[str, list[str]]) -> Iterator[int]:
    """A REST interface that knows these connectors; yields its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.split("/")[2]
            self.send_response(200 if name in states else 404)
            self.end_headers()
            tasks = [{"state": state} for state in states.get(name, [])]
            self.wfile.write(json.dumps({"tasks": tasks}).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_it_is_ready_when_the_task_of_every_connector_runs(tmp_path: Path) -> None:
    states = {"one": ["RUNNING"]}
    with rest(states) as port:
        two = [{"name": "one"}, {"name": "two"}]
        child = kafka_connect.prepare(tmp_path, "127.0.0.1:1", port, [Path("a.jar")], two)
        assert not child.ready()
        states["two"] = []
        assert not child.ready()
        states["two"] = ["FAILED"]
        assert not child.ready()
        states["two"] = ["RUNNING"]
        assert child.ready()


def test_no_proxy_is_between_the_worker_and_its_readiness(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setattr(urllib.request, "_opener", None)  # `urlopen` keeps its first one
    with rest({"one": ["RUNNING"]}) as port:
        one = [{"name": "one"}]
        assert kafka_connect.prepare(tmp_path, "127.0.0.1:1", port, [Path("a.jar")], one).ready()


def test_files_hold_what_the_worker_and_the_connector_need(tmp_path: Path) -> None:
    source = kafka_connect.debezium("shop", 5432, "items", topic_prefix="s", partitions=3)
    child = kafka_connect.prepare(tmp_path, "127.0.0.1:9", 8083, [Path("a.jar")], [source])
    home = tmp_path / "connect"
    worker = (home / "worker.properties").read_text(encoding="utf-8")
    assert "bootstrap.servers=127.0.0.1:9\n" in worker
    assert "listeners=http://127.0.0.1:8083\n" in worker
    connector = (home / "source-shop.properties").read_text(encoding="utf-8")
    for line in ("slot.name=shop", "topic.prefix=s", "topic.creation.default.partitions=3"):
        assert f"{line}\n" in connector
    assert child.argv[-2:] == ["worker.properties", "source-shop.properties"]
    assert child.cwd == home


def test_one_class_path_holds_one_version_of_each_jar() -> None:
    kafka = kafka_jars.locked()
    connect = kafka_jars.locked(kafka_jars.CONNECT_LOCK)
    assert not kafka.keys() & connect.keys()
    artifacts = [PurePosixPath(path).parts[:-2] for path in (*kafka, *connect)]
    assert len(set(artifacts)) == len(artifacts)
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in connect.values())
    names = {PurePosixPath(path).name for path in connect}
    version = kafka_jars.DEBEZIUM_VERSION
    assert f"debezium-connector-postgres-{version}.jar" in names
    assert f"connect-runtime-{kafka_jars.VERSION}.jar" in names


def test_locks_that_do_not_fit_together_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kafka_jars, "LOCK", tmp_path / "kafka.lock")
    monkeypatch.setattr(kafka_jars, "CONNECT_LOCK", tmp_path / "connect.lock")
    own = {kafka_jars.ENDPOINT: "1  a/a-1.jar\n", kafka_jars.CONNECT_ENDPOINT: "2  a/a-2.jar\n"}
    monkeypatch.setattr(kafka_jars, "resolve", lambda endpoint=kafka_jars.ENDPOINT: own[endpoint])
    with pytest.raises(kafka_jars.LocalServerError, match=r"1 of the broker's jars: a/a-1\.jar"):
        kafka_jars.write_locks()
    assert not list(tmp_path.iterdir())
    own[kafka_jars.CONNECT_ENDPOINT] = "1  a/a-1.jar\n2  b/b-1.jar\n"
    kafka_jars.write_locks()
    assert (tmp_path / "connect.lock").read_text(encoding="utf-8") == "2  b/b-1.jar\n"
