"""The blender: a bilinear model that orders candidates, learned from clicks one by one.

score = qᵀ W x, for the context q of the request and the features x of a candidate. The loss of a
click is −ln softmax over the candidates at the clicked one; W is updated by AdaGrad (Duchi, Hazan
and Singer, 2011). W starts as a fusion by logarithmic rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from eddyline.errors import EddylineError

Matrix = npt.NDArray[np.float64]

RATE = 0.1
SQUARES_START = 0.01
FORMAT = 1


class BlenderRejected(EddylineError):
    """Stored weights that cannot be used."""


class _Stored(msgspec.Struct, array_like=True, frozen=True):
    """The stored form. weights, squares: float64, row by row, little-endian."""

    format: int
    contexts: list[str]
    features: list[str]
    learned: int
    weights: bytes
    squares: bytes


@dataclass(slots=True)
class Blender:
    """Weights, and what AdaGrad keeps of each. Thread rule: one thread learns, any thread scores.

    A learner replaces `weights` whole with each click, so a reader never sees half an update.

    contexts: names of the entries of q; features: names of the entries of x
    weights:  float64 (contexts, features)
    squares:  the same shape: sums of squared gradients
    learned:  clicks so far
    """

    contexts: tuple[str, ...]
    features: tuple[str, ...]
    weights: Matrix
    squares: Matrix
    learned: int = 0

    @classmethod
    def start(
        cls, contexts: Sequence[str], features: Sequence[str], by_rank: Sequence[str]
    ) -> Blender:
        """Weights of nothing learned: 1 for the features `by_rank` in the first context, else 0."""
        weights = np.zeros((len(contexts), len(features)))
        weights[0, [features.index(name) for name in by_rank]] = 1.0
        squares = np.full_like(weights, SQUARES_START)
        return cls(tuple(contexts), tuple(features), weights, squares)

    def scores(self, q: Matrix, x: Matrix) -> Matrix:
        """float64 (candidates,). q: float64 (contexts,); x: float64 (candidates, features)."""
        found: Matrix = x @ (q @ self.weights)
        return found

    def parts(self, q: Matrix, x: Matrix) -> Matrix:
        """What each feature adds to each score: float64 (candidates, features)."""
        found: Matrix = x * (q @ self.weights)
        return found

    def learn(self, q: Matrix, x: Matrix, clicked: int) -> float:
        """One step for a click. Returns its loss before the step. clicked: row of x.

        A step that is not finite is left out.
        """
        scores = self.scores(q, x)
        scores -= scores.max()
        chances = np.exp(scores)
        total = float(chances.sum())
        loss = float(np.log(total) - scores[clicked])
        chances /= total
        chances[clicked] -= 1.0
        gradient = np.outer(q, chances @ x)
        if np.isfinite(gradient).all():
            self.squares = self.squares + gradient * gradient
            self.weights = self.weights - RATE * gradient / np.sqrt(self.squares)
            self.learned += 1
        return loss

    def encode(self) -> bytes:
        """The stored form; equal blenders have equal bytes."""
        return msgspec.msgpack.encode(
            _Stored(
                FORMAT,
                list(self.contexts),
                list(self.features),
                self.learned,
                self.weights.astype("<f8").tobytes(),
                self.squares.astype("<f8").tobytes(),
            )
        )

    @classmethod
    def decode(cls, value: bytes) -> Blender:
        """The reverse of `encode`. Raises BlenderRejected."""
        try:
            stored = msgspec.msgpack.decode(value, type=_Stored)
        except msgspec.MsgspecError as error:
            raise BlenderRejected(f"the blender's weights cannot be read: {error}") from None
        if stored.format != FORMAT:
            raise BlenderRejected(
                f"the blender's weights have format {stored.format}, this version reads {FORMAT}"
            )
        shape = len(stored.contexts), len(stored.features)
        arrays = []
        for name, data in (("weights", stored.weights), ("squares", stored.squares)):
            if len(data) != 8 * shape[0] * shape[1]:
                raise BlenderRejected(
                    f"the blender's {name}: {len(data)} bytes, expected {shape[0]} × {shape[1]} × 8"
                )
            array = np.frombuffer(data, "<f8").reshape(shape).astype(np.float64)
            if not np.isfinite(array).all():
                raise BlenderRejected(f"the blender's {name} are not finite")
            arrays.append(array)
        if not (arrays[1] > 0).all():
            raise BlenderRejected("the blender's squares: expected numbers above 0")
        contexts, features = tuple(stored.contexts), tuple(stored.features)
        return cls(contexts, features, arrays[0], arrays[1], stored.learned)
