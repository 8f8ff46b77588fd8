"""Keeps the index up to date: bundle or snapshot, then the tail of `item-vectors.<generation>`.

The topic is compacted; the replica reads it from its beginning, or from the snapshot's positions
(`serving.worker.item_vectors`). Records that the bundle holds already are no-ops in the index.
While Kafka is unavailable, the index keeps serving.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eddyline.errors import KafkaRefused, Rejected, SettingsError, Unavailable, VectorRejected
from eddyline.kafka import topics
from eddyline.kafka.unreadable import UnreadableBatch
from eddyline.process.retry import Backoff
from eddyline.schema.item_record import ItemRecord, decode_record
from eddyline.settings.loader import Settings
from embeddings.bundle.bundle import Bundle
from index.port import Index
from serving.sharding import ALL, ShardAssignment
from serving.worker.item_vectors import ItemVectorLog

log = logging.getLogger(__name__)

# How often the ends of the topic are read: they give the lag, and show that Kafka answers.
ENDS_S = 1.0
# A poll returns as soon as there is a record, and after this time without one.
POLL_MS = 200
# One batch takes the index about 2 ms: neither its lock nor the interpreter is held for long.
APPLY_RECORDS = 256
RETRY_S = 0.05
CLOSE_S = 10.0
# The index keeps a delete as long as Kafka keeps delete records.
DELETES_KEPT_US = topics.DELETE_RETENTION_MS * 1_000
# The first bad records are logged one by one, then every thousandth.
LOGGED_BAD = 10


def load_bundle(index: Index, bundle: Bundle, assignment: ShardAssignment = ALL) -> None:
    """Put the assigned items of the bundle into the index; their versions are source offsets.

    Items of a bundle without times have `at_ms` 0, until the topic brings their records.
    """
    written_us = bundle.created_ms * 1000
    times = [0] * len(bundle.item_ids) if bundle.item_at_ms is None else bundle.item_at_ms.tolist()
    records = [
        ItemRecord(item_id, partition, offset, at_ms, written_us, vector, attributes)
        for item_id, partition, offset, at_ms, vector, attributes in zip(
            bundle.item_ids,
            bundle.item_partitions.tolist(),
            bundle.item_offsets.tolist(),
            times,
            bundle.item_vectors,
            bundle.item_attributes,
            strict=True,
        )
    ]
    mine, others = assignment.split(records)
    index.apply(mine, others)


@dataclass(frozen=True, slots=True)
class TailState:
    """Progress of the tail; see TailStatus in retrieval.proto."""

    caught_up: bool = False
    lag_records: int = 0
    records: int = 0
    undecodable: int = 0
    rejected: int = 0
    away_since_ms: int = 0


class Replica:
    """Tails the topic into the index on its own thread. Thread rule: any thread."""

    def __init__(
        self,
        settings: Settings,
        generation: str,
        index: Index,
        *,
        positions: Mapping[int, int] | None = None,
        assignment: ShardAssignment = ALL,
    ) -> None:
        """positions: partition -> offset to begin at, from the snapshot in the index.

        A partition without one, or with one that the log no longer has, is read from its beginning.
        assignment: the items that go into the index; records of others move its watermarks only
        """
        self._settings = settings
        self._topic = settings.prefixed(topics.item_vectors(generation))
        self._index = index
        self._assignment = assignment
        self._generation = generation
        self._positions = dict(positions or {})
        # The first ends seen; read up to them, the replica has all records from before the start.
        self._goal: dict[int, int] | None = None
        # When some ends were read, and these ends; the next ones are noted once these are reached.
        self._next_goal: tuple[float, dict[int, int]] | None = None
        self._reached_s = float("-inf")
        self._caught_up = threading.Event()
        self._stop = threading.Event()
        self._away = ""
        self._away_since_ms = 0
        self._refused = False
        self._stopped: dict[int, UnreadableBatch] = {}
        self._lag = self._records = self._undecodable = self._rejected = 0
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start to tail the topic."""
        # Made here: Python counts a thread from before a fork as stopped, even if it never ran.
        self._thread = threading.Thread(target=self._run, name="replica", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop tailing."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(CLOSE_S)

    def wait_caught_up(self, timeout_s: float) -> bool:
        """Whether the ends seen at start have been reached; waits at most `timeout_s`."""
        return self._caught_up.wait(timeout_s)

    @property
    def reached_s(self) -> float:
        """All records from before this time are applied; monotonic clock."""
        return self._reached_s

    def state(self) -> TailState:
        """Progress now."""
        return TailState(
            caught_up=self._caught_up.is_set(),
            lag_records=self._lag,
            records=self._records,
            undecodable=self._undecodable,
            rejected=self._rejected,
            away_since_ms=self._away_since_ms,
        )

    def positions(self) -> dict[int, int]:
        """Partition -> offset up to which all has been applied; {} until it has caught up once."""
        if not self._caught_up.is_set():
            return {}
        return dict(self._positions)

    def missing(self) -> str:
        """Why the index may lag behind, and since when; "" if it does not."""
        since_ms, away = self._away_since_ms, self._away
        if not since_ms:
            return "; ".join(str(batch) for batch in self._stopped.values())
        since_s = max(0.0, time.time() - since_ms / 1000)
        return f"{away} (since {since_s:.1f} s); items stand as they were then"

    def _run(self) -> None:
        backoff = Backoff(RETRY_S, self._settings.backoff_ms_max / 1000)
        while not self._stop.is_set():
            topic: ItemVectorLog | None = None
            try:
                topic = ItemVectorLog(self._settings, self._generation)
                self._tail(topic)
            except KafkaRefused as error:
                self._mark_away(str(error), refused=True)
            except (Unavailable, SettingsError, OSError) as error:
                if not self._away_since_ms:
                    backoff.reset()
                self._mark_away(f"{type(error).__name__}: {error}")
            except Exception as error:
                log.exception("the tail of the item vectors failed; it restarts")
                self._mark_away(f"{type(error).__name__}: {error}")
            finally:
                if topic is not None:
                    with contextlib.suppress(Exception):  # a failed close must not end the tail
                        topic.close()
            self._stop.wait(backoff.next_s())

    def _tail(self, topic: ItemVectorLog) -> None:
        topic.begin(self._positions)
        self._positions = topic.positions()
        ends_at = 0.0
        while not self._stop.is_set():
            ends_read = time.monotonic() >= ends_at
            if ends_read:
                asked_s = time.monotonic()
                ends = topic.ends()
                self._next_goal = self._next_goal or (asked_s, ends)
                self._update_lag(ends)
                ends_at = time.monotonic() + ENDS_S
            polled = topic.poll(POLL_MS)
            self._stopped = topic.stopped()
            # One batch for all partitions: what a batch costs the index grows little with its size.
            self._apply([record for batch in polled.values() for record in batch])
            for partition, batch in polled.items():
                self._positions[partition] = batch[-1].offset + 1
            if not (polled and self._caught_up.is_set()):
                # Transaction markers may follow the last record; the consumer skips them.
                self._positions = topic.positions()
            self._check_caught_up()
            if ends_read and self._caught_up.is_set():
                self._index.end_tombstones(DELETES_KEPT_US)

    def _update_lag(self, ends: dict[int, int]) -> None:
        if self._goal is None:
            self._goal = ends
        self._lag = 0
        for at, end in ends.items():
            position = self._positions.get(at, 0)
            # Beyond the end: the topic is another one, of which nothing was read.
            self._lag += end - position if position <= end else end
        if self._away_since_ms:
            log.info("Kafka answers again", extra={"topic": self._topic})
        self._away, self._away_since_ms = "", 0

    def _check_caught_up(self) -> None:
        if self._next_goal is not None:
            asked_s, ends = self._next_goal
            if all(self._positions.get(at, 0) >= end for at, end in ends.items()):
                self._reached_s, self._next_goal = asked_s, None
        if self._caught_up.is_set() or self._goal is None:
            return
        if all(
            self._positions.get(at, 0) >= end or at in self._stopped
            for at, end in self._goal.items()
        ):
            self._lag = 0
            self._caught_up.set()

    def _mark_away(self, reason: str, refused: bool = False) -> None:
        """refused: Kafka denies access, which no retry heals; the index keeps serving."""
        was_away, was_refused = bool(self._away_since_ms), self._refused
        self._away = (
            reason if refused else f"Kafka at {self._settings.kafka_bootstrap_servers}: {reason}"
        )
        self._refused = refused
        if not was_away:
            self._away_since_ms = time.time_ns() // 1_000_000
        if not was_away or (refused and not was_refused):
            log.warning("the item vectors cannot be read", extra={"reason": self._away})

    def _apply(self, batch: Sequence[Any]) -> None:
        self._records += len(batch)
        records: list[ItemRecord] = []
        for record in batch:
            try:
                if record.key is None or record.value is None:
                    raise Rejected("bad_record", "", "has no key or no value")
                records.append(decode_record(record.key, record.value))
            except Rejected as error:
                self._undecodable += 1
                self._log_bad(self._undecodable, record, str(error))
        for at in range(0, len(records), APPLY_RECORDS):
            self._apply_some(records[at : at + APPLY_RECORDS])

    def _apply_some(self, records: list[ItemRecord]) -> None:
        mine, others = self._assignment.split(records)
        try:
            self._index.apply(mine, others)
        except VectorRejected:
            self._index.apply([], others)
            for record in mine:
                try:
                    self._index.apply([record])
                except VectorRejected as error:
                    self._rejected += 1
                    self._log_bad(self._rejected, record, str(error))

    def _log_bad(self, count: int, record: Any, reason: str) -> None:
        if count <= LOGGED_BAD or count % 1000 == 0:
            where = {
                "partition": record.partition,
                "offset": record.offset,
                "count": count,
                "reason": reason,
            }
            log.warning("an item record was skipped", extra=where)
