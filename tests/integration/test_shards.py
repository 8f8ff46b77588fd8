"""Four shard workers with a coordinator, compared with one worker that has all items."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from eddyline.kafka.producers import now_ms
from eddyline.schema.events import Item
from eddyline.schema.partitioning import item_shard
from sandbox.processes import Deployment
from sandbox.servers.supervisor import Supervisor
from serving.proto import retrieval_pb2 as pb
from serving.rpc.client import CallFailed, Client, is_ready

SHARDS = 4


@dataclass
class Sharded:
    """The processes of this file. Every wait has a time-out."""

    live: object
    deployment: Deployment
    addresses: list[str]
    address: str
    coordinator: Client
    one: Client

    def kill(self, shard: int, sig: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.deployment.supervisor.pids()[f"shard-{shard}"], sig)

    def whole(self, timeout_s: float = 60) -> None:
        """Wait until every shard answers and has the records of the one worker."""

        def complete() -> bool:
            answer = self.coordinator.retrieve("nobody at all", 50)
            return not answer.shards.missing and seen(answer) == seen(
                self.one.retrieve("nobody at all", 50)
            )

        self.live.wait_for("all shards to answer", complete, timeout_s)


@pytest.fixture(scope="module")
def sharded(live, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sharded]:
    folder = tmp_path_factory.mktemp("shards")
    settings = msgspec.structs.replace(
        live.settings, data_dir=str(folder), bundle_dir=str(live.settings.bundles)
    )
    deployment = Deployment(settings, Supervisor(folder / "logs"))
    more = {
        "clicks_partitions": str(settings.clicks_partitions),
        "items_partitions": str(settings.items_partitions),
        "redis_timeout_ms": "1000",
        "kafka_timeout_ms": "5000",
        "backoff_ms_max": "500",
        "shard_timeout_ms": "1500",  # the machine that runs the tests may be busy
    }
    children, addresses, address = deployment.sharded_children(SHARDS, is_ready, **more)
    try:
        deployment.supervisor.start(*children)
        with contextlib.ExitStack() as opened:
            coordinator, one = (opened.enter_context(Client(at)) for at in (address, live.address))
            yield Sharded(live, deployment, addresses, address, coordinator, one)
    finally:
        deployment.supervisor.stop()


@pytest.fixture
def user() -> str:
    return f"user-{uuid.uuid4().hex[:10]}"


def ids(answer: pb.RetrieveResponse) -> list[str]:
    return [item.item_id for item in answer.items]


def seen(response: pb.RetrieveResponse) -> tuple[object, ...]:
    """The parts of an answer that depend neither on time nor on the process."""
    items = [
        (i.item_id, i.score, i.rank, i.path, i.path_rank, i.generation, i.card.title)
        for i in response.items
    ]
    paths = [(p.path, p.candidates, p.taken, p.why) for p in response.paths]
    marks = [(w.partition, w.offset, w.at_ms, w.written_us) for w in response.freshness.index]
    user = response.freshness.user.SerializeToString(deterministic=True)
    return items, paths, marks, user, response.short_because, list(response.missing)


def requests(live) -> Iterator[tuple[str, int, dict[str, object]]]:
    """Requests of many kinds: (user, k, other fields)."""
    known = list(live.dataset.profiles)[:40]
    items = [item.item_id for item in live.dataset.items]
    categories = sorted({name for item in live.dataset.items for name in item.categories})
    kinds: list[dict[str, object]] = [
        {},
        {"with_cards": True},
        {"filters": pb.Filters(categories=categories[:1])},
        {"filters": pb.Filters(categories=categories[1:3], deny=items[::3])},
        {"filters": pb.Filters(allow=items[:25])},
        {"filters": pb.Filters(allow=items[7:8])},
        {"popularity_beta": 0.2},
        {"popularity_beta": 0.2, "filters": pb.Filters(deny=items[:50])},
    ]
    for n, who in enumerate([*known, "a stranger", "another stranger"]):
        for m, kind in enumerate(kinds):
            yield who, (1, 10, 50, 400)[(n + m) % 4], kind


def test_the_same_answers_as_one_worker(sharded, live) -> None:
    live.applied()
    sharded.whole()

    # Each process reads the clicks' counts every half second.
    def same() -> bool:
        one = sharded.one.retrieve("p2", 400)
        return bool(seen(one) == seen(sharded.coordinator.retrieve("p2", 400)))

    live.wait_for("both lists of popular items", same, 20)
    compared, paths = 0, set()
    for who, k, more in requests(live):
        one = sharded.one.retrieve(who, k, **more)
        answer = sharded.coordinator.retrieve(who, k, **more)
        assert seen(answer) == seen(one), (who, k, more)
        assert answer.shards.count == SHARDS and answer.shards.answered == answer.shards.asked >= 1
        compared += 1
        paths |= {item.path for item in one.items}
    assert compared >= 200 and paths == {"towers", "popular", "newest"}
    stats = sharded.coordinator.stats()
    assert (
        stats.index.live
        == sharded.one.stats().index.live
        == sum(shard.live for shard in stats.held)
    )
    assert all(0 < shard.live < stats.index.live for shard in stats.held)


def test_a_click_changes_the_next_answer(sharded, live, user) -> None:
    sharded.whole()
    for item in [item.item_id for item in live.dataset.items if item.available][:3]:
        token = live.click(user, item)
    before = sharded.coordinator.retrieve(user, 10, after=token, wait_ms=2000)
    assert before.freshness.after.applied and {item.path for item in before.items} == {"towers"}
    clicked = before.items[3].item_id
    token = live.click(user, clicked)
    answer = sharded.coordinator.retrieve(user, 10, after=token, wait_ms=2000)
    assert (
        answer.freshness.after.applied and clicked not in ids(answer) and ids(answer) != ids(before)
    )
    assert seen(answer) == seen(sharded.one.retrieve(user, 10))


def test_items_of_every_shard_come_change_and_go(sharded, live, user) -> None:
    sharded.whole()
    token = live.click(user, live.dataset.items[0].item_id)
    sharded.coordinator.retrieve(user, 1, after=token, wait_ms=2000)
    names: dict[int, str] = {}
    while len(names) < SHARDS:
        name = f"item-{uuid.uuid4().hex[:10]}"
        names.setdefault(item_shard(name, SHARDS), name)
    new = set(names.values())
    everything = len(live.dataset.items) + 50

    def found() -> set[str]:
        return new & set(ids(sharded.coordinator.retrieve(user, everything)))

    for name in new:
        live.item(
            Item(
                item_id=name,
                title=name,
                categories=live.dataset.items[0].categories,
                at_ms=now_ms(),
            )
        )
    live.wait_for("the new items", lambda: found() == new)
    for name in new:
        live.delete(name)
    live.wait_for("the deleted items to go", lambda: not found())
    sharded.whole()


def test_a_shard_is_killed_and_comes_back(sharded, live) -> None:
    sharded.whole()
    who = next(iter(live.dataset.profiles))
    before = sharded.coordinator.retrieve(who, 20)
    sharded.kill(2)
    partial = 0
    deadline = time.monotonic() + 30
    while True:
        assert time.monotonic() < deadline
        began = time.monotonic()
        answer = sharded.coordinator.retrieve(who, 20, timeout_s=20.0)
        # A shard is waited for 1.5 s at most; the rest is for a busy machine.
        assert time.monotonic() - began < 5.0 and len(answer.items) == 20
        if not answer.shards.missing:
            assert seen(answer) == seen(before), "an answer is whole, or says that it is not"
            if partial:
                break
            continue
        partial += 1
        missing = answer.shards.missing[0]
        assert (missing.shard, missing.address) == (2, sharded.addresses[2]) and missing.reason in (
            "away",
            "late",
        )
        assert answer.shards.answered == SHARDS - 1
        assert not [i for i in ids(answer) if item_shard(i, SHARDS) == 2]
        assert any(line.startswith(f"shard 2 at {missing.address}: ") for line in answer.missing)
    assert partial >= 3
    sharded.whole()
    assert seen(sharded.coordinator.retrieve(who, 20)) == seen(before)


def test_a_shard_that_hangs_is_left_out_in_time(sharded, live) -> None:
    sharded.whole()
    who = list(live.dataset.profiles)[1]
    sharded.kill(1, signal.SIGSTOP)
    try:
        for _ in range(5):
            began = time.monotonic()
            answer = sharded.coordinator.retrieve(who, 20, timeout_s=20.0)
            assert time.monotonic() - began < 5.0 and len(answer.items) == 20
            assert [(m.shard, m.reason) for m in answer.shards.missing] == [(1, "late")]
    finally:
        sharded.kill(1, signal.SIGCONT)
    sharded.whole()


def test_the_command_line_speaks_to_the_coordinator(sharded, live) -> None:
    sharded.whole()
    env = {k: v for k, v in os.environ.items() if not k.startswith("EDDYLINE_")} | {
        "EDDYLINE_KAFKA_BOOTSTRAP_SERVERS": live.settings.kafka_bootstrap_servers,
        "EDDYLINE_REDIS_URL": live.settings.redis_url,
        "EDDYLINE_NAMESPACE": live.settings.namespace,
        "EDDYLINE_DATA_DIR": sharded.deployment.settings.data_dir,
        "EDDYLINE_CLICKS_PARTITIONS": "4",
        "EDDYLINE_ITEMS_PARTITIONS": "2",
        "COLUMNS": "200",
    }

    def run(*words: str, code: int = 0, **more: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "cli", *words],
            env=env | more,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    shown = run("query", next(iter(live.dataset.profiles)), "-k", "5")
    assert "shards: 4 of 4 answered" in shown and "towers" in shown
    shown = run("stats")
    for n in range(SHARDS):
        assert f"shard {n}" in shown and sharded.addresses[n] in shown
    refused = run("coordinator", code=2, EDDYLINE_SHARD_ADDRESSES="here")
    assert "shard_addresses: 'here' is not host:port" in refused


def test_a_shard_alone_answers_no_user(sharded) -> None:
    with Client(sharded.addresses[3]) as client:
        with pytest.raises(CallFailed) as failed:
            client.retrieve("ana", 5)
        assert failed.value.code == "FAILED_PRECONDITION"
        assert client.stats().shard == 3


def test_each_shard_keeps_a_snapshot_of_its_own(sharded) -> None:
    """The supervisor's child ends in good order, writes its snapshot and restarts from it."""
    sharded.whole()
    folder = Path(sharded.deployment.settings.data_dir) / "snapshots"
    sharded.kill(0, signal.SIGTERM)
    sharded.live.wait_for("the snapshot", lambda: list(folder.glob("*.shard-0-of-4.snapshot")), 20)
    log = sharded.deployment.supervisor.log_file("shard-0")
    sharded.live.wait_for(
        "its start", lambda: "index restored" in log.read_text(encoding="utf-8"), 30
    )
    sharded.whole()
