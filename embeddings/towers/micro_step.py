"""The micro-step: one event updates the ID embedding e of its user; all other weights stay frozen.

The loss of an event is a sampled softmax over its item and 256 negatives, through the
normalisation:

    u = (f + e) / |f + e|        p = softmax(u · v / τ)        g = Σ pⱼ·vⱼ − v₊
    e ← (1 − decay) · e − lr / (τ·|f + e|) · (g − (g·u)·u)     then |e| ≤ norm_max

f is the user tower's vector of the history just before the event. The negatives come from a *pool*:
a sample of the bundle's catalogue in hashed order, small enough for the core's cache. An event uses
consecutive rows of the pool, from a position that is a hash of the event's key. So the embedding is
a function of the click log and the generation, independent of batching and of the process. Only e
is trained, so an item outside the pool loses nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated
from zlib import crc32

import msgspec
import numpy as np
import numpy.typing as npt

from embeddings.towers.numerics import Floats, Ints

Hashes = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


class MicroSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of the step; part of a generation.

    rate, decay:      larger ones lost 4–14 % of the hit rate of a live history encoder
    negatives:        negatives per event, at most the pool's size
    pool:             items to draw negatives from, at most the catalogue's size
    norm_max:         upper bound of |e|; 0.5 keeps the query within 30° of f
    min_steps_before: events of a user that are only counted, before the first step
    """

    temperature: float = 0.07
    rate: float = 0.001
    decay: float = 0.002
    negatives: Annotated[int, msgspec.Meta(ge=1)] = 256
    pool: Annotated[int, msgspec.Meta(ge=1)] = 16_384
    norm_max: float = 0.5
    min_steps_before: int = 5


class MicroStep:
    """The step over a catalogue. Thread rule: any thread; immutable.

    catalogue: float32 (n, d), unit norm, n ≥ 1: the bundle's item vectors
    """

    def __init__(self, catalogue: Floats, settings: MicroSettings):
        self.settings = settings
        self._catalogue = catalogue
        # Two inner products differ by 2 at most: only then can exp() of their difference overflow.
        self._clamps = 2.0 / settings.temperature > 79.0
        rows = _shuffled(len(catalogue), settings.pool)
        self._places = {row: place for place, row in enumerate(rows.tolist())}
        # No item is drawn twice: in a small catalogue every item is a negative.
        self.negatives = min(settings.negatives, len(rows))
        # The pool is a ring. Its first rows are repeated at the end, so that every draw is one
        # slice.
        self._rows = np.concatenate([rows, rows[: self.negatives - 1]])
        self._pool = catalogue.take(self._rows, axis=0)

    @property
    def min_steps_before(self) -> int:
        """Events of a user that only count, before the first step; the embedding stays zero."""
        return self.settings.min_steps_before

    def step(
        self, forward: Floats, embedding: Floats, targets: Sequence[int], event_keys: Sequence[str]
    ) -> Floats:
        """The embeddings after one event each, a new float32 (n, d), |e| ≤ norm_max.

        Rows are independent users: two events of one user need two calls, in their order.
        forward:    float32 (n, d), unit norm: f before the event
        embedding:  float32 (n, d): e before the event
        targets:    n rows of the catalogue: the items of the events
        event_keys: n keys that are equal in every replay (event id, else partition/offset)
        """
        s, one = self.settings, np.float32(1.0)
        positives = self._catalogue.take(np.array(targets, np.int64), axis=0)
        u = forward + embedding
        norm = np.maximum(_norms(u), np.float32(1e-6))
        u /= norm
        sharp = u * np.float32(1.0 / s.temperature)
        positive_scores: Floats = np.add.reduce(positives * sharp, axis=1, keepdims=True)
        odds, pull = np.empty((len(u), self.negatives), np.float32), np.empty_like(u)
        starts = self._starts(event_keys)
        drawn = [self._pool[start : start + self.negatives] for start in starts]
        # One product per event, so that its bits do not depend on the batch.
        for negatives, query, scores in zip(drawn, sharp, odds, strict=True):
            np.dot(negatives, query, scores)
        # Relative to the score of the positive; e^80 · 256 is still finite in float32.
        odds -= positive_scores
        if self._clamps:
            np.minimum(odds, np.float32(80.0), out=odds)
        np.exp(odds, out=odds)
        self._mask_targets(targets, starts, odds)
        total: Floats = np.add.reduce(odds, axis=1, keepdims=True)
        for negatives, weights, weighed in zip(drawn, odds, pull, strict=True):
            np.dot(weights, negatives, weighed)
        g: Floats = (pull - total * positives) / (one + total)
        g -= np.add.reduce(g * u, axis=1, keepdims=True) * u
        g *= np.float32(s.rate / s.temperature) / norm
        moved = embedding * np.float32(1.0 - s.decay) - g
        # Just inside the bound: a float32 norm of 64 terms has an error of up to ± 5e-7.
        bound = np.float32(s.norm_max * (1 - 1e-6))
        result: Floats = moved * np.minimum(
            one, bound / np.maximum(_norms(moved), np.float32(1e-12))
        )
        return result

    def draw(self, event_keys: Sequence[str]) -> Ints:
        """The negatives of each event: rows of the catalogue, int64 (n, negatives)."""
        starts = np.array(self._starts(event_keys), np.int64)
        result: Ints = self._rows[starts[:, None] + np.arange(self.negatives)]
        return result

    def _starts(self, event_keys: Sequence[str]) -> list[int]:
        """The first position in the pool of each event's negatives."""
        hashes = _mixed(np.array([crc32(key.encode()) for key in event_keys], np.uint64))
        # Scaling to the pool's size is as even as a modulo, without its division.
        places = (hashes >> np.uint64(32)) * np.uint64(len(self._places)) >> np.uint64(32)
        starts: list[int] = places.tolist()
        return starts

    def _mask_targets(self, targets: Sequence[int], starts: Sequence[int], odds: Floats) -> None:
        """Set the odds of the event's own item to 0 if it was drawn as a negative."""
        place_of, size = self._places.get, len(self._places)
        for at, (target, start) in enumerate(zip(targets, starts, strict=True)):
            place = place_of(target)
            if place is not None and (after := (place - start) % size) < self.negatives:
                odds[at, after] = 0.0


def _shuffled(n: int, size: int) -> Ints:
    """At most `size` of the rows 0 … n − 1, in hashed order; equal in every process."""
    hashes = _mixed(np.arange(n, dtype=np.uint64))
    if size < n:
        chosen = np.argpartition(hashes, size)[:size]
        result: Ints = chosen[np.argsort(hashes[chosen])]
        return result
    return np.argsort(hashes)


def _mixed(z: Hashes) -> Hashes:
    """splitmix64, bijective (Steele et al. 2014, "Fast splittable pseudorandom number
    generators")."""
    z = z + _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    result: Hashes = z ^ (z >> np.uint64(31))
    return result


def _norms(rows: Floats) -> Floats:
    """The norms of the rows, float32 (n, 1)."""
    result: Floats = np.sqrt(np.add.reduce(rows * rows, axis=1, keepdims=True))
    return result
