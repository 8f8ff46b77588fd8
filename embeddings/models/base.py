"""The port of a model that can be trained, and the recipe of a training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from embeddings.data.examples import TrainingData
from embeddings.towers.base import TrainedModel
from embeddings.towers.micro_step import MicroSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to train. The defaults were chosen on film ratings, never on the last 20 % by time.

    batch, uniform: clicks per step, and additional negatives per step, drawn uniformly
    rate:           initial learning rate; it falls to 0 along half a cosine
    dropout:        probability that the ID embedding of an item is dropped
    seed:           0 … `SEED_MAX`
    threads:        torch threads; where other processes share two cores, a step took 27 ms with
                    1 thread and 230 ms with 2, because idle threads spin
    """

    dimension: int = 64
    hidden: int = 128
    history_max: int = 20
    batch: int = 512
    uniform: int = 512
    temperature: float = 0.07
    rate: float = 2e-3
    dropout: float = 0.15
    epochs: int = 8
    seed: int = 0
    threads: int = 1
    micro: MicroSettings = field(default_factory=MicroSettings)


@dataclass(frozen=True, slots=True)
class Progress:
    """The state of a training after a step. step: 1 … steps, counted over all epochs."""

    step: int
    steps: int
    epoch: int
    epochs: int
    loss: float


OnProgress = Callable[[Progress], None]


class Model(Protocol):
    """One kind of model. Thread rule: one thread per `fit`.

    kind: the name in the bundle; `embeddings.towers.runtimes` has the runtime of the same kind
    """

    kind: str

    def fit(
        self, data: TrainingData, recipe: Recipe, on_progress: OnProgress | None = None
    ) -> TrainedModel:
        """Train on all of `data`, which holds at least one item and one example.

        The caller seeds torch with `recipe.seed`. The same data and recipe then give the same
        arrays on the same machine. Raises BundleError if the items do not fit together.
        """
