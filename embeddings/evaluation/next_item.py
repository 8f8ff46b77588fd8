"""How often the clicked item is among the first k, with the history as it was just before each click.

The protocol: events in the order of time; the query is formed from events strictly before (one basket of the
same user and millisecond sees the same history); every item of the catalogue is scored; items that the user
already had are left out, as the product does; rank = 1 + items scored higher + half the ties. Popularity,
counted up to each event's time, is ranked on the same events.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eddyline.schema.events import Click
from embeddings.bundle.bundle import Bundle
from embeddings.data.examples import Examples, Ints, make_examples
from embeddings.towers.numerics import Floats, blocks
from embeddings.towers.user_tower import query_vector

# Scores of all items are held for this many events at a time.
_EVENTS_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class Quality:
    """Shares in 0 … 1 over `events`, of which `unseen` are from users without an event in training."""

    events: int
    hit_rate_10: float
    hit_rate_50: float
    hit_rate_100: float
    mrr: float
    ndcg_10: float
    hit_rate_10_seen_users: float
    hit_rate_10_unseen_users: float


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """The towers with the live history, the same with the micro-step's embedding, and popularity.

    with_embedding is None where it was not asked for.
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
    """Judge a bundle that was trained on `before` by the clicks after it.

    events_max:  above it, every n-th event is scored; the history is complete all the same
    micro:       also replay the micro-step over the held-out clicks (one row after another: slower)
    on_progress: called with (events done, events)
    """
    rows = {item_id: row for row, item_id in enumerate(bundle.item_ids)}
    events = make_examples(before + held_out, rows)
    first = len(make_examples(before, rows))
    scored = np.arange(first, len(events))
    if not len(scored):
        raise ValueError("there is no held-out click on an item of the catalogue")
    if not micro:
        scored = scored[:: -(-len(scored) // events_max)]
    seen_users = np.isin(events.users[scored], events.users[:first])
    ranks, popular = np.empty(len(scored)), np.empty(len(scored))
    with_embedding = np.empty(len(scored))
    replay = _Replay(bundle, events)
    counts = _Counts(events, len(rows))
    for start, stop in blocks(len(scored), _EVENTS_AT_ONCE):
        some = scored[start:stop]
        forward = _forward(bundle, profiles, events, some)
        scores = forward @ bundle.item_vectors.T
        wanted = events.targets[some]
        for i, event in enumerate(some):
            had = events.log[events.starts[event] : events.ends[event]]
            ranks[start + i] = _rank(scores[i], had, wanted[i])
            popular[start + i] = _rank(counts.before(event), had, wanted[i])
            if micro:
                own = bundle.item_vectors @ query_vector(forward[i], replay.embedding(event))
                with_embedding[start + i] = _rank(own, had, wanted[i])
                replay.step(event, forward[i])
        if on_progress is not None:
            on_progress(stop, len(scored))
    return EvaluationResult(
        _quality(ranks, seen_users),
        _quality(with_embedding, seen_users) if micro else None,
        _quality(popular, seen_users),
    )


class _Counts:
    """Clicks of each item strictly before an event's time; events come in order."""

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
    """The users' ID embeddings over the held-out events; within a basket all see the one before it."""

    def __init__(self, bundle: Bundle, events: Examples) -> None:
        self._bundle, self._events = bundle, events
        self._zero = np.zeros(bundle.dimension, np.float32)
        self._state: dict[
            int, tuple[int, int, Floats, Floats]
        ] = {}  # steps, at_ms, before the basket, now

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


def _rank(scores: Floats, had: Ints, wanted: int) -> float:
    own = scores[wanted]
    # Items that the user had do not compete; the wanted one itself may be among them.
    others = np.unique(had)
    others = others[others != wanted]
    higher = np.count_nonzero(scores > own) - np.count_nonzero(scores[others] > own)
    ties = np.count_nonzero(scores == own) - 1 - np.count_nonzero(scores[others] == own)
    return 1 + higher + ties / 2


def _quality(ranks: npt.NDArray[np.float64], seen: npt.NDArray[np.bool_]) -> Quality:
    hits = ranks <= 10
    gain = np.where(hits, 1 / np.log2(ranks + 1), 0.0)
    return Quality(
        len(ranks),
        float(hits.mean()),
        float((ranks <= 50).mean()),
        float((ranks <= 100).mean()),
        float((1 / ranks).mean()),
        float(gain.mean()),
        float(hits[seen].mean()) if seen.any() else 0.0,
        float(hits[~seen].mean()) if not seen.all() else 0.0,
    )
