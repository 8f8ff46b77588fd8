"""One batch of changes, written: rows first, then who stands where, then the State that counts them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from eddyline.schema.item_record import ItemRecord
from index.arrays import Ints, Vector
from index.storage.state import IndexVersion
from index.storage.vector_table import CAPACITY_MIN, NEVER
from index.writing.placement import Placement

# Up to so many records a batch is written in one go: giving way costs some 60 µs of CPU each time.
AT_ONCE = 64
# Just long enough that a reader who waits for the interpreter gets it: letting go of it and asking for it
# again at once wins it back before he has woken up.
GIVE_WAY_S = 1e-6


def yield_gil() -> None:
    """Let readers have the interpreter before the writer goes on."""
    time.sleep(GIVE_WAY_S)


def without_yielding() -> None:
    """Give no way."""


def with_room(state: IndexVersion, place: Placement, more: int) -> IndexVersion:
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
        state = state._replace(
            table=table, used=len(kept), row_of=new_row[state.row_of], columns=columns
        )
    return place.with_room(state, more)


def rollback_on_error(state: IndexVersion) -> IndexVersion:
    """The State without what a batch that broke off had written behind its back."""
    died_at = state.table.died_at
    died_at[(died_at > state.seq) & (died_at < NEVER)] = NEVER
    state.row_of[:] = state.seen(state.row_of)
    return state._replace(columns=state.columns.compacted(np.arange(state.used), state.used))


class Changes(NamedTuple):
    """What of a batch counts, each item once.

    labels (n,), stamps (n, 4) as of `port.stamps_of`, vectors (n, d), attributes: of the upserts
    out: labels of the retired
    """

    labels: Ints
    stamps: Ints
    vectors: Vector
    attributes: Sequence[Mapping[str, Any]]
    out: Ints


def chosen(
    records: Sequence[ItemRecord], vectors: Vector, stamps: Ints, labels: Ints, places: Ints
) -> Changes:
    """The changes of the records that count.

    vectors: those of the records that carry one; stamps: of all; labels: of the records at `places`
    """
    out = labels[:0]
    if len(vectors) < len(records):
        carries = np.array([record.vector is not None for record in records], bool)
        lives = carries.take(places)
        # The place of a record among those that carry a vector.
        vectors = vectors.take((np.cumsum(carries) - 1).take(places[lives]), axis=0)
        out, labels, places = labels[~lives], labels[lives], places[lives]
    elif len(places) < len(records):
        vectors = vectors.take(places, axis=0)
    if len(places) < len(records):
        stamps, records = stamps.take(places, axis=0), [records[at] for at in places.tolist()]
    return Changes(labels, stamps, vectors, [record.attributes for record in records], out)


def apply_changes(
    state: IndexVersion, place: Placement, changes: Changes, yield_gil: Callable[[], None]
) -> IndexVersion:
    """The State after some upserts and retires. yield_gil: is called between its parts."""
    return write(with_room(state, place, len(changes.labels)), place, changes, yield_gil)


def write(
    state: IndexVersion, place: Placement, changes: Changes, yield_gil: Callable[[], None]
) -> IndexVersion:
    """`applied`, where there is room."""
    labels, stamps, vectors, attributes, out = changes
    table, start, n, seq = state.table, state.used, len(labels), state.seq + 1
    before = state.row_of[labels]
    if n:
        # What no row ever stood for is named when its first one is written.
        first = labels[before < 0]
        if len(first):
            state.names[first] = [state.ids[label] for label in first.tolist()]
        table.write(start, vectors, labels, stamps, before)
        state.columns.append(start, attributes)
    # What is replaced dies with this State; what was dead already, or never was (-1), stays dead.
    gone = np.concatenate((before, state.row_of[out])) if len(out) else before
    gone = gone[table.died_at[gone] > state.seq]
    table.died_at[gone] = seq
    yield_gil()
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
