"""The newest items: a bounded list that follows the versions, so that no call sorts all items.

The list holds the live items that come first, by time and id. The next version costs the rows
written since: dead entries go, new rows that rank are inserted. Only when deletes have used up the
list is it selected again from all rows.
"""

from __future__ import annotations

import heapq
import threading
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import compress, islice
from typing import NamedTuple

import numpy as np

from index.arrays import Ints, Mask
from index.filters import Filter
from index.hits import HitColumns
from index.port import Hit
from index.search import filtered
from index.storage.index_version import IndexVersion

# Entries of the list, 3 MB. A filter that passes 1 item in 100 finds 160 items here.
KEPT = 16_000
# The list is cut to KEPT entries when it has grown to this many.
KEPT_MAX = 20_000
# With more rows since the last version, one new selection is cheaper than insertions.
NEW_ROWS_MAX = 20_000
# Entries that a filter looks at first, and the factor of the next looks.
LOOK_FIRST, LOOK_FACTOR = 512, 4
# Ids that are read at a time: readers get the interpreter lock in between.
NAMES_AT_ONCE = 4_096

# (-at_ms, item id): ascending is newest first, equal times by id.
Key = tuple[int, str]


class Newest(NamedTuple):
    """The first live items of one version.

    keys: ascending; rows: int64 (n,), of the same items
    complete: whether these are all live items; if not, no other item comes before the last one
    """

    version: IndexVersion
    keys: list[Key]
    rows: Ints
    complete: bool


class NewestItems:
    """The list of a live index. Thread rule: any thread; one of them brings it up to date."""

    def __init__(self, current: Callable[[], IndexVersion]) -> None:
        """current: the version that readers read now."""
        self._current = current
        self._lock = threading.Lock()
        self._newest: Newest | None = None

    def find(self, k: int, excluded: Collection[str], filters: Filter | None) -> Sequence[Hit]:
        """The k live items that pass and are not excluded, newest first, equal times by id."""
        found = self._up_to_date(refill=False)
        if k <= 0:
            return []
        chosen, enough = _choose(found, k, excluded, filters)
        if not enough and filters is None and k + len(excluded) <= KEPT // 2:
            found = self._up_to_date(refill=True)
            chosen, enough = _choose(found, k, excluded, filters)
        if not enough:
            version = found.version
            mask = None if filters is None else filtered.passing_mask(version, filters)
            unwanted = frozenset(excluded) | (filters.deny if filters else frozenset())
            rows = first_rows(version, k + len(unwanted), mask)[1]
            names = version.names[version.table.labels[rows]].tolist()
            chosen = [
                r for r, name in zip(rows.tolist(), names, strict=True) if name not in unwanted
            ]
            chosen = chosen[:k]
        return _hits(found.version, np.array(chosen, np.int64))

    def _up_to_date(self, refill: bool) -> Newest:
        """The list for the current version. refill: it has become too short."""
        with self._lock:
            version, newest = self._current(), self._newest
            if newest is not None and newest.version is not version:
                newest = _follow(newest, version)
            if newest is None or (refill and not newest.complete and len(newest.keys) < KEPT // 2):
                keys, rows = first_rows(version, KEPT, None)
                newest = Newest(version, keys, rows, len(keys) == version.live)
            self._newest = newest
            return newest


def first_rows(version: IndexVersion, need: int, mask: Mask | None) -> tuple[list[Key], Ints]:
    """Keys and rows of the `need` newest live items, all if fewer. O(n).

    mask: bool (count,), live rows to consider; None: all live rows
    """
    table = version.table
    if mask is None:
        rows = table.live_rows(version.used, version.seq)
    else:
        rows = np.flatnonzero(mask)
    times = table.at_ms[rows]
    if need >= len(rows):
        newer, equal, wanted = rows, rows[:0], 0
    else:
        cut = np.partition(times, len(rows) - need)[len(rows) - need]
        newer, equal = rows[times > cut], rows[times == cut]
        wanted = need - len(newer)
    found = list(zip(_names(version, newer), newer.tolist(), strict=True))
    if wanted:
        # Of many equal times only the first ids are ordered.
        names = list(_names(version, equal))
        last = heapq.nsmallest(wanted, names)[-1]
        found += [pair for pair in zip(names, equal.tolist(), strict=True) if pair[0] <= last]
    at_ms = table.at_ms
    ranked = sorted((-int(at_ms[row]), name, row) for name, row in found)
    return [(at, name) for at, name, _ in ranked], np.array([row for *_, row in ranked], np.int64)


def _names(version: IndexVersion, rows: Ints) -> Iterator[str]:
    for at in range(0, len(rows), NAMES_AT_ONCE):
        labels = version.table.labels[rows[at : at + NAMES_AT_ONCE]]
        yield from version.names.take(labels).tolist()


def _follow(newest: Newest, version: IndexVersion) -> Newest | None:
    """The list for a later version; None if it has to be selected again."""
    before, table = newest.version, version.table
    # At a compaction the table gets other rows, in the same order.
    written = table.dropped + version.used - before.table.dropped - before.used
    if not 0 <= written <= NEW_ROWS_MAX:
        return None
    keys, rows = newest.keys, newest.rows
    if table is not before.table:
        rows = version.rows_of([name for _, name in keys])
        # A row with another time is a new one: its key comes in below.
        times = np.fromiter((-at for at, _ in keys), np.int64, len(keys))
        rows = np.where(table.at_ms[rows] == times, rows, -1)
    alive = table.died_at.take(rows) > version.seq
    dead = len(rows) - int(np.count_nonzero(alive))
    keys = list(compress(keys, alive.tolist())) if dead else keys.copy()
    rows = rows[alive]
    first = max(0, version.used - written)
    new = first + np.flatnonzero(table.died_at[first : version.used] > version.seq)
    if not newest.complete and len(new):
        if not keys:
            return None
        # The last key that was kept bounds what may be missing.
        new = new[table.at_ms[new] >= -newest.keys[-1][0]]
    keys, rows = _insert(newest, version, keys, rows, new)
    complete = newest.complete
    if len(keys) > KEPT_MAX:
        keys, rows, complete = keys[:KEPT], rows[:KEPT], False
    return Newest(version, keys, rows, complete)


def _insert(
    newest: Newest, version: IndexVersion, keys: list[Key], rows: Ints, new: Ints
) -> tuple[list[Key], Ints]:
    """Keys and rows with these new live rows, as far as they rank."""
    last = newest.keys[-1] if newest.keys else (0, "")
    times = version.table.at_ms[new].tolist()
    more = sorted(
        (-at_ms, name, row)
        for at_ms, name, row in zip(times, _names(version, new), new.tolist(), strict=True)
    )
    places, added = list[int](), list[int]()
    old, merged, at = keys, list[Key](), 0
    for at_ms, name, row in more:
        key = (at_ms, name)
        if not newest.complete and key > last:
            break
        place = bisect_left(old, key, at)
        if place < len(old) and old[place] == key:
            continue  # known already, after a compaction
        merged += old[at:place]
        merged.append(key)
        at = place
        places.append(place)
        added.append(row)
    merged += old[at:]
    return merged, np.insert(rows, places, added) if places else rows


def _choose(
    newest: Newest, k: int, excluded: Collection[str], filters: Filter | None
) -> tuple[list[int], bool]:
    """(rows of the first k that pass, whether no other item can come before them)."""
    keys, version = newest.keys, newest.version
    if filters is None:
        places = (n for n, (_, name) in enumerate(keys) if name not in excluded)
        chosen = newest.rows[list(islice(places, k))].tolist() if keys else []
        return chosen, len(chosen) == k or newest.complete
    if filters.allow is not None and not newest.complete:
        return [], False  # the mask finds the few rows at once
    chosen, at, look = [], 0, LOOK_FIRST
    while at < len(keys) and len(chosen) < k:
        rows = filtered.passing_rows(version, newest.rows[at : at + look], filters)
        for place in np.flatnonzero(rows >= 0).tolist():
            if keys[at + place][1] not in excluded:
                chosen.append(int(rows[place]))
        at, look = at + look, look * LOOK_FACTOR
    return chosen[:k], len(chosen) >= k or newest.complete


def _hits(version: IndexVersion, rows: Ints) -> HitColumns:
    """The hits of these rows, with score 0.0."""
    facts = version.table.facts.take(rows, axis=0)
    return HitColumns(version.names, facts[:, 0], facts[:, 1:], np.zeros(len(rows)))
