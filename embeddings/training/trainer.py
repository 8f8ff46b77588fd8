"""Train both towers on clicks and write a generation's bundle.

Loss: softmax over 512 in-batch targets and 512 items drawn evenly, at temperature 0.07, with the logarithm of
the mixture's probability subtracted from every score (Yi et al. 2019, "Sampling-bias-corrected neural
modeling"; Yang et al. 2020, "Mixed negative sampling"), and other occurrences of the positive masked.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from eddyline.errors import BundleError
from eddyline.schema.events import Item
from eddyline.schema.item_record import attributes_of
from embeddings.bundle import bundle
from embeddings.bundle.bundle import Parts
from embeddings.data.examples import Examples, Ints, TrainingData, examples
from embeddings.models.two_tower import CatalogueFeatures, ItemModel, UserModel, pick_bags
from embeddings.towers import features
from embeddings.towers.features import FeatureSpace
from embeddings.towers.item_tower import ItemTower
from embeddings.towers.micro_step import MicroSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to train. The defaults were chosen on film ratings, never on the last 20 % by time."""

    dimension: int = 64
    hidden: int = 128
    history_max: int = 20
    batch: int = 512
    uniform: int = 512
    temperature: float = 0.07
    rate: float = 2e-3
    dropout: float = 0.15
    micro: MicroSettings = field(default_factory=MicroSettings)


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a training is, after each step. step counts from 1 to steps over all epochs."""

    step: int
    steps: int
    epoch: int
    epochs: int
    loss: float
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class Report:
    """What a training did. losses: the mean of each epoch; events: those that were trained on."""

    generation: str
    folder: Path
    items: int
    users: int
    events: int
    epochs: int
    losses: list[float]
    wall_s: float
    cut: Mapping[str, int]
    created_ms: int


def train(
    data: TrainingData,
    out_folder: Path,
    generation: str,
    *,
    epochs: int = 8,
    seed: int = 0,
    threads: int = 1,
    on_progress: Callable[[Progress], None] | None = None,
    recipe: Recipe | None = None,
) -> Report:
    """Train on all of `data` and write the bundle at `out_folder`.

    The same data, seed, epochs and threads give the same weights on the same machine. Raises BundleError
    where there is no available item or no click to learn from, or where `out_folder` exists.
    threads: 1 by default: torch's workers spin while they wait for each other, so on two cores that other
             processes use as well, 2 threads took 230 ms a step and 1 took 27.
    """
    began = time.monotonic()
    recipe = recipe or Recipe()
    if Path(out_folder).exists():
        raise BundleError(f"{out_folder} exists already; a generation is never overwritten")
    items = _catalogue_order(data.items)
    rows = {item.item_id: row for row, item in enumerate(items)}
    events = examples(data.clicks, rows)
    if not events or not any(item.available for item in items):
        raise BundleError(
            "nothing to train on: no available item, or no click on an item of the catalogue"
        )
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            trainer = Trainer(items, data.profiles, events, recipe, seed)
            losses = trainer.run(epochs, on_progress)
    finally:
        torch.set_num_threads(threads_before)
    created_ms = time.time_ns() // 1_000_000
    measured = {"events": float(len(events)), "epochs": float(epochs)}
    if losses:
        measured["loss"] = losses[-1]
    parts = trainer.parts(data, generation, created_ms, measured)
    bundle.write(Path(out_folder), parts)
    return Report(
        generation,
        Path(out_folder),
        len(parts.item_ids),
        len(events.user_ids),
        len(events),
        epochs,
        losses,
        time.monotonic() - began,
        dict(data.cut),
        created_ms,
    )


class Trainer:
    """Models, optimiser and data of one training. Thread rule: one thread."""

    def __init__(
        self,
        items: Sequence[Item],
        profiles: Mapping[str, Mapping[str, object]],
        events: Examples,
        recipe: Recipe,
        seed: int,
    ):
        self.items, self.events, self.recipe = items, events, recipe
        self.rng = np.random.default_rng(seed)
        self.item_space = features.learn_items(items, dense=_dense_length(items))
        self.profile_space = features.learn_profiles(profiles.values())
        counts = np.bincount(events.targets, minlength=len(items))
        self.identity_ids, self.catalogue, self._dense_fold = _catalogue(
            items, self.item_space, counts
        )
        of_users = features.bags(
            self.profile_space.of_profile(profiles.get(u, {})) for u in events.user_ids
        )
        self.profile_bags = (
            torch.from_numpy(of_users.rows),
            torch.from_numpy(of_users.offsets),
            torch.from_numpy(of_users.weights),
        )
        self.item_model = ItemModel(
            len(self.identity_ids),
            self.item_space.rows,
            self.item_space.dense,
            dimension=recipe.dimension,
            hidden=recipe.hidden,
            dropout=recipe.dropout,
        )
        self.user_model = UserModel(
            self.profile_space.rows,
            dimension=recipe.dimension,
            hidden=recipe.hidden,
            history_max=recipe.history_max,
        )
        share = counts / counts.sum()
        in_batch = recipe.batch / (recipe.batch + recipe.uniform)
        mixture = in_batch * share + (1 - in_batch) / len(items)
        self.log_q = torch.from_numpy(np.log(mixture)).float()

    def run(self, epochs: int, on_progress: Callable[[Progress], None] | None) -> list[float]:
        """Train; returns the mean loss of each epoch."""
        began, n, batch = time.monotonic(), len(self.events), self.recipe.batch
        per_epoch = math.ceil(n / batch)
        steps = per_epoch * epochs
        parameters = [*self.item_model.parameters(), *self.user_model.parameters()]
        # Fused: a step over 3 tables of 20,000 rows takes 14 ms instead of 85 ms.
        optimizer = torch.optim.Adam(parameters, lr=self.recipe.rate, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
        losses = []
        for epoch in range(epochs):
            order = self.rng.permutation(n)
            total = 0.0
            for at in range(per_epoch):
                loss = self.loss(order[at * batch : (at + 1) * batch])
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                value = float(loss.detach())
                total += value
                if on_progress is not None:
                    step = epoch * per_epoch + at + 1
                    on_progress(
                        Progress(step, steps, epoch + 1, epochs, value, time.monotonic() - began)
                    )
            losses.append(total / per_epoch)
        return losses

    def loss(self, chosen: Ints) -> Tensor:
        """The loss of some events, with negatives drawn anew."""
        events = self.events
        histories, counts = events.histories(chosen, self.recipe.history_max)
        targets = torch.from_numpy(events.targets[chosen])
        drawn = torch.from_numpy(self.rng.integers(0, len(self.items), self.recipe.uniform))
        candidates = torch.cat([targets, drawn])
        shown = torch.from_numpy(histories).clamp(min=0).flatten()
        unique, place = torch.unique(torch.cat([candidates, shown]), return_inverse=True)
        vectors = self.item_model(self.catalogue, unique)
        places = place[len(candidates) :].view(histories.shape)
        users = torch.from_numpy(events.users[chosen])
        profiles = pick_bags(*self.profile_bags, users)
        forward = self.user_model(vectors, places, torch.from_numpy(counts), profiles)
        scores = forward @ vectors[place[: len(candidates)]].T / self.recipe.temperature
        scores = scores - self.log_q[candidates]
        same = candidates[None, :] == targets[:, None]
        same[torch.arange(len(targets)), torch.arange(len(targets))] = False
        return F.cross_entropy(scores.masked_fill(same, -1e9), torch.arange(len(targets)))

    def parts(
        self, data: TrainingData, generation: str, created_ms: int, measured: Mapping[str, float]
    ) -> Parts:
        """What the bundle is written from; its item vectors are computed by the numpy tower."""
        item_arrays = self.item_model.eval().export()
        if self._dense_fold is not None:
            mean, deviation = self._dense_fold
            item_arrays["projection"] = item_arrays["projection"] / deviation[:, None]
            item_arrays["projection_bias"] = (
                item_arrays["projection_bias"] - mean @ item_arrays["projection"]
            )
        identities = {item_id: row for row, item_id in enumerate(self.identity_ids)}
        tower = ItemTower(self.item_space, identities, item_arrays)
        live = [item for item in self.items if item.available]
        versions = [data.versions.get(item.item_id, (0, -1)) for item in live]
        return Parts(
            generation=generation,
            created_ms=created_ms,
            item_space=self.item_space,
            item_arrays=item_arrays,
            identity_ids=self.identity_ids,
            profile_space=self.profile_space,
            user_arrays=self.user_model.eval().export(),
            micro=self.recipe.micro,
            item_ids=[item.item_id for item in live],
            item_vectors=tower.encode(live),
            item_partitions=np.array([p for p, _ in versions], np.int32),
            item_offsets=np.array([o for _, o in versions], np.int64),
            item_attributes=[attributes_of(item) for item in live],
            cut=data.cut,
            measured=measured,
        )


def _catalogue_order(items: Sequence[Item]) -> list[Item]:
    """By id: independent of the order in which partitions were read. The last one of an id counts."""
    latest = {item.item_id: item for item in items}
    return [latest[item_id] for item_id in sorted(latest)]


def _dense_length(items: Sequence[Item]) -> int:
    lengths = {len(item.vector) for item in items if item.vector is not None}
    if len(lengths) > 1:
        raise BundleError(f"items carry vectors of different lengths: {sorted(lengths)}")
    return lengths.pop() if lengths else 0


def _catalogue(
    items: Sequence[Item], space: FeatureSpace, counts: npt.NDArray[np.int64]
) -> tuple[
    list[str], CatalogueFeatures, tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None
]:
    """(ids with an ID embedding, the catalogue as tensors, mean and deviation of dense vectors).

    An item without a click gets no ID embedding: it would be trained as a negative alone.
    """
    identities = np.where(counts > 0, np.cumsum(counts > 0) - 1, -1)
    ids = [item.item_id for item, count in zip(items, counts, strict=True) if count > 0]
    of_items = features.bags(space.of_item(item) for item in items)
    if not space.dense:
        return ids, CatalogueFeatures(of_items, identities, None, None), None
    given = np.array([item.vector is not None for item in items], np.float32)
    raw = np.array([item.vector or [0.0] * space.dense for item in items], np.float32)
    mean = raw[given > 0].mean(axis=0)
    deviation = np.maximum(raw[given > 0].std(axis=0), np.float32(1e-3))
    return (
        ids,
        CatalogueFeatures(of_items, identities, (raw - mean) / deviation, given),
        (mean, deviation),
    )
