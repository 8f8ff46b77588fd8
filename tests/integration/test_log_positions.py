"""Offsets that hold no record, and committed offsets after a log lost its end, on a real Kafka."""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import Any

import pytest
from kafka import TopicPartition
from kafka.structs import OffsetAndMetadata

from eddyline.kafka import producers, topics
from eddyline.kafka.producers import now_ms
from eddyline.kafka.topics import CLICKS
from eddyline.schema import events
from eddyline.schema.events import Click
from eddyline.schema.partitioning import partition_of
from eddyline.settings.loader import Settings
from sandbox.servers.supervisor import Supervisor
from streams.operations import retention_gaps
from streams.operations.retention_gaps import AcceptObserver, Gap


def send_in_transactions(live: Any, partition: int, *, commit: bool) -> None:
    """One click of a partition in a transaction, which leaves a marker at the partition's end."""
    count = live.settings.clicks_partitions
    user = next(f"tx{n}" for n in range(99) if partition_of(f"tx{n}", count) == partition)
    item = live.dataset.items[0].item_id
    click = Click(user_id=user, item_id=item, at_ms=now_ms(), event_id=uuid.uuid4().hex)
    producer = producers.make_producer(
        live.settings, transactional_id=live.settings.prefixed("exactly-once")
    )
    try:
        producer.init_transactions()
        producer.begin_transaction()
        producer.send(
            live.settings.prefixed(CLICKS),
            events.encode(click),
            key=user.encode(),
            partition=partition,
        )
        producer.flush(timeout=10)
        if commit:
            producer.commit_transaction()
        else:
            producer.abort_transaction()
    finally:
        producer.close(timeout=5)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("commit", [True, pytest.param(False, marks=pytest.mark.long)])
def test_a_marker_at_the_end_is_no_lag_and_no_loss_once_it_expired(
    make_live: Any, commit: bool
) -> None:
    live = make_live(with_worker=False)
    send_in_transactions(live, 1, commit=commit)
    live.applied(timeout_s=20)  # by the fences: they have passed the marker
    name = live.settings.prefixed(CLICKS)
    end = topics.end_offsets(live.settings, CLICKS)[1]
    live.wait_for(
        "the committed offset behind the marker",
        lambda: retention_gaps.committed_offsets(live.settings)[1] == end,
    )
    live.supervisor.stop()
    with topics.open_admin(live.settings) as admin:
        admin.delete_records({TopicPartition(name, 1): end})
    live.wait_for("retention", lambda: topics.beginning_offsets(live.settings, CLICKS)[1] == end)
    with Supervisor(Path(live.settings.data_dir) / "again") as again:
        again.start(
            live.deployment.ingest_child("again", clicks_partitions="4", items_partitions="2")
        )
        send_in_transactions(live, 1, commit=True)
        live.applied(timeout_s=20)
        time.sleep(0.5)
        assert again.states()["again"] == ("ready", 0)


class Quiet(AcceptObserver):
    def fences_changed(self, count: int) -> None:
        pass

    def given_up(self, gap: Gap) -> None:
        pass


@pytest.mark.timeout(60)
def test_accept_log_sets_committed_offsets_back_to_the_logs_end(fresh_settings: Settings) -> None:
    """A log that ends before them: what comes next was never forwarded."""
    topics.ensure_topics(fresh_settings)
    name, items = fresh_settings.prefixed(CLICKS), fresh_settings.prefixed(topics.ITEMS)
    producer = producers.make_producer(fresh_settings)
    for _ in range(5):
        producer.send(name, b"{}", key=b"k", partition=0)
    producer.flush(timeout=10)
    producer.close(timeout=5)
    committed = {(name, 0): 1_000, (name, 1): 0, (items, 1): 7}
    offsets = {TopicPartition(*at): OffsetAndMetadata(n, "", -1) for at, n in committed.items()}
    group = fresh_settings.prefixed(retention_gaps.GROUP)
    # A new broker has no coordinator for the first group yet: it is asked again.
    retention_gaps._of_group(fresh_settings, lambda a: a.alter_group_offsets(group, offsets))
    assert retention_gaps.committed_offsets(fresh_settings)[0] == 1_000
    retention_gaps.accept_log(fresh_settings, Quiet(), skip_lost=False)
    found = retention_gaps.committed_offsets(fresh_settings)
    assert (found[0], found[1]) == (5, 0)
    assert retention_gaps.committed_offsets(fresh_settings, topics.ITEMS, 2)[1] == 0
