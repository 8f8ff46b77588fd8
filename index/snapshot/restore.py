"""Between a State and the contents of a snapshot."""

from __future__ import annotations

from operator import itemgetter

import numpy as np

from index.arrays import Ints
from index.snapshot.format import Contents
from index.storage.columns import Columns
from index.storage.state import IndexVersion
from index.storage.vector_table import CAPACITY_MIN, ROOM_SHARE, VectorTable


def export_state(state: IndexVersion, versions: Ints) -> Contents:
    """All that is live in a State, and the versions of what was deleted. versions: label -> its version."""
    table, ids = state.table, state.ids
    rows = table.alive(state.used, state.seq)
    labels = table.labels[rows]
    dead = np.ones(len(versions), bool)
    dead[labels] = False
    gone = np.flatnonzero(dead)
    return Contents(
        ids=[ids[label] for label in (*labels.tolist(), *gone.tolist())],
        vectors=table.gather(rows),
        facts=table.facts[rows, 1:],
        deleted=versions[gone],
        # In the order of their names: the same contents are the same bytes.
        columns=sorted(
            state.columns.compacted(rows, state.used).items(len(rows)), key=itemgetter(0)
        ),
        watermarks=dict(state.watermarks),
    )


def import_state(state: IndexVersion, contents: Contents) -> tuple[IndexVersion, Ints]:
    """(an empty State filled with these contents, the version of each label).

    The vectors stay where they lie, in the mapped file: workers on one machine share them. Raises ValueError
    where an item is there twice.
    """
    live, known = len(contents.vectors), len(contents.ids)
    table = VectorTable(
        max(CAPACITY_MIN, live // ROOM_SHARE), contents.vectors.shape[1], contents.vectors
    )
    table.labels[:live], table.facts[:live, 1:] = np.arange(live), contents.facts
    columns = Columns()
    for key, rows, values in contents.columns:
        columns.put(key, rows, values)
    label_of = dict(zip(contents.ids, range(known), strict=True))
    if len(label_of) != known:
        raise ValueError(f"{known - len(label_of)} items of the snapshot are there twice")
    room = max(CAPACITY_MIN, 2 * known)
    row_of, names = np.full(room, -1), np.full(room, None)
    names[:known] = contents.ids
    row_of[:live] = np.arange(live)
    after = state._replace(
        ids=list(contents.ids),
        label_of=label_of,
        table=table,
        used=live,
        seq=state.seq + 1,
        live=live,
        row_of=row_of,
        names=names,
        watermarks=dict(contents.watermarks),
        columns=columns,
    )
    return after, np.concatenate((contents.facts[:, 2], contents.deleted))
