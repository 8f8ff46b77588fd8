"""Deleted items in an ingest process: their metadata is removed once they have ended.

The rule is applied where an item is read (`items.order`): a record that is appended after the end
finds no item. So it makes no difference when, and whether, the metadata is removed (ADR 32).
"""

from __future__ import annotations

from collections.abc import Iterator

from typing_extensions import override

from eddyline.schema.partitioning import item_slots
from eddyline.settings.loader import Settings
from eddyline.stores.state_store import StateStore
from streams.background_removal import BackgroundRemoval
from streams.fences import PartitionFences


class DeletedItems(BackgroundRemoval):
    """Removes the metadata of deleted items that have ended. Thread rule: `check` in one thread.

    fences: of `items`. One process is enough: the one that has partition 0 removes those of all
    """

    def __init__(self, settings: Settings, store: StateStore, fences: PartitionFences) -> None:
        super().__init__("deleted items", settings.deleted_items_kept_s)
        self._store = store
        self._fences = fences
        self._slots = item_slots(settings.item_slots)
        self._partitions = settings.items_partitions

    @override
    def pages(self, slack_ms: int) -> Iterator[int]:
        if not self._fences.is_open(0):
            return iter(())
        return self._store.remove_deleted_items(self._slots, self._partitions, slack_ms)
