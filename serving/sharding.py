"""Which items a worker holds: all of them, or one shard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from eddyline.errors import SettingsError
from eddyline.schema.item_record import ItemRecord
from eddyline.schema.partitioning import item_shard
from eddyline.settings.loader import Settings


class ShardAssignment(NamedTuple):
    """The items whose ids hash to the shard `shard` of 0 … shards - 1."""

    shard: int = 0
    shards: int = 1

    @property
    def whole(self) -> bool:
        """Whether these are all items."""
        return self.shards == 1

    @property
    def name(self) -> str:
        """For messages, as "shard 0 of 4"; "" for all items."""
        return "" if self.whole else f"shard {self.shard} of {self.shards}"

    def holds(self, item_id: str) -> bool:
        """Whether this item belongs to it."""
        return self.shards == 1 or item_shard(item_id, self.shards) == self.shard

    def split(self, records: Sequence[ItemRecord]) -> tuple[list[ItemRecord], list[ItemRecord]]:
        """(records of its own items, records of other items), each in their order."""
        mine: list[ItemRecord] = []
        others: list[ItemRecord] = []
        for record in records:
            (mine if self.holds(record.item_id) else others).append(record)
        return mine, others


ALL = ShardAssignment()


def shard_of(settings: Settings) -> ShardAssignment:
    """The items that a worker holds by its settings. Raises SettingsError."""
    if settings.shard >= settings.shards:
        raise SettingsError(
            f"shard = {settings.shard}: must be less than shards = {settings.shards}"
        )
    return ShardAssignment(settings.shard, settings.shards)
