"""The worker's tail on a fake consumer, the modules it loads, its files and exit codes."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from eddyline.errors import GenerationEnded, KafkaUnavailable, LogReplaced, Unavailable
from eddyline.kafka.unreadable import UnreadableBatch
from eddyline.schema.item_record import ItemRecord, encode_record
from eddyline.settings.loader import Settings
from index.exact import ExactIndex
from index.filters import Filter, Range
from serving import __main__ as worker_main
from serving import running_workers
from serving.sharding import ALL, ShardAssignment
from serving.worker import prefork, replica
from serving.worker.replica import Replica, load_bundle

D = 4
ROOT = Path(__file__).resolve().parents[3]
SETTINGS = Settings(kafka_bootstrap_servers="nowhere:9092", backoff_ms_max=50, namespace="t")


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)


def unit(at: int) -> np.ndarray:
    vector = np.zeros(D, np.float32)
    vector[at % D] = 1
    return vector


@dataclass(frozen=True)
class Record:
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None


class Log:
    """A topic of two partitions, and consumers of it that can be cut off."""

    def __init__(self) -> None:
        self.records: dict[int, list[Record]] = {0: [], 1: []}
        self.away = False
        self.connects = 0
        self.stopped: dict[int, Any] = {}

    def put(
        self,
        partition: int,
        item_id: str,
        offset: int,
        vector: np.ndarray | None,
        written_us: int = 1,
    ) -> None:
        record = ItemRecord(item_id, partition, offset, 0, written_us, vector)
        self.raw(partition, item_id.encode(), encode_record(record))

    def raw(self, partition: int, key: bytes | None, value: bytes | None) -> None:
        log = self.records[partition]
        log.append(Record(partition, len(log), key, value))

    def connect(self, settings: Settings, generation: str) -> "Consumer":
        self.connects += 1
        if self.away:
            raise KafkaUnavailable("no server")
        return Consumer(self)


class Consumer:
    """What a ItemVectorLog does, on a Log."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.at = dict.fromkeys(log.records, -1)

    def begin(self, positions: dict[int, int]) -> None:
        self.at = {p: positions.get(p, 0) for p in self.at}

    def positions(self) -> dict[int, int]:
        return dict(self.at)

    def ends(self) -> dict[int, int]:
        if self.log.away:
            raise KafkaUnavailable("no answer")
        return {p: len(records) for p, records in self.log.records.items()}

    def poll(self, timeout_ms: int) -> dict[int, list[Record]]:
        if self.log.away:
            time.sleep(timeout_ms / 1000)
            return {}
        found = {
            p: self.log.records[p][at : at + 3]
            for p, at in self.at.items()
            if p not in self.log.stopped
        }
        for partition, batch in found.items():
            self.at[partition] += len(batch)
        if not any(found.values()):
            time.sleep(0.005)
        return {p: batch for p, batch in found.items() if batch}

    def stopped(self) -> dict[int, Any]:
        return self.log.stopped

    def close(self) -> None:
        self.at = {}


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    monkeypatch.setattr(replica, "ENDS_S", 0.02)
    monkeypatch.setattr(replica, "POLL_MS", 10)
    made = Log()
    monkeypatch.setattr(replica, "ItemVectorLog", made.connect)
    return made


def tail(log: Log, index: ExactIndex) -> Replica:
    made = Replica(SETTINGS, "g1", index)
    made.start()
    return made


def test_the_tail_reads_from_the_beginning_and_goes_on(log: Log) -> None:
    index = ExactIndex(D)
    for n in range(10):
        log.put(n % 2, f"i{n}", n, unit(n))
    log.put(0, "i2", 20, None)
    made = tail(log, index)
    try:
        assert made.wait_caught_up(10)
        assert index.stats().live == 9
        assert index.watermarks()[0].offset == 20
        log.put(1, "new", 30, unit(1))
        wait_until(lambda: index.describe(["new"])[0] is not None)
        log.put(1, "new", 31, None)
        wait_until(lambda: index.describe(["new"])[0] is None)
        state = made.state()
        assert (state.caught_up, state.records, state.away_since_ms) == (True, 13, 0)
        wait_until(lambda: made.state().lag_records == 0)
        assert made.missing() == ""
    finally:
        made.close()


def test_a_bad_record_is_counted_and_skipped(log: Log) -> None:
    index = ExactIndex(D)
    log.raw(0, b"a", b"garbage")
    log.raw(0, b"a", None)
    log.raw(0, None, b"")
    log.put(0, "flat", 1, np.zeros(D, np.float32))
    log.put(0, "short", 2, np.ones(1, np.float32))
    log.put(0, "good", 3, unit(0))
    made = tail(log, index)
    try:
        assert made.wait_caught_up(10)
        assert (made.state().undecodable, made.state().rejected, index.stats().live) == (3, 2, 1)
    finally:
        made.close()


def test_a_partition_that_stands_still_holds_up_neither_the_start_nor_the_others(log: Log) -> None:
    index = ExactIndex(D)
    log.put(1, "a", 1, unit(0))
    bad = UnreadableBatch("item-vectors.g1", 0, 0, 0, 4, "checksum", "Invalid CRC", b"")
    log.stopped = {0: bad}
    log.put(0, "b", 2, unit(1))
    made = tail(log, index)
    try:
        assert made.wait_caught_up(10)
        assert made.missing() == str(bad) and "skip item-vectors.g1/0/0" in str(bad)
        assert index.stats().live == 1
        log.stopped = {}
        wait_until(lambda: made.missing() == "" and index.stats().live == 2)
    finally:
        made.close()


def test_kafka_away_the_index_goes_on_and_says_since_when(log: Log) -> None:
    index = ExactIndex(D)
    log.put(0, "a", 1, unit(0))
    made = tail(log, index)
    try:
        assert made.wait_caught_up(10)
        log.away = True
        wait_until(lambda: log.connects >= 3)
        assert "no answer" in made.missing() or "no server" in made.missing()
        assert "(since 0." in made.missing() and made.missing().startswith("Kafka at nowhere:9092")
        assert made.state().away_since_ms > 0
        assert index.query(unit(0), 1)[0].item_id == "a"
        log.put(0, "b", 2, unit(1))
        log.away = False
        wait_until(lambda: index.describe(["b"])[0] is not None)
        wait_until(lambda: made.missing() == "")
        assert made.state().records == 2  # it went on where it was
    finally:
        made.close()


def test_an_empty_topic_is_caught_up_and_a_missing_one_is_not(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tail(log, ExactIndex(D))
    try:
        assert made.wait_caught_up(10)
    finally:
        made.close()

    def nothing(settings: Settings, generation: str) -> None:
        raise Unavailable(f"there is no topic t.item-vectors.{generation}")

    monkeypatch.setattr(replica, "ItemVectorLog", nothing)
    other = Replica(SETTINGS, "g2", ExactIndex(D))
    other.start()
    try:
        wait_until(lambda: "there is no topic t.item-vectors.g2" in other.missing())
        assert not other.wait_caught_up(0)
    finally:
        other.close()


def test_no_thread_is_left_behind(log: Log) -> None:
    made = tail(log, ExactIndex(D))
    assert made.wait_caught_up(10)
    made.close()
    assert "replica" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers fork on Linux only")
def test_a_replica_from_before_a_fork_runs_and_ends_in_the_child(log: Log) -> None:
    """The keeper of several worker processes opens the generation, its children start the tail."""
    made = Replica(SETTINGS, "g1", ExactIndex(D))
    log.put(0, "a", 0, unit(0))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            made.start()
            caught_up = made.wait_caught_up(10)
            made.close()
            alive = [thread for thread in threading.enumerate() if thread.name == "replica"]
            code = 0 if caught_up and not alive else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    made.close()  # never started here


def test_deletes_end_with_the_retention_once_the_whole_log_was_read(log: Log) -> None:
    """The record of `late` was published again, behind a delete that has ended by then."""
    kept_us = 30 * 86_400_000_000
    log.put(0, "gone", 9, None)
    log.put(0, "other", 10, unit(1), 2 + kept_us)
    for n in range(20):
        log.put(0, "filler", 11 + n, unit(2), 2 + kept_us)
    log.put(0, "late", 5, unit(0), 3 + kept_us)
    index = ExactIndex(D)
    made = tail(log, index)
    try:
        assert made.wait_caught_up(10)
        wait_until(lambda: index.stats().tombstones == 0)
        assert index.describe(["late"])[0] is not None
        log.put(0, "gone", 8, unit(3), 4 + kept_us)
        log.put(0, "after", 40, unit(3), 4 + kept_us)
        wait_until(lambda: index.describe(["after"])[0] is not None)
        assert index.describe(["gone"]) == [None]
    finally:
        made.close()


def test_the_bundle_is_older_than_the_tail() -> None:
    index = ExactIndex(D)
    bundle = SimpleNamespace(
        created_ms=5,
        item_ids=["a", "b"],
        item_partitions=np.array([0, 1], np.int32),
        item_offsets=np.array([-1, 7]),
        item_vectors=np.stack([unit(0), unit(1)]),
        item_attributes=[{"categories": ["Drama"]}, {"attributes": {"year": 1999}}],
        item_at_ms=None,
    )
    load_bundle(index, bundle)  # type: ignore[arg-type]
    for filters, found in (
        (Filter(categories=frozenset({"Drama"})), ["a"]),
        (Filter(ranges={"year": Range(1990, 2000)}), ["b"]),
        (Filter(tags=frozenset({"new"})), []),
    ):
        assert [hit.item_id for hit in index.query(unit(0), 2, filters=filters)] == found
    described = index.describe(["a", "b"])
    assert [(hit.offset, hit.written_us) for hit in described if hit] == [(-1, 5_000), (7, 5_000)]
    assert index.apply([ItemRecord("b", 1, 7, 0, 0, None), ItemRecord("a", 0, 0, 0, 0, None)]) == 1
    assert index.describe(["a"]) == [None]
    shares = [ShardAssignment(n, 2) for n in range(2)]
    held = [ExactIndex(D) for _ in shares]
    for share, part in zip(shares, held, strict=True):
        load_bundle(part, bundle, share)  # type: ignore[arg-type]
        assert [hit is not None for hit in part.describe(["a", "b"])] == [
            *map(share.holds, ["a", "b"])
        ]
        assert part.watermarks().keys() == {0, 1}, "items of other shards count as read"
    assert sum(part.stats().live for part in held) == 2


def test_a_shard_skips_records_of_others_and_a_bad_one_of_its_own(log: Log) -> None:
    share = ShardAssignment(1, 2)
    mine = [f"i{n}" for n in range(40) if share.holds(f"i{n}")][:4]
    others = [f"i{n}" for n in range(40) if not share.holds(f"i{n}")][:4]
    for n, item_id in enumerate([*mine, *others]):
        log.put(0, item_id, n, unit(n))
    log.put(0, mine[0], 10, 2 * unit(0))  # not of unit norm: refused, alone
    log.put(0, mine[1], 11, None)
    log.put(0, others[0], 12, 2 * unit(0))  # not of this shard: ignored
    log.put(0, others[1], 13, None)
    index = ExactIndex(D)
    made = Replica(SETTINGS, "g1", index, assignment=share)
    made.start()
    try:
        assert made.wait_caught_up(10)
        assert {hit.item_id for hit in index.query(unit(0), 99)} == {*mine} - {mine[1]}
        assert index.watermarks()[0].offset == 13
        assert (index.stats().tombstones, made.state().rejected, made.state().records) == (1, 1, 12)
    finally:
        made.close()


def test_workers_announce_themselves_and_the_dead_are_forgotten(tmp_path: Path) -> None:
    settings = Settings(data_dir=str(tmp_path))
    assert running_workers.running(settings) == []
    gone = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, timeout=30
    )
    dead = running_workers.RegisteredWorker(
        address="h:1", pid=int(gone.stdout), generation="g1", started_ms=1
    )
    mine = running_workers.RegisteredWorker(
        address="h:2", pid=os.getpid(), generation="g1", started_ms=2
    )
    first = running_workers.announce(settings, dead)
    assert running_workers.running(settings) == []
    second = running_workers.announce(settings, mine)
    assert not first.exists() and second.exists()
    (tmp_path / "run" / "worker-1.json").write_text("{torn", encoding="utf-8")
    assert running_workers.running(settings) == [mine]


def python(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {
        k: v for k, v in os.environ.items() if not k.startswith(("EDDYLINE_", "KAFKA_", "REDIS_"))
    }
    return subprocess.run(
        [sys.executable, *code.split(" ", 1)],
        cwd=ROOT,
        env=clean | environ,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_worker_loads_neither_torch_nor_faust() -> None:
    code = (
        "import serving.__main__ as worker, sys; "
        "worker.ann_backend(worker.Settings()); print(*sys.modules)"
    )
    loaded = python(f"-c {code}")
    names = {name.partition(".")[0] for name in loaded.stdout.split()}
    assert {"serving", "grpc", "hnswlib", "numpy"} <= names, loaded.stderr
    assert not names & {"torch", "faust", "mode", "streams", "faiss", "annoy"}


@pytest.mark.parametrize(
    ("environ", "sentence"),
    [
        ({"EDDYLINE_WORKER_THREADS": "0"}, "EDDYLINE_WORKER_THREADS: worker_threads = '0'"),
        ({"EDDYLINE_NO_SUCH": "1"}, "there is no setting 'no_such'"),
        ({}, "no Kafka: set KAFKA_BOOTSTRAP_SERVERS"),
    ],
)
def test_a_bad_setting_ends_the_worker_with_2(
    tmp_path: Path, environ: dict[str, str], sentence: str
) -> None:
    ended = python("-m serving", EDDYLINE_DATA_DIR=str(tmp_path), **environ)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert sentence in ended.stderr


def test_a_taken_port_ends_the_worker_with_2_and_a_stop_while_it_waits_with_0(
    tmp_path: Path,
) -> None:
    environ = {
        "EDDYLINE_DATA_DIR": str(tmp_path),
        "KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1",
        "REDIS_URL": "redis://127.0.0.1:1/0",
        "EDDYLINE_WORKER_PORT": "0",
    }
    waiting = subprocess.Popen(
        [sys.executable, "-m", "serving"],
        cwd=ROOT,
        env=os.environ | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert waiting.stdout is not None
        line = waiting.stdout.readline()
        assert line.startswith("worker listens on 127.0.0.1:")
        port = line.strip().rpartition(":")[2]
        ended = python("-m serving", **environ | {"EDDYLINE_WORKER_PORT": port})
        assert ended.returncode == 2
        assert f"127.0.0.1:{port} cannot be bound" in ended.stderr
        waiting.terminate()
        _, errors = waiting.communicate(timeout=20)
        assert waiting.returncode == 0, errors
        assert "waiting" in errors and "Traceback" not in errors
    finally:
        waiting.kill()
        waiting.communicate(timeout=20)
    assert not list(tmp_path.glob("run/worker-*"))


@pytest.mark.parametrize("error", [LogReplaced("another topic"), GenerationEnded("it has ended")])
def test_a_forked_worker_that_cannot_go_on_has_the_keeper_open_anew(
    monkeypatch: pytest.MonkeyPatch, error: Exception, tmp_path: Path
) -> None:
    """Its siblings share the memory of the same log, so they are replaced one by one."""

    def run(*_: object, **__: object) -> int:
        raise error

    monkeypatch.setattr(worker_main.Worker, "run", run)
    settings = Settings(worker_port=0, data_dir=str(tmp_path))
    index = ExactIndex(D)
    processes = worker_main.WorkerProcesses(settings, None, ALL, threading.Event())  # type: ignore[arg-type]
    shared = SimpleNamespace(index=index)
    assert processes.serve(shared, 0, lambda: None, may_build=True) == prefork.RENEW  # type: ignore[arg-type]
    processes._port.close()
