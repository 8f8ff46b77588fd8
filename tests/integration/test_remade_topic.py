"""A topic that is deleted and made anew in a real Kafka is noticed by its id."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from eddyline import generations
from eddyline.errors import EddylineError, LogReplaced
from eddyline.generations import Manifest
from eddyline.kafka import producers, topics
from eddyline.process import lifecycle
from eddyline.schema.item_record import ItemRecord, encode_record
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import LogId
from index.factory import ann_backend
from serving.__main__ import Worker
from serving.proto import retrieval_pb2 as pb
from serving.rpc.client import Client
from serving.sharding import ALL
from serving.worker import log_watch
from serving.worker.log_watch import LogWatch


def delete(settings: Settings, name: str) -> None:
    with topics.open_admin(settings) as admin:
        admin.delete_topics([settings.prefixed(name)])


def create_again(settings: Settings, name: str, before: LogId) -> None:
    deadline = time.monotonic() + 30
    while True:  # Kafka deletes in the background
        assert time.monotonic() < deadline
        try:
            topics.ensure_topics(settings, [name])
            if topics.log_ids(settings, [name])[name] != before:
                return
        except EddylineError:
            pass
        time.sleep(0.2)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_topic_that_is_made_anew_is_noticed(fresh_settings: Settings) -> None:
    settings, name = fresh_settings, topics.item_vectors("1")
    topics.ensure_topics(settings, [*topics.SOURCES, name])
    known = topics.log_ids(settings, [name, topics.CLICKS])
    watch = LogWatch(settings, known)
    watch.check()
    assert watch.missing() == ""
    delete(settings, name)
    wait_until(lambda: watch.check() or watch.missing())
    watch.raise_replaced(name)  # it is gone, and there is no other yet
    create_again(settings, name, known[name])
    watch.check()
    said = watch.missing()
    assert f"the topic {settings.prefixed(name)} was made anew or deleted" in said
    assert "clicks" not in said
    with pytest.raises(LogReplaced, match="was made anew or deleted"):
        watch.raise_replaced(name)


class RunningWorker:
    """A worker that serves in a thread of this process."""

    def __init__(self, settings: Settings) -> None:
        self.error: BaseException | None = None
        self.code: int | None = None
        self._stop = threading.Event()
        self._worker = Worker(settings, ann_backend(settings), ALL, self._stop)
        self.address = self._worker.listen().address
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.code = self._worker.run()
        except BaseException as error:
            self.error = error

    def stats(self) -> pb.StatsResponse:
        with Client(self.address) as client:
            return client.stats()

    def stop(self) -> None:
        self._stop.set()
        self.thread.join(30)


def test_a_worker_ends_when_its_log_is_another_and_the_next_one_reads_that(
    fresh_settings: Settings, bundle: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It never shows the lag of a log that it did not read, and the new log is read from 0."""
    monkeypatch.setattr(log_watch, "CHECK_S", 0.2)
    settings = msgspec.structs.replace(
        fresh_settings, worker_port=0, bundle_dir=str(bundle[0]), snapshot_interval_s=0
    )
    topics.ensure_topics(settings)
    generations.publish(settings, bundle[1])
    name = topics.item_vectors("1")
    producer = producers.make_producer(settings)

    def put(*item_ids: str) -> None:
        for item_id in item_ids:
            vector = np.full(64, 0.125, np.float32)
            value = encode_record(ItemRecord(item_id, 0, 2**40, 1, 1, vector))
            producer.send(settings.prefixed(name), value, key=item_id.encode(), partition=0)
        producer.flush(10)

    frozen = gc.get_freeze_count()
    first = RunningWorker(settings)
    second: RunningWorker | None = None
    try:
        wait_until(lambda: first.stats().ready)
        assert gc.get_freeze_count() > frozen + 10_000, "collections skip what is loaded"
        items = first.stats().index.live
        put("old-1", "old-2", "old-3")
        wait_until(lambda: first.stats().index.live == items + 3)
        before = topics.log_ids(settings, [name])[name]
        delete(settings, name)
        create_again(settings, name, before)
        first.thread.join(30)
        assert isinstance(first.error, LogReplaced) and lifecycle.exit_code(first.error) == 1
        assert f"the topic {settings.prefixed(name)} was made anew" in str(first.error)
        put("new-1")
        second = RunningWorker(settings)
        wait_until(lambda: second.stats().ready)
        stats = second.stats()
        assert stats.index.live == items + 1 and stats.tail.lag_records == 0
        assert stats.tail.records == 1 and not any("made anew" in line for line in stats.missing)
    finally:
        producer.close(timeout=5)
        first.stop()
        if second is not None:
            second.stop()
        gc.unfreeze()
    assert second.code == 0 and second.error is None
