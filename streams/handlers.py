"""The three handlers, wired: for ingest, refill, state replay and the oracle of the tests."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from kafka import KafkaProducer

from eddyline.kafka.topics import CLICKS, ITEMS, USERS
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import StateStore
from streams.clicks.handler import ClickHandler
from streams.dead_letters import KafkaDeadLetters, KafkaForwarder
from streams.fences import LogIds, PartitionFences
from streams.generation import Generation
from streams.items.handler import ItemHandler
from streams.items.metadata import METADATA_WAIT_S
from streams.ports import DeadLetterSink, ForgetSink, Forwarder, Handler
from streams.users import UserHandler


class Sink(DeadLetterSink, Forwarder, Protocol):
    """Dead letters and forwarded records in one."""


@dataclass(frozen=True)
class Outputs:
    """Where the handlers' records go, besides item records. Each sink serves one handler.

    forgets: see `UserHandler`
    """

    click_letters: DeadLetterSink
    user_letters: DeadLetterSink
    item_letters: DeadLetterSink
    forwarder: Forwarder
    forgets: ForgetSink | None = None

    @classmethod
    def to_kafka(cls, settings: Settings, producer: KafkaProducer) -> Outputs:
        """The topics of Kafka."""
        return cls(
            click_letters=KafkaDeadLetters(settings, producer),
            user_letters=KafkaDeadLetters(settings, producer),
            item_letters=KafkaDeadLetters(settings, producer),
            forwarder=KafkaForwarder(settings, producer),
            forgets=KafkaForwarder(settings, producer),
        )

    @classmethod
    def to_sink(cls, sink: Sink) -> Outputs:
        """One sink for all handlers, which run one after the other."""
        return cls(sink, sink, sink, sink)


class Handlers:
    """The handlers of one process, made at first use, on one store.

    generations:  the live ones, which learn and publish
    known:        every recorded generation: a forgotten user's embeddings of all of them are
                  deleted
    items_wait_s: how long item metadata waits for that of more batches
    clock_us:     see `ItemHandler`
    """

    def __init__(
        self,
        settings: Settings,
        store: StateStore,
        logs: LogIds,
        generations: Sequence[Generation],
        outputs: Outputs,
        known: Sequence[str],
        items_wait_s: float = METADATA_WAIT_S,
        clock_us: Callable[[], int] = lambda: time.time_ns() // 1_000,
    ) -> None:
        self._settings = settings
        self._store = store
        self._logs = logs
        self._generations = generations
        self._outputs = outputs
        self._known = known
        self._items_wait_s = items_wait_s
        self._clock_us = clock_us

    @cached_property
    def clicks(self) -> ClickHandler:
        """The handler of `clicks`."""
        return ClickHandler(
            self._settings,
            self._store,
            PartitionFences(self._settings, self._store, CLICKS, self._logs),
            self._outputs.click_letters,
            self._outputs.forwarder,
            [generation.micro for generation in self._generations],
        )

    @cached_property
    def users(self) -> UserHandler:
        """The handler of `users`.

        It writes the slots of `clicks`, so both share a thread and a cache.
        """
        return UserHandler(
            self._settings,
            self._store,
            PartitionFences(self._settings, self._store, USERS, self._logs),
            self._outputs.user_letters,
            self._known,
            self.clicks.cache,
            self._outputs.forgets,
        )

    @cached_property
    def items(self) -> ItemHandler:
        """The handler of `items`."""
        names = [generation.name for generation in self._generations]
        return ItemHandler(
            self._settings,
            self._store,
            PartitionFences(self._settings, self._store, ITEMS, self._logs, names),
            self._outputs.item_letters,
            self._generations,
            self._items_wait_s,
            self._clock_us,
        )

    def of(self, topic: str) -> Handler:
        """The handler of a topic, by the topic's name without prefix."""
        by_topic: dict[str, Handler] = {CLICKS: self.clicks, USERS: self.users, ITEMS: self.items}
        return by_topic[topic]
