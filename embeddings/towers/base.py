"""A trained model as a bundle stores it, and the ports of a model at run time; numpy only.

A bundle names the kind of its model. `embeddings.towers.runtimes` maps the kind to a
`ModelRuntime`, which builds the item tower, the user tower and the micro-step from the arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from eddyline.schema.events import Item
from embeddings.towers.features import FeatureSpace
from embeddings.towers.micro_step import MicroSettings, MicroStep
from embeddings.towers.numerics import Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedModel:
    """The result of a training, without the catalogue. Thread rule: any thread; immutable.

    kind, version: which runtime reads the arrays, and the version of their layout
    dimension:     d, the length of item vectors and user vectors
    history_max:   number of newest items that the user tower uses
    identity_ids:  item ids, in the order of the rows of the table of ID embeddings
    arrays:        float32 arrays by name; a bundle stores each as `<name>.npy`
    losses:        mean loss of each epoch; empty in a model that was loaded from a bundle
    """

    kind: str
    version: int
    dimension: int
    history_max: int
    item_space: FeatureSpace
    profile_space: FeatureSpace
    identity_ids: Sequence[str]
    arrays: Mapping[str, Floats]
    micro: MicroSettings
    losses: Sequence[float] = ()

    def tower_arrays(self, prefix: str) -> dict[str, Floats]:
        """The arrays whose names begin with `prefix`, by the rest of the name."""
        return {n.removeprefix(prefix): a for n, a in self.arrays.items() if n.startswith(prefix)}


class ItemEncoder(Protocol):
    """The item tower of any model. Thread rule: any thread."""

    def encode(self, items: Sequence[Item]) -> Floats:
        """The vectors of items, float32 (n, d), unit norm; the bits do not depend on the batch.

        Raises VectorRejected if an item's dense vector is not finite or differs in length from the
        training data.
        """


class UserEncoder(Protocol):
    """The user tower of any model. Thread rule: any thread.

    history_max: number of newest items that are used
    """

    history_max: int

    def encode(
        self,
        table: Floats,
        histories: Sequence[Sequence[int]],
        profiles: Sequence[Mapping[str, object]],
    ) -> Floats:
        """The vectors that the micro-step corrects, float32 (n, d), unit norm.

        table:     float32 (m, d), m >= 1, unit norm: the items' vectors
        histories: rows of the table, newest first; the first `history_max` are used
        profiles:  one mapping per user, empty if unknown
        The bits of a user do not depend on the batch.
        """

    def encode_one(self, history: Floats, profile: Mapping[str, object]) -> Floats:
        """The vector of one user at query time, float32 (d,), unit norm.

        A model with several interest vectors per user returns float32 (interests, d).
        history: float32 (m, d), newest first: the items' vectors; the first `history_max` are used
        """

    def combine(self, forward: Floats, embedding: Floats | None) -> Floats:
        """The query vector: `forward` corrected by the user-ID embedding, same shape, unit norm.

        forward:   float32 (d,) or (n, d): a result of `encode` or `encode_one`
        embedding: float32 (d,) or (n, d); None means zeros
        """


class ModelRuntime(Protocol):
    """Builds the run-time side of one kind of model. Thread rule: any thread; immutable.

    version: newest layout of the arrays that it reads
    arrays:  names of the arrays that it needs
    """

    kind: str
    version: int
    arrays: tuple[str, ...]

    def shapes(self, model: TrainedModel) -> Mapping[str, tuple[int, ...]]:
        """The shape that each array of the model must have."""

    def item_tower(self, model: TrainedModel) -> ItemEncoder:
        """The item tower."""

    def user_tower(self, model: TrainedModel) -> UserEncoder:
        """The user tower."""

    def micro_step(self, model: TrainedModel, item_vectors: Floats) -> MicroStep:
        """The micro-step over a catalogue. item_vectors: float32 (n, d), unit norm, n >= 1."""
