"""Items in an order that no index decides, such as the most clicked ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eddyline.schema.item_key import cached_keys_of
from index.arrays import Floats, Ints, Keys


class RankedItems:
    """Thread rule: any thread; immutable.

    ids:    each once
    scores: float64 (n,), falling
    """

    __slots__ = ("_keys", "ids", "looked_up", "scores")

    def __init__(self, ids: Sequence[str], scores: Floats) -> None:
        self.ids = ids
        self.scores = scores
        self._keys: Keys | None = None
        # Of an index: (its table of keys, the table's state, int64 (n,) its number of each item).
        self.looked_up: tuple[object, int, Ints | None] = (None, 0, None)

    @classmethod
    def of(cls, pairs: Sequence[tuple[str, float]]) -> RankedItems:
        """pairs: (id, score) in the order."""
        return cls([one for one, _ in pairs], np.array([score for _, score in pairs], np.float64))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def keys(self) -> Keys:
        """uint64 (n,): `eddyline.schema.item_key` of each; made at the first call."""
        if self._keys is None:
            self._keys = cached_keys_of(self.ids)
        return self._keys
