"""The entries that visits add to co-visitation rows, summed up with numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import numpy.typing as npt

from eddyline.schema.co_visits import ENTRIES, ENTRY_BYTES, Visit
from eddyline.schema.item_key import cached_keys_of
from eddyline.schema.partitioning import item_slot

Ints = npt.NDArray[np.int64]


@dataclass(slots=True)
class SlotRows:
    """What is appended to the rows of one item slot: item id -> entries."""

    after: dict[str, bytes] = field(default_factory=dict)
    before: dict[str, bytes] = field(default_factory=dict)


NO_ROWS = SlotRows()


def rows_of(visits: Sequence[Visit], done: Mapping[str, int], items: int) -> dict[str, SlotRows]:
    """What these visits append, by item slot; equal keys of a row are summed where they came first.

    done:  of every item slot, the offset up to which it has the visits already
    items: a visit counts at so many older items
    """
    older = [visit[2][:items] for visit in visits]
    sizes = np.array([len(of_visit) for of_visit in older], np.int64)
    if not sizes.sum():
        return {}
    # Every item has a number, in the order in which they are named.
    numbers: dict[str, int] = {}
    for _, item_id, of_visit in visits:
        numbers.setdefault(item_id, len(numbers))
        for other in of_visit:
            numbers.setdefault(other, len(numbers))
    ids, number_of = [*numbers], numbers.__getitem__
    offsets = np.repeat(np.array([visit[0] for visit in visits], np.int64), sizes)
    clicked = np.repeat(np.array([number_of(visit[1]) for visit in visits], np.int64), sizes)
    before = np.array([*map(number_of, chain.from_iterable(older))], np.int64)
    distances = np.arange(1, len(before) + 1) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    pairs = clicked != before
    offsets, clicked, before, distances = (
        column[pairs] for column in (offsets, clicked, before, distances)
    )
    slots = sorted(done)
    slot_of = np.zeros(len(ids), np.int64)
    if len(slots) > 1:
        slot_of[:] = [slots.index(item_slot(one, len(slots))) for one in ids]
    done_of = np.array([done[slot] for slot in slots], np.int64)[slot_of]
    keys = cached_keys_of(ids)
    found = {slot: SlotRows() for slot in slots}
    for kind, rows, others in (("after", before, clicked), ("before", clicked, before)):
        new = offsets > done_of[rows]
        for row, entries in _summed(rows[new], others[new], distances[new], keys):
            getattr(found[slots[slot_of[row]]], kind)[ids[row]] = entries
    return found


def _summed(
    rows: Ints, others: Ints, distances: Ints, keys: npt.NDArray[np.uint64]
) -> list[tuple[int, bytes]]:
    """(row, its entries), where each pair has one; rows, others: numbers of items."""
    if not len(rows):
        return []
    pair, at = np.unique(rows * len(keys) + others, return_inverse=True)
    first = np.full(len(pair), len(rows))
    np.minimum.at(first, at, np.arange(len(rows)))
    entries = np.zeros(len(pair), ENTRIES)
    entries["key"] = keys[pair % len(keys)]
    entries["milli"] = np.bincount(at, np.rint(1_000 / distances))
    entries["next"] = np.bincount(at, distances == 1)
    of_pair = pair // len(keys)
    order = np.lexsort((first, of_pair))
    of_pair, data = of_pair[order], entries[order].tobytes()
    starts = np.flatnonzero(np.diff(of_pair, prepend=-1))
    ends = [*starts[1:].tolist(), len(of_pair)]
    return [
        (row, data[ENTRY_BYTES * start : ENTRY_BYTES * end])
        for row, start, end in zip(of_pair[starts].tolist(), starts.tolist(), ends, strict=True)
    ]
