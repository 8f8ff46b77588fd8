"""The worker's snapshots: one to start from, a new one every few minutes and at the stop.

The positions of a snapshot are read before its contents, so the contents include every record
before them; a record that is applied twice is a no-op. If a snapshot cannot be used, the log names
the reason and the worker starts from bundle and topic.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping

from eddyline.kafka import topics
from eddyline.settings.loader import Settings
from embeddings.bundle.bundle import Bundle
from index.live import LiveIndex
from index.snapshot import format
from index.snapshot.format import Origin, SnapshotRefused
from serving.sharding import ALL, ShardAssignment
from serving.worker.replica import Replica

log = logging.getLogger(__name__)

# An older snapshot could restore a deleted item.
AGE_MS_MAX = topics.DELETE_RETENTION_MS
# This generation's file and those of earlier generations, which may become active again.
KEPT_FILES = 3
# A partial file of a killed writer is removed after this time; no write takes as long.
PARTIAL_S_MAX = 600.0
CLOSE_S = 30.0


class Snapshots:
    """The snapshots of one generation. Thread rule: any thread; one write at a time."""

    def __init__(
        self,
        settings: Settings,
        bundle: Bundle,
        log_id: str,
        index: LiveIndex,
        clock: Callable[[], float] = time.time,
        assignment: ShardAssignment = ALL,
    ) -> None:
        """log_id: identity of the item vectors' topic, to which the positions belong.

        assignment: the items that the index holds; each shard has its own files
        """
        self._interval_s = settings.snapshot_interval_s
        self._prefix = settings.prefixed("item-vectors.")
        self._assignment = assignment
        self._origin = Origin(
            generation=bundle.generation,
            dimension=bundle.dimension,
            bundle_ms=bundle.created_ms,
            log=log_id,
            texts=tuple(sorted(settings.filter_text_names)),
            part=assignment.name,
        )
        # Of a bundle without times, older releases kept items without times in their snapshots.
        self._may_lack_times = bundle.item_at_ms is None
        self._index = index
        self._clock = clock
        part = "" if assignment.whole else f".shard-{assignment.shard}-of-{assignment.shards}"
        topic = settings.prefixed(topics.item_vectors(bundle.generation))
        self.path = settings.snapshots / f"{topic}{part}.snapshot"
        self._written: Mapping[int, int] = {}
        self._one_at_a_time = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def load(self) -> dict[int, int] | None:
        """Fill the empty index. Returns the positions to read the topic from, if any."""
        begun = time.monotonic()
        try:
            contents, header = format.load(
                self.path, self._origin, int(self._clock() * 1000) - AGE_MS_MAX
            )
            self._index.restore(contents)
        except FileNotFoundError:
            return None
        except (SnapshotRefused, ValueError) as error:
            log.warning(
                "the snapshot is not used; the topic is read from its beginning",
                extra={"reason": str(error)},
            )
            return None
        took_ms = round((time.monotonic() - begun) * 1000)
        log.info(
            "index restored",
            extra={"items": header.live, "took_ms": took_ms, "from": self.path.name},
        )
        facts = contents.facts
        if self._may_lack_times and ((facts[:, 0] == 0) & (facts[:, 2] >= 0)).any():
            log.info("items of the snapshot have no time yet; the topic is read again")
            return {}
        self._written = header.positions
        return header.positions

    def start(self, replica: Replica) -> None:
        """Write every `snapshot_interval_s` and at `close`; never if the interval is 0.

        replica: feeds the index; its positions go into the snapshot
        """
        if self._interval_s and self._thread is None:
            self._thread = threading.Thread(
                target=self._run, args=(replica,), name="snapshots", daemon=True
            )
            self._thread.start()

    def close(self) -> None:
        """Write the last one if `start` was called, and stop."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(CLOSE_S)

    def write(self, positions: Mapping[int, int]) -> bool:
        """Write one now if records came since the last one; False if it failed (see the log)."""
        if not positions or positions == self._written:
            return True
        with self._one_at_a_time:
            at = dict(positions)
            try:
                now_ms = int(self._clock() * 1000)
                format.write(self.path, self._index.contents(), self._origin, at, now_ms)
                self._prune()
            except OSError as error:
                log.warning(
                    "no snapshot could be written; the old one stays",
                    extra={"path": str(self.path), "reason": str(error)},
                )
                return False
            self._written = at
            return True

    def _run(self, replica: Replica) -> None:
        stopped = False
        while not stopped:
            stopped = self._stop.wait(self._interval_s)
            try:
                self.write(replica.positions())
            except Exception:
                log.exception("no snapshot could be written; the old one stays")

    def _prune(self) -> None:
        """Remove files of old generations and killed writers, but no file of another shard."""
        folder = self.path.parent
        mine = (
            "*.snapshot"
            if self._assignment.whole
            else f"*.shard-{self._assignment.shard}-of-*.snapshot"
        )
        found = [
            path
            for path in folder.glob(f"{self._prefix}{mine}")
            if not (self._assignment.whole and ".shard-" in path.name)
        ]
        found.sort(key=lambda p: p.stat().st_mtime, reverse=True)
        for path in found[KEPT_FILES:]:
            if path != self.path:
                path.unlink(missing_ok=True)
        for path in folder.glob(f"{self._prefix}*.partial"):
            if self._clock() - path.stat().st_mtime > PARTIAL_S_MAX:
                path.unlink(missing_ok=True)
