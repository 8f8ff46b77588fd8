"""Named items as hits: by id, by key, and the first ones of an order that the caller knows."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from index import port
from index.arrays import Floats, Ints, Keys
from index.filters import Filter
from index.hits import HitColumns
from index.port import Hit, Term, hit_of
from index.ranked import RankedItems
from index.search import filtered
from index.storage.index_version import IndexVersion
from index.storage.key_table import KeyTable


def describe(
    version: IndexVersion, item_ids: Sequence[str], filters: Filter | None
) -> list[Hit | None]:
    """As `IndexReader.describe`."""
    rows = version.rows_of(item_ids)
    if filters is not None:
        rows = filtered.passing_rows(version, rows, filters)
    facts = version.table.facts[rows, 1:].tolist()
    return [
        None if row < 0 else hit_of((item_id, 0.0, *of_item))
        for item_id, row, of_item in zip(item_ids, rows.tolist(), facts, strict=True)
    ]


def terms_of(
    version: IndexVersion, item_ids: Sequence[str], names: Collection[str]
) -> list[frozenset[Term]]:
    """As `IndexReader.terms_of`."""
    rows = version.rows_of(item_ids)
    live = np.flatnonzero(rows >= 0)
    found = [frozenset[Term]()] * len(rows)
    for at, of_row in zip(live.tolist(), version.columns.terms(rows[live], names), strict=True):
        found[at] = of_row
    return found


def find_keys(version: IndexVersion, keys: Keys, filters: Filter | None) -> list[Hit | None]:
    """As `IndexReader.find_keys`."""
    rows = rows_of_keys(version, keys, filters)
    found = np.flatnonzero(rows >= 0)
    facts = version.table.facts[rows[found]]
    hits: list[Hit | None] = [None] * len(rows)
    columns = zip(
        found.tolist(), version.names[facts[:, 0]].tolist(), facts[:, 1:].tolist(), strict=True
    )
    for at, item_id, of_item in columns:
        hits[at] = hit_of((item_id, 0.0, *of_item))
    return hits


def live_ids(version: IndexVersion, keys: Keys) -> list[str]:
    """As `IndexReader.live_ids`."""
    rows = rows_of_keys(version, keys, None)
    found: list[str] = version.names[version.table.labels[rows[rows >= 0]]].tolist()
    return found


def rows_of_keys(version: IndexVersion, keys: Keys, filters: Filter | None) -> Ints:
    """int64 (n,): the row of each key, -1 where no item with it is live and passes the filter."""
    return _passing(version, version.keys.find(keys), filters)


def first_listed(
    version: IndexVersion,
    ranked: RankedItems,
    k: int,
    exclude: Collection[str],
    filters: Filter | None,
) -> Sequence[Hit]:
    """As `IndexReader.first_listed`."""
    parts, found = list[Ints](), 0
    labels = _labels_of(version.keys, ranked)
    start, size = 0, k + port.PIECE_MIN
    while found < k and start < len(ranked):
        rows = _passing(version, labels[start : start + size], filters)
        at = (rows >= 0).nonzero()[0]
        if exclude:
            names = version.names[version.table.labels[rows[at]]].tolist()
            at = at[np.array([name not in exclude for name in names], bool)]
        parts.append(np.stack((rows[at], start + at)))
        found += len(at)
        start, size = start + size, 2 * size
    if not found or k <= 0:
        return []
    rows, at = np.concatenate(parts, axis=1)[:, :k]
    facts = version.table.facts.take(rows, axis=0)
    return HitColumns(version.names, facts[:, 0], facts[:, 1:], ranked.scores[at])


def first_by_key(
    version: IndexVersion, keys: Keys, scores: Floats, k: int, filters: Filter | None
) -> Sequence[Hit]:
    """As `IndexReader.first_by_key`."""
    size = k + port.PIECE_MIN
    while True:
        places = np.arange(len(keys))
        if size < len(keys):
            # With all of the last score: only the ids say which of them come first.
            places = np.flatnonzero(scores >= np.partition(scores, -size)[-size])
        rows = rows_of_keys(version, keys[places], filters)
        live = rows >= 0
        if size >= len(keys) or np.count_nonzero(live) >= k:
            break
        size *= 2
    if k <= 0 or not live.any():
        return []
    rows, values = rows[live], scores[places[live]]
    order = np.argsort(-values, kind="stable")
    falling = values[order]
    if (falling[1:] == falling[:-1]).any():
        names = version.names[version.table.labels[rows]].tolist()
        scored = zip((-values).tolist(), names, range(len(names)), strict=True)
        order = np.array([at for _, _, at in sorted(scored)], np.int64)
    order = order[:k]
    facts = version.table.facts.take(rows[order], axis=0)
    return HitColumns(version.names, facts[:, 0], facts[:, 1:], values[order])


def _labels_of(table: KeyTable, ranked: RankedItems) -> Ints:
    """int64 (n,): the label of each item, -1 for none; looked up once while no item comes or goes.

    The list keeps them with what they are of, as one.
    """
    changes = table.changes
    of, at, labels = ranked.looked_up
    if labels is None or of is not table or at != changes:
        labels = table.find(ranked.keys)
        ranked.looked_up = table, changes, labels
    return labels


def _passing(version: IndexVersion, labels: Ints, filters: Filter | None) -> Ints:
    rows = version.rows_at(labels)
    return rows if filters is None else filtered.passing_rows(version, rows, filters)
