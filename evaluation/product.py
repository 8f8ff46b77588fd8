"""What a worker would know and answer at one moment of a log: an engine for logs without Kafka.

Every topic has one partition here, and the broker's clock is that of the events.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from eddyline.kafka.topics import CLICKS, ITEMS, SOURCES, USERS
from eddyline.schema import events
from eddyline.schema.events import Click, Item, UserProfile
from eddyline.schema.records import BuiltRecord
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import LogId
from embeddings.bundle.bundle import Bundle
from evaluation.engine import BATCH_RECORDS, Engine

# A log's own event ids are all different, so the shortest window that the engine allows is enough.
_WINDOW_EVENTS = 2 * BATCH_RECORDS


def offline(settings: Settings) -> Settings:
    """The settings, for topics of one partition in Eddyline's own format; any path can be a row."""
    return msgspec.structs.replace(
        settings,
        path_state="all",
        clicks_partitions=1,
        items_partitions=1,
        item_slots=1,
        clicks_map="",
        items_map="",
        users_map="",
        chunk_records_max=min(settings.chunk_records_max, BATCH_RECORDS),
        dedupe_window_events=_WINDOW_EVENTS,
    )


class Product(Engine):
    """An engine that events are given to, not records. Thread rule: one thread."""

    def __init__(
        self, settings: Settings, bundle: Bundle, follows: Callable[[str], bool] | None = None
    ) -> None:
        """Without events and items. settings: any; see `offline`; follows: see `Engine`"""
        logs = {topic: LogId("evaluate", topic) for topic in SOURCES}
        super().__init__(offline(settings), bundle, logs, follows=follows)
        self._offsets = dict.fromkeys(SOURCES, 0)

    def apply_items(self, items: Sequence[Item]) -> None:
        """Apply changes of items, in their order."""
        self.apply_item_records([self._record(ITEMS, one.item_id, one) for one in items])

    def apply_profiles(self, profiles: Sequence[UserProfile]) -> None:
        """Apply profiles, in their order."""
        self.apply_profile_records([self._record(USERS, one.user_id, one) for one in profiles])

    def apply_events(self, clicks: Sequence[Click]) -> None:
        """Apply events, in their order, at the latest before something reads what they change."""
        for click in clicks:
            self.queue(self._record(CLICKS, click.user_id, click), (click,))

    def _record(self, topic: str, key: str, event: Click | Item | UserProfile) -> BuiltRecord:
        """Append to a topic. The broker's clock is the event's."""
        offset = self._offsets[topic]
        self._offsets[topic] = offset + 1
        name, value = self.settings.prefixed(topic), events.encode(event)
        return BuiltRecord(name, 0, offset, event.at_ms, key.encode(), value)
