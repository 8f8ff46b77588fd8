"""Where each item stands, in the graph or in the fresh buffer: the writer's side of it.

An item that is new, or turned further than the gate since the graph was built, moves to the fresh buffer;
one that turned less stays where the graph has it.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from index.port import Vector
from index.rows import CAPACITY_MIN, NEVER, Ints, Rows
from index.state import Main, State

# An item that turned less than this since the graph was built is still found through its old place:
# measured, recall never fell below a fresh build's.
GATE_COSINE = math.cos(math.radians(8.0))


class Placement:
    """What only the writer knows of fresh buffer and graph. Thread rule: under the write lock.

    fresh_at: label -> its row in the fresh buffer, -1 is none
    built_at: label -> its row in `built`, the vectors that the graph was built with, -1 is none
    """

    def __init__(self, dimension: int) -> None:
        """Nothing is anywhere."""
        self.fresh_at: Ints = np.full(CAPACITY_MIN, -1)
        self.built_at: Ints = np.full(CAPACITY_MIN, -1)
        self.built: Vector = np.empty((0, dimension), np.float32)

    def grow(self, room: int) -> None:
        """Make room for so many more labels."""
        self.fresh_at = np.concatenate((self.fresh_at, np.full(room, -1)))
        self.built_at = np.concatenate((self.built_at, np.full(room, -1)))

    def with_room(self, state: State, more: int) -> State:
        """The State with room for `more` fresh rows; a full buffer is replaced by a copy."""
        if state.main is None or state.fresh.room_for(state.fresh_count, more):
            return state
        fresh, kept = state.fresh.compacted(state.fresh_count, state.seq, more)
        self.fresh_at[fresh.labels[: len(kept)]] = np.arange(len(kept))
        return replace(state, fresh=fresh, fresh_count=len(kept))

    def freshen(self, state: State, labels: Ints, new: Vector, before: Ints, seq: int) -> int:
        """Put into the fresh buffer what the graph no longer stands for; returns the buffer's new count."""
        fresh, count = state.fresh, state.fresh_count
        same = np.zeros(len(labels), bool)
        by_main = (self.built_at[labels] >= 0) & (state.fresh_since[labels] == NEVER)
        if by_main.any():
            built = self.built[self.built_at[labels[by_main]]]
            same[by_main] = np.einsum("ij,ij->i", built, new[by_main]) >= GATE_COSINE
        in_fresh = self.fresh_at[labels] >= 0
        if in_fresh.any():
            same[in_fresh] = (state.table.vectors[before[in_fresh]] == new[in_fresh]).all(axis=1)
        moving = labels[~same]
        self.leave(fresh, moving, seq)
        end = count + len(moving)
        fresh.vectors[count:end] = new[~same]
        fresh.labels[count:end] = moving
        self.fresh_at[moving] = np.arange(count, end)
        # The first time only: a reader of an older State, whose fresh buffer has the item already, must not
        # take it from the graph as well.
        state.fresh_since[moving[state.fresh_since[moving] == NEVER]] = seq
        return end

    def leave(self, fresh: Rows, labels: Ints, seq: int) -> None:
        """Take labels out of the fresh buffer."""
        places = self.fresh_at[labels]
        fresh.died_at[places[places >= 0]] = seq
        self.fresh_at[labels] = -1

    def stale(self, state: State, labels: Ints) -> int:
        """How many of these labels have a place in the graph that no longer counts."""
        gone = (state.row_of[labels] < 0) | (state.fresh_since[labels] < NEVER)
        return int(np.count_nonzero((self.built_at[labels] >= 0) & gone))

    def adopt(self, state: State, main: Main | None, labels: Ints, vectors: Vector, offsets: Ints) -> State:
        """The State with a new graph; what changed while it was built becomes fresh.

        labels (n,), vectors (n, d), offsets (n,): what the graph was built from; None lets the old one go
        """
        seq, room = state.seq + 1, len(state.row_of)
        built_at = np.full(room, -1)
        moved = np.zeros(room, bool)
        if main is not None:
            built_at[labels] = np.arange(len(labels))
            moved[:] = (state.row_of >= 0) & (built_at < 0)
            rows = state.row_of[labels]
            changed = (rows >= 0) & (state.table.offsets[rows] != offsets)
            now = state.table.vectors[rows[changed]]
            turned = np.einsum("ij,ij->i", now, vectors[changed]) < GATE_COSINE
            moved[labels[changed][turned]] = True
        fresh_labels = np.flatnonzero(moved)
        n = len(fresh_labels)
        fresh = Rows(max(CAPACITY_MIN, 2 * n) if main else 1, state.table.vectors.shape[1])
        fresh.vectors[:n] = state.table.vectors[state.row_of[fresh_labels]]
        fresh.labels[:n] = fresh_labels
        self.built_at = built_at
        self.built = vectors if main is not None else vectors[:0].copy()
        self.fresh_at = np.full(room, -1)
        self.fresh_at[fresh_labels] = np.arange(n)
        fresh_since = np.full(room, NEVER)
        fresh_since[fresh_labels] = seq
        stale = int(np.count_nonzero((built_at >= 0) & ((state.row_of < 0) | moved)))
        return replace(
            state, seq=seq, main=main, fresh=fresh, fresh_count=n, fresh_since=fresh_since, stale=stale
        )
