"""Notices that a topic was made anew, or is gone, while a worker or coordinator runs."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from eddyline.errors import EddylineError, LogReplaced
from eddyline.kafka import topics
from eddyline.process.periodic import Periodic
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import LogId

log = logging.getLogger(__name__)

# An offset beyond the end of a new log looks like a reader that has caught up, so ids are compared.
CHECK_S = 10.0
# What Kafka shows as the id of a topic that does not exist.
NO_TOPIC = ("", "None", "00000000-0000-0000-0000-000000000000")


class LogWatch:
    """Compares the identity of topics with that at the start. Thread rule: any thread."""

    def __init__(self, settings: Settings, logs: Mapping[str, LogId]) -> None:
        """logs: topic -> its log at the start, of all topics to watch."""
        self._settings = settings
        self._logs = dict(logs)
        self._changed: dict[str, LogId] = {}
        self._checks = Periodic(
            "log-watch", self.check, CHECK_S, "the identity of the topics could not be compared"
        )

    def start(self) -> None:
        """Check in the background."""
        self._checks.start()

    def close(self) -> None:
        """Stop checking."""
        self._checks.close()

    def check(self) -> None:
        """Compare now; without an answer of Kafka the last result stands."""
        try:
            found = topics.log_ids(self._settings, list(self._logs))
        except EddylineError:
            return  # the tail reports that Kafka is away
        for name, known in self._logs.items():
            if found[name] == known:
                self._changed.pop(name, None)
            else:
                if name not in self._changed:
                    log.error("a topic was made anew or deleted", extra={"topic": name})
                self._changed[name] = found[name]

    def missing(self) -> str:
        """Which topics are not those of the start; "" if all are."""
        return "; ".join(self._sentence(name, now) for name, now in list(self._changed.items()))

    def raise_replaced(self, name: str) -> None:
        """Raise LogReplaced if this topic is another one; not while it is merely deleted."""
        now = self._changed.get(name)
        if now is not None and now.topic_id not in NO_TOPIC:
            raise LogReplaced(self._sentence(name, now))

    def _sentence(self, name: str, now: LogId) -> str:
        known = self._logs[name]
        clusters = "" if known.cluster_id == now.cluster_id else f", in cluster {now.cluster_id}"
        advice = "Restart this process"
        if name == topics.ITEMS:
            advice = "Its offsets begin anew, so changes may be ignored: train a new generation"
        return (
            f"the topic {self._settings.prefixed(name)} was made anew or deleted (it was "
            f"{known.topic_id}, it is {now.topic_id}{clusters}); answers stand as they were then. "
            f"{advice}"
        )
