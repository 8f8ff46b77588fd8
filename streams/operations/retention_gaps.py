"""Clicks that Kafka's retention removed before they were applied: which they are, and going on without them.

Ingest does not start over such a gap (`streams.fences`). `eddyline refill` closes it from the archive,
`eddyline accept-log --skip-lost` gives the records up.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from kafka import KafkaAdminClient, TopicPartition
from kafka.errors import CoordinatorNotAvailableError, KafkaError

from cli.console import console
from eddyline.errors import EddylineError
from eddyline.kafka import clients, topics
from eddyline.kafka.topics import CLICKS
from eddyline.settings.loader import Settings
from eddyline.stores.redis import RedisStore
from eddyline.stores.state_store import Fence, LogId, Source, StateStore, UserEffects
from streams.clicks import handler
from streams.fences import PartitionFences

GROUP = "eddyline-ingest"
_ASK_AGAIN_S = 0.1


@dataclass(frozen=True, slots=True)
class Gap:
    """Offsets of a clicks partition, first and last included, that are neither applied nor in Kafka.

    end: the offset that the partition's next record will get
    """

    partition: int
    first: int
    last: int
    end: int


def find(settings: Settings, store: StateStore, log: LogId) -> list[Gap]:
    """The gaps of all partitions. Raises LogMismatch where fences are of another log than this one."""
    begins, ends = topics.beginning_offsets(settings, CLICKS), topics.end_offsets(settings, CLICKS)
    positions = PartitionFences(
        store, settings.prefixed(CLICKS), lambda p: handler.sources(settings, p), lambda: log
    )
    # Asked as if the log still began with 0: the answer is where the fences say to go on.
    next_ones = positions.open({partition: (0, end) for partition, end in ends.items()})
    return [
        Gap(partition, first, begins[partition] - 1, ends[partition])
        for partition, first in sorted(next_ones.items())
        if first < begins[partition]
    ]


def close(settings: Settings, store: StateStore, log: LogId, gap: Gap) -> int:
    """Say that everything up to the gap's end has been applied; how many fences were behind it.

    Raises FenceMoved where another process writes.
    """
    behind = 0
    for source, slots in handler.sources(settings, gap.partition).items():
        for slot, fence in store.fences(source, slots).items():
            if fence is not None and fence.offset >= gap.last:
                continue
            behind += 1
            _move(settings, store, slot, source, fence, Fence(gap.last, log))
    return behind


def accept_log(settings: Settings, *, skip_lost: bool) -> None:
    """Take Kafka's present logs for the truth, and say what was changed.

    skip_lost: give up what is in the gaps, too
    """
    topics.ensure_topics(settings)
    ids = topics.log_ids(settings, topics.SOURCES)
    store = RedisStore(settings)
    try:
        changed = store.accept_log(
            {name: (ids[name], topics.end_offsets(settings, name)) for name in ids}
        )
        console.print(
            f"{changed} fences changed; logs that are new are read from their beginning, others go on"
        )
        for gap in find(settings, store, ids[CLICKS]) if skip_lost else ():
            close(settings, store, ids[CLICKS], gap)
            console.print(f"given up: {CLICKS}/{gap.partition} offsets {gap.first} to {gap.last}")
    finally:
        store.close()


def members(settings: Settings) -> int:
    """How many ingest processes are in their consumer group. One that was killed counts for some seconds."""
    group = settings.prefixed(GROUP)
    deadline = time.monotonic() + settings.kafka_timeout_ms / 1000
    with _admin(settings) as admin:
        while True:
            try:
                return len(admin.describe_groups([group])[group]["members"])
            except CoordinatorNotAvailableError:
                # A Kafka that never had a group makes their topic when it is asked for the first time.
                if time.monotonic() > deadline:
                    raise
            time.sleep(_ASK_AGAIN_S)


def read_upto(settings: Settings) -> Mapping[int, int]:
    """By partition of clicks, below which offset ingest once had everything, as it told Kafka; 0 unknown.

    Told after the effects, so it is at most behind, by a second.
    """
    group, topic = settings.prefixed(GROUP), settings.prefixed(CLICKS)
    places = [TopicPartition(topic, p) for p in range(settings.clicks_partitions)]
    with _admin(settings) as admin:
        found = admin.list_group_offsets({group: places})[group]
    return {p.partition: max(0, found[p].offset) if p in found else 0 for p in places}


@contextmanager
def _admin(settings: Settings) -> Iterator[KafkaAdminClient]:
    admin = clients.connect(settings, KafkaAdminClient)
    try:
        yield admin
    except KafkaError as error:
        raise clients.translate_error(settings, error) from None
    finally:
        admin.close()


def _move(
    settings: Settings, store: StateStore, slot: str, source: Source, old: Fence | None, new: Fence
) -> None:
    if slot.startswith("u"):
        store.write_users(slot, source, old, new, UserEffects())
    else:
        limits = settings.popular_buckets, settings.popular_items_max
        store.count_clicks(slot, source, old, new, {}, *limits)


def require_no_ingest(settings: Settings) -> None:
    """Raise EddylineError while an ingest process runs. The fences would keep both right, but not quick."""
    if found := members(settings):
        raise EddylineError(
            f"{found} ingest processes are in the consumer group {settings.prefixed(GROUP)}: stop them first "
            "(one that was killed leaves the group after six seconds)"
        )
