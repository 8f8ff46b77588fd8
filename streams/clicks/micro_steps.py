"""The micro-steps of a batch: rounds of different users, each user's events in order.

The towers' forward does not depend on the embeddings, so it runs once for all events of the batch;
then round r takes the r-th event of every user. So a batch is a few large numpy calls, and the
result is that of one event at a time: the engines work in tiles of fixed shape, whose rows do not
depend on each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import NamedTuple, cast

import numpy as np

from eddyline.schema.user_history import DISLIKE, Entry, positive_events
from embeddings.bundle.bundle import Bundle
from embeddings.towers.numerics import Floats


class Step(NamedTuple):
    """One event to learn from.

    history: rows of the bundle's item vectors, newest first, as they were just before the event
    target:  the row of the event's item
    key:     seeds the draw of the negatives: the event id, or the coordinates where it has none
    """

    user_id: str
    history: tuple[int, ...]
    target: int
    key: str


class MicroSteps:
    """The micro-steps of one generation. Thread rule: one thread."""

    def __init__(self, towers: Bundle) -> None:
        self.generation = towers.generation
        self.min_steps_before = towers.micro.min_steps_before
        self.row = towers.rows.get
        self._towers = towers
        self._zero = np.zeros(towers.dimension, dtype="<f4").tobytes()

    def history(self, entries: Sequence[Entry]) -> tuple[int, ...]:
        """The rows of a list's newest items that the bundle has, without disliked ones."""
        row_of, limit = self.row, self._towers.user_tower.history_max
        # Mostly nothing is disliked and the bundle has all items: then these are the rows.
        newest = [row_of(e.item_id) for e in entries[:limit] if e.kind != DISLIKE]
        if len(newest) == min(limit, len(entries)) and None not in newest:
            return tuple(cast("list[int]", newest))
        rows = (row_of(entry.item_id) for entry in positive_events(entries))
        return tuple(islice((row for row in rows if row is not None), limit))

    def run(
        self,
        steps: Sequence[Step],
        counts: Mapping[str, int],
        stored: Mapping[str, tuple[int, bytes]],
        profiles: Mapping[str, Mapping[str, object]],
    ) -> dict[str, tuple[int, bytes]]:
        """Return the new (steps, float32[d] bytes) of every user in `counts`.

        steps:  in the order of the log
        counts: user id -> the user's number of counted events after the batch
        stored: user id -> the embedding before the batch; absent users start at zero
        """
        vectors = {u: stored[u][1] if u in stored else self._zero for u in counts}
        if steps:
            forward = self._forward(steps, profiles)
            for numbers in _rounds(steps):
                self._round(steps, numbers, forward, vectors)
        return {user: (count, vectors[user]) for user, count in counts.items()}

    def _forward(
        self, steps: Sequence[Step], profiles: Mapping[str, Mapping[str, object]]
    ) -> Floats:
        towers, nothing = self._towers, dict[str, object]()
        known = [profiles.get(step.user_id, nothing) for step in steps]
        return towers.user_tower.encode(
            towers.item_vectors, [step.history for step in steps], known
        )

    def _round(
        self, steps: Sequence[Step], numbers: list[int], forward: Floats, vectors: dict[str, bytes]
    ) -> None:
        chosen = [steps[n] for n in numbers]
        before = np.frombuffer(b"".join(vectors[s.user_id] for s in chosen), dtype="<f4")
        after = self._towers.micro.step(
            forward[numbers],
            before.reshape(len(chosen), self._towers.dimension),
            [s.target for s in chosen],
            [s.key for s in chosen],
        )
        packed, size = np.ascontiguousarray(after, dtype="<f4").tobytes(), len(self._zero)
        for at, step in enumerate(chosen):
            vectors[step.user_id] = packed[at * size : (at + 1) * size]


def _rounds(steps: Sequence[Step]) -> list[list[int]]:
    """Numbers of the steps by round: the first of each user, the second of each user, …

    >>> _rounds([Step("a", (), 0, ""), Step("b", (), 0, ""), Step("a", (), 0, "")])
    [[0, 1], [2]]
    """
    rounds: list[list[int]] = []
    seen: dict[str, int] = {}
    for number, step in enumerate(steps):
        turn = seen.get(step.user_id, 0)
        seen[step.user_id] = turn + 1
        if turn == len(rounds):
            rounds.append([])
        rounds[turn].append(number)
    return rounds
