"""The archive's files: boundaries, bytes, re-sends, users forgotten; without Kafka."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import msgspec
import pandas as pd
import pytest
from kafka import TopicPartition

from eddyline import archive as layout
from eddyline.archive import FORGETS, HOUR_MS, Archive, Forgotten
from eddyline.errors import LogMismatch, SettingsError
from eddyline.kafka.topics import CLICKS, ITEMS, USERS
from eddyline.schema import events
from eddyline.schema.erasure import DAY_MS, OLD_KEPT_MS, Erasure, digest
from eddyline.schema.events import Click, Forget, Item, UserProfile
from eddyline.schema.partitioning import partition_of
from eddyline.settings.loader import Settings
from eddyline.stores.memory import MemoryStore
from eddyline.stores.state_store import LogId
from streams.archive import erasure, file_placement
from streams.archive.archiver import Archiver
from streams.archive.partition_writer import ForgottenUsers, open_partition
from streams.clicks.handler import ClickHandler
from streams.fences import PartitionFences
from tests.applying import ingest

LOG = LogId("cluster-a", "topic-1")
MS = 472_222 * HOUR_MS  # a whole hour
P = partition_of("ana", 2)
USERS_HERE = [u for u in (f"user-{n}" for n in range(60)) if partition_of(u, 2) == P]


def settings_of(folder: Path | str, **more: Any) -> Settings:
    where = {"data_dir": str(folder)} if isinstance(folder, Path) else {"archive_url": folder}
    fields: dict[str, Any] = where | {"clicks_partitions": 2, "items_partitions": 2} | more
    return Settings(
        **{"at_ms_min": 0, "dedupe_window_events": 10, "archive_file_offsets": 100} | fields
    )


def record(offset: int, value: bytes | None, key: bytes, at_ms: int = MS, **more: Any) -> Any:
    fields = {"partition": P, "headers": [("produced_us", b"17")], "topic": CLICKS} | more
    return SimpleNamespace(offset=offset, value=value, key=key, timestamp=at_ms, **fields)


def click(offset: int, at_ms: int = MS, event_ms: int | None = None, **more: Any) -> Any:
    """at_ms: of the append; event_ms: of the event, the same by default."""
    happened = at_ms if event_ms is None else event_ms
    fields: dict[str, Any] = {"user_id": "ana", "item_id": f"i{offset}", "at_ms": happened} | more
    return record(offset, events.encode(Click(**fields)), fields["user_id"].encode(), at_ms)


def stream(n: int, seed: int) -> list[Any]:
    """A log with everything in it: hours, gaps, re-sends, refused and stray records."""
    rng, offset, at_ms, made = random.Random(seed), 0, MS, []
    for _ in range(n):
        offset += 1 if rng.random() < 0.9 else rng.randrange(2, 40)
        at_ms += rng.randrange(0, HOUR_MS // 40)
        kind = rng.random()
        if kind < 0.05:
            made.append(record(offset, b"{", b"ana", at_ms))
        elif kind < 0.1:
            made.append(
                click(
                    offset,
                    at_ms,
                    user_id=next(
                        u for u in ("b1", "b2", "b3", "b4", "b5", "b6") if partition_of(u, 2) != P
                    ),
                )
            )
        else:
            event_id = None if kind < 0.2 else f"e{max(0, offset - rng.randrange(12))}"
            context = {"page": rng.randrange(5), "ab": "x"} if kind < 0.5 else None
            user = rng.choice(USERS_HERE)
            made.append(click(offset, at_ms, user_id=user, event_id=event_id, context=context))
    return made


class Runner:
    """Archives a log as the process does: from the position that the files give."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.archive = settings, Archive(settings)

    def open(self, topic: str = CLICKS, forgetting: Any = None) -> Any:
        shared = defaultdict(ForgottenUsers) if forgetting is None else forgetting
        return open_partition(self.settings, self.archive, topic, P, LOG, 0, shared)

    def run(self, records: list[Any], chunk: int, topic: str = CLICKS, end: bool = True) -> Any:
        writer = self.open(topic)
        mine = [r for r in records if r.offset >= writer.written]
        for start in range(0, len(mine), chunk):
            writer.append(mine[start : start + chunk])
        if end:
            writer.complete()
        return writer

    def bytes(self, topic: str = CLICKS) -> dict[str, bytes]:
        found = {}
        for file in self.archive.files(topic):
            with self.archive.fs.open(file.path, "rb") as opened:
                found[file.path.removeprefix(self.archive.root)] = opened.read()
        return found


def accepted_by_ingest(settings: Settings, records: list[Any]) -> list[str]:
    """The items of the clicks that ingest counts, in order."""
    store = MemoryStore()
    outside: Any = SimpleNamespace(put=lambda *_: None, forward=lambda *_: None, flush=lambda: None)
    at = PartitionFences(settings, store, CLICKS, {CLICKS: LOG})
    at.open({P: (0, records[-1].offset + 1)})
    handler = ClickHandler(settings, store, at, outside, outside, [])
    done = [one for one in records if ingest(handler, P, [one]).applied]
    return [msgspec.json.decode(one.value)["item_id"] for one in done]


@pytest.mark.parametrize("seed", range(4))
def test_the_same_log_gives_the_same_bytes_whatever_the_chunks_and_restarts(
    tmp_path: Path, seed: int
) -> None:
    log, rng = stream(900, seed), random.Random(seed)
    whole = Runner(settings_of(tmp_path / "whole"))
    whole.run(log, 10_000)
    broken = Runner(settings_of(tmp_path / "broken"))
    for _ in range(6):
        upto = log[: rng.randrange(len(log))]
        broken.run(upto, rng.randrange(1, 70), end=False).discard()
    broken.run(log, 13)
    assert broken.bytes() == whole.bytes() and len(whole.bytes()) > 10
    assert not list(broken.archive.partials().iterdir())
    rows = [e.event.item_id for e in whole.archive.read(CLICKS)]
    assert rows == accepted_by_ingest(whole.settings, log), "the archive and ingest decide alike"


def test_a_file_ends_at_the_hour_and_at_a_run_of_offsets(tmp_path: Path) -> None:
    runner = Runner(settings_of(tmp_path))
    log = [
        click(o, MS + (HOUR_MS - 1 if o < 150 else HOUR_MS))
        for o in range(90, 220)
        if o not in (99, 150)
    ]
    runner.run(log, 7)
    found = [(f.first, f.last, f.hour_ms - MS) for f in runner.archive.files(CLICKS)]
    assert found == [(90, 98, 0), (100, 149, 0), (151, 199, HOUR_MS), (200, 219, HOUR_MS)]
    path = runner.archive.files(CLICKS)[0].path
    assert path.endswith(f"clicks/hour=2023-11-14T22/000{P}-{90:020d}-{98:020d}.parquet")


def test_a_record_without_a_time_stamp_ends_no_file(tmp_path: Path) -> None:
    """Otherwise each of them would be a file of its own, in an hour of 1969."""
    runner = Runner(settings_of(tmp_path))
    records = [click(n, -1 if n % 2 else MS) for n in range(10)]
    runner.run(records, 3)
    assert [name for name in runner.bytes() if "1969" in name or "1970" in name] == []
    assert len(runner.bytes()) == 1
    assert [event.offset for event in runner.archive.read(CLICKS)] == [0, 2, 4, 6, 8]


def test_a_chain_of_duplicates_is_decided_alike_after_a_restart(tmp_path: Path) -> None:
    # Accepted at 0; dropped at 8; accepted at 16 because 0 is too far back, though 8 is not.
    log = [click(o, event_id="again" if o % 8 == 0 else f"e{o}") for o in range(33)]
    whole = Runner(settings_of(tmp_path / "a", archive_file_offsets=4))
    whole.run(log, 100)
    stepwise = Runner(settings_of(tmp_path / "b", archive_file_offsets=4))
    for upto in range(1, len(log) + 1):
        stepwise.run(log[:upto], 100, end=False).discard()
    stepwise.run(log, 100)
    again = [e.offset for e in stepwise.archive.read(CLICKS) if e.event.event_id == "again"]
    assert again == [0, 16, 32] and stepwise.bytes() == whole.bytes()


def test_pandas_and_duckdb_read_what_was_sent(tmp_path: Path) -> None:
    runner = Runner(settings_of(tmp_path))
    log = stream(400, 1)
    runner.run(log, 50)
    events_ = list(runner.archive.read(CLICKS))
    by_pandas = pd.concat(pd.read_parquet(f.path) for f in runner.archive.files(CLICKS))
    assert list(by_pandas["offset"]) == [e.offset for e in events_]
    assert list(by_pandas["user_id"]) == [e.event.user_id for e in events_]
    query = (
        f"SELECT count(*), sum(weight), count(DISTINCT hour), max(context->>'ab') "
        f"FROM read_parquet('{runner.archive.root}/clicks/*/*.parquet', hive_partitioning=true)"
    )
    rows, weight, hours, ab = duckdb.sql(query).fetchall()[0]
    assert (rows, weight, ab) == (len(events_), float(len(events_)), "x")
    assert hours == len({f.hour_ms for f in runner.archive.files(CLICKS)}) > 3
    assert sum(e.event.context is not None for e in events_) > 50
    sent = {r.offset: r for r in log}
    for e in events_:
        decoded = events.decode_click(
            sent[e.offset].value, appended_ms=e.appended_ms, far_future_ms_max=10**9, id_form="nfc"
        )
        assert (
            e.event == decoded and e.appended_ms == sent[e.offset].timestamp and e.produced_us == 17
        )


def test_items_and_profiles_keep_every_field(tmp_path: Path) -> None:
    runner = Runner(settings_of(tmp_path, item_vector_dimension=2))
    ids = [i for i in (f"i{n}" for n in range(20)) if partition_of(i, 2) == P][:3]
    item = Item(
        item_id=ids[0],
        title="Ä",
        categories=["a", "b"],
        tags=["t"],
        attributes={"n": 1, "x": 1.0, "b": True},
        available=False,
        at_ms=5,
        vector=[0.1, -2.0],
    )
    bare = Item(item_id=ids[1])
    log = [
        record(0, events.encode(item), ids[0].encode()),
        record(1, events.encode(bare), ids[1].encode()),
        record(2, None, ids[0].encode()),
        record(3, events.encode(bare), b"another key"),
    ]
    writer = runner.run(log, 2, ITEMS)
    found = list(runner.archive.read(ITEMS))
    assert [(e.key, e.event) for e in found] == [(ids[0], item), (ids[1], bare), (ids[0], None)]
    assert msgspec.json.encode(found[0].event) == events.encode(item), (
        "1 and 1.0 stay what they are"
    )
    assert (writer.rows, writer.skipped) == (3, 1)
    profile = UserProfile(user_id="ana", attributes={"age": 30}, at_ms=9)
    runner.run([record(0, events.encode(profile), b"ana")], 1, USERS)
    assert [e.event for e in runner.archive.read(USERS)] == [profile]
    assert runner.archive.log_id(runner.archive.files(USERS)[0]) == LOG


def test_a_long_row_group_is_cut_by_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streams.archive.partition_writer.ROW_GROUP_BYTES", 1_000)
    runner = Runner(settings_of(tmp_path, archive_file_offsets=1_000))
    writer = runner.open()
    for o in range(200):
        writer.append([click(o)])
        assert writer._file._bytes < 1_000 + len(click(o).value), "memory holds one row group"
    writer.complete()
    assert len(list(runner.archive.read(CLICKS))) == 200


def test_where_the_place_cannot_be_written_nothing_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, log = Runner(settings_of(tmp_path)), [click(o) for o in range(250)]

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        writer = runner.open()
        with pytest.raises(OSError, match="No space"):
            writer.append(log)
        writer.discard()
    assert runner.archive.files(CLICKS) == [] and not list(runner.archive.partials().iterdir())
    runner.run(log, 250)
    assert [e.offset for e in runner.archive.read(CLICKS)] == list(range(250))


def test_an_object_store_gets_whole_objects(tmp_path: Path) -> None:
    log = stream(300, 3)
    local = Runner(settings_of(tmp_path / "local"))
    local.run(log, 40)
    there = Runner(
        settings_of(f"memory://{tmp_path.name}/archive", data_dir=str(tmp_path / "data"))
    )
    there.run(log[:200], 40, end=False).discard()
    there.run(log, 40)
    assert there.bytes() == local.bytes() and not there.archive.is_local
    assert not list(there.archive.partials().iterdir()), "nothing is left where it was written"
    erasure.forget(there.archive, {USERS_HERE[0]: layout.EVERYTHING}, P)
    kept = {e.event.user_id for e in there.archive.read(CLICKS)}
    assert USERS_HERE[0] not in kept and USERS_HERE[1] in kept


def test_an_address_of_an_unknown_kind_is_a_sentence() -> None:
    with pytest.raises(SettingsError, match="archive_url = 'nosuch://x'"):
        Archive(Settings(archive_url="nosuch://x"))


def holds(runner: Runner, word: str, *topics: str) -> list[str]:
    """The files that contain a word: in their bytes, statistics included, or in a value."""
    found = []
    for topic in topics or (CLICKS, USERS, FORGETS):
        for file in runner.archive.files(topic):
            raw, rows = Path(file.path).read_bytes(), pd.read_parquet(file.path)
            if word.encode() in raw or any(
                rows[c].astype(str).str.contains(word).any() for c in rows
            ):
                found.append(file.path)
    return found


def test_forgetting_takes_a_user_out_of_every_file(tmp_path: Path) -> None:
    runner, gone = Runner(settings_of(tmp_path)), USERS_HERE[3]
    log = stream(600, 2)
    runner.run(log, 100)
    runner.run([record(0, events.encode(UserProfile(user_id=gone)), gone.encode())], 1, USERS)
    before = [(e.offset, e.event) for e in runner.archive.read(CLICKS)]
    names, holding = set(runner.bytes()), holds(runner, gone)
    assert len(holding) > 3
    done, rows = erasure.forget(runner.archive, {gone: layout.EVERYTHING}, P)
    assert done == len(holding) and rows == sum(e.user_id == gone for _, e in before) + 1
    assert holds(runner, gone) == []
    assert set(runner.bytes()) == names, "files keep their names"
    rest = [(o, e) for o, e in before if e.user_id != gone]
    assert [(e.offset, e.event) for e in runner.archive.read(CLICKS)] == rest
    assert erasure.forget(runner.archive, {gone: layout.EVERYTHING}, P) == (0, 0)
    assert runner.open().written == log[-1].offset + 1, "the position stays"


@pytest.mark.parametrize("clicks_first", [True, False])
def test_a_null_record_forgets_whatever_is_written_first(
    tmp_path: Path, clicks_first: bool
) -> None:
    """Clicks before the null record go, later ones stay; also after a crash between the two."""
    runner = Runner(settings_of(tmp_path))
    log = [click(o, MS + o) for o in range(40)]
    profiles = [
        record(0, events.encode(UserProfile(user_id="ana")), b"ana", MS),
        record(1, None, b"ana", MS + 20),
        record(2, events.encode(UserProfile(user_id="ana", at_ms=1)), b"ana", MS + 20),
    ]
    for topic, records in [(CLICKS, log), (USERS, profiles)][:: 1 if clicks_first else -1]:
        runner.run(records, 7, topic)
    assert [e.offset for e in runner.archive.read(CLICKS)] == list(range(21, 40))
    profiles = [(e.key, e.digest) for e in runner.archive.read(USERS)]
    assert profiles == [(None, digest("ana")), ("ana", None)]


def test_a_null_record_is_seen_by_the_open_file_of_clicks(tmp_path: Path) -> None:
    runner, shared = Runner(settings_of(tmp_path, forgotten_kept_d=1)), defaultdict(ForgottenUsers)
    writer, profiles = runner.open(CLICKS, shared), runner.open(USERS, shared)
    writer.append([click(o, MS + o) for o in range(10)])
    profiles.append([record(0, None, b"ana", MS + 4)])
    profiles.complete()
    writer.complete()
    assert [e.offset for e in runner.archive.read(CLICKS)] == [5, 6, 7, 8, 9]
    assert not holds(Runner(settings_of(tmp_path)), '"ana"')
    for offset, hours, kept in ((200, 25, 1), (300, 26, 0)):
        writer.append([click(offset, MS + hours * HOUR_MS)])
        writer.complete()
        assert len(shared[P].by_digest) == kept, "old null records are dropped"


def forget(offset: int, until_ms: int, keep_after_ms: int, users_offset: int = 1) -> Any:
    event = Forget(
        user_id="ana",
        forget_until_ms=until_ms,
        keep_after_ms=keep_after_ms,
        users_offset=users_offset,
    )
    return record(offset, events.encode(event), b"ana", until_ms + 10)


@pytest.mark.parametrize("with_null", [True, False])
@pytest.mark.parametrize("restart", [True, False])
def test_the_archive_erases_by_the_place_of_the_forget(
    tmp_path: Path, with_null: bool, restart: bool
) -> None:
    """An archive that was down when the null record was compacted away learns of it in clicks."""
    runner, shared = Runner(settings_of(tmp_path)), defaultdict(ForgottenUsers)
    profiles = [record(0, events.encode(UserProfile(user_id="ana")), b"ana", MS)]
    profiles += [record(1, None, b"ana", MS + 20)] if with_null else []
    users = runner.open(USERS, shared)
    users.append(profiles)
    users.complete()
    log = [
        click(0, MS + 1, event_ms=MS + 25),  # the device's clock was ahead
        click(1, MS + 22, event_ms=MS + 25),  # between null record and Forget
        click(2, MS + 22, event_ms=MS + 31),  # of the user who returned
        forget(3, MS + 20, MS + 30),
        click(4, MS + 31, event_ms=MS + 20),
        click(5, MS + 31, event_ms=MS + 21),
        forget(6, MS + 20, MS + 30),  # repeated: the user who returned stays
    ]
    late = [click(101, MS + 40, event_ms=MS + 20), click(102, MS + 40, event_ms=MS + 41)]
    late.append(click(103, MS + 40, event_ms=MS + 41))
    late[-1].headers = [("origin_ms", str(MS + 20).encode())]
    writer = runner.open(CLICKS, shared)
    writer.append(log)
    writer.complete()
    if restart:
        writer = runner.open()
    writer.append(late)
    writer.complete()
    assert [e.offset for e in runner.archive.read(CLICKS)] == [2, 5, 102]
    assert [e.key for e in runner.archive.read(USERS)] == ([None] if with_null else [])
    kept = [(e.offset, e.key, e.digest, e.event) for e in runner.archive.read(FORGETS)]
    ends_ms = MS + 20 + OLD_KEPT_MS
    boundary = Forget(
        user_id="", forget_until_ms=MS + 20, keep_after_ms=MS + 30, users_offset=1, ends_ms=ends_ms
    )
    assert kept == [(at, None, digest("ana"), boundary) for at in (3, 6)]
    assert not holds(runner, "ana", FORGETS, USERS)


def test_limits_of_forgetting_are_exact() -> None:
    by_time, by_offset = Forgotten(Erasure(MS, 0, 2 * MS)), Forgotten(Erasure(0, 7, 0))
    import pyarrow as pa

    clicks = pa.table(
        {
            "user_id": ["a", "a", "b", "a"],
            "appended_ms": [MS, MS + 1, MS, MS + 1],
            "offset": [1, 2, 3, 4],
            "at_ms": [MS + 1, MS + 1, MS, MS],
        }
    )
    assert erasure._kept(clicks, CLICKS, {"a": by_time}.get) == [False, True, True, False]
    by_place = Forgotten(Erasure(0, 0, 0), clicks_offset=2, keep_after_ms=MS + 1)
    assert erasure._kept(clicks, CLICKS, {"a": by_place}.get) == [False, True, True, True]
    by_place = Forgotten(Erasure(0, 0, 0), clicks_offset=3, keep_after_ms=MS)
    assert erasure._kept(clicks, CLICKS, {"a": by_place}.get) == [True, True, True, True]
    users = pa.table(
        {
            "user_id": ["a", "a", None],
            "appended_ms": [MS] * 3,
            "offset": [6, 7, 8],
            "at_ms": [0, 0, None],
        }
    )
    assert erasure._kept(users, USERS, {"a": by_offset}.get) == [False, True, True]


def test_kill_9_in_mid_write_leaves_whole_files_only(tmp_path: Path) -> None:
    """A process archives until it is killed, repeatedly; every file is readable and right."""
    program = textwrap.dedent("""
        import sys
        from collections import defaultdict
        from types import SimpleNamespace
        from eddyline.archive import Archive
        from eddyline.stores.state_store import LogId
        from eddyline.settings.loader import Settings
        from streams.archive import file_placement, partition_writer
        settings = Settings(data_dir=sys.argv[1], clicks_partitions=2, archive_file_offsets=700)
        archive, partition = Archive(settings), int(sys.argv[2])
        file_placement.remove_abandoned(archive)
        log, shared = LogId("cluster-a", "topic-1"), defaultdict(partition_writer.ForgottenUsers)
        mine = partition_writer.open_partition(
            settings, archive, "clicks", partition, log, 0, shared)
        print("ready", flush=True)
        value = b'{"user_id": "ana", "item_id": "i", "at_ms": 0}'
        for o in range(mine.written, 10**9):
            mine.append([SimpleNamespace(offset=o, value=value, key=b"ana", timestamp=0,
                                         partition=partition, headers=[])])
    """)
    runner = Runner(settings_of(tmp_path, archive_file_offsets=700))
    for turn in range(2):
        argv = [sys.executable, "-c", program, str(tmp_path), str(P)]
        child = subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=Path(__file__).parents[3])
        try:
            assert child.stdout and child.stdout.readline() == b"ready\n"
            deadline, before = time.monotonic() + 30, len(runner.archive.files(CLICKS))
            while len(runner.archive.files(CLICKS)) < before + 3:
                assert child.poll() is None and time.monotonic() < deadline
                time.sleep(0.003 + 0.002 * turn)
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait(timeout=10)
            assert child.stdout
            child.stdout.close()
        offsets = [e.offset for e in runner.archive.read(CLICKS)]
        assert offsets == list(range(len(offsets))) and len(offsets) % 700 == 0 and offsets
    left = len(list(runner.archive.partials().iterdir()))
    assert left <= 1, "of what the ones before left, the next process took care"
    assert file_placement.remove_abandoned(runner.archive) == left, (
        "torn files lie where nobody looks"
    )


@pytest.mark.parametrize(
    ("days", "offset", "record_days", "resynced", "refused"),
    [
        (29.9, 9, 0, False, False),
        (31, 9, 0, False, True),  # offset 8 may have been a delete
        (31, 8, 29, False, False),  # every record after the files is young enough
        (31, 8, 31, False, True),
        (31, 9, 0, True, False),  # null records were appended for what the topic had lost
    ],
)
def test_an_archive_that_may_lack_deletes_is_refused(
    tmp_path: Path, days: float, offset: int, record_days: float, resynced: bool, refused: bool
) -> None:
    runner = Runner(settings_of(tmp_path))
    runner.run([record(7, events.encode(UserProfile(user_id="ana")), b"ana", MS)], 1, USERS)
    now_ms = int(MS + HOUR_MS + days * DAY_MS)
    archiver = Archiver(
        runner.settings, runner.archive, threading.Event(), "member", lambda: now_ms
    )
    if resynced:
        runner.archive.note_resync(USERS, now_ms - 1)
    resume = archiver._resume(USERS, TopicPartition(USERS, P), 30 * DAY_MS)
    after = record(offset, None, b"bo", int(now_ms - record_days * DAY_MS))
    if refused:
        with pytest.raises(LogMismatch, match="`eddyline resync`"):
            resume.check([after])
    else:
        assert resume.check([after]) == 0
    assert len(runner.archive.files(USERS)) == 1, "the note is no file of the archive"
