"""What a worker holds before it serves: a generation, its index, and where the tail of the topic goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from eddyline.kafka import topics
from eddyline.process.retry import Retry
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import LogId
from embeddings.bundle.bundle import Bundle
from index.backends.base import AnnBackend
from index.factory import live_index
from index.live import LiveIndex
from serving import dependencies
from serving.sharding import ShardAssignment
from serving.worker.replica import load_bundle
from serving.worker.snapshots import Snapshots


@dataclass(frozen=True)
class OpenedIndex:
    """An index filled from a snapshot or the bundle; no thread runs yet.

    logs:      the item vectors and the clicks: who they are in Kafka
    positions: partition -> offset from which on the topic is to be read; None is from the beginning
    """

    generation: Bundle
    index: LiveIndex
    snapshots: Snapshots
    logs: Mapping[str, LogId]
    positions: Mapping[int, int] | None


def open_index(
    settings: Settings, backend: AnnBackend, share: ShardAssignment, retry: Retry
) -> OpenedIndex:
    """Open the active generation. Its graph is built from `LiveIndex.begin` on, or by hand.

    Raises BundleError, KafkaRefused, Stopped.
    """
    generation = dependencies.open_generation(settings, retry)
    topic = topics.item_vectors(generation.generation)
    retry.wait_for("Kafka", lambda: topics.ensure_topics(settings, [*topics.SOURCES, topic]))
    logs = retry.wait_for("Kafka", lambda: topics.log_ids(settings, [topic, topics.CLICKS]))
    index = live_index(settings, backend, generation.dimension)
    index.background = False
    of_log = f"{logs[topic].cluster_id}/{logs[topic].topic_id}"
    snapshots = Snapshots(settings, generation, of_log, index, share=share)
    positions = snapshots.load()
    if positions is None:
        load_bundle(index, generation, share)
    return OpenedIndex(generation, index, snapshots, logs, positions)
