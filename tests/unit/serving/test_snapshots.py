"""The worker's snapshots: written on time and at the stop; the topic heals an unusable one."""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from eddyline.schema.item_record import ItemRecord, encode_record
from eddyline.settings.loader import Settings
from index.factory import HnswIndex
from index.snapshot import format
from serving.sharding import ALL, ShardAssignment
from serving.worker import replica
from serving.worker.replica import Replica
from serving.worker.snapshots import AGE_MS_MAX, KEPT_FILES, Snapshots

D = 4
BUNDLE = SimpleNamespace(
    generation="g1", dimension=D, created_ms=5, item_at_ms=np.empty(0, np.int64)
)


def unit(at: int) -> np.ndarray:
    return np.eye(D, dtype=np.float32)[at % D]


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)


class Topic:
    """One partition of item vectors and a consumer of it; `begins` is where reading began."""

    def __init__(self) -> None:
        self.records: list[SimpleNamespace] = []
        self.begins: list[int] = []
        self.at = 0

    def put(self, item_id: str, vector: np.ndarray | None) -> None:
        offset = len(self.records)
        value = encode_record(
            ItemRecord(
                item_id, 0, offset, 0, 1, vector, {"tags": ["t"]} if vector is not None else {}
            )
        )
        self.records.append(
            SimpleNamespace(partition=0, offset=offset, key=item_id.encode(), value=value)
        )

    def begin(self, positions: dict[int, int]) -> None:
        self.at = positions.get(0, 0)
        self.begins.append(self.at)

    def positions(self) -> dict[int, int]:
        return {0: self.at}

    def ends(self) -> dict[int, int]:
        return {0: len(self.records)}

    def poll(self, timeout_ms: int) -> dict[int, list[SimpleNamespace]]:
        batch = self.records[self.at :]
        self.at += len(batch)
        if not batch:
            time.sleep(0.005)
        return {0: batch} if batch else {}

    def stopped(self) -> dict[int, Any]:
        return {}

    def close(self) -> None: ...


class Worker:
    """Index, tail and snapshots as the process wires them."""

    def __init__(self, folder: Path, topic: Topic, **more: object) -> None:
        settings = Settings(
            data_dir=str(folder), kafka_bootstrap_servers="nowhere:9092", snapshot_interval_s=3_600
        )
        self.index = HnswIndex(D)
        clock, share = more.get("clock", time.time), more.get("share", ALL)
        log_id = str(more.get("log_id", "c/t"))
        self.snapshots = Snapshots(settings, BUNDLE, log_id, self.index, clock, share)  # type: ignore[arg-type]
        self.positions = self.snapshots.load()
        self.replica = Replica(
            settings, "g1", self.index, positions=self.positions, assignment=share
        )
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(replica, "ItemVectorLog", lambda *_: topic)
            self.replica.start()
            self.snapshots.start(self.replica)
            assert self.replica.wait_caught_up(10)

    def stop(self) -> None:
        self.replica.close()
        self.snapshots.close()
        self.index.close()

    def ids(self) -> set[str]:
        return {hit.item_id for hit in self.index.query(unit(0), 99)}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "POLL_MS", 10)
    monkeypatch.setattr(replica, "ENDS_S", 0.02)


@pytest.fixture
def topic() -> Topic:
    made = Topic()
    for n in range(8):
        made.put(f"i{n}", unit(n))
    return made


@pytest.mark.parametrize(("times", "begins"), [(True, [0, 2]), (False, [0, 0])])
def test_items_without_a_time_are_read_again_if_the_bundle_has_no_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: bool, begins: list[int]
) -> None:
    """A snapshot of an older release keeps the times that its bundle lacked at 0."""
    topic = Topic()
    topic.put("a", unit(0))
    topic.put("b", unit(1))
    first = Worker(tmp_path, topic)
    first.stop()
    if not times:
        monkeypatch.setattr(BUNDLE, "item_at_ms", None)
    second = Worker(tmp_path, topic)
    assert (topic.begins, second.ids()) == (begins, {"a", "b"})
    second.stop()


def test_a_worker_starts_where_the_last_one_stopped(tmp_path: Path, topic: Topic) -> None:
    first = Worker(tmp_path, topic)
    assert first.positions is None and topic.begins == [0]
    first.stop()
    topic.put("new", unit(1))
    topic.put("i3", None)
    second = Worker(tmp_path, topic)
    try:
        assert (second.positions, topic.begins) == ({0: 8}, [0, 8])
        assert second.replica.state().records == 2
        # Deleted while no worker ran: the tail is read before the worker serves.
        assert second.ids() == {*(f"i{n}" for n in range(8)), "new"} - {"i3"}
    finally:
        second.stop()
    third = Worker(tmp_path, topic)
    try:
        assert (third.positions, third.ids()) == ({0: 10}, second.ids())
    finally:
        third.stop()


@pytest.mark.parametrize("damage", ["flipped", "short", "empty", "older", "log", "bundle"])
def test_a_snapshot_that_cannot_be_used_is_healed_from_the_topic(
    tmp_path: Path, topic: Topic, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = Worker(tmp_path, topic)
    first.stop()
    path, more = first.snapshots.path, {}
    whole = path.read_bytes()
    if damage == "flipped":
        path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    elif damage in ("short", "empty"):
        path.write_bytes(whole[: len(whole) // 2 if damage == "short" else 0])
    elif damage == "older":
        more = {"clock": lambda: time.time() + AGE_MS_MAX / 1000 + 60}
    elif damage == "log":
        more = {"log_id": "c/another"}
    else:
        contents, header = format.load(path, first.snapshots._origin, 0)
        other = format.Origin(generation="g1", dimension=D, bundle_ms=6, log="c/t")
        format.write(path, contents, other, header.positions, header.created_ms)
    topic.put("i3", None)
    with caplog.at_level(logging.WARNING):
        second = Worker(tmp_path, topic, **more)
    try:
        assert (second.positions, topic.begins) == (None, [0, 0])
        assert second.ids() == first.ids() - {"i3"}
        assert [r.message for r in caplog.records] == [
            "the snapshot is not used; the topic is read from its beginning"
        ]
        assert path.name in caplog.records[0].reason  # type: ignore[attr-defined]
    finally:
        second.stop()
    third = Worker(tmp_path, topic, **more)  # the stop wrote a good one
    third.stop()
    assert third.positions == {0: 9}


def test_a_full_disk_is_said_and_the_worker_goes_on(
    tmp_path: Path, topic: Topic, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    worker = Worker(tmp_path, topic)
    try:
        assert worker.snapshots.write({0: 8})
        before = worker.snapshots.path.read_bytes()

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
            patched.setattr(os, "fsync", full)
            assert not worker.snapshots.write({0: 9})
        assert "No space left" in caplog.records[-1].reason  # type: ignore[attr-defined]
        assert worker.snapshots.path.read_bytes() == before
        assert [p.name for p in worker.snapshots.path.parent.iterdir()] == [
            worker.snapshots.path.name
        ]
        assert worker.ids()
    finally:
        worker.stop()


def test_written_every_interval_and_only_where_something_came(tmp_path: Path) -> None:
    index = HnswIndex(D)
    index.upsert([ItemRecord("a", 0, 1, 0, 0, unit(0))])
    settings = Settings(data_dir=str(tmp_path), snapshot_interval_s=1)
    snapshots = Snapshots(settings, BUNDLE, "c/t", index)  # type: ignore[arg-type]
    snapshots._interval_s = 0.02  # type: ignore[assignment]
    at: dict[int, int] = {}
    snapshots.start(SimpleNamespace(positions=lambda: at))  # type: ignore[arg-type]
    time.sleep(0.1)
    assert not snapshots.path.exists()  # it has not caught up
    at[0] = 1
    wait_until(snapshots.path.exists)
    wait_until(lambda: snapshots._written == {0: 1})
    first = snapshots.path.stat().st_ino
    time.sleep(0.1)
    assert snapshots.path.stat().st_ino == first
    at[0] = 2
    wait_until(lambda: snapshots.path.stat().st_ino != first)
    snapshots.close()


def test_never_where_the_interval_is_0(tmp_path: Path) -> None:
    index = HnswIndex(D)
    index.upsert([ItemRecord("a", 0, 1, 0, 0, unit(0))])
    snapshots = Snapshots(
        Settings(data_dir=str(tmp_path), snapshot_interval_s=0), BUNDLE, "c/t", index
    )  # type: ignore[arg-type]
    snapshots.start(SimpleNamespace(positions=lambda: {0: 1}))  # type: ignore[arg-type]
    snapshots.close()
    assert not snapshots.path.exists()


def test_old_generations_and_killed_writers_leave_no_heap(tmp_path: Path) -> None:
    index = HnswIndex(D)
    snapshots = Snapshots(Settings(data_dir=str(tmp_path)), BUNDLE, "c/t", index)  # type: ignore[arg-type]
    folder = snapshots.path.parent
    folder.mkdir()
    for n in range(5):
        old = folder / f"item-vectors.old{n}.snapshot"
        old.touch()
        os.utime(old, (n, n))
    for name, age_s in (("dead", 10_000), ("busy", 0)):
        partial = folder / f"item-vectors.g1.snapshot.{name}.partial"
        partial.touch()
        os.utime(partial, (time.time() - age_s,) * 2)
    (folder / "other.item-vectors.g1.snapshot").touch()
    assert snapshots.write({0: 1})
    left = sorted(path.name for path in folder.iterdir())
    assert left == [
        "item-vectors.g1.snapshot",
        "item-vectors.g1.snapshot.busy.partial",
        "item-vectors.old3.snapshot",
        "item-vectors.old4.snapshot",
        "other.item-vectors.g1.snapshot",
    ]
    assert KEPT_FILES == 3


def test_each_shard_starts_from_a_snapshot_of_its_own(tmp_path: Path, topic: Topic) -> None:
    shares = [ShardAssignment(n, 3) for n in range(3)]
    for share in (*shares, ALL):
        Worker(tmp_path, topic, share=share).stop()
    folder = tmp_path / "snapshots"
    assert len({path.name for path in folder.iterdir()}) == 4
    topic.put("new", unit(1))
    topic.put("i3", None)
    held, live = [], {*(f"i{n}" for n in range(8)), "new"} - {"i3"}
    for share in shares:
        worker = Worker(tmp_path, topic, share=share)
        worker.stop()
        assert worker.positions == {0: 8} and worker.replica.state().records == 2
        assert worker.index.watermarks()[0].offset == 9, "records of other shards count as read"
        assert all(share.holds(item_id) for item_id in worker.ids())
        held += worker.ids()
    assert sorted(held) == sorted(live)


@pytest.mark.parametrize("other", [ShardAssignment(2, 4), ShardAssignment(1, 5), ALL])
def test_a_snapshot_of_another_shard_or_count_is_refused(
    tmp_path: Path, topic: Topic, other: ShardAssignment, caplog: pytest.LogCaptureFixture
) -> None:
    mine = ShardAssignment(1, 4)
    made = Worker(tmp_path, topic, share=other)
    made.stop()
    place = made.snapshots.path.with_name("item-vectors.g1.shard-1-of-4.snapshot")
    made.snapshots.path.rename(place)
    with caplog.at_level(logging.WARNING):
        healed = Worker(tmp_path, topic, share=mine)
    healed.stop()
    reason = caplog.records[0].reason  # type: ignore[attr-defined]
    assert f"part {other.name!r}, expected 'shard 1 of 4'" in reason
    assert healed.positions is None and healed.ids() == {
        f"i{n}" for n in range(8) if mine.holds(f"i{n}")
    }


def test_a_shard_leaves_the_files_of_others_alone(tmp_path: Path) -> None:
    index = HnswIndex(D)
    folder = tmp_path / "snapshots"
    folder.mkdir()
    others = [
        f"item-vectors.{g}{part}.snapshot"
        for g in "abcde"
        for part in ("", ".shard-0-of-4", ".shard-11-of-12")
    ]
    own = [f"item-vectors.{g}.shard-1-of-{n}.snapshot" for n, g in enumerate("abcde", 2)]
    for at, name in enumerate((*others, *own)):
        (folder / name).touch()
        os.utime(folder / name, (at, at))
    settings = Settings(data_dir=str(tmp_path))
    shard = Snapshots(settings, BUNDLE, "c/t", index, assignment=ShardAssignment(1, 4))  # type: ignore[arg-type]
    assert shard.write({0: 1})
    left = {path.name for path in folder.iterdir()}
    assert left == {*others, *own[-KEPT_FILES + 1 :], shard.path.name}
    whole = Snapshots(settings, BUNDLE, "c/t", index)  # type: ignore[arg-type]
    assert whole.write({0: 1})
    gone = left - {path.name for path in folder.iterdir()}
    assert gone == {f"item-vectors.{g}.snapshot" for g in "abc"}
