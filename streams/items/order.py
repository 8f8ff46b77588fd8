"""The order of an item's changes where producers send it to different partitions (ADR 23).

A change in a wrong partition is forwarded to the item's own. There it counts only if its first
append is not older than that of the change that the item has. The log is compacted, and compaction
keeps the last record of a key: so after an outdated change, the newer one is appended again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from eddyline.stores.state_store import ItemMetadata
from streams.items.metadata import ItemChange
from streams.records import Restored, appended_after


@dataclass(slots=True)
class KeyOrder:
    """Which forwarded changes of one batch count. Only items with such a change are looked up.

    stored:   by item, what it had before the batch
    disputed: forwarded changes of items that another producer sends to their own partition
    """

    stored: Mapping[str, ItemMetadata] = field(default_factory=dict)
    disputed: int = 0
    _accepted: dict[str, ItemChange] = field(default_factory=dict)
    _restored: dict[str, Restored] = field(default_factory=dict)

    def newest(self, item_id: str) -> ItemMetadata | None:
        """What the item has; None if nothing, or if it was not looked up and has no change yet."""
        accepted = self._accepted.get(item_id)
        return self.stored.get(item_id) if accepted is None else accepted.metadata

    def counts(self, item_id: str, change: ItemChange) -> bool:
        """Whether the change counts; call it for each in the order of the log."""
        newest = self.newest(item_id) if change.forwarded else None
        if newest is None or newest.has_ended(change.record.timestamp):
            return True
        self.disputed += change.stray and not newest.stray
        if not change.is_older(newest):
            return True
        body = newest.body or None
        self._restored[item_id] = Restored.after(change.record, item_id, newest.first_ms, body)
        return False

    def accepted(self, item_id: str, change: ItemChange) -> None:
        """The change holds: the next one is decided by it."""
        self._restored.pop(item_id, None)
        self._accepted[item_id] = change

    def refused(self, item_id: str, change: ItemChange) -> None:
        """The item keeps what it has, which is still to be appended after an earlier record."""
        self._accepted[item_id] = change

    def append(self, item_id: str, change: ItemChange) -> None:
        """Append what the item has after the change behind it: compaction keeps the record alone.

        Not after a record that was itself appended so: settings may refuse today what was fine.
        """
        if (after := change.metadata).body and appended_after(change.record) is None:
            restored = Restored.after(change.record, item_id, after.first_ms, after.body)
            self._restored[item_id] = restored

    def restored(self) -> Iterable[Restored]:
        """What to append again: newer changes than those that are last in the log."""
        return self._restored.values()
