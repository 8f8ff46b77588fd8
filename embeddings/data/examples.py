"""Clicks as training examples: each event with the history that lay strictly before it.

Events are sorted by (time, user, position). Events of one user at the same millisecond are one basket: none
of them is in the history of another. Dislikes are neither targets nor history, and clicks on items outside
the catalogue are left out: that is what the live path does too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from eddyline.schema.events import Click, Item

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TrainingData:
    """What a training sees.

    items:    the catalogue as it is now; unavailable items may be in it, deleted ones are not
    profiles: user id -> attributes
    clicks:   in the order of their log; the order breaks ties of time
    versions: item id -> (partition, offset) of the record of `items` that it came from; absent from a file
    cut:      partition of `items` -> the last offset that is contained, -1 none; empty from a file
    rejected: reason -> number of records left out
    """

    items: list[Item]
    profiles: Mapping[str, Mapping[str, object]]
    clicks: list[Click]
    versions: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    cut: Mapping[str, int] = field(default_factory=dict)
    rejected: Mapping[str, int] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Examples:
    """Events in time order. All arrays int64 (n,) unless said.

    users, targets, at_ms: the event; users and targets are rows of `user_ids` and of the catalogue
    starts, ends:          its history is `log[starts:ends]`, oldest first
    log:                   int64 (m,): the items of all events, user by user, in time order
    keys:                  a key of each event that stays the same at every replay of the same data
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

        Returns (rows int64 (n, length) with -1 where there is none, counts int64 (n,)).
        """
        places = self.ends[events, None] - 1 - np.arange(length)
        there = places >= self.starts[events, None]
        rows = np.where(there, self.log[np.maximum(places, 0)] if len(self.log) else -1, -1)
        return rows, np.minimum(self.ends[events] - self.starts[events], length)


def examples(clicks: list[Click], rows: Mapping[str, int]) -> Examples:
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
    places = np.arange(len(kept))
    new_user = np.diff(sorted_users, prepend=-1) != 0
    new_basket = new_user | (np.diff(sorted_at, prepend=-1) != 0)
    starts, ends = np.empty_like(places), np.empty_like(places)
    starts[by_user] = np.maximum.accumulate(np.where(new_user, places, 0))
    ends[by_user] = np.maximum.accumulate(np.where(new_basket, places, 0))
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
