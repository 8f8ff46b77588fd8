"""Item keys to labels: an open-addressing hash table that readers search without a lock."""

from __future__ import annotations

import numpy as np

from index.arrays import Ints, Keys
from index.storage.vector_table import CAPACITY_MIN

# In place of the key of a label that has none. An item with this key is not found: one in 2^64.
NO_KEY = np.uint64(0)
_EMPTY = -1


class KeyTable:
    """The label of each `eddyline.schema.item_key`. Of items with equal keys, one is found.

    A key is its own hash. A slot holds a label, so an entry takes 4 bytes and is valid while the
    label has the key: a label that is freed leaves a slot that matches nothing. At most half of the
    slots are used. With the 8 bytes of a key an item takes about 20 bytes, at most 40.

    Thread rule: one writer; any number of readers. A full table is copied, not changed.
    """

    __slots__ = ("_keys", "_mask", "_slots", "_used", "changes")

    def __init__(self, labels: int, entries: int = 0) -> None:
        """labels: below this number; entries: that fit before a copy."""
        entries = max(entries, CAPACITY_MIN)
        self._keys: Keys = np.full(labels, NO_KEY)
        size = 1 << max(1, 2 * entries - 1).bit_length()
        self._slots = np.full(size, _EMPTY, np.int32)
        self._mask = np.uint64(size - 1)
        self._used = 0
        # Counts the beginnings and ends of changes: an answer of `find` is good while the number
        # from before it stays the same.
        self.changes = 0

    @property
    def memory_bytes(self) -> int:
        """Of the arrays."""
        return self._keys.nbytes + self._slots.nbytes

    def find(self, keys: Keys) -> Ints:
        """int64 (n,): the label of each key, -1 for none."""
        at = keys & self._mask
        # Most keys are in their first slot, or that one is empty.
        found = self._slots[at]
        equal = (self._keys[found] == keys) & (found != _EMPTY)
        labels = np.where(equal, found, _EMPTY).astype(np.int64)
        pending = np.flatnonzero(~equal & (found != _EMPTY))
        at[pending] = (at[pending] + np.uint64(1)) & self._mask
        while len(pending):
            found = self._slots[at[pending]]
            occupied = found != _EMPTY
            pending, found = pending[occupied], found[occupied]
            equal = self._keys[found] == keys[pending]
            labels[pending[equal]] = found[equal]
            pending = pending[~equal]
            at[pending] = (at[pending] + np.uint64(1)) & self._mask
        return labels

    def keys_at(self, labels: Ints) -> Keys:
        """uint64 (n,): the keys of labels that have or had a row."""
        return self._keys[labels]

    def with_room(self, labels: int, more: int) -> KeyTable:
        """A table for labels below this number, with room for `more` entries: this one, or a copy.

        A copy has no slots of freed labels.
        """
        if labels <= len(self._keys) and 2 * (self._used + more) <= len(self._slots):
            return self
        known = np.flatnonzero(self._keys != NO_KEY)
        copy = KeyTable(max(labels, len(self._keys)), 3 * (len(known) + more) // 2)
        copy.insert(known, self._keys[known])
        return copy

    def insert(self, labels: Ints, keys: Keys) -> None:
        """Set the keys of these distinct labels, for which there is room."""
        self.changes += 1
        # Before the slots: a reader that finds a label in a slot compares its key.
        self._keys[labels] = keys
        self._used += len(labels)
        at, labels = keys & self._mask, labels.astype(np.int32)
        while len(labels):
            free = self._slots[at] == _EMPTY
            # Of several for one slot the first gets it; the others find it occupied.
            slots, first = np.unique(at[free], return_index=True)
            chosen = np.flatnonzero(free)[first]
            self._slots[slots] = labels[chosen]
            left = np.ones(len(labels), bool)
            left[chosen] = False
            at = (at[left] + (~free[left]).astype(np.uint64)) & self._mask
            labels = labels[left]
        self.changes += 1

    def remove(self, labels: Ints) -> None:
        """Clear the keys of these labels; no reader may still need them."""
        self.changes += 1
        self._keys[labels[labels < len(self._keys)]] = NO_KEY
        self.changes += 1
