"""From an IndexVersion to the contents of a snapshot, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from eddyline.schema.item_key import keys_of
from index.arrays import Ints
from index.snapshot.format import Contents
from index.storage.columns import Columns
from index.storage.index_version import IndexVersion
from index.storage.item_offsets import UNKNOWN
from index.storage.key_table import KeyTable
from index.storage.tombstones import LABEL, OFFSET, PARTITION, WRITTEN_US
from index.storage.vector_table import CAPACITY_MIN, ROOM_SHARE, VectorTable


def export_state(
    version: IndexVersion,
    offsets: Ints,
    tombstones: Sequence[Ints] = (),
    floors: Mapping[int, int] | None = None,
) -> Contents:
    """All live items of a version and the offsets of the deleted ones.

    offsets: by label; tombstones, floors: see `index.storage.tombstones`
    """
    table, ids = version.table, version.ids
    rows = table.live_rows(version.used, version.seq)
    labels = table.labels[rows]
    is_deleted = offsets != UNKNOWN  # free labels
    is_deleted[labels] = False
    deleted = np.flatnonzero(is_deleted)
    # Where and when each was written; -1 and 0 where that is not known.
    origins = np.tile(np.array([-1, 0]), (len(offsets), 1))
    for block in tombstones:
        current = block[offsets[block[:, LABEL]] == block[:, OFFSET]]
        origins[current[:, LABEL]] = current[:, [PARTITION, WRITTEN_US]]
    return Contents(
        ids=[ids[label] for label in (*labels.tolist(), *deleted.tolist())],
        vectors=table.gather(rows),
        facts=table.facts[rows, 1:],
        deleted=np.column_stack((offsets[deleted], origins[deleted])),
        floors=dict(floors or {}),
        columns=version.columns.data(rows, version.used),
        watermarks=dict(version.watermarks),
    )


def import_state(version: IndexVersion, contents: Contents) -> tuple[IndexVersion, Ints, Ints]:
    """(the empty version filled with these contents, offset of each label, rows of tombstones).

    The vectors stay in the mapped file, which the workers of a machine share. Raises ValueError if
    an item occurs twice.
    """
    live, known = len(contents.vectors), len(contents.ids)
    table = VectorTable(
        max(CAPACITY_MIN, live // ROOM_SHARE), contents.vectors.shape[1], contents.vectors
    )
    table.labels[:live] = np.arange(live)
    table.facts[:live, 1:] = contents.facts
    label_of = dict(zip(contents.ids, range(known), strict=True))
    if len(label_of) != known:
        raise ValueError(f"{known - len(label_of)} items of the snapshot occur twice")
    room = max(CAPACITY_MIN, 2 * known)
    row_of, names = np.full(room, -1), np.full(room, None)
    names[:known] = contents.ids
    row_of[:live] = np.arange(live)
    keys = KeyTable(room, live)
    keys.insert(np.arange(live), keys_of(contents.ids[:live]))
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
        columns=Columns(*contents.columns, text_names=version.columns.text_names),
        keys=keys,
    )
    offsets = np.concatenate((contents.facts[:, 2], contents.deleted[:, 0]))
    return filled, offsets, np.column_stack((np.arange(live, known), contents.deleted))
