"""The three handlers, wired: for ingest, refill, state replay and the oracle of the tests."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from kafka import KafkaProducer

from eddyline.generations import KafkaStepRanges
from eddyline.kafka.kept import KeptKafka
from eddyline.kafka.topics import CLICKS, ITEMS, USERS
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import StateStore
from streams.clicks.handler import ClickHandler
from streams.clicks.step_ranges import FixedStepRanges, RecordedStepRanges, StepRangeRule
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

    user_forwarder, item_forwarder, forgets: see `UserHandler`, `ItemHandler`
    steps:   see `ClickHandler`
    """

    click_letters: DeadLetterSink
    user_letters: DeadLetterSink
    item_letters: DeadLetterSink
    forwarder: Forwarder
    user_forwarder: Forwarder | None = None
    item_forwarder: Forwarder | None = None
    forgets: ForgetSink | None = None
    steps: StepRangeRule = field(default_factory=FixedStepRanges)

    @classmethod
    def to_kafka(
        cls, settings: Settings, producer: KafkaProducer, kept: KeptKafka | None = None
    ) -> Outputs:
        """The topics of Kafka. kept: see `KafkaStepRanges`"""
        return cls(
            click_letters=KafkaDeadLetters(settings, producer),
            user_letters=KafkaDeadLetters(settings, producer),
            item_letters=KafkaDeadLetters(settings, producer),
            forwarder=KafkaForwarder(settings, producer),
            user_forwarder=KafkaForwarder(settings, producer),
            item_forwarder=KafkaForwarder(settings, producer),
            forgets=KafkaForwarder(settings, producer),
            steps=RecordedStepRanges(KafkaStepRanges(settings, producer, kept)),
        )

    @classmethod
    def to_sink(cls, sink: Sink, steps: StepRangeRule | None = None) -> Outputs:
        """One sink for all handlers, which run one after the other."""
        return cls(sink, sink, sink, sink, steps=steps or FixedStepRanges())


@dataclass(eq=False)
class Handlers:
    """The handlers of one process, made at first use, on one store.

    generations:  the live ones, which learn and publish
    known:        every recorded generation: a forgotten user's embeddings of all of them are
                  deleted
    items_wait_s: how long item metadata waits for that of more batches
    clock_us:     see `ItemHandler`
    delete_retention_ms: of the compacted topics; others are not searched for lost deletes
    follows:      see `ClickHandler`
    """

    settings: Settings
    store: StateStore
    logs: LogIds
    generations: Sequence[Generation]
    outputs: Outputs
    known: Sequence[str]
    items_wait_s: float = METADATA_WAIT_S
    clock_us: Callable[[], int] = lambda: time.time_ns() // 1_000
    delete_retention_ms: Mapping[str, int] = field(default_factory=dict)
    follows: Callable[[str], bool] | None = None

    @cached_property
    def clicks(self) -> ClickHandler:
        """The handler of `clicks`."""
        return ClickHandler(
            self.settings,
            self.store,
            PartitionFences(self.settings, self.store, CLICKS, self.logs),
            self.outputs.click_letters,
            self.outputs.forwarder,
            [generation.micro for generation in self.generations],
            steps=self.outputs.steps,
            follows=self.follows,
        )

    @cached_property
    def users(self) -> UserHandler:
        """The handler of `users`.

        It writes the slots of `clicks`, so both share a thread and a cache.
        """
        return UserHandler(
            self.settings,
            self.store,
            PartitionFences(
                self.settings,
                self.store,
                USERS,
                self.logs,
                delete_retention_ms=self.delete_retention_ms.get(USERS),
            ),
            self.outputs.user_letters,
            self.known,
            self.clicks.cache,
            self.outputs.forgets,
            self.outputs.user_forwarder,
        )

    @cached_property
    def items(self) -> ItemHandler:
        """The handler of `items`."""
        names = [generation.name for generation in self.generations]
        return ItemHandler(
            self.settings,
            self.store,
            PartitionFences(
                self.settings,
                self.store,
                ITEMS,
                self.logs,
                names,
                self.delete_retention_ms.get(ITEMS),
            ),
            self.outputs.item_letters,
            self.generations,
            self.items_wait_s,
            self.clock_us,
            self.outputs.item_forwarder,
        )

    def of(self, topic: str) -> Handler:
        """The handler of a topic, by the topic's name without prefix."""
        by_topic: dict[str, Handler] = {CLICKS: self.clicks, USERS: self.users, ITEMS: self.items}
        return by_topic[topic]
