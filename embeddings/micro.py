"""The micro-step: one event moves its user's ID embedding e a little; everything else stays frozen.

The loss of an event is a sampled softmax over its item and 256 negatives, through the normalisation:

    u = (f + e) / |f + e|        p = softmax(u · v / τ)        g = Σ pⱼ·vⱼ − v₊
    e ← (1 − decay) · e − lr / (τ·|f + e|) · (g − (g·u)·u)     then |e| ≤ norm_max

f is the user tower's vector of the history just before the event. The negatives are drawn from the
bundle's catalogue by a hash of the event's key: the embedding is a function of the log of clicks and of the
generation, whatever the chunking and whoever computes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import msgspec
import numpy as np
import numpy.typing as npt

from embeddings.tiles import Floats

Ints = npt.NDArray[np.int64]
Marks = npt.NDArray[np.bool_]

# Events of one pass: a call into numpy costs as much for 8 as for 32, and 64 would leave the core's cache.
PASS = 32
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


class MicroSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of the step; part of a generation.

    rate, decay: larger ones lost 4–14 % of the hit rate of a live history encoder
    norm_max:    0.5 keeps the query within 30° of what the history says
    """

    temperature: float = 0.07
    rate: float = 0.001
    decay: float = 0.002
    negatives: int = 256
    norm_max: float = 0.5
    min_steps_before: int = 5


class MicroStep:
    """The step over a catalogue. Thread rule: any thread; it holds nothing that changes.

    catalogue: float32 (n, d), unit norm, n ≥ 1: the bundle's item vectors
    """

    def __init__(self, catalogue: Floats, settings: MicroSettings):
        self.settings = settings
        self._catalogue = catalogue
        # Two scores differ by 2 at most: only then can their odds be too large.
        self._clamps = 2.0 / settings.temperature > 79.0
        # One hash for two negatives.
        self._counter = np.arange(1, (settings.negatives + 1) // 2 + 1, dtype=np.uint64) * _GOLDEN

    @property
    def min_steps_before(self) -> int:
        """A user's first so many events only count steps; his embedding stays at zero."""
        return self.settings.min_steps_before

    def step(
        self, forward: Floats, embedding: Floats, targets: Sequence[int], event_keys: Sequence[str]
    ) -> Floats:
        """The embeddings after one event each, float32 (n, d), |e| ≤ norm_max; inputs stay as they are.

        Rows are independent users: two events of one user go into two calls, in their order.
        forward:    float32 (n, d), unit norm: f before the event
        embedding:  float32 (n, d): e before the event
        targets:    n rows of the catalogue: the items of the events
        event_keys: n keys that stay the same at every replay (event id, else its coordinates)
        """
        s, one = self.settings, np.float32(1.0)
        own = np.array(targets, np.int64).reshape(-1, 1)
        positives = self._catalogue.take(own[:, 0], axis=0)
        u = forward + embedding
        norm = np.maximum(_norms(u), np.float32(1e-6))
        u /= norm
        sharp = u * np.float32(1.0 / s.temperature)
        wanted: Floats = np.add.reduce(positives * sharp, axis=1, keepdims=True)
        total: Floats = np.empty_like(wanted)
        pull = np.empty_like(u)
        drawn = self.draw(event_keys)
        same = drawn == own
        for start in range(0, len(u), PASS):
            rows = slice(start, min(start + PASS, len(u)))
            self._pull(drawn[rows], sharp[rows], wanted[rows], same[rows], total[rows], pull[rows])
        g: Floats = (pull - total * positives) / (one + total)
        g -= np.add.reduce(g * u, axis=1, keepdims=True) * u
        g *= np.float32(s.rate / s.temperature) / norm
        moved = embedding * np.float32(1.0 - s.decay) - g
        # Just inside the bound: the float32 norm of 64 terms is off by up to 5e-7, on either side of it.
        bound = np.float32(s.norm_max * (1 - 1e-6))
        result: Floats = moved * np.minimum(one, bound / np.maximum(_norms(moved), np.float32(1e-12)))
        return result

    def draw(self, event_keys: Sequence[str]) -> Ints:
        """Rows of the catalogue, int64 (n, negatives): halves of splitmix64, seeded by a hash of the key."""
        digests = b"".join(blake2b(key.encode(), digest_size=8).digest() for key in event_keys)
        z = np.frombuffer(digests, "<u8")[:, None] + self._counter
        z ^= z >> np.uint64(30)
        z *= _MIX_1
        z ^= z >> np.uint64(27)
        z *= _MIX_2
        z ^= z >> np.uint64(31)
        # Each half scaled to the catalogue: as even as a modulo, and free of its division.
        halves = z.astype("<u8", copy=False).view("<u4")[:, : self.settings.negatives]
        rows = np.multiply(halves, np.uint64(len(self._catalogue)), dtype=np.uint64)
        rows >>= np.uint64(32)
        result: Ints = rows.view(np.int64)
        return result

    def _pull(
        self, drawn: Ints, sharp: Floats, wanted: Floats, same: Marks, total: Floats, pull: Floats
    ) -> None:
        """Weigh the negatives of some events by their odds against the event's own item.

        sharp: (n, d), u / τ; wanted: (n, 1), u · v₊ / τ; same: where the event's own item was drawn
        total, pull: (n, 1), (n, d), where the sum of the odds and the weighed sum of the negatives go
        """
        negatives = self._catalogue.take(drawn, axis=0)
        odds = np.matmul(negatives, sharp[:, :, None])[:, :, 0]
        # Relative to the positive's own score; e^80 · 256 is still finite in float32.
        odds -= wanted
        if self._clamps:
            np.minimum(odds, np.float32(80.0), out=odds)
        np.exp(odds, out=odds)
        # The event's own item drawn as a negative does not count.
        np.putmask(odds, same, np.float32(0.0))
        np.add.reduce(odds, axis=1, keepdims=True, out=total)
        np.matmul(odds[:, None, :], negatives, out=pull[:, None, :])


def _norms(rows: Floats) -> Floats:
    """float32 (n, 1)."""
    result: Floats = np.sqrt(np.add.reduce(rows * rows, axis=1, keepdims=True))
    return result
