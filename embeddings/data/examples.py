"""Clicks as training examples: each event with the history strictly before it.

Events are sorted by (time, user, position). Events of one user at the same millisecond are one
basket: none of them is in the history of another. As in the live path, dislikes are neither targets
nor history, and clicks on items outside the catalogue are ignored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from eddyline.schema.events import Click, Item
from embeddings.towers.numerics import Ints


@dataclass(frozen=True)
class TrainingData:
    """The input of a training.

    items:    the current catalogue, with unavailable items, without deleted ones
    profiles: user id -> attributes
    clicks:   in log order, which breaks ties of time
    versions: item id -> (partition, offset) of its record in `items`; empty if from a file
    cut:      partition of `items` -> last offset contained, -1 for none; empty if from a file
    rejected: reason -> number of records that were skipped
    """

    items: list[Item]
    profiles: Mapping[str, Mapping[str, object]]
    clicks: list[Click]
    versions: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    cut: Mapping[str, int] = field(default_factory=dict)
    rejected: Mapping[str, int] = field(default_factory=Counter)

    @cached_property
    def catalogue(self) -> list[Item]:
        """The items by id, independent of the order of reading; of equal ids the last one."""
        latest = {item.item_id: item for item in self.items}
        return [latest[item_id] for item_id in sorted(latest)]

    @cached_property
    def examples(self) -> Examples:
        """The examples of all clicks; targets are rows of `catalogue`."""
        return make_examples(
            self.clicks, {item.item_id: row for row, item in enumerate(self.catalogue)}
        )


@dataclass(frozen=True, slots=True)
class Examples:
    """Events in time order. All arrays are int64 (n,).

    users, targets, at_ms: the event; users are rows of `user_ids`, targets rows of the catalogue
    starts, ends:          the event's history is `log[starts:ends]`, oldest first
    log:                   the items of all events, user by user, in time order
    keys:                  a key of each event that is equal in every replay of the same data
    """

    user_ids: list[str]
    users: Ints
    targets: Ints
    at_ms: Ints
    starts: Ints
    ends: Ints
    log: Ints
    keys: list[str]

    def __len__(self) -> int:
        """The number of events."""
        return len(self.targets)

    def histories(self, events: Ints, length: int) -> tuple[Ints, Ints]:
        """The newest `length` items before each event, newest first.

        Returns (rows int64 (n, length), -1 beyond the history; counts int64 (n,)).
        """
        positions = self.ends[events, None] - 1 - np.arange(length)
        inside = positions >= self.starts[events, None]
        rows = np.where(inside, self.log[np.maximum(positions, 0)] if len(self.log) else -1, -1)
        return rows, np.minimum(self.ends[events] - self.starts[events], length)


def make_examples(clicks: list[Click], rows: Mapping[str, int]) -> Examples:
    """The examples of all clicks. rows: item id -> its row in the catalogue."""
    kept = [(i, c) for i, c in enumerate(clicks) if c.kind != "dislike" and c.item_id in rows]
    user_ids = sorted({c.user_id for _, c in kept})
    user_rows = {u: n for n, u in enumerate(user_ids)}
    users = np.fromiter((user_rows[c.user_id] for _, c in kept), np.int64, len(kept))
    targets = np.fromiter((rows[c.item_id] for _, c in kept), np.int64, len(kept))
    at_ms = np.fromiter((c.at_ms for _, c in kept), np.int64, len(kept))
    order = np.lexsort((users, at_ms))  # stable: the position breaks ties
    users, targets, at_ms = users[order], targets[order], at_ms[order]
    keys = [c.event_id or f"{i}" for i, c in (kept[n] for n in order)]

    by_user = np.argsort(users, kind="stable")
    log, sorted_users, sorted_at = targets[by_user], users[by_user], at_ms[by_user]
    positions = np.arange(len(kept))
    new_user = np.diff(sorted_users, prepend=-1) != 0
    new_basket = new_user | (np.diff(sorted_at, prepend=-1) != 0)
    starts, ends = np.empty_like(positions), np.empty_like(positions)
    starts[by_user] = np.maximum.accumulate(np.where(new_user, positions, 0))
    ends[by_user] = np.maximum.accumulate(np.where(new_basket, positions, 0))
    return Examples(user_ids, users, targets, at_ms, starts, ends, log, keys)


def split(clicks: list[Click], share: float) -> tuple[list[Click], list[Click]]:
    """The first `share` of the clicks by (time, user, position), and the rest.

    >>> a, b = (Click(user_id="u", item_id="i", at_ms=t) for t in (2, 1))
    >>> [[c.at_ms for c in part] for part in split([a, b], 0.5)]
    [[1], [2]]
    """
    ordered = sorted(clicks, key=lambda c: (c.at_ms, c.user_id))
    at = round(len(ordered) * share)
    return ordered[:at], ordered[at:]
