"""Publishes what the blender has learned: the newest weights in the compacted topic `blender`."""

from __future__ import annotations

import logging

from kafka.errors import KafkaError

from eddyline.errors import EddylineError
from eddyline.kafka import clients, producers, topics
from eddyline.kafka.topics import BLENDER
from eddyline.settings.loader import Settings
from serving.answer.blend_weights import KEY
from serving.answer.blender import Blender

log = logging.getLogger(__name__)

_CLOSE_S = 2.0


class BlenderPublisher:
    """Thread rule: one thread. A failure is logged once; the next weights are sent all the same."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._producer: producers.Producer | None = None
        self._published = -1
        self._failure = ""

    def publish(self, blender: Blender | None) -> None:
        """Send the weights if they have learned since the last call. Waits `kafka_timeout_ms`."""
        if blender is None or blender.learned == self._published:
            return
        try:
            if self._producer is None:
                topics.ensure_topics(self._settings, [BLENDER])
                self._producer = producers.make_producer(self._settings)
            topic = self._settings.prefixed(BLENDER)
            future = self._producer.send(topic, blender.encode(), key=KEY)
            producers.sent_to(future, self._settings)
        except KafkaError as error:
            self._failed(clients.translate_error(self._settings, error))
        except EddylineError as error:
            self._failed(error)
        else:
            self._published, self._failure = blender.learned, ""

    def close(self) -> None:
        """Close the connection."""
        producer, self._producer = self._producer, None
        if producer is not None:
            producer.close(timeout=_CLOSE_S)

    def _failed(self, error: EddylineError) -> None:
        if self._failure != type(error).__name__:
            more = {"reason": str(error)}
            log.warning("the weights of the blender cannot be published", extra=more)
        self._failure = type(error).__name__
        self.close()
