"""Trains a model on clicks and writes the bundle of a generation."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from eddyline.errors import BundleError
from eddyline.schema.item_record import attributes_of
from embeddings.bundle import bundle
from embeddings.bundle.bundle import NewBundle
from embeddings.data.examples import TrainingData
from embeddings.models.base import Model, OnProgress, Recipe
from embeddings.models.registry import DEFAULT, MODELS
from embeddings.towers import runtimes
from embeddings.towers.base import TrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The result of a training. events: clicks trained on; losses: mean loss of each epoch."""

    generation: str
    folder: Path
    items: int
    users: int
    events: int
    epochs: int
    losses: Sequence[float]
    wall_s: float
    cut: Mapping[str, int]
    created_ms: int


def train(
    data: TrainingData,
    folder: Path,
    generation: str,
    *,
    recipe: Recipe | None = None,
    model: Model | None = None,
    on_progress: OnProgress | None = None,
) -> Report:
    """Train on all of `data` and write the bundle at `folder`.

    The same data and recipe give the same weights on the same machine. Raises BundleError if there
    is no available item, if there is no click on an item of the catalogue, or if `folder` exists.
    """
    began_s = time.monotonic()
    recipe = recipe or Recipe()
    model = model or MODELS[DEFAULT]
    folder = Path(folder)
    if folder.exists():
        raise BundleError(f"{folder} exists already; a generation is never overwritten")
    if not data.examples or not any(item.available for item in data.catalogue):
        raise BundleError(
            "nothing to train on: no available item, or no click on an item of the catalogue"
        )
    trained = _fit(model, data, recipe, on_progress)
    created_ms = time.time_ns() // 1_000_000
    new = _new_bundle(trained, data, recipe, generation, created_ms)
    bundle.write(folder, new)
    return Report(
        generation=generation,
        folder=folder,
        items=len(new.item_ids),
        users=len(data.examples.user_ids),
        events=len(data.examples),
        epochs=recipe.epochs,
        losses=trained.losses,
        wall_s=time.monotonic() - began_s,
        cut=dict(data.cut),
        created_ms=created_ms,
    )


def _fit(
    model: Model, data: TrainingData, recipe: Recipe, on_progress: OnProgress | None
) -> TrainedModel:
    """Fit with the recipe's seed and threads; torch's own state is restored afterwards."""
    threads_before = torch.get_num_threads()
    torch.set_num_threads(recipe.threads)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            return model.fit(data, recipe, on_progress)
    finally:
        torch.set_num_threads(threads_before)


def _new_bundle(
    trained: TrainedModel, data: TrainingData, recipe: Recipe, generation: str, created_ms: int
) -> NewBundle:
    """The bundle's content; the run-time item tower computes its item vectors."""
    item_tower = runtimes.runtime(trained.kind, trained.version).item_tower(trained)
    available = [item for item in data.catalogue if item.available]
    versions = [data.versions.get(item.item_id, (0, -1)) for item in available]
    measured = {"events": float(len(data.examples)), "epochs": float(recipe.epochs)}
    if trained.losses:
        measured["loss"] = trained.losses[-1]
    return NewBundle(
        generation=generation,
        created_ms=created_ms,
        model=trained,
        item_ids=[item.item_id for item in available],
        item_vectors=item_tower.encode(available),
        item_partitions=np.array([partition for partition, _ in versions], np.int32),
        item_offsets=np.array([offset for _, offset in versions], np.int64),
        item_attributes=[attributes_of(item) for item in available],
        item_at_ms=np.array([item.at_ms for item in available], np.int64),
        cut=data.cut,
        measured=measured,
    )
