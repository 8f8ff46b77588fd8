"""A topic that is made anew under a running worker is in every answer."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest

from eddyline.errors import KafkaUnavailable, LogReplaced
from eddyline.kafka import topics
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import LogId
from index.exact import ExactIndex
from serving.proto import retrieval_pb2 as pb
from serving.rpc.backends import LocalIndex
from serving.worker import log_watch
from serving.worker.log_watch import NO_TOPIC, LogWatch
from serving.worker.replica import Replica, TailState

OLD, NEW = LogId("cluster", "old"), LogId("cluster", "new")
NAMES = ("clicks", "item-vectors.1")


@pytest.fixture
def logs(monkeypatch: pytest.MonkeyPatch) -> dict[str, LogId]:
    """What Kafka answers; {}: it is away."""
    found = dict.fromkeys(NAMES, OLD)

    def log_ids(settings: Settings, names: list[str]) -> dict[str, LogId]:
        if not found:
            raise KafkaUnavailable("nowhere")
        return {name: found[name] for name in names}

    monkeypatch.setattr(topics, "log_ids", log_ids)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_another_topic_is_reported_until_the_worker_is_restarted(
    logs: dict[str, LogId], name: str
) -> None:
    watch = LogWatch(Settings(namespace="t"), dict(logs))
    watch.check()
    assert watch.missing() == ""
    logs[name] = NEW
    watch.check()
    said = watch.missing()
    assert said.startswith(f"the topic t.{name} was made anew or deleted (it was old, it is new)")
    assert "Restart" in said and said.count("the topic") == 1
    logs.clear()
    watch.check()
    assert watch.missing() == said
    tail = SimpleNamespace(state=TailState, missing=str)
    held = LocalIndex("1", ExactIndex(4), tail, watch=watch)  # type: ignore[arg-type]
    stats = pb.StatsResponse()
    held.fill_index_stats(stats)
    assert held.missing() == said and list(stats.missing) == [f"kafka: {said}"]


def test_only_another_topic_ends_the_process_and_not_a_missing_one(logs: dict[str, LogId]) -> None:
    watch, name = LogWatch(Settings(namespace="t"), dict(logs)), NAMES[1]
    watch.check()
    watch.raise_replaced(name)
    for nothing in NO_TOPIC:
        logs[name] = LogId("cluster", nothing)
        watch.check()
        assert "made anew or deleted" in watch.missing()
        watch.raise_replaced(name)
    for new in (NEW, LogId("another cluster", "old")):
        logs[name] = new
        watch.check()
        with pytest.raises(LogReplaced, match=r"topic t\.item-vectors\.1 was made anew"):
            watch.raise_replaced(name)
        watch.raise_replaced("clicks")
    assert "in cluster another cluster" in watch.missing()


def test_items_that_are_made_anew_need_a_new_generation(logs: dict[str, LogId]) -> None:
    logs["items"] = OLD
    watch = LogWatch(Settings(), dict(logs))
    logs["items"] = NEW
    watch.check()
    assert "train a new generation" in watch.missing() and "Restart" not in watch.missing()


def test_it_is_noticed_in_the_background(
    logs: dict[str, LogId], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_watch, "CHECK_S", 0.02)
    watch = LogWatch(Settings(), dict(logs))
    watch.start()
    logs["clicks"] = NEW
    deadline = time.monotonic() + 10
    while not watch.missing() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert watch.missing()
    watch.close()
    assert "log-watch" not in {thread.name for thread in threading.enumerate()}


def test_the_lag_of_another_topic_is_all_that_it_holds() -> None:
    replica = Replica(Settings(), "1", ExactIndex(4), positions={0: 900, 1: 5})
    replica._update_lag({0: 40, 1: 8})
    assert replica.state().lag_records == 40 + 3
