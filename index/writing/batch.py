"""Writes one batch: rows first, then their placement, then the IndexVersion that counts them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from eddyline.schema.item_key import keys_of
from eddyline.schema.item_record import ItemRecord
from index.arrays import Ints, Vector
from index.storage.index_version import IndexVersion
from index.storage.vector_table import CAPACITY_MIN, NEVER
from index.writing.placement import Placement

# Batches of up to this many records are written without a yield, which costs about 60 µs of CPU.
YIELD_ABOVE = 64
# Just long enough for a waiting reader to get the interpreter lock: a thread that releases it and
# requests it again at once wins before the reader has woken up.
YIELD_S = 1e-6


def yield_gil(records: int) -> None:
    """Let readers have the interpreter lock in the middle of a large batch."""
    if records > YIELD_ABOVE:
        time.sleep(YIELD_S)


class Changes(NamedTuple):
    """The records of a batch that take effect, one per item.

    labels (n,), stamps (n, 4) as `records.stamps_of`, vectors (n, d), attributes: of the upserts
    retired: labels of the deletes; retired_stamps (m, 4): theirs
    """

    labels: Ints
    stamps: Ints
    vectors: Vector
    attributes: Sequence[Mapping[str, Any]]
    retired: Ints
    retired_stamps: Ints


def select_changes(
    records: Sequence[ItemRecord], vectors: Vector, stamps: Ints, labels: Ints, positions: Ints
) -> Changes:
    """The changes of the records that take effect.

    vectors: of the records that carry one; stamps: of all records
    labels:  of the records at `positions`, which take effect
    """
    retired, retired_stamps = labels[:0], stamps[:0]
    if len(vectors) < len(records):
        has_vector = np.array([record.vector is not None for record in records], bool)
        upserts = has_vector.take(positions)
        retired, retired_stamps = labels[~upserts], stamps.take(positions[~upserts], axis=0)
        labels, positions = labels[upserts], positions[upserts]
        # Position among all records -> position among those with a vector.
        vectors = vectors.take((np.cumsum(has_vector) - 1).take(positions), axis=0)
    elif len(positions) < len(records):
        vectors = vectors.take(positions, axis=0)
    if len(positions) < len(records):
        stamps, records = stamps.take(positions, axis=0), [records[at] for at in positions.tolist()]
    attributes = [record.attributes for record in records]
    return Changes(labels, stamps, vectors, attributes, retired, retired_stamps)


def apply_changes(version: IndexVersion, placement: Placement, changes: Changes) -> IndexVersion:
    """The version after these upserts and retires."""
    return write(_reserve(version, placement, len(changes.labels)), placement, changes)


def _reserve(version: IndexVersion, placement: Placement, more: int) -> IndexVersion:
    """The version with room for `more` rows and for every label; full arrays become copies."""
    known = len(version.row_of)
    if len(version.ids) > known:
        room = max(CAPACITY_MIN, 2 * len(version.ids)) - known
        placement.grow(known + room)
        version = version._replace(
            row_of=np.concatenate((version.row_of, np.full(room, -1))),
            names=np.concatenate((version.names, np.full(room, None))),
        )
    # The labels without a row yet are at most all of them.
    version = version._replace(keys=version.keys.with_room(len(version.row_of), more))
    if not version.table.has_room(version.used, more):
        table, kept = version.table.compact(version.used, version.seq, more)
        new_row = np.full(version.table.capacity + 1, -1)
        new_row[kept] = np.arange(len(kept))
        version = placement.renumber_rows(version, new_row)._replace(
            table=table,
            used=len(kept),
            row_of=new_row[version.row_of],
            columns=version.columns.compact(kept, version.used),
        )
    return placement.reserve(version, more)


def write(version: IndexVersion, placement: Placement, changes: Changes) -> IndexVersion:
    """As `apply_changes`, given enough room."""
    labels, stamps, vectors, attributes, retired, _ = changes
    table, start, n, seq = version.table, version.used, len(labels), version.seq + 1
    before = version.row_of[labels]
    if n:
        first = labels[before < 0]
        if len(first):
            version.names[first] = names = [version.ids[label] for label in first.tolist()]
            version.keys.insert(first, keys_of(names))
        table.write(start, vectors, labels, stamps, before)
        version.columns.append(start, attributes)
    # Replaced rows die with this version. Rows that were dead already, or -1, stay dead.
    died = np.concatenate((before, version.row_of[retired])) if len(retired) else before
    died = died[table.died_at[died] > version.seq]
    table.died_at[died] = seq
    yield_gil(n + len(retired))
    fresh_count = version.fresh_count
    rows = np.arange(start, start + n)
    if version.segments:
        fresh_count = placement.place(version, labels, vectors, rows)
        if len(retired):
            placement.remove(retired)
    version.row_of[labels] = rows
    return version._replace(
        used=start + n,
        seq=seq,
        live=version.live + n - len(died),
        fresh_count=fresh_count,
        live_entries=placement.live_entries(version),
    )


def rollback_on_error(version: IndexVersion) -> IndexVersion:
    """The version without what a failed batch has written into its arrays.

    The rows of the batch stay dead and are never written again: a reader that has met one still
    follows it to the row that it replaced.
    """
    table = version.table
    died_at = table.died_at
    died_at[(died_at > version.seq) & (died_at < NEVER)] = NEVER
    version.row_of[:] = version.seen(version.row_of)
    used = max(version.used, table.written)
    died_at[version.used : used] = 0
    return version._replace(used=used)
