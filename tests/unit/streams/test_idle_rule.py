"""Idle users: their next event starts afresh; what they left is removed without any effect."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from eddyline.schema import events, user_history
from eddyline.schema.events import Click, Merge
from eddyline.schema.user_history import UserHistory
from eddyline.settings.loader import Settings
from eddyline.stores.memory import MemoryStore
from streams.idle_users import IdleUsers
from tests.applying import ingest
from tests.simulation.test_ingest_faults import Rec
from tests.unit.streams import test_generations
from tests.unit.streams.test_generations import ANA, CLICKS, MS, Process, two

DAY_S = 86_400


@pytest.fixture(autouse=True)
def ten_days(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = msgspec.structs.replace(test_generations.SETTINGS, user_idle_s_max=10 * DAY_S)
    monkeypatch.setattr(test_generations, "SETTINGS", settings)


def click(process: Process, day: float, item: str, user: str = ANA, ago_d: float = 0) -> None:
    appended_ms = MS + round(day * DAY_S * 1_000)
    at_ms = appended_ms - round(ago_d * DAY_S * 1_000)
    send(process, appended_ms, Click(user_id=user, item_id=item, at_ms=at_ms))


def send(process: Process, appended_ms: int, event: Any) -> None:
    offset = process.next[CLICKS]
    process.next[CLICKS] += 1
    record = Rec(CLICKS, 0, offset, appended_ms, event.user_id.encode(), events.encode(event))
    ingest(process.handlers.clicks, 0, [record])


def items_of(process: Process, user: str = ANA) -> list[str]:
    history = process.store.read_user("u0", 0, user, "new").history
    return [entry.item_id for entry in history.entries]


def idle_of(process: Process, idle_s_max: int = 10 * DAY_S) -> IdleUsers:
    settings = Settings(user_idle_s_max=idle_s_max)
    return IdleUsers(settings, process.store, process.handlers.clicks.cache, threading.Lock())


@pytest.fixture(params=["left", "removed", "removed_and_not_cached"])
def remove(request: pytest.FixtureRequest) -> Any:
    """What happens between two events of an idle user; it makes no difference."""

    def do(process: Process) -> Process:
        if request.param == "left":
            return process
        idle_of(process).check()
        if request.param == "removed":
            return process
        process.handlers.clicks.flush()
        return Process(process.store, *two())

    return do


def test_the_bound_itself_is_not_idle_and_one_millisecond_more_is(remove: Any) -> None:
    process = Process(MemoryStore(), *two())
    click(process, 0, "i0")
    click(process, 0, "i1")
    click(process, 0, "i0", "bo")
    before = process.embedding("new")
    click(process, 10, "i2")
    assert items_of(process) == ["i2", "i1", "i0"] and process.embedding("new") != before
    send(process, MS + 20 * DAY_S * 1_000 + 1, Click(user_id="bo", item_id="i1", at_ms=MS))
    process = remove(process)
    send(process, MS + 20 * DAY_S * 1_000 + 1, Click(user_id=ANA, item_id="i1", at_ms=MS))
    assert items_of(process) == ["i1"], "also an event of before"
    assert process.embedding("new") == (1, [0.0, 0.0, 0.0])
    assert process.embedding("old") == (1, [0.0, 0.0])


def test_an_idle_user_is_unknown_to_queries_once_the_log_is_further(remove: Any) -> None:
    process = Process(MemoryStore(), *two())
    click(process, 0, "i0")
    click(process, 11, "i1", "bo")
    process = remove(process)
    assert items_of(process) == [] and process.embedding("new") is None
    assert items_of(process, "bo") == ["i1"]


def test_a_late_event_counts_as_activity(remove: Any) -> None:
    process = Process(MemoryStore(), *two())
    click(process, 0, "i0")
    click(process, 9, "i1", ago_d=8)
    click(process, 15, "i0", "bo")
    process = remove(process)
    click(process, 18, "i2")
    assert items_of(process) == ["i2", "i1", "i0"]


def test_a_merge_of_an_idle_visitor_moves_nothing(remove: Any) -> None:
    process = Process(MemoryStore(), *two())
    click(process, 0, "i0")
    click(process, 11, "i0", "bo")
    process = remove(process)
    moved: list[bytes] = []
    letters = process.letters
    letters.forward = lambda record, key, value, partition: moved.append(value)  # type: ignore[method-assign]
    appended_ms = MS + 12 * DAY_S * 1_000
    send(process, appended_ms, Merge(user_id=ANA, merge_into="cy", at_ms=appended_ms))
    assert moved == []
    send(process, appended_ms, Merge(user_id="bo", merge_into="cy", at_ms=appended_ms))
    assert len(moved) == 1


def test_removal_waits_until_a_brokers_clock_cannot_go_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process = Process(MemoryStore(), *two())
    click(process, 0, "i0")
    idle = idle_of(process)
    click(process, 10 + 1 / 24, "i0", "bo")
    idle.check()
    assert idle.removed == 0
    click(process, 10 + 1.001 / 24, "i0", "bo")
    idle.check()
    assert idle.removed == 1
    assert set(process.store.snapshot().histories) == {("u0", "bo")}
    assert {user for _, _, user in process.store.snapshot().embeddings} == {"bo"}


@pytest.mark.parametrize(
    ("idle_s_max", "slack_s", "pause_s"),
    [(0, 3_600, 21_600), (2, 0.5, 1), (400, 100, 100), (34_560_000, 3_600, 21_600)],
)
def test_slack_and_pause_follow_the_setting(
    idle_s_max: int, slack_s: float, pause_s: float
) -> None:
    idle = idle_of(Process(MemoryStore(), *two()), idle_s_max)
    assert (idle._slack_ms, idle._checks._interval_s) == (1_000 * slack_s, pause_s)


def test_a_removal_ends_with_the_process() -> None:
    process = Process(MemoryStore(), *two())
    click(process, 0, "i0")
    click(process, 11, "i0", "bo")
    idle, pages = idle_of(process), []

    def page(slots: Any, slack_ms: int) -> Iterator[int]:
        for number in range(9):
            pages.append(number)
            idle._checks.stop.set()
            yield 1

    process.store.remove_idle_users = page  # type: ignore[method-assign]
    idle.check()
    assert pages == [0] and idle.removed == 1


def test_a_history_of_an_older_version_ends_after_the_default() -> None:
    history = UserHistory(partition=0, offset=1, at_ms=MS, appended_ms=MS)
    new = user_history.encode_recent(history, [])
    values = msgspec.msgpack.decode(new)
    old = msgspec.msgpack.encode(values[:-1])
    read = user_history.decode(old + bytes(8)).history
    assert read.idle_after_ms == MS + 1_000 * Settings().user_idle_s_max
    assert user_history.decode(new + bytes(8)).history.idle_after_ms == 0
    untimed = msgspec.msgpack.encode([*values[:5], -1, *values[6:-1]])
    assert user_history.decode(untimed + bytes(8)).history.idle_after_ms == 0
