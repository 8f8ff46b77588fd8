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

# Events of one pass: 16 · 256 negatives of 64 float32 are 1 MB and stay in the core's own cache; 32 events
# were no faster.
PASS = 16
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
        self._counter = np.arange(1, settings.negatives + 1, dtype=np.uint64) * _GOLDEN

    @property
    def min_steps_before(self) -> int:
        """A user's first so many events only count steps; his embedding stays at zero."""
        return self.settings.min_steps_before

    def step(self, forward: Floats, embedding: Floats, targets: Floats, event_keys: Sequence[str]) -> Floats:
        """The embeddings after one event each, float32 (n, d), |e| ≤ norm_max; inputs stay as they are.

        Rows are independent users: two events of one user go into two calls, in their order.
        forward:    float32 (n, d), unit norm: f before the event
        embedding:  float32 (n, d): e before the event
        targets:    float32 (n, d): the catalogue's vectors of the items of the events
        event_keys: n keys that stay the same at every replay (event id, else its coordinates)
        """
        out = np.empty_like(embedding)
        for start in range(0, len(out), PASS):
            rows = slice(start, min(start + PASS, len(out)))
            drawn = self.draw(event_keys[rows])
            out[rows] = self._pass(forward[rows], embedding[rows], targets[rows], drawn)
        return out

    def draw(self, event_keys: Sequence[str]) -> npt.NDArray[np.int64]:
        """Rows of the catalogue, int64 (n, negatives): splitmix64, seeded by a hash of the key."""
        digests = b"".join(blake2b(key.encode(), digest_size=8).digest() for key in event_keys)
        z = np.frombuffer(digests, "<u8")[:, None] + self._counter
        z ^= z >> np.uint64(30)
        z *= _MIX_1
        z ^= z >> np.uint64(27)
        z *= _MIX_2
        z ^= z >> np.uint64(31)
        # The upper half scaled to the catalogue: as even as a modulo, and free of its division.
        rows = ((z >> np.uint64(32)) * np.uint64(len(self._catalogue))) >> np.uint64(32)
        result: npt.NDArray[np.int64] = rows.view(np.int64)
        return result

    def _pass(self, f: Floats, e: Floats, targets: Floats, drawn: npt.NDArray[np.int64]) -> Floats:
        s = self.settings
        one = np.float32(1.0)
        z = f + e
        norm = np.maximum(_norms(z), np.float32(1e-6))
        u = z / norm
        negatives = self._catalogue.take(drawn, axis=0)
        scores = np.matmul(negatives, u[:, :, None])[:, :, 0]
        wanted = np.add.reduce(targets * u, axis=1, keepdims=True)
        # Relative to the positive's own score; e^80 · 256 is still finite in float32.
        logits = (scores - wanted) * np.float32(1.0 / s.temperature)
        odds = np.exp(np.minimum(logits, np.float32(80.0)))
        # The event's own item drawn as a negative does not count.
        odds[negatives[:, :, 0] == targets[:, :1]] = 0.0
        total = np.add.reduce(odds, axis=1, keepdims=True)
        pull = np.matmul(odds[:, None, :], negatives)[:, 0]
        g = (pull - total * targets) / (one + total)
        g -= np.add.reduce(g * u, axis=1, keepdims=True) * u
        moved = e * np.float32(1.0 - s.decay) - g * (np.float32(s.rate / s.temperature) / norm)
        # Just inside the bound: the float32 norm of 64 terms is off by up to 5e-7, on either side of it.
        bound = np.float32(s.norm_max * (1 - 1e-6))
        result: Floats = moved * np.minimum(one, bound / np.maximum(_norms(moved), np.float32(1e-12)))
        return result


def _norms(rows: Floats) -> Floats:
    """float32 (n, 1)."""
    result: Floats = np.sqrt(np.add.reduce(rows * rows, axis=1, keepdims=True))
    return result
