"""Three processes share the test files; the third one begins with those that need no servers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from xdist.remote import Producer

from tests.scheduler import THIRD, ServersLastInThird

SERVERS = [f"tests/integration/test_{n}.py::test_{m}" for n in range(6) for m in range(3)]
SERVERS += ["tests/contract/test_state_store.py::test_one"]
OTHERS = [f"tests/unit/test_{n}.py::test_{m}" for n in range(9) for m in range(4)]


class Node:
    """A process that runs what it gets, in order."""

    def __init__(self, name: str) -> None:
        self.gateway = SimpleNamespace(id=name)
        self.pending: list[int] = []
        self.ran: list[str] = []
        self.shutting_down = False

    def send_runtest_some(self, indexes: list[int]) -> None:
        assert not self.shutting_down
        self.pending += indexes

    def shutdown(self) -> None:
        self.shutting_down = True


@pytest.mark.parametrize("collection", [SERVERS + OTHERS, OTHERS, SERVERS])
def test_every_test_runs_once_and_the_third_process_begins_without_servers(
    collection: list[str],
) -> None:
    options: dict[str, Any] = {"tx": ["3*popen"], "numprocesses": 3}
    config: Any = SimpleNamespace(
        getvalue=options.__getitem__, option=SimpleNamespace(loadscopereorder=False)
    )
    scheduler = ServersLastInThird(config, Producer("test"))
    nodes: list[Any] = [Node(f"gw{n}") for n in range(3)]
    for node in nodes:
        scheduler.add_node(node)
        scheduler.add_node_collection(node, collection)
    scheduler.schedule()
    while any(node.pending for node in nodes):
        for node in nodes:
            # A process runs a test once it knows the next one, or that there is none.
            if node.pending and (len(node.pending) > 1 or node.shutting_down):
                index = node.pending.pop(0)
                node.ran.append(collection[index])
                scheduler.mark_test_complete(node, index)
    assert sorted(test for node in nodes for test in node.ran) == sorted(collection)
    [third] = [node.ran for node in nodes if node.gateway.id == THIRD]
    on_servers = [test in SERVERS for test in third]
    assert on_servers == sorted(on_servers), "tests without servers come first"
    if collection == SERVERS + OTHERS:
        assert not on_servers[0] and all(n.ran[0] in SERVERS for n in nodes if n.ran != third)
    assert all(node.shutting_down for node in nodes)
    for node in nodes:
        files = [test.split("::")[0] for test in node.ran]
        assert len(set(files)) == sum(a != b for a, b in zip(["", *files], files, strict=False))
