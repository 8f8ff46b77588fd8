"""A coordinator's cache of item vectors with their versions; the shards check the versions."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping

from index.arrays import Vector

# With 64 numbers each about 25 MB; a user's next query finds the items of the last one.
ITEMS_MAX = 50_000
# (version, vector)
Entry = tuple[int, Vector]


class VectorCache:
    """The vectors used last, of one generation. Thread rule: any thread."""

    def __init__(self, items_max: int = ITEMS_MAX) -> None:
        """items_max: beyond it, the least recently used go first."""
        self._items_max = items_max
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._lock = threading.Lock()

    def look_up(self, item_ids: Iterable[str]) -> dict[str, Entry]:
        """The cached ones of these items."""
        found: dict[str, Entry] = {}
        with self._lock:
            for item_id in item_ids:
                entry = self._entries.get(item_id)
                if entry is not None:
                    found[item_id] = entry
                    self._entries.move_to_end(item_id)
        return found

    def keep(self, entries: Mapping[str, Entry]) -> None:
        """Cache these, in place of older versions."""
        copies = {item_id: (version, row.copy()) for item_id, (version, row) in entries.items()}
        with self._lock:
            self._entries.update(copies)
            for item_id in copies:
                self._entries.move_to_end(item_id)
            while len(self._entries) > self._items_max:
                self._entries.popitem(last=False)

    def __len__(self) -> int:
        """Number of cached items."""
        return len(self._entries)
