"""Which change of an item is the newest: its version is the source offset, and older ones are no-ops."""

from __future__ import annotations

from collections.abc import Sequence

from eddyline.records import ItemRecord


class Versions:
    """Label -> the offset of its newest change. Thread rule: the index's write lock.

    ids and label_of are the State's own: appended to here, before a State counts what was appended.
    """

    def __init__(self, ids: list[str], label_of: dict[str, int], offsets: list[int]) -> None:
        self.ids = ids
        self.label_of = label_of
        self.offsets = offsets
        self._before: dict[int, int] = {}
        self._known = len(offsets)

    def newer(self, records: Sequence[ItemRecord]) -> dict[int, int]:
        """label -> the place of its newest record among these, no-ops left out."""
        chosen: dict[int, int] = {}
        offsets, label_of = self.offsets, self.label_of
        before = self._before = {}
        self._known = len(offsets)
        for at, record in enumerate(records):
            label = label_of.get(record.item_id)
            offset = record.offset
            if label is None:
                label = len(offsets)
                self.ids.append(record.item_id)
                offsets.append(offset)
                label_of[record.item_id] = label
            elif offset > offsets[label]:
                before.setdefault(label, offsets[label])
                offsets[label] = offset
            else:
                continue
            chosen[label] = at
        return chosen

    def undo(self) -> None:
        """Take the last `newer` back: its records were not written, and must not count as old next time."""
        for item_id in self.ids[self._known :]:
            del self.label_of[item_id]
        del self.ids[self._known :], self.offsets[self._known :]
        for label, offset in self._before.items():
            if label < self._known:
                self.offsets[label] = offset
