"""Calls that repeat in a thread: their interval, their errors and their end."""

from __future__ import annotations

import itertools
import logging
import threading
import time

import pytest

from eddyline.errors import KafkaUnavailable, StoreRefused
from eddyline.process import periodic
from eddyline.process.periodic import Periodic


def runs(name: str) -> bool:
    return any(thread.name == name for thread in threading.enumerate())


def run(calls: list[Exception | None]) -> list[float]:
    """Make calls of which the first end like these, and close. Returns the times of all."""
    left, times, done = iter(calls), list[float](), threading.Event()

    def call() -> None:
        times.append(time.monotonic())
        found = next(left, done)
        if found is done:
            done.set()
        elif isinstance(found, Exception):
            raise found

    repeated = Periodic("some-calls", call, 0.01, "a call failed", at_once=True)
    repeated.start()
    assert done.wait(10)
    repeated.close()
    assert not runs("some-calls")
    return times


def test_the_calls_go_on_until_the_close() -> None:
    times = run([None] * 3)
    assert len(times) >= 4
    assert all(later - earlier >= 0.009 for earlier, later in itertools.pairwise(times))
    made = len(times)
    time.sleep(0.05)
    assert len(times) == made


def test_the_same_error_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    away = [KafkaUnavailable("broker 1"), KafkaUnavailable("broker 2")]
    refused = [StoreRefused("no right to DEL"), StoreRefused("no right to EVAL")]
    run([*away, *refused, refused[1], None, *away])
    assert {line.getMessage() for line in caplog.records} == {"a call failed"}
    reasons = [line.__dict__["reason"] for line in caplog.records]
    assert reasons == ["broker 1", "no right to DEL", "no right to EVAL", "broker 1"]
    assert all(line.levelno == logging.WARNING and not line.exc_info for line in caplog.records)


def test_a_bug_is_logged_with_its_place_and_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    run([RuntimeError("broken"), RuntimeError("broken")])
    assert [(line.levelno, bool(line.exc_info)) for line in caplog.records] == [
        (logging.ERROR, True)
    ]


def test_a_call_may_be_the_last_one() -> None:
    calls = list[int]()

    def call() -> None:
        calls.append(1)
        repeated.stop.set()

    repeated = Periodic("last-call", call, 0.01, "", at_once=True)
    repeated.start()
    assert repeated.stop.wait(10)
    repeated.close()
    assert calls == [1] and not runs("last-call")


def test_without_at_once_the_first_call_waits_for_the_interval() -> None:
    called = threading.Event()
    repeated = Periodic("later-calls", called.set, 60.0, "")
    repeated.start()
    assert not called.wait(0.1)
    repeated.close()
    assert not called.is_set() and not runs("later-calls")


def test_a_call_that_hangs_does_not_hold_the_close(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(periodic, "CLOSE_S", 0.05)
    begun, go_on = threading.Event(), threading.Event()

    def call() -> None:
        begun.set()
        go_on.wait(10)

    repeated = Periodic("hanging-call", call, 0.01, "", at_once=True)
    repeated.start()
    assert begun.wait(10)
    since = time.monotonic()
    repeated.close()
    assert time.monotonic() - since < 5
    go_on.set()


def test_it_may_be_closed_without_a_start() -> None:
    Periodic("no-calls", pytest.fail, 1.0, "").close()
