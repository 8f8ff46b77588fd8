"""Worker processes forked from one: one port, one graph, each as live as a worker alone."""

from __future__ import annotations

import os
import random
import signal
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest

from eddyline.settings.loader import Settings
from sandbox.processes import Deployment
from sandbox.servers import free_ports
from sandbox.servers.supervisor import Supervisor
from serving import running_workers
from serving.proto import retrieval_pb2 as pb
from serving.proto.retrieval_pb2_grpc import RetrievalStub
from serving.rpc.client import CallFailed, Client, is_ready, open_channel

PROCESSES = 3
_R = TypeVar("_R")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forked workers need Linux")


@dataclass
class Group:
    live: object
    settings: Settings
    supervisor: Supervisor
    address: str
    metrics: int

    def ready(self, number: int) -> bool:
        """Whether the metrics of the process in this place report that it is ready."""
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{self.metrics + number}/metrics", timeout=5
            ) as answer:
                return "eddyline_worker_ready 1.0" in answer.read().decode()
        except OSError:
            return False

    def pids(self) -> set[int]:
        return {worker.pid for worker in running_workers.running(self.settings)}

    def keeper(self) -> int:
        return self.supervisor.pids()["worker"]

    def log(self) -> str:
        return "".join(
            path.read_text(encoding="utf-8")
            for path in (Path(self.settings.data_dir) / "logs").glob("worker*")
        )

    def each(self, call: Callable[[Client], _R]) -> list[_R]:
        """Results over enough connections to reach every process almost surely."""
        found = []
        for _ in range(8 * PROCESSES):
            with Client(self.address) as client:
                client._channel.close()
                client._channel = open_channel(
                    self.address, [("grpc.use_local_subchannel_pool", 1)]
                )
                client._stub = RetrievalStub(client._channel)
                found.append(call(client))
        return found

    def have_graphs(self) -> bool:
        try:
            return all(self.each(lambda client: client.stats().index.main))
        except CallFailed:
            # Exact ones are being replaced: who has just connected to one that ends has to call
            # again.
            return False

    def all_answer(self) -> bool:
        """Whether calls reach the expected number of processes."""
        try:
            return len(set(self.each(lambda client: client.stats().started_ms))) == PROCESSES
        except CallFailed:
            return False

    def have(self, item_id: str) -> bool:
        """Whether every process answers with this item."""
        only = pb.Filters(allow=[item_id])
        return all(self.each(lambda client: client.retrieve("forked", 1, filters=only).items))


def neighbours(folder: Path, count: int) -> int:
    """The first of so many free ports, one after the other."""
    while True:
        first = free_ports.choose_ports(folder / str(random.random()), ("metrics",))["metrics"]
        if all(free_ports.is_free(first + n) for n in range(count)):
            return first


@pytest.fixture
def group(live, tmp_path: Path) -> Iterator[Group]:
    settings = msgspec.structs.replace(
        live.settings, data_dir=str(tmp_path), bundle_dir=str(live.settings.bundles)
    )
    supervisor = Supervisor(tmp_path / "logs")
    worker, address = Deployment(settings, supervisor).worker_child(
        is_ready,
        worker_processes=str(PROCESSES),
        index_exact_below="50",
        backoff_ms_max="500",
        worker_metrics_port=str(metrics := neighbours(tmp_path, PROCESSES)),
        clicks_partitions=str(settings.clicks_partitions),
        items_partitions=str(settings.items_partitions),
    )
    supervisor.start(worker)
    made = Group(live, settings, supervisor, address, metrics)
    try:
        live.wait_for("all processes", lambda: len(made.pids()) == PROCESSES, 40)
        yield made
    finally:
        supervisor.stop()
        live.wait_for("no process to be left", lambda: not made.pids(), 20)


def test_they_share_a_port_and_one_that_is_killed_is_replaced(group: Group) -> None:
    live = group.live
    live.wait_for("the graphs", group.have_graphs, 60)
    live.wait_for("the exact ones to end", lambda: len(group.pids()) == PROCESSES, 20)
    assert group.keeper() not in group.pids()
    live.wait_for("all of them to answer", group.all_answer, 20)
    # A click and an item are seen by each of them.
    token = live.click("forked", live.dataset.items[3].item_id)
    live.item(msgspec.structs.replace(live.dataset.items[0], item_id="forked-item", title="Forked"))
    live.applied()
    answers = group.each(lambda client: client.retrieve("forked", 10, after=token, wait_ms=2_000))
    assert {answer.freshness.after.why for answer in answers} == {""}
    assert {len(answer.items) for answer in answers} == {10}
    live.wait_for("the item everywhere", lambda: group.have("forked-item"), 20)
    first = group.pids()
    os.kill(min(first), signal.SIGKILL)
    live.wait_for(
        "another one", lambda: len(group.pids()) == PROCESSES and group.pids() != first, 20
    )
    assert group.have("forked-item") and group.have_graphs()
    # A new worker in a place has its port as well, once the old one released it.
    live.wait_for("metrics of each", lambda: all(group.ready(n) for n in range(PROCESSES)), 20)
    assert "Traceback" not in group.log()


def test_they_end_with_a_keeper_that_is_killed(group: Group) -> None:
    group.live.wait_for("the graphs", group.have_graphs, 60)
    pids = group.pids()
    os.kill(group.keeper(), signal.SIGKILL)
    # The supervisor starts another keeper; the old processes leave the port.
    group.live.wait_for(
        "others", lambda: len(group.pids()) == PROCESSES and not group.pids() & pids, 60
    )

    def answered() -> bool:
        try:
            answers = group.each(lambda client: client.retrieve("forked", 5))
        except CallFailed:  # of an old process that ends while it is called
            return False
        return all(len(answer.items) == 5 for answer in answers)

    group.live.wait_for("answers over every connection", answered, 30)
