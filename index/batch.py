"""One batch of changes, written: rows first, then who stands where, then the State that counts them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from eddyline.records import ItemRecord
from index.placement import Placement
from index.port import Vector
from index.rows import CAPACITY_MIN, NEVER, Ints
from index.state import State


def with_room(state: State, place: Placement, more: int) -> State:
    """The State with room for `more` rows and for every label; what is full is replaced by a copy."""
    known = len(state.row_of)
    if len(state.ids) > known:
        room = max(CAPACITY_MIN, 2 * len(state.ids)) - known
        place.grow(known + room)
        state = state._replace(
            row_of=np.concatenate((state.row_of, np.full(room, -1))),
            names=np.concatenate((state.names, np.full(room, None))),
        )
    if not state.table.room_for(state.used, more):
        table, kept = state.table.compacted(state.used, state.seq, more)
        new_row = np.full(state.table.capacity + 1, -1)
        new_row[kept] = np.arange(len(kept))
        columns = state.columns.compacted(kept, state.used)
        state = place.renumbered(state, new_row)
        state = state._replace(table=table, used=len(kept), row_of=new_row[state.row_of], columns=columns)
    return place.with_room(state, more)


def undone(state: State) -> State:
    """The State without what a batch that broke off had written behind its back."""
    died_at = state.table.died_at
    died_at[(died_at > state.seq) & (died_at < NEVER)] = NEVER
    state.row_of[:] = state.seen(state.row_of)
    return state._replace(columns=state.columns.compacted(np.arange(state.used), state.used))


def applied(
    state: State, place: Placement, records: Sequence[ItemRecord], vectors: Vector, chosen: Mapping[int, int]
) -> State:
    """The State after the records that count.

    vectors: those of the records that carry one; chosen: label -> place of its record among the records
    """
    labels, kept = np.array(list(chosen), np.int64), [records[at] for at in chosen.values()]
    out = labels[:0]
    if len(vectors) < len(records):
        lives = np.array([record.vector is not None for record in kept], bool)
        # The place of a record among those that carry a vector.
        places = np.cumsum([record.vector is not None for record in records]) - 1
        vectors = vectors[places[np.array(list(chosen.values()), np.int64)[lives]]]
        kept = [record for record in kept if record.vector is not None]
        labels, out = labels[lives], labels[~lives]
    elif len(kept) < len(records):
        vectors = vectors[list(chosen.values())]
    return write(with_room(state, place, len(kept)), place, labels, kept, vectors, out)


def write(
    state: State, place: Placement, labels: Ints, records: Sequence[ItemRecord], vectors: Vector, out: Ints
) -> State:
    """The State after some upserts and retires; it has room for them, see `with_room`.

    labels (n,), records, vectors (n, d): of the upserts, each item once; out: labels of the retired
    """
    table, start, n, seq = state.table, state.used, len(labels), state.seq + 1
    before = state.row_of.take(labels)
    if n:
        # What no row ever stood for is named when its first one is written.
        first = labels[before < 0]
        if len(first):
            state.names[first] = [state.ids[label] for label in first.tolist()]
        facts = np.empty((n, 4), np.int64)
        facts[:, 0] = labels
        facts[:, 1] = [record.at_ms for record in records]
        facts[:, 2] = [record.written_us for record in records]
        facts[:, 3] = [record.offset for record in records]
        table.write(start, vectors, facts, before)
        state.columns.append(start, [record.attributes for record in records])
    # What is replaced dies with this State; what was dead already, or never was (-1), stays dead.
    gone = np.concatenate((before, state.row_of[out])) if len(out) else before
    gone = gone[table.died_at[gone] > state.seq]
    table.died_at[gone] = seq
    fresh_count = state.fresh_count
    rows = np.arange(start, start + n)
    if state.graphs:
        fresh_count = place.place(state, labels, vectors, rows)
        if len(out):
            place.leave(out)
    state.row_of[labels] = rows
    return state._replace(
        used=start + n,
        seq=seq,
        live=state.live + n - len(gone),
        fresh_count=fresh_count,
        standing=place.standing(state),
    )
