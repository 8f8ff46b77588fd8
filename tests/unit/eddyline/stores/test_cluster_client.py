"""The cluster client without servers: redirections, errors, nodes without a slot map."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from redis import exceptions

from eddyline.errors import StoreRefused
from eddyline.stores.cluster_slots import Address, slot_of
from eddyline.stores.redis_cluster import RedisCluster

A, B, C = ("a", 1), ("b", 2), ("c", 3)
ROWS = [[0, 8_191, [b"a", 1, b"id"], [b"c", 3, b"id"]], [8_192, 16_383, [b"b", 2, b"id"]]]


class Node(redis.Redis):
    """One node: answers come from a function of the command's words."""

    def __init__(self, address: Address, answer: Callable[..., Any]) -> None:
        super().__init__(*address)
        self.address, self.answer = address, answer

    def execute_command(self, *args: Any, **options: Any) -> Any:
        return self.answer(self.address, *args)


def cluster(answer: Callable[..., Any], *seeds: Address) -> RedisCluster:
    return RedisCluster(seeds or (A,), lambda address: Node(address, answer), timeout_s=1.0)


def test_commands_go_to_the_node_of_their_key_and_follow_redirections() -> None:
    tried: list[Address] = []
    moves: Iterator[Exception | bytes] = iter(())

    def answer(address: Address, *args: Any) -> Any:
        if args[:2] == ("CLUSTER", "SLOTS"):
            return ROWS
        tried.append(address)
        found = next(moves, b"OK")
        if isinstance(found, Exception):
            raise found
        return found

    made = cluster(answer)
    low = next(f"k{n}" for n in range(99) if slot_of(("GET", f"k{n}")) < 8_192)  # type: ignore[operator]
    assert made.get(low) == b"OK" and tried == [A]
    moves = iter([exceptions.MovedError("5 b:2"), exceptions.MovedError("5 :3")])
    tried.clear()
    assert made.get(low) == b"OK" and tried == [A, B, ("b", 3)]
    moves = iter([exceptions.MovedError("5 b:2")] * 5)
    tried.clear()
    with pytest.raises(exceptions.ClusterError, match="moved 5 times"):
        made.get(low)
    assert len(tried) == 5
    moves = iter([exceptions.ConnectionError("gone"), exceptions.ConnectionError("gone")])
    tried.clear()
    with pytest.raises(exceptions.ConnectionError):
        made.get(low)
    assert len(tried) == 2, "one retry if the connection breaks"
    moves = iter([exceptions.TimeoutError("late")])
    tried.clear()
    with pytest.raises(exceptions.TimeoutError):
        made.get(low)
    assert len(tried) == 1, "no retry after a time-out"


def test_nodes_that_know_nothing_are_passed_over() -> None:
    def answer(address: Address, *args: Any) -> Any:
        if address == A:
            raise exceptions.ConnectionError("refused")
        return [] if address == C else ROWS

    assert cluster(answer, A, C, B).map().primaries == (A, B)
    with pytest.raises(exceptions.ConnectionError, match=r"a:1, c:3\): it serves no hash slot"):
        cluster(answer, A, C).map()


def test_what_is_no_cluster_and_who_may_not_ask_is_said() -> None:
    def single(*_: Any) -> Any:
        raise exceptions.ResponseError("This instance has cluster support disabled")

    with pytest.raises(StoreRefused, match="a:1 is a single server: set redis_cluster = false"):
        cluster(single, A, B).map()

    def barred(*_: Any) -> Any:
        raise exceptions.NoPermissionError("no permissions to run the 'cluster|slots' command")

    with pytest.raises(exceptions.NoPermissionError):
        cluster(barred, A, B).map()


def test_a_pipeline_refuses_what_has_no_place_in_it() -> None:
    made = cluster(lambda *_: ROWS)
    with made.pipeline(transaction=True) as pipe:
        pipe.get("{u1}").get("{u2}")
        with pytest.raises(exceptions.ResponseError, match="keys of one slot tag"):
            pipe.execute()
        with pytest.raises(exceptions.ResponseError, match="names no key"):
            pipe.execute_command("INFO")
        assert len(pipe) == 0 and pipe.execute() == []
