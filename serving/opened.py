"""What a worker holds before it serves: a generation, its index, and where the tail of the topic goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from eddyline import kafka
from eddyline.ports import LogId
from eddyline.settings import Settings
from eddyline.start import Patience
from embeddings.bundle import Bundle
from index.live import LiveIndex
from index.mains.port import MainIndex
from serving import wiring
from serving.replica import load_bundle
from serving.share import Share
from serving.snapshots import Snapshots


@dataclass(frozen=True)
class Opened:
    """An index filled from a snapshot or the bundle; no thread runs yet.

    logs:      the item vectors and the clicks: who they are in Kafka
    positions: partition -> offset from which on the topic is to be read; None is from the beginning
    """

    generation: Bundle
    index: LiveIndex
    snapshots: Snapshots
    logs: Mapping[str, LogId]
    positions: Mapping[int, int] | None


def open_index(settings: Settings, main: MainIndex, share: Share, patience: Patience) -> Opened:
    """Open the active generation. Its graph is built from `LiveIndex.begin` on, or by hand.

    Raises BundleError, KafkaRefused, Stopped.
    """
    generation = wiring.open_generation(settings, patience)
    topic = kafka.item_vectors(generation.generation)
    patience.until("Kafka", lambda: kafka.ensure_topics(settings, [*kafka.SOURCES, topic]))
    logs = patience.until("Kafka", lambda: kafka.log_ids(settings, [topic, kafka.CLICKS]))
    index = LiveIndex(
        generation.dimension,
        main.build,
        breadth=settings.index_ef,
        exact_below=settings.index_exact_below,
        fresh_max=settings.index_fresh_max,
        tier_above=settings.index_tier_above,
    )
    index.background = False
    of_log = f"{logs[topic].cluster_id}/{logs[topic].topic_id}"
    snapshots = Snapshots(settings, generation, of_log, index, share=share)
    positions = snapshots.load()
    if positions is None:
        load_bundle(index, generation, share)
    return Opened(generation, index, snapshots, logs, positions)
