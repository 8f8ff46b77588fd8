"""Answers in the archive: columns, what is refused, and what goes when a user is forgotten."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pytest

from eddyline.archive import EVERYTHING, Forgotten
from eddyline.kafka.topics import ANSWERS, CLICKS, USERS
from eddyline.schema.answers import (
    AnsweredItem,
    Candidate,
    PathCandidates,
    RecordedAnswer,
    encode_answer,
)
from eddyline.schema.erasure import Erasure
from eddyline.schema.partitioning import partition_of
from streams.archive import erasure
from streams.archive.partition_writer import ForgottenUsers
from tests.unit.streams.test_archive_files import (
    MS,
    USERS_HERE,
    P,
    Runner,
    click,
    forget,
    record,
    settings_of,
)


def answer(offset: int, at_ms: int = MS, user_id: str = "ana", **more: Any) -> Any:
    """A record of `answers`; at_ms: of the append and of the answer."""
    fields: dict[str, Any] = {
        "impression_id": f"p.{offset}",
        "user_id": user_id,
        "at_ms": at_ms,
        "generation": "g1",
        "k": 2,
        "scene": "home",
        "items": [AnsweredItem("i1", "towers", 1, 0.5), AnsweredItem("ü2", "popular", 3, 7.0)],
        "paths": [
            PathCandidates("towers", 1, 1, [Candidate("i1", 0.5)]),
            PathCandidates("popular", 9, 1, []),
        ],
        "missing": ["kafka: no answer"],
    }
    value = encode_answer(RecordedAnswer(**fields | more))
    return record(offset, value, user_id.encode(), at_ms, topic=ANSWERS)


def test_answers_keep_every_field(tmp_path: Path) -> None:
    runner = Runner(settings_of(tmp_path))
    given = [
        answer(0, user_offset=7, arm="b", session=3, filtered=True, popularity_beta=0.5),
        answer(1, MS + 5, user_id=USERS_HERE[0], items=[], paths=[], missing=[]),
    ]
    runner.run(given, 10, ANSWERS)
    found = list(runner.archive.read(ANSWERS))
    assert [encode_answer(one.event) for one in found] == [one.value for one in given]  # type: ignore[arg-type]
    assert [(one.offset, one.appended_ms, one.key) for one in found] == [
        (0, MS, "ana"),
        (1, MS + 5, USERS_HERE[0]),
    ]


def test_pandas_and_duckdb_read_lists(tmp_path: Path) -> None:
    runner = Runner(settings_of(tmp_path))
    runner.run([answer(n) for n in range(5)], 10, ANSWERS)
    [file] = runner.archive.files(ANSWERS)
    frame = pd.read_parquet(file.path)
    assert [item["path"] for item in frame["items"][0]] == ["towers", "popular"]
    shown = duckdb.sql(
        f"""SELECT item.path, count(*) FROM
        (SELECT unnest(items) AS item FROM read_parquet('{file.path}')) GROUP BY ALL ORDER BY 1"""
    ).fetchall()
    assert shown == [("popular", 5), ("towers", 5)]


def test_the_same_log_gives_the_same_bytes(tmp_path: Path) -> None:
    log = [answer(n, MS + n * 60_000, user_id=USERS_HERE[n % 9]) for n in range(0, 400, 3)]
    whole, broken = (Runner(settings_of(tmp_path / name)) for name in ("whole", "broken"))
    whole.run(log, 10_000, ANSWERS)
    for upto in (20, 90):
        broken.run(log[:upto], 7, ANSWERS, end=False).discard()
    broken.run(log, 11, ANSWERS)
    assert whole.bytes(ANSWERS) == broken.bytes(ANSWERS) and len(whole.bytes(ANSWERS)) > 5


def test_records_that_are_no_answers_have_no_row(tmp_path: Path) -> None:
    runner = Runner(settings_of(tmp_path))
    elsewhere = next(u for u in map(str, range(99)) if partition_of(u, 2) != P)
    log = [
        answer(0),
        record(1, b"{", b"ana"),
        record(2, None, b"ana"),
        record(3, answer(3).value, b"bob"),
        answer(4, user_id=elsewhere),
        answer(5),
    ]
    writer = runner.run(log, 2, ANSWERS)
    assert [one.offset for one in runner.archive.read(ANSWERS)] == [0, 5]
    assert (writer.rows, writer.skipped) == (2, 4)


def kept(runner: Runner) -> list[int]:
    return [one.offset for one in runner.archive.read(ANSWERS) if one.key == "ana"]


LOG = [
    answer(0, MS),
    answer(1, MS + 20),
    answer(2, MS + 25, user_offset=2),  # the worker read the user before ingest forgot them
    answer(3, MS + 26),  # of a user of whom nothing is known
    answer(4, MS + 27, user_offset=3),  # knows of the Forget, and nothing from before
    answer(5, MS + 28, user_offset=9),
    answer(6, MS + 28, user_id=USERS_HERE[0], user_offset=2),
]


@pytest.mark.parametrize("order", [[USERS, CLICKS, ANSWERS], [ANSWERS, CLICKS, USERS]])
@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize("with_null", [True, False])
def test_what_was_given_to_a_forgotten_user_goes_in_any_order(
    tmp_path: Path, order: list[str], restart: bool, with_null: bool
) -> None:
    """restart: each topic's file is complete before the next one begins, as after crashes."""
    runner, shared = Runner(settings_of(tmp_path)), defaultdict(ForgottenUsers)
    null = [record(0, None, b"ana", MS + 20)] if with_null else []
    users = [record(1, b"{}", b"ana", MS + 30), *null]
    topics = {
        ANSWERS: LOG,
        USERS: sorted(users, key=lambda one: one.offset),
        CLICKS: [*(click(n, MS + n) for n in range(3)), forget(3, MS + 20, MS + 30)],
    }
    writers = {} if restart else {name: runner.open(name, shared) for name in sorted(order)}
    for name in order:
        if restart:
            shared = defaultdict(ForgottenUsers)
            for other in sorted(order):
                writers[other] = runner.open(other, shared)
        writers[name].append(topics[name])
        writers[name].complete()
    assert kept(runner) == [3, 4, 5]
    assert sum(1 for one in runner.archive.read(ANSWERS) if one.key != "ana") == 1
    raw = b"".join(runner.bytes(ANSWERS).values())
    assert b"p.0" not in raw and b"p.2" not in raw


def test_answers_after_the_forget_was_archived_are_checked_too(tmp_path: Path) -> None:
    runner = Runner(settings_of(tmp_path))
    runner.run([*(click(n) for n in range(3)), forget(3, MS + 20, MS + 30)], 9)
    shared: defaultdict[int, ForgottenUsers] = defaultdict(ForgottenUsers)
    writer = runner.open(ANSWERS, shared)
    runner.open(CLICKS, shared)
    writer.append(LOG)
    writer.complete()
    assert kept(runner) == [3, 4, 5]


def test_the_command_takes_every_answer(tmp_path: Path) -> None:
    runner = Runner(settings_of(tmp_path))
    runner.run(LOG, 9, ANSWERS)
    assert erasure.forget(runner.archive, {"ana": EVERYTHING}, P) == (1, 6)
    assert kept(runner) == [] and len(list(runner.archive.read(ANSWERS))) == 1


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_the_bounds_of_an_erasure(more: int) -> None:
    found = Forgotten(Erasure(MS, 4, 2 * MS), clicks_offset=50)
    assert found.covers_answer(-1, MS + more, MS + 99) == (more <= 0)
    assert found.covers_answer(-1, MS + 99, MS + more) == (more <= 0)
    assert found.covers_answer(50 + more, MS + 1, MS + 1) == (more < 0)
    assert not Forgotten(Erasure(MS, 4, 2 * MS)).covers_answer(3, MS + 1, MS + 1), (
        "its Forget comes later"
    )


def test_the_query_of_the_page_joins_clicks_and_answers(tmp_path: Path) -> None:
    runner = Runner(settings_of(tmp_path))
    runner.run([answer(n) for n in range(3)], 9, ANSWERS)
    given = [("i1", "p.0"), ("i1", "p.1"), ("ü2", "p.1"), ("i1", "p.9"), ("i9", "p.2")]
    clicks = [click(n, item_id=i, impression_id=p) for n, (i, p) in enumerate(given)]
    runner.run([*clicks, click(9, item_id="i1")], 9)
    page = (Path(__file__).parents[3] / "docs" / "archive.md").read_text(encoding="utf-8")
    [sql] = [one for one in re.findall(r"```sql\n(.*?)```", page, re.DOTALL) if "JOIN" in one]
    found = duckdb.sql(sql.replace(".eddyline/archive", runner.archive.root)).fetchall()
    assert found == [("popular", 2, 1), ("towers", 1, 2)]
