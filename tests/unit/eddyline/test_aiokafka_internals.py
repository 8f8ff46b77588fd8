"""The private members of aiokafka that readers use; no other file uses any."""

from __future__ import annotations

import ast
import asyncio
import inspect
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer
from aiokafka.consumer.fetcher import Fetcher
from aiokafka.consumer.group_coordinator import GroupCoordinator
from aiokafka.errors import GroupAuthorizationFailedError

from eddyline.kafka import aiokafka_internals
from eddyline.kafka.aiokafka_internals import AIOKAFKA_VERSION, check_group, fetching_ended

ROOT = Path(__file__).parents[3]
ROOMS = ("eddyline", "streams", "serving", "embeddings", "index", "sandbox", "evaluation", "cli")
# Of aiokafka's consumer. The producers of items have their own (ADR 14).
PRIVATE = {"_fetcher", "_coordinator", "_subscription", "_client", "_group_instance_id"}
PRIVATE |= {"_fetch_task", "_get_actions_per_node", "_wait_consume_future", "_max_poll_records"}


def private_uses(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr in PRIVATE:
            yield node.attr


def test_no_other_file_uses_the_insides_of_the_consumer() -> None:
    found = {
        path.relative_to(ROOT).as_posix(): sorted(set(private_uses(path)))
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        if "aiokafka" in path.read_text(encoding="utf-8") and any(private_uses(path))
    }
    assert list(found) == ["eddyline/kafka/aiokafka_internals.py"], found


def test_the_version_is_the_one_that_was_read() -> None:
    assert version("aiokafka") == AIOKAFKA_VERSION


def test_what_is_used_is_there() -> None:
    assert isinstance(Fetcher.error_future, property)
    assert "return self._fetch_task" in inspect.getsource(Fetcher.error_future.fget)  # type: ignore[arg-type]
    assert "self._pending_exception" in inspect.getsource(GroupCoordinator.check_errors)
    assert "_push_error_to_user" in inspect.getsource(GroupCoordinator)
    leaves = inspect.getsource(GroupCoordinator._maybe_leave_group)
    assert "self._group_instance_id is None" in leaves
    assert "self._coordinator = GroupCoordinator(" in inspect.getsource(AIOKafkaConsumer.start)


def test_an_error_inside_the_fetcher_ends_the_fetches() -> None:
    async def run() -> None:
        hold = asyncio.get_running_loop().create_future()
        fetcher: Any = Fetcher.__new__(Fetcher)
        fetcher._fetch_task = asyncio.ensure_future(hold)
        consumer = SimpleNamespace(_fetcher=fetcher)
        assert not fetching_ended(consumer)
        hold.set_exception(ValueError("no"))
        assert fetching_ended(consumer)
        assert not fetching_ended(SimpleNamespace(_fetcher=None))  # not started
        fetcher._fetch_task.exception()

    asyncio.run(run())


def test_an_error_of_the_group_is_raised() -> None:
    coordinator: Any = GroupCoordinator.__new__(GroupCoordinator)
    coordinator._coordination_task = SimpleNamespace(done=lambda: False)
    coordinator._error_consumed_fut = None
    coordinator._pending_exception = GroupAuthorizationFailedError("the-group")
    with pytest.raises(GroupAuthorizationFailedError):
        check_group(SimpleNamespace(_coordinator=coordinator))
    check_group(SimpleNamespace(_coordinator=coordinator))  # raised once
    check_group(SimpleNamespace(_coordinator=None))


def test_a_static_member_leaves_the_group_at_its_stop() -> None:
    async def sent(static: bool) -> list[Any]:
        requests: list[Any] = []

        async def send(request: Any) -> None:
            requests.append(request)

        coordinator: Any = GroupCoordinator.__new__(GroupCoordinator)
        vars(coordinator).update(
            generation=3,
            group_id="group",
            member_id="member",
            _group_instance_id="ingest-1",
            _send_req=send,
            _rejoin_needed_fut=asyncio.get_running_loop().create_future(),
        )
        if not static:
            aiokafka_internals.leave_at_stop(SimpleNamespace(_coordinator=coordinator))
        await coordinator._maybe_leave_group()
        return requests

    assert asyncio.run(sent(static=True)) == []
    assert len(asyncio.run(sent(static=False))) == 1
