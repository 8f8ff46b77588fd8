"""From an IndexVersion to the contents of a snapshot, and back."""

from __future__ import annotations

from operator import itemgetter

import numpy as np

from index.arrays import Ints
from index.snapshot.format import Contents
from index.storage.columns import Columns
from index.storage.index_version import IndexVersion
from index.storage.vector_table import CAPACITY_MIN, ROOM_SHARE, VectorTable


def export_state(version: IndexVersion, offsets: Ints) -> Contents:
    """All live items of a version and the offsets of the deleted ones. offsets: by label."""
    table, ids = version.table, version.ids
    rows = table.live_rows(version.used, version.seq)
    labels = table.labels[rows]
    is_deleted = np.ones(len(offsets), bool)
    is_deleted[labels] = False
    deleted = np.flatnonzero(is_deleted)
    columns = version.columns.compact(rows, version.used).items(len(rows))
    return Contents(
        ids=[ids[label] for label in (*labels.tolist(), *deleted.tolist())],
        vectors=table.gather(rows),
        facts=table.facts[rows, 1:],
        deleted=offsets[deleted],
        # Sorted, so that the same contents give the same bytes.
        columns=sorted(columns, key=itemgetter(0)),
        watermarks=dict(version.watermarks),
    )


def import_state(version: IndexVersion, contents: Contents) -> tuple[IndexVersion, Ints]:
    """(the empty version filled with these contents, offset of each label).

    The vectors stay in the mapped file, which the workers of a machine share. Raises ValueError if
    an item occurs twice.
    """
    live, known = len(contents.vectors), len(contents.ids)
    table = VectorTable(
        max(CAPACITY_MIN, live // ROOM_SHARE), contents.vectors.shape[1], contents.vectors
    )
    table.labels[:live] = np.arange(live)
    table.facts[:live, 1:] = contents.facts
    columns = Columns()
    for key, rows, values in contents.columns:
        columns.put(key, rows, values)
    label_of = dict(zip(contents.ids, range(known), strict=True))
    if len(label_of) != known:
        raise ValueError(f"{known - len(label_of)} items of the snapshot occur twice")
    room = max(CAPACITY_MIN, 2 * known)
    row_of, names = np.full(room, -1), np.full(room, None)
    names[:known] = contents.ids
    row_of[:live] = np.arange(live)
    filled = version._replace(
        ids=list(contents.ids),
        label_of=label_of,
        table=table,
        used=live,
        seq=version.seq + 1,
        live=live,
        row_of=row_of,
        names=names,
        watermarks=dict(contents.watermarks),
        columns=columns,
    )
    return filled, np.concatenate((contents.facts[:, 2], contents.deleted))
