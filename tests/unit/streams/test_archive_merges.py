"""Merges in the archive, what a file covers, and two who rewrite the archive at the same time."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import pandas as pd
import pyarrow.parquet as pq
import pytest
from kafka import TopicPartition

from eddyline.archive import EVERYTHING, HOUR_MS, MERGES, Archive, Forgotten
from eddyline.kafka.topics import CLICKS, USERS
from eddyline.schema import events
from eddyline.schema.erasure import Erasure
from eddyline.schema.events import Click, Merge, UserProfile
from eddyline.schema.partitioning import partition_of
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import LogId
from streams.archive import erasure, file_placement
from streams.archive.archiver import Archiver
from streams.archive.partition_writer import ForgottenUsers, open_partition

LOG = LogId("cluster-a", "topic-1")
MS = 472_222 * HOUR_MS
P = partition_of("ana", 2)
HERE = [u for u in (f"user-{n}" for n in range(60)) if partition_of(u, 2) == P]
ELSEWHERE = [u for u in (f"user-{n}" for n in range(60)) if partition_of(u, 2) != P]


def settings_of(folder: Path, **more: Any) -> Settings:
    fields: dict[str, Any] = {
        "data_dir": str(folder),
        "clicks_partitions": 2,
        "archive_file_offsets": 100,
    }
    return Settings(**fields | {"dedupe_window_events": 600} | more)


def record(offset: int, value: bytes | None, key: str, at_ms: int = MS, partition: int = P) -> Any:
    return SimpleNamespace(
        offset=offset,
        value=value,
        key=key.encode(),
        timestamp=at_ms,
        partition=partition,
        headers=[],
        topic=CLICKS,
    )


def click(offset: int, user: str = "ana", at_ms: int = MS, partition: int = P) -> Any:
    event = Click(user_id=user, item_id=f"i{offset}", at_ms=MS, event_id=f"e{offset}")
    return record(offset, events.encode(event), user, at_ms, partition)


def merge(offset: int, visitor: str, user: str, at_ms: int = MS, partition: int = P) -> Any:
    event = Merge(user_id=visitor, merge_into=user, at_ms=MS)
    return record(offset, events.encode(event), visitor, at_ms, partition)


def write(
    settings: Settings, records: list[Any], topic: str = CLICKS, begin: int = 0, partition: int = P
) -> None:
    archive = Archive(settings)
    writer = open_partition(
        settings, archive, topic, partition, LOG, begin, defaultdict(ForgottenUsers)
    )
    writer.append(records)
    writer.complete()


def merges(settings: Settings) -> list[tuple[int, str | None, str]]:
    return [(e.offset, e.key, e.event.merge_into) for e in Archive(settings).read(MERGES)]  # type: ignore[union-attr]


def test_merges_lie_in_files_of_their_own_under_the_same_name(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    log = [
        click(0),
        merge(1, "ana", HERE[0]),
        click(2),
        merge(7, HERE[1], ELSEWHERE[0]),
        click(130),
    ]
    write(settings, log)
    archive = Archive(settings)
    assert merges(settings) == [(1, "ana", HERE[0]), (7, HERE[1], ELSEWHERE[0])]
    assert [e.offset for e in archive.read(CLICKS)] == [0, 2, 130], "clicks are read as before"
    [mine] = archive.files(MERGES)
    first = archive.files(CLICKS)[0]
    assert (
        (mine.first, mine.last, mine.hour_ms)
        == (first.first, first.last, first.hour_ms)
        == (0, 7, MS)
    )
    frame = pd.read_parquet(mine.path)
    assert list(frame["merge_into"]) == [HERE[0], ELSEWHERE[0]]
    files = f"'{archive.root}/merges/*/*.parquet', hive_partitioning=true"
    query = f"SELECT count(*) FROM read_parquet({files})"
    assert duckdb.sql(query).fetchall() == [(2,)]


def test_a_crash_between_merges_and_clicks_leaves_them_once(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    log = [click(0), merge(1, "ana", HERE[0]), click(2)]
    write(settings, log)
    before = [Path(file.path).read_bytes() for file in Archive(settings).files(MERGES)]
    Path(Archive(settings).files(CLICKS)[0].path).unlink()
    write(settings, log)
    assert merges(settings) == [(1, "ana", HERE[0])]
    assert [Path(file.path).read_bytes() for file in Archive(settings).files(MERGES)] == before
    assert [e.offset for e in Archive(settings).read(CLICKS)] == [0, 2]


def test_forgetting_takes_either_user_out_of_merges(tmp_path: Path) -> None:
    settings, into = settings_of(tmp_path), ELSEWHERE[0]
    log = [merge(0, "ana", into), merge(1, HERE[0], into), merge(2, HERE[1], HERE[2]), click(3)]
    write(settings, log)
    archive = Archive(settings)
    partition = partition_of(into, 2)
    assert erasure.forget(archive, {into: EVERYTHING}, partition) == (1, 2)
    assert merges(settings) == [(0, "ana", ""), (1, HERE[0], ""), (2, HERE[1], HERE[2])], (
        "the list ended there"
    )
    assert erasure.forget(archive, {"ana": EVERYTHING}, P) == (2, 2), "a merge and a click"
    assert [key for _, key, _ in merges(settings)] == [HERE[0], HERE[1]]
    raw = b"".join(Path(file.path).read_bytes() for file in archive.files(MERGES))
    assert into.encode() not in raw and b"ana" not in raw
    assert erasure.forget(archive, {into: EVERYTHING}, partition) == (0, 0)


def test_a_merge_after_the_null_record_is_of_the_new_user(tmp_path: Path) -> None:
    settings, into = settings_of(tmp_path), ELSEWHERE[0]
    write(settings, [merge(0, "ana", into, MS + 10), merge(1, "ana", into, MS + 20)])
    limit = {into: Forgotten(Erasure(MS + 10, 0, 2 * MS))}
    erasure.forget(Archive(settings), limit, partition_of(into, 2))
    assert merges(settings) == [(0, "ana", ""), (1, "ana", into)]


@pytest.mark.parametrize("merges_first", [True, False])
def test_a_null_record_in_another_partition_reaches_merges_in_either_order(
    tmp_path: Path, merges_first: bool
) -> None:
    settings, into = settings_of(tmp_path), ELSEWHERE[0]
    other = partition_of(into, 2)
    profiles = [
        record(0, events.encode(UserProfile(user_id=into)), into, MS, other),
        record(1, None, into, MS + 30, other),
    ]
    turns = [
        lambda: write(settings, [merge(0, "ana", into, MS + 10), merge(1, "ana", into, MS + 40)]),
        lambda: write(settings, profiles, USERS, partition=other),
    ]
    for turn in turns if merges_first else turns[::-1]:
        turn()
    assert merges(settings) == [(0, "ana", ""), (1, "ana", into)]


def test_an_end_without_records_is_not_lacking(tmp_path: Path) -> None:
    settings, archive = settings_of(tmp_path), Archive(settings_of(tmp_path))
    write(settings, [click(5), click(20)], begin=5)
    archive.note_empty(CLICKS, P, LOG, 20, 23)  # 21 and 22 are markers
    assert archive.lacking(CLICKS, P, 5, 22, LOG) == archive.lacking(CLICKS, P, 21, 22, LOG) == []
    assert archive.lacking(CLICKS, P, 22, 22, LOG) == []
    assert archive.lacking(CLICKS, P, 5, 23, LOG) == archive.lacking(CLICKS, P, 23, 23, LOG)
    assert archive.lacking(CLICKS, P, 23, 23, LOG) == [(23, 23)]
    assert archive.lacking(CLICKS, P, 4, 22, LOG) == [(4, 4)]
    other = LogId("cluster-a", "topic-2")
    assert archive.lacking(CLICKS, P, 21, 22, other) == [(21, 22)]
    assert archive.lacking(CLICKS, 1 - P, 21, 22, LOG) == [(21, 22)]
    write(settings, [click(40)], begin=30)  # 23 to 29 were gone
    assert archive.lacking(CLICKS, P, 5, 40, LOG) == [(23, 29)]
    assert [file.last for file in archive.files(CLICKS)] == [20, 40]


def test_what_the_files_cover(tmp_path: Path) -> None:
    settings, archive = settings_of(tmp_path), Archive(settings_of(tmp_path))
    assert archive.lacking(CLICKS, P, 0, 9) == [(0, 9)]
    write(settings, [click(5), click(20)], begin=5)  # Kafka began with 5; 6 to 19 are markers
    write(settings, [click(150), click(155)])  # 21 to 149 are markers
    write(settings, [click(190), click(320)], begin=180)  # 156 to 179 were gone
    assert archive.lacking(CLICKS, P, 0, 320) == [(0, 4), (156, 179)]
    assert archive.lacking(CLICKS, P, 5, 155) == [] == archive.lacking(CLICKS, P, 21, 149)
    assert archive.lacking(CLICKS, P, 155, 156) == [(156, 156)]
    assert archive.lacking(CLICKS, P, 179, 179) == [(179, 179)]
    assert archive.lacking(CLICKS, P, 180, 400) == [(321, 400)]
    assert archive.lacking(CLICKS, 1 - P, 3, 4) == [(3, 4)], "of another partition there is nothing"


def test_a_file_of_before_this_was_kept_covers_its_own_records_only(tmp_path: Path) -> None:
    settings, archive = settings_of(tmp_path), Archive(settings_of(tmp_path))
    write(settings, [click(0), click(20)])
    write(settings, [click(120), click(130)])
    for file in archive.files(CLICKS):
        table = pq.read_table(file.path)
        metadata = {k: v for k, v in table.schema.metadata.items() if k != b"eddyline.since"}
        pq.write_table(table.replace_schema_metadata(metadata), file.path)
    assert archive.since(archive.files(CLICKS)[0]) is None
    assert archive.lacking(CLICKS, P, 0, 130) == [(21, 119)]
    assert [e.offset for e in archive.read(CLICKS)] == [0, 20, 120, 130]


def test_retention_that_overtakes_the_archive_leaves_a_gap_that_is_known(tmp_path: Path) -> None:
    settings, archive = settings_of(tmp_path), Archive(settings_of(tmp_path))
    writer = open_partition(settings, archive, CLICKS, P, LOG, 0, defaultdict(ForgottenUsers))
    place: Any = TopicPartition(CLICKS, P)
    for begin, offset in [(0, 3), (2, 9), (40, 41)]:
        consumer: Any = SimpleNamespace(
            beginning_offsets=lambda _, at=begin: defaultdict(lambda: at)
        )
        if offset > writer.last_read + 1:
            Archiver._check_for_loss(SimpleNamespace(_consumer=consumer), place, writer)  # type: ignore[arg-type]
        writer.append([click(offset)])
    writer.complete()
    assert [e.offset for e in archive.read(CLICKS)] == [3, 9, 41], "what was read before it is kept"
    assert archive.lacking(CLICKS, P, 0, 41) == [(10, 39)]


def test_two_that_forget_do_not_undo_each_other(tmp_path: Path) -> None:
    settings, profiles, started = settings_of(tmp_path), HERE[:10], threading.Barrier(2)
    write(settings, [click(o, (*profiles, "ana")[o % 11]) for o in range(1_980)])

    def forget(users: list[str]) -> None:
        archive = Archive(settings)
        started.wait(20)
        for user in users:
            erasure.forget(archive, {user: EVERYTHING}, P)

    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(forget, profiles[n::2]) for n in range(2)]:
            done.result(timeout=60)
    assert {e.key for e in Archive(settings).read(CLICKS)} == {"ana"}
    assert not list(Archive(settings).partials().iterdir())


def test_a_writer_that_comes_late_does_not_bring_forgotten_users_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, archive = settings_of(tmp_path), Archive(settings_of(tmp_path))
    log = [click(o, HERE[o % 2]) for o in range(50)]
    zombie = open_partition(settings, archive, CLICKS, P, LOG, 0, defaultdict(ForgottenUsers))
    zombie.append(log)
    monkeypatch.setattr(
        "socket.gethostname", lambda: "another"
    )  # a process of its own writes elsewhere
    write(settings, log)
    erasure.forget(archive, {HERE[0]: EVERYTHING}, P)
    zombie.complete()
    assert {e.key for e in archive.read(CLICKS)} == {HERE[1]}
    assert not list(archive.partials().iterdir())


def test_between_machines_a_file_that_changed_meanwhile_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(tmp_path, archive_url=f"memory://{tmp_path.name}/archive")
    write(settings, [click(o, HERE[o % 3]) for o in range(60)])
    archive = Archive(settings)
    plain, turns = erasure.copy_without, []

    def another_machine_is_faster(source: Any, target: Path, topic: str, forgotten: Any) -> int:
        changed = plain(source, target, topic, forgotten)
        if not turns:
            turns.append(1)
            [file] = archive.files(CLICKS)
            theirs = tmp_path / "theirs"
            with archive.fs.open(file.path, "rb") as opened:
                plain(opened, theirs, topic, {HERE[1]: EVERYTHING}.get)
            archive.fs.put_file(str(theirs), file.path)
        return changed

    monkeypatch.setattr(erasure, "copy_without", another_machine_is_faster)
    erasure.forget(archive, {HERE[0]: EVERYTHING}, P)
    assert {e.key for e in archive.read(CLICKS)} == {HERE[2]}


def test_the_lock_is_waited_for_and_not_for_ever(tmp_path: Path) -> None:
    archive = Archive(settings_of(tmp_path))
    inside, release = threading.Event(), threading.Event()

    def hold() -> None:
        with file_placement.locked(archive):
            inside.set()
            assert release.wait(20)

    holder = threading.Thread(target=hold)
    holder.start()
    try:
        assert inside.wait(10)
        begun = time.monotonic()
        with (
            pytest.raises(OSError, match="held by another process"),
            file_placement.locked(archive, 0.2),
        ):
            pass
        assert 0.2 <= time.monotonic() - begun < 5
    finally:
        release.set()
        holder.join(20)
    with file_placement.locked(archive, 0.2):
        pass
