"""Next-item evaluation: the rank of the clicked item, given the history just before each click.

Events are in time order. The query uses only events strictly before; events of one user at the same
millisecond see the same history. Every item of the catalogue is scored, except the items that the
user already had, which the product excludes too. Popularity, counted up to each event's time, is
ranked on the same events.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from eddyline.schema.events import Click
from embeddings.bundle.bundle import Bundle
from embeddings.data.examples import Examples, make_examples
from embeddings.evaluation.metrics import Quality, quality, rank
from embeddings.towers.numerics import Floats, Ints, blocks

# Scores of all items are held for this many events at a time.
_EVENTS_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """The quality of the towers, of the towers with the micro-step's embedding, and of popularity.

    with_embedding: None without `micro`
    """

    towers: Quality
    with_embedding: Quality | None
    popularity: Quality


def evaluate(
    bundle: Bundle,
    profiles: Mapping[str, Mapping[str, object]],
    before: list[Click],
    held_out: list[Click],
    *,
    events_max: int = 20_000,
    micro: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> EvaluationResult:
    """Evaluate a bundle that was trained on `before` by the later clicks `held_out`.

    events_max:  if there are more, every n-th event is scored; the histories stay complete
    micro:       also replay the micro-step over the held-out clicks, one event at a time
    on_progress: called with (events done, events)
    Raises ValueError if no held-out click is on an item of the catalogue.
    """
    events = make_examples(before + held_out, bundle.rows)
    first = len(make_examples(before, bundle.rows))
    scored = np.arange(first, len(events))
    if not len(scored):
        raise ValueError("there is no held-out click on an item of the catalogue")
    if not micro:
        scored = scored[:: -(-len(scored) // events_max)]
    seen_users = np.isin(events.users[scored], events.users[:first])
    ranks, popularity, with_embedding = np.empty((3, len(scored)))
    replay = _Replay(bundle, events)
    counts = _Counts(events, len(bundle.rows))
    for start, stop in blocks(len(scored), _EVENTS_AT_ONCE):
        some = scored[start:stop]
        forward = _forward(bundle, profiles, events, some)
        scores = forward @ bundle.item_vectors.T
        targets = events.targets[some]
        for i, event in enumerate(some):
            had = events.log[events.starts[event] : events.ends[event]]
            ranks[start + i] = rank(scores[i], had, targets[i])
            popularity[start + i] = rank(counts.before(event), had, targets[i])
            if micro:
                query = bundle.user_tower.combine(forward[i], replay.embedding(event))
                with_embedding[start + i] = rank(bundle.item_vectors @ query, had, targets[i])
                replay.step(event, forward[i])
        if on_progress is not None:
            on_progress(stop, len(scored))
    return EvaluationResult(
        quality(ranks, seen_users),
        quality(with_embedding, seen_users) if micro else None,
        quality(popularity, seen_users),
    )


class _Counts:
    """Clicks of each item strictly before an event's time, for events in time order."""

    def __init__(self, events: Examples, items: int) -> None:
        self._events, self._counts = events, np.zeros(items, np.float32)
        self._first_of_time = np.searchsorted(events.at_ms, events.at_ms, side="left")
        self._done = 0

    def before(self, event: int) -> Floats:
        upto = int(self._first_of_time[event])
        np.add.at(self._counts, self._events.targets[self._done : upto], 1.0)
        self._done = upto
        return self._counts


class _Replay:
    """The users' ID embeddings over the held-out events; a basket sees the embedding before it."""

    def __init__(self, bundle: Bundle, events: Examples) -> None:
        self._bundle, self._events = bundle, events
        self._zero = np.zeros(bundle.dimension, np.float32)
        # User -> (steps, at_ms, embedding before the basket, embedding now).
        self._state: dict[int, tuple[int, int, Floats, Floats]] = {}

    def embedding(self, event: int) -> Floats:
        user = int(self._events.users[event])
        _, at_ms, before, now = self._state.get(user, (0, -1, self._zero, self._zero))
        return before if at_ms == self._events.at_ms[event] else now

    def step(self, event: int, forward: Floats) -> None:
        user, now_ms = int(self._events.users[event]), int(self._events.at_ms[event])
        steps, at_ms, before, now = self._state.get(user, (0, -1, self._zero, self._zero))
        before = before if at_ms == now_ms else now
        if steps >= self._bundle.micro.min_steps_before:
            target = [int(self._events.targets[event])]
            keys = [self._events.keys[event]]
            now = self._bundle.micro.step(forward[None], now[None], target, keys)[0]
        self._state[user] = (steps + 1, now_ms, before, now)


def _forward(
    bundle: Bundle, profiles: Mapping[str, Mapping[str, object]], events: Examples, some: Ints
) -> Floats:
    histories, counts = events.histories(some, bundle.user_tower.history_max)
    return bundle.user_tower.encode(
        bundle.item_vectors,
        [row[:n].tolist() for row, n in zip(histories, counts, strict=True)],
        [profiles.get(events.user_ids[u], {}) for u in events.users[some]],
    )
