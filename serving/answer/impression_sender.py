"""Sends the queued impressions to the topic `answers`, in a thread of its own.

While Kafka is away the queue fills up and further answers are dropped and counted; queries do not
notice.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from kafka.errors import KafkaError

from eddyline.errors import EddylineError
from eddyline.kafka import clients, producers, topics
from eddyline.schema.answers import encode_answer
from eddyline.settings.loader import Settings
from serving.answer.impressions import Impressions, QueuedAnswer

log = logging.getLogger(__name__)

# How often the thread looks at the queue. To wake it for each answer would make queries compete
# with it for the interpreter lock.
INTERVAL_S = 0.2
# Answers that are sent together; the thread then waits until Kafka has them.
BATCH = 256
# Pause after a failure: a server that refuses is not called in a loop.
AGAIN_S = 5.0
# At a stop: how long the thread goes on sending, and how long `close` waits for it.
FLUSH_S, CLOSE_S = 2.0, 4.0
_STEP_S, _DISCONNECT_S = 0.1, 1.0
# Answers of so many milliseconds go to the broker in one request.
_LINGER_MS = 20


class ImpressionSender:
    """The thread of one process. Thread rule: `start`, then `close`, once each."""

    def __init__(
        self,
        settings: Settings,
        impressions: Impressions,
        connect: Callable[[Settings], Any] | None = None,
    ) -> None:
        """connect: default: a producer, once the topic exists."""
        self._settings = settings
        self._impressions = impressions
        self._connect = connect or _connect
        self._stop = threading.Event()
        self._end_s = float("inf")
        self._thread: threading.Thread | None = None
        self._producer: Any = None
        self._failure = ""

    def start(self) -> None:
        """Begin in the background; nothing is started where no user is sampled."""
        if self._impressions.share > 0:
            self._thread = threading.Thread(target=self._run, name="impressions", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Send what is queued, at most for `FLUSH_S`, and end the thread."""
        self._end_s = time.monotonic() + FLUSH_S
        self._stop.set()
        if self._thread is not None:
            self._thread.join(CLOSE_S)
        if dropped := self._impressions.drop_all():
            log.warning("answers were not recorded: the process ends", extra={"answers": dropped})

    def _run(self) -> None:
        pause_s = 0.0
        while not self._stop.wait(pause_s):
            pause_s = INTERVAL_S if self._send_queued() else AGAIN_S
        if self._producer is not None:
            self._send_queued()
            self._disconnect()

    def _send_queued(self) -> bool:
        """Send until the queue is empty; False after a failure."""
        try:
            if self._producer is None:
                self._producer = self._connect(self._settings)
            while time.monotonic() < self._end_s and (batch := self._impressions.take(BATCH)):
                self._send(batch)
        except EddylineError as error:
            return self._failed(error)
        except KafkaError as error:
            return self._failed(clients.translate_error(self._settings, error))
        except Exception:
            log.exception("sending answers failed")
            self._disconnect()
            return False
        if self._failure:
            log.info("answers are recorded again")
        self._failure = ""
        return True

    def _send(self, batch: Sequence[QueuedAnswer]) -> None:
        """Send a batch and wait for Kafka. Raises KafkaError; a record that is too large is no
        error, it only counts as failed.
        """
        topic, futures, sent = self._settings.prefixed(topics.ANSWERS), list[Any](), 0
        try:
            for answer in batch:
                value = encode_answer(answer.recorded())
                futures.append(self._producer.send(topic, value, key=answer.user_id.encode()))
            for future in futures:
                while not future.is_done and time.monotonic() < self._end_s:
                    with suppress(KafkaError):
                        future.get(timeout=_STEP_S)
            sent = sum(future.succeeded() for future in futures)
        finally:
            self._impressions.count(sent=sent, failed=len(batch) - sent)
        for future in futures:
            if future.failed() and not clients.is_too_large(future.exception):
                raise future.exception

    def _failed(self, error: EddylineError) -> bool:
        """Log an error, once until sending succeeds; the next attempt connects anew."""
        if self._failure != type(error).__name__:
            log.warning("answers are not recorded", extra={"reason": str(error)})
        self._failure = type(error).__name__
        self._disconnect()
        return False

    def _disconnect(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            producer.close(timeout=_DISCONNECT_S)


def _connect(settings: Settings) -> producers.Producer:
    topics.ensure_topics(settings, [topics.ANSWERS])
    # The least that kafka-python accepts: a record that waited longer has failed.
    timeout_ms = max(settings.kafka_timeout_ms, 1_000) + _LINGER_MS
    return producers.make_producer(settings, linger_ms=_LINGER_MS, delivery_timeout_ms=timeout_ms)
