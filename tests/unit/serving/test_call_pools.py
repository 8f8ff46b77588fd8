"""Threads of calls: a few at first, further ones for calls that are stuck; one batch an answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from serving.proto import retrieval_pb2 as pb
from serving.rpc import call_pools, one_batch
from serving.rpc.call_pools import CallPool
from serving.rpc.client import CallFailed, Client


def wait_until(what: str, check: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s for: {what}"
        time.sleep(0.005)


class Hanging:
    """Calls that hang until they are let go; how many hang now."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.lock, self.now, self.done = threading.Lock(), 0, 0

    def __call__(self) -> str:
        with self.lock:
            self.now += 1
        assert self.go.wait(20)
        with self.lock:
            self.now, self.done = self.now - 1, self.done + 1
        return threading.current_thread().name


@pytest.mark.parametrize(("calls", "hang"), [(1, 1), (2, 2), (3, 3), (7, 7), (8, 8), (9, 8)])
def test_a_call_that_is_stuck_gets_a_thread_up_to_the_most(calls: int, hang: int) -> None:
    """No further call comes that could notice it."""
    pool, hanging = CallPool("query", 8, 99, at_first=2), Hanging()
    futures = [pool.submit(hanging) for _ in range(calls)]
    wait_until("the threads", lambda: hanging.now == hang)
    time.sleep(2 * call_pools.STUCK_S)
    assert hanging.now == hang
    hanging.go.set()
    assert len({future.result(5) for future in futures}) == hang
    assert hanging.done == calls
    pool.shutdown(wait=False)


def test_calls_that_wait_long_but_one_after_the_other_need_no_further_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last of them waits ten times as long as a pool that takes none does."""
    monkeypatch.setattr(call_pools, "STUCK_S", 0.2)
    pool = CallPool("query", 8, 999, at_first=2)

    def call() -> str:
        time.sleep(0.02)
        return threading.current_thread().name

    futures = [pool.submit(call) for _ in range(200)]
    assert len({future.result(20) for future in futures}) == 2
    pool.shutdown(wait=False)


def test_further_threads_end_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_pools, "IDLE_S", 0.05)
    pool = CallPool("some", 4, 99, at_first=1)
    for _ in range(3):
        hanging = Hanging()
        futures = [pool.submit(hanging) for _ in range(4)]
        wait_until("four threads", lambda hanging=hanging: hanging.now == 4)  # type: ignore[misc]
        hanging.go.set()
        for future in futures:
            future.result(5)
        wait_until("the end of the further ones", lambda: pool._further.count == 0)
        assert pool._first.count == 1
    pool.shutdown(wait=False)


@pytest.mark.parametrize(("inside", "full"), [(0, False), (2, False), (3, True), (4, True)])
def test_a_pool_is_full_at_its_limit(inside: int, full: bool) -> None:
    pool, hanging = CallPool("query", 2, 3), Hanging()
    futures = [pool.submit(hanging) for _ in range(inside)]
    assert pool.full() == full
    hanging.go.set()
    for future in futures:
        future.result(5)
    wait_until("room", lambda: not pool.full())
    pool.shutdown(wait=False)


def test_an_error_is_the_call_s_and_the_thread_goes_on() -> None:
    pool = CallPool("query", 1, 9)
    with pytest.raises(ZeroDivisionError):
        pool.submit(lambda: 1 / 0).result(5)
    assert pool.submit(lambda a, b: a + b, 1, b=2).result(5) == 3
    pool.shutdown(wait=False)


def test_a_closed_pool_ends_what_is_inside_and_takes_nothing_more() -> None:
    pool, hanging = CallPool("query", 3, 9, at_first=1), Hanging()
    futures = [pool.submit(hanging) for _ in range(5)]
    wait_until("three threads", lambda: hanging.now == 3)
    pool.shutdown(wait=False)
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(hanging)
    hanging.go.set()
    for future in futures:
        future.result(5)
    wait_until("no thread", lambda: not pool._first.count and not pool._further.count)


def test_this_grpc_ends_a_call_in_one_batch() -> None:
    """If this fails, a newer gRPC has changed: answers take two batches more until it is mended."""
    assert one_batch.STATUS is not None


@pytest.mark.parametrize("known", [True, False])
def test_answers_and_errors_are_the_same_in_one_batch_and_in_two(
    client: Client, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not known:
        monkeypatch.setattr(one_batch, "STATUS", None)
    assert len(client.retrieve("nobody", 3).items) == 3
    with pytest.raises(CallFailed) as failed:
        client.retrieve("nobody", 0)
    assert failed.value.code == "INVALID_ARGUMENT" and "k: 0" in failed.value.detail


def test_a_context_of_another_kind_gets_two_sends() -> None:
    sent: list[Any] = []
    context: Any = object()
    one_batch.ending(context, sent.append)(pb.RetrieveResponse(short_because="a"))
    one_batch.ending(context, sent.append)(None)
    assert sent == [pb.RetrieveResponse(short_because="a"), None, None]
