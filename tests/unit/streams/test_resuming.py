"""Where reading resumes: a log that grew again over a hole, and delete records that are gone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from eddyline.errors import LogMismatch
from eddyline.kafka.topics import CLICKS, ITEMS, USERS
from eddyline.stores.state_store import Fence, LogId, Mark, Source
from streams import resuming
from streams.fences import PartitionFences
from streams.resuming import Resume, mark_of
from tests.applying import ingest
from tests.unit.streams.test_ingest_rules import (
    HERE,
    LOG,
    MS,
    SETTINGS,
    Rig,
    click,
    item,
    profile,
    rec,
)

DAY_MS = 86_400_000
KEPT_MS = 30 * DAY_MS


def reopened(
    rig: Rig, name: str, begin: int = 0, end: int = 100, kept_ms: int | None = None
) -> tuple[PartitionFences, int]:
    """(fences opened by another process, where it reads on)."""
    generations = ["g"] if name == ITEMS else []
    fences = PartitionFences(SETTINGS, rig.store, name, {name: LOG}, generations, kept_ms)
    position = fences.open({HERE: (begin, end)})[HERE]
    return fences, fences.resume_at(HERE, position)


def applied(name: str, *offsets: int) -> tuple[Rig, Callable[..., Any]]:
    """(a rig that has applied these records, the function that makes a record)."""
    rig = Rig()
    make: Callable[..., Any] = {
        CLICKS: click,
        USERS: lambda at: profile(at, {"n": at}),
        ITEMS: item,
    }[name]
    handler = {CLICKS: rig.clicks, USERS: rig.users, ITEMS: rig.items}[name]
    if offsets:
        ingest(handler, HERE, [make(at) for at in offsets], 0)
        handler.flush()
    return rig, make


@pytest.mark.parametrize("name", [CLICKS, USERS, ITEMS])
def test_reading_resumes_at_the_last_record_and_compares_it(name: str) -> None:
    rig, make = applied(name, 3, 7)
    fences, position = reopened(rig, name)
    assert position == 7
    assert fences.resumed(HERE, [make(7), make(8)]) == 1  # the one that was applied
    assert fences.resumed(HERE, [make(9)]) == 0
    fences, _ = reopened(rig, name)
    other = make(7)
    other.timestamp += 1
    with pytest.raises(LogMismatch, match="offset 7 is not the one that was applied"):
        fences.resumed(HERE, [other])


def test_every_part_of_a_record_is_compared() -> None:
    record = rec(1, b"value", b"key")
    others = [rec(1, b"valuf", b"key"), rec(1, b"value", b"kez"), rec(1, None, b"key")]
    others += [rec(1, b"value", None), rec(1, b"value", b"key", timestamp=MS + 1)]
    assert mark_of(record) == mark_of(rec(1, b"value", b"key"))
    assert len({mark_of(one).checksum for one in (record, *others)}) == 6


@pytest.mark.parametrize(("name", "refused"), [(CLICKS, True), (USERS, False), (ITEMS, False)])
def test_a_record_that_is_gone_is_a_loss_where_nothing_is_compacted(
    name: str, refused: bool
) -> None:
    rig, make = applied(name, 7)
    fences, _ = reopened(rig, name)
    if refused:
        with pytest.raises(LogMismatch, match="lost its end"):
            fences.resumed(HERE, [make(8)])
    else:
        assert fences.resumed(HERE, [make(8)]) == 0


def test_a_record_that_retention_removed_is_not_compared() -> None:
    rig, make = applied(CLICKS, 7)
    fences, position = reopened(rig, CLICKS, begin=8)
    assert position == 8 and fences.resumed(HERE, [make(8)]) == 0


def test_reading_resumes_before_offsets_without_a_record() -> None:
    rig, make = applied(CLICKS, 3)
    assert rig.clicks.skip_empty(HERE, 3, 6)
    fences, position = reopened(rig, CLICKS)
    assert position == 3 and fences.lowest(HERE) == 6
    assert fences.resumed(HERE, [make(3), make(7)]) == 1


def test_fences_of_an_older_version_are_read_and_not_compared() -> None:
    old = Fence.parse("7|cluster|topic")
    assert old == Fence(7, LogId("cluster", "topic"))
    assert (old.mark, str(old)) == (None, "7|cluster|topic")
    new = Fence(7, LogId("cluster", "topic"), Mark(6, MS, 2**32 - 1))
    assert Fence.parse(str(new)).mark == new.mark and new == old
    rig = Rig()
    rig.store.write_item_metadata("u0", Source(CLICKS, HERE), None, Fence(7, LOG), {})
    rig.store.write_item_metadata("i0", Source(CLICKS, HERE), None, Fence(7, LOG), {})
    fences, position = reopened(rig, CLICKS)
    assert position == 8 and fences.resumed(HERE, [click(9)]) == 0


@pytest.mark.parametrize("name", [USERS, ITEMS])
@pytest.mark.parametrize(
    ("days", "offset", "record_days", "refused"),
    [
        (29, 9, 0, False),  # deletes from between are still there
        (31, 9, 0, True),  # offset 8 may have been a delete
        (31, 8, 29, False),  # every record after the fence is young enough
        (31, 8, 30.01, True),
    ],
)
def test_deletes_that_may_be_gone_are_refused(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    days: float,
    offset: int,
    record_days: float,
    refused: bool,
) -> None:
    rig, make = applied(name, 7)
    monkeypatch.setattr(resuming, "now_ms", lambda: MS + days * DAY_MS)
    fences, _ = reopened(rig, name, kept_ms=KEPT_MS)
    assert fences.resumed(HERE, [make(7)]) == 1
    record = make(offset)
    record.timestamp = int(MS + (days - record_days) * DAY_MS)
    if refused:
        with pytest.raises(LogMismatch, match="`eddyline resync`"):
            fences.resumed(HERE, [record])
    else:
        assert fences.resumed(HERE, [record]) == 0
        record.timestamp = MS
        assert fences.resumed(HERE, [record]) == 0, "looked at once"


@pytest.mark.parametrize("name", [USERS, ITEMS])
@pytest.mark.parametrize(
    ("mark_ms", "record_ms", "refused"),
    [(-1, -1, False), (-1, MS, True), (MS, -1, True), (-1, MS + 31 * DAY_MS, False)],
)
def test_a_record_without_a_time_stamp_is_no_age(
    monkeypatch: pytest.MonkeyPatch, name: str, mark_ms: int, record_ms: int, refused: bool
) -> None:
    """A topic with CreateTime may have -1: that is no reason to refuse the log at every start."""
    rig, make = applied(name)
    first = make(7)
    first.timestamp = mark_ms
    handler = {USERS: rig.users, ITEMS: rig.items}[name]
    ingest(handler, HERE, [first], 0)
    handler.flush()
    monkeypatch.setattr(resuming, "now_ms", lambda: MS + 31 * DAY_MS)
    fences, _ = reopened(rig, name, kept_ms=KEPT_MS)
    again, record = make(7), make(8)
    again.timestamp, record.timestamp = mark_ms, record_ms
    assert fences.resumed(HERE, [again]) == 1
    if refused:
        with pytest.raises(LogMismatch, match="`eddyline resync`"):
            fences.resumed(HERE, [record])
    else:
        assert fences.resumed(HERE, [record]) == 0


@pytest.mark.parametrize(("end", "refused"), [(8, False), (9, True)])
def test_an_end_without_records_may_have_been_deletes(
    monkeypatch: pytest.MonkeyPatch, end: int, refused: bool
) -> None:
    rig, _ = applied(ITEMS, 7)
    monkeypatch.setattr(resuming, "now_ms", lambda: MS + 31 * DAY_MS)
    fences, _ = reopened(rig, ITEMS, end=end, kept_ms=KEPT_MS)
    if refused:
        with pytest.raises(LogMismatch, match="`eddyline resync`"):
            fences.can_skip(HERE, 7, 8)
    else:
        assert fences.can_skip(HERE, 7, 8), "a marker that came later is no delete"


def test_clicks_are_not_compacted(monkeypatch: pytest.MonkeyPatch) -> None:
    rig, make = applied(CLICKS, 7)
    monkeypatch.setattr(resuming, "now_ms", lambda: MS + 31 * DAY_MS)
    fences, _ = reopened(rig, CLICKS)
    assert fences.resumed(HERE, [make(7), make(9)]) == 1


def test_a_refused_log_can_be_accepted() -> None:
    rig, make = applied(CLICKS, 7)
    rig.store.accept_log({CLICKS: (LOG, {HERE: 12})})
    fences, position = reopened(rig, CLICKS)
    other = make(8)
    assert position == 8 and fences.resumed(HERE, [other]) == 0


def test_a_new_slot_or_generation_is_read_from_the_beginning() -> None:
    rig, make = applied(ITEMS, 3, 7)
    fences = PartitionFences(SETTINGS, rig.store, ITEMS, {ITEMS: LOG}, ["g", "new"])
    position = fences.open({HERE: (0, 100)})[HERE]
    assert fences.resume_at(HERE, position) == 0
    assert fences.resumed(HERE, [make(3), make(7)]) == 0


def test_the_oldest_fence_decides() -> None:
    fences = [Fence(9, LOG, Mark(9, MS, 1)), Fence(5, LOG, Mark(4, MS - 5, 2))]
    resume = Resume.of(USERS, 0, fences, (0, 20), None)
    assert (resume.done, resume.mark) == (5, Mark(4, MS - 5, 2))
