"""Publishes what the blender has learned: the newest weights in the compacted topic `blender`."""

from __future__ import annotations

import logging

from kafka.errors import KafkaError

from eddyline.errors import EddylineError
from eddyline.kafka import clients, producers, topics
from eddyline.kafka.topics import BLENDER
from eddyline.settings.loader import Settings
from evaluation.blend_learner import BlendLearner
from serving.answer.blend_weights import KEY

log = logging.getLogger(__name__)

_CLOSE_S = 2.0


class BlenderPublisher:
    """Thread rule: one thread. A failure is logged once; the next weights are sent all the same."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._producer: producers.Producer | None = None
        self._published = -1
        self._replaced = False
        self._failure = ""

    def publish(self, learner: BlendLearner | None) -> None:
        """Send the weights if they are others than at the last call. Waits `kafka_timeout_ms`."""
        if learner is None or learner.served.learned == self._published:
            return
        blender = learner.served
        if learner.guard.replaced != self._replaced:
            self._replaced = learner.guard.replaced
            more = {"wins": round(learner.guard.wins), "losses": round(learner.guard.losses)}
            if self._replaced:
                log.warning("the blender does harm: a fusion by rank replaces it", extra=more)
            else:
                log.info("the blender answers again", extra=more)
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
