"""Reads the weights of the blender that the judge publishes, again and again."""

from __future__ import annotations

from eddyline.kafka import topics
from eddyline.kafka.kept import KeptKafka
from eddyline.kafka.topics import BLENDER
from eddyline.process.periodic import Periodic
from eddyline.settings.loader import Settings
from serving.answer.blend_weights import KEY, CurrentBlender

# Weights that a few more clicks have changed order the same items in nearly the same way.
INTERVAL_S = 2.0


class BlenderWatch:
    """Has a process answer with the newest weights. Thread rule: `start`, then `close`, once each.

    While Kafka is away, the last weights stay in use.
    """

    def __init__(self, settings: Settings, current: CurrentBlender) -> None:
        self._settings = settings
        self._current = current
        self._kept = KeptKafka(settings)
        self._exists = False
        self._reads = Periodic(
            "blender",
            self.read,
            INTERVAL_S,
            "the weights of the blender cannot be read",
            at_once=True,
        )

    def start(self) -> None:
        """Begin in the background."""
        self._reads.start()

    def close(self) -> None:
        """Stop reading."""
        self._reads.close()
        self._kept.close()

    def read(self) -> None:
        """Read now. Raises KafkaUnavailable, KafkaRefused."""
        if not self._exists:
            topics.ensure_topics(self._settings, [BLENDER])
            self._exists = True
        self._current.take(self._kept.latest(BLENDER).get(KEY))
