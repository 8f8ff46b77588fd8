"""One generation in a query worker, from its bundle to its answers.

`eddyline.generations` knows which generation is active.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import ExitStack

from eddyline.kafka import topics
from eddyline.process.retry import Retry, Stopped
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import LogId, StateStore
from embeddings.bundle.bundle import Bundle
from index.backends.base import AnnBackend
from index.factory import guard_recall, live_index
from serving import dependencies
from serving.answer.impressions import Impressions
from serving.rpc.backends import LocalIndex, ShardBackend, WorkerBackend, no_impressions
from serving.sharding import ALL, ShardAssignment
from serving.worker.build_turn import BuildTurn
from serving.worker.log_watch import LogWatch
from serving.worker.publish_barrier import PublishBarrier
from serving.worker.replica import Replica, load_bundle
from serving.worker.snapshots import Snapshots


class GenerationRuntime:
    """Owns bundle, index, replica, snapshots and recall paths of one generation.

    Several can live in one process; each closes what is its own and nothing else. In order: the
    constructor fills the index and starts no thread, so that the process can still be forked; then
    `build_graph`, `start`, `wait_caught_up`; then the result of `start` answers, until `close`.
    """

    def __init__(
        self,
        settings: Settings,
        bundle: Bundle,
        logs: Mapping[str, LogId],
        ann: AnnBackend,
        assignment: ShardAssignment = ALL,
    ) -> None:
        """Fill the index from the newest snapshot, else from the bundle.

        logs: topic -> its identity in Kafka, of the item vectors, the items and the clicks
        """
        self.generation = bundle.generation
        self.index = live_index(settings, ann, bundle.dimension)
        self.index.background = False
        self.index.turn = BuildTurn(settings).take
        self._settings = settings
        self._bundle = bundle
        self._assignment = assignment
        self._logs = dict(logs)
        vectors = logs[topics.item_vectors(bundle.generation)]
        log_id = f"{vectors.cluster_id}/{vectors.topic_id}"
        self._snapshots = Snapshots(settings, bundle, log_id, self.index, assignment=assignment)
        positions = self._snapshots.load()
        if positions is None:
            load_bundle(self.index, bundle, assignment)
        self.replica = Replica(
            settings, bundle.generation, self.index, positions=positions, assignment=assignment
        )
        self._barrier: PublishBarrier | None = None
        self._watch: LogWatch | None = None
        self._closing = ExitStack()
        # In reverse: the replica stops, the last snapshot is written, the index ends its work.
        for part in (self.index, self._snapshots, self.replica):
            self._closing.callback(part.close)

    @classmethod
    def open(
        cls, settings: Settings, ann: AnnBackend, assignment: ShardAssignment, retry: Retry
    ) -> GenerationRuntime:
        """The active generation, once there is one. Raises BundleError, KafkaRefused, Stopped."""
        bundle = dependencies.open_bundle(settings, retry)
        return cls(settings, bundle, cls.logs_of(settings, bundle, retry), ann, assignment)

    @staticmethod
    def logs_of(settings: Settings, bundle: Bundle, retry: Retry) -> dict[str, LogId]:
        """The `logs` of a generation; missing topics are created. Raises KafkaRefused, Stopped."""
        topic = topics.item_vectors(bundle.generation)
        retry.wait_for("Kafka", lambda: topics.ensure_topics(settings, [*topics.SOURCES, topic]))
        return retry.wait_for(
            "Kafka", lambda: topics.log_ids(settings, [topic, topics.ITEMS, topics.CLICKS])
        )

    def build_graph(self) -> None:
        """Build the graph in the background, and have the recall guard watch it."""
        guard_recall(self._settings, self.index)
        self.index.begin()

    def wait_published(self, store: StateStore, stop: threading.Event) -> None:
        """Wait for a limited time until ingest has published the last changes of items."""
        self._barrier = PublishBarrier(self._settings, store, self.generation)
        self._closing.callback(self._barrier.close)
        self._barrier.wait(stop)

    def start(
        self, store: StateStore, *, write_snapshots: bool, impressions: Impressions | None = None
    ) -> WorkerBackend | ShardBackend:
        """Tail the item vectors. Returns what answers; it is complete after `wait_caught_up`.

        impressions: of the process; None: answers have ids, and none is recorded
        """
        self.replica.start()
        if write_snapshots:
            self._snapshots.start(self.replica)
        if self._barrier is not None:
            self._barrier.start(self.replica)
        self._watch = watch = LogWatch(self._settings, self._logs)
        watch.start()
        self._closing.callback(watch.close)
        held = LocalIndex(self.generation, self.index, self.replica, self._barrier, watch)
        if not self._assignment.whole:
            return ShardBackend(held, self._assignment)
        retriever = dependencies.start_retriever(
            self._settings,
            store,
            generation=self.generation,
            tower=self._bundle.user_tower,
            clicks=self._logs[topics.CLICKS],
            closing=self._closing,
            index=self.index,
        )
        return WorkerBackend(held, retriever, impressions or no_impressions())

    def wait_caught_up(self, stop: threading.Event) -> None:
        """Return once the replica has read all records from before `start`.

        Raises Stopped, LogReplaced.
        """
        while not self.replica.wait_caught_up(0.05):
            self.check_log()
            if stop.is_set():
                raise Stopped

    def check_log(self) -> None:
        """Raise LogReplaced if the item vectors were found to be another topic than at the start.

        Its offsets say nothing about what is in the index: only a process that opens the bundle
        again can read it from its beginning.
        """
        if self._watch is not None:
            self._watch.raise_replaced(topics.item_vectors(self.generation))

    def close(self) -> None:
        """Stop the threads; write the last snapshot."""
        self._closing.close()
