"""The newest source offset of each item: a record with an older or equal offset is a no-op."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from index.arrays import Ints, Mask
from index.storage.vector_table import CAPACITY_MIN

# Below every offset of a record.
UNKNOWN = np.iinfo(np.int64).min


class ItemOffsets:
    """Label -> offset of its newest record, deletes included. Thread rule: under the write lock.

    ids, label_of: shared with the IndexVersions; a new label is appended before a version counts it
    A label whose delete has ended is free (`free`): its id is "", and the next new item takes it.
    """

    def __init__(self, ids: list[str], label_of: dict[str, int], offsets: Ints) -> None:
        """offsets: int64 (n,), of the existing labels."""
        self.ids = ids
        self.label_of = label_of
        self._offsets = offsets
        # For `undo`: the number of labels before the last `advance`, and the offsets that it set.
        self._known = len(ids)
        self._previous: tuple[Ints, Ints] = (offsets[:0], offsets[:0])
        self._free: list[int] = []
        # Of the last `advance`: the free labels that it took.
        self._reused: list[int] = []

    @property
    def free_count(self) -> int:
        """Number of free labels."""
        return len(self._free)

    def free(self, labels: Sequence[int]) -> None:
        """Free labels of deleted items; no reader may still see an item under them."""
        for label in labels:
            del self.label_of[self.ids[label]]
            self._release(label)

    def _release(self, label: int) -> None:
        self.ids[label] = ""
        self._offsets[label] = UNKNOWN
        self._free.append(label)

    @property
    def offsets(self) -> Ints:
        """int64 (n,): offset of every label; read it under the lock."""
        return self._offsets[: len(self.ids)]

    def advance(
        self, item_ids: Sequence[str], offsets: Ints, brings_time: Callable[[Ints, Ints], Mask]
    ) -> tuple[Ints, Ints]:
        """(labels, positions) of the records that are newest for their item, by position.

        item_ids, offsets (n,): of the records; no-ops are left out
        brings_time: of these labels and positions, which record has a time that its item lacks;
                     such a record counts although its offset is the one of the item
        """
        self._known, self._previous = len(self.ids), (self._offsets[:0], self._offsets[:0])
        self._reused = []
        found = list(map(self.label_of.get, item_ids))
        if None in found:
            self._add_labels(found, item_ids)
        labels = np.array(found, np.int64)
        before = self._offsets[labels]
        newer = offsets > before
        equal = (offsets == before).nonzero()[0]
        if len(equal):
            newer[equal] = brings_time(labels[equal], equal)
        positions = newer.nonzero()[0]
        if len(set(found)) < len(found):
            positions = _newest_of_each(labels, offsets, positions)
        labels = labels[positions]
        self._previous = (labels, before[positions])
        self._offsets[labels] = offsets[positions]
        return labels, positions

    def undo(self) -> list[int]:
        """Revert the last `advance`: its records were not written and must not count as old.

        Returns the labels that no longer belong to an item. `advance` itself may have failed at
        any point.
        """
        ended = [*range(self._known, len(self.ids)), *self._reused]
        labels, before = self._previous
        self._offsets[labels] = before
        for item_id in self.ids[self._known :]:
            self.label_of.pop(item_id, None)
        del self.ids[self._known :]
        while self._reused:
            label = self._reused.pop()
            self.label_of.pop(self.ids[label], None)
            self._release(label)
        return ended

    def _add_labels(self, found: list[int | None], item_ids: Sequence[str]) -> None:
        """Set a label for every item of `found` that has none."""
        for at, label in enumerate(found):
            if label is None:
                item_id = item_ids[at]
                # A batch may name the item twice.
                new = self.label_of.get(item_id)
                if new is None:
                    new = self.label_of[item_id] = self._new_label(item_id)
                found[at] = new
        if len(self.ids) > len(self._offsets):
            room = np.full(max(CAPACITY_MIN, 2 * len(self.ids)) - self._known, UNKNOWN)
            self._offsets = np.concatenate((self._offsets[: self._known], room))
        self._offsets[self._known : len(self.ids)] = UNKNOWN

    def _new_label(self, item_id: str) -> int:
        if not self._free:
            self.ids.append(item_id)
            return len(self.ids) - 1
        label = self._free.pop()
        self._reused.append(label)
        self.ids[label] = item_id
        return label


def _newest_of_each(labels: Ints, offsets: Ints, positions: Ints) -> Ints:
    """Of these positions one per label: the highest offset, the first one of equals."""
    order = positions[np.lexsort((positions, -offsets[positions], labels[positions]))]
    first = np.ones(len(order), bool)
    first[1:] = labels[order[1:]] != labels[order[:-1]]
    return np.sort(order[first])
