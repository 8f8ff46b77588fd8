"""Which change of an item is the newest: its version is the source offset, and older ones are no-ops."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from index.arrays import Ints
from index.storage.vector_table import CAPACITY_MIN

# Below every version that a record can carry.
UNKNOWN = np.iinfo(np.int64).min


class Versions:
    """Label -> the offset of its newest change. Thread rule: the index's write lock.

    ids and label_of are the State's own: appended to here, before a State counts what was appended.
    """

    def __init__(self, ids: list[str], label_of: dict[str, int], offsets: Ints) -> None:
        """offsets: int64 (n,), those of the labels that there are."""
        self.ids = ids
        self.label_of = label_of
        self._offsets = offsets
        # What `undo` puts back: how many labels there were, and the versions of those that were set.
        self._known = len(ids)
        self._set: tuple[Ints, Ints] = (offsets[:0], offsets[:0])

    @property
    def offsets(self) -> Ints:
        """int64 (n,): the version of every label, to be read under the lock."""
        return self._offsets[: len(self.ids)]

    def newer(self, item_ids: Sequence[str], offsets: Ints) -> tuple[Ints, Ints]:
        """(labels, the place of the newest record of each among these), no-ops left out, by place.

        item_ids, offsets (n,): of the records
        """
        self._known = len(self.ids)
        found = list(map(self.label_of.get, item_ids))
        if None in found:
            self._name(found, item_ids)
        labels = np.array(found, np.int64)
        before = self._offsets[labels]
        places = (offsets > before).nonzero()[0]
        if len(set(found)) < len(found):
            places = _newest_of_each(labels, offsets, places)
        labels = labels[places]
        self._set = (labels, before[places])
        self._offsets[labels] = offsets[places]
        return labels, places

    def undo(self) -> None:
        """Take the last `newer` back: its records were not written, and must not count as old next time."""
        labels, before = self._set
        self._offsets[labels] = before
        for item_id in self.ids[self._known :]:
            del self.label_of[item_id]
        del self.ids[self._known :]

    def _name(self, found: list[int | None], item_ids: Sequence[str]) -> None:
        """Give a label to every item that has none."""
        for at, label in enumerate(found):
            if label is None:
                item_id, more = item_ids[at], len(self.ids)
                # The same item may be there twice.
                found[at] = self.label_of.get(item_id, more)
                if found[at] == more:
                    self.ids.append(item_id)
                    self.label_of[item_id] = more
        if len(self.ids) > len(self._offsets):
            room = np.full(max(CAPACITY_MIN, 2 * len(self.ids)) - self._known, UNKNOWN)
            self._offsets = np.concatenate((self._offsets[: self._known], room))
        self._offsets[self._known : len(self.ids)] = UNKNOWN


def _newest_of_each(labels: Ints, offsets: Ints, places: Ints) -> Ints:
    """Of some places one for each label: that of the highest offset, the first one where equal."""
    order = places[np.lexsort((places, -offsets[places], labels[places]))]
    first = np.ones(len(order), bool)
    first[1:] = labels[order[1:]] != labels[order[:-1]]
    return np.sort(order[first])
