"""The two-tower model in torch: the formulas of `embeddings.towers.item_tower` and `user_tower`.

Histories are rows of a table of the item tower's output vectors, so gradients flow through keys and
values into the item tower. `export` multiplies the matrices of the attention in float64 for the
numpy forward.

Loss: softmax over 512 in-batch targets and 512 uniformly drawn items, at temperature 0.07. The
logarithm of the mixture's probability is subtracted from every score (Yi et al. 2019,
"Sampling-bias-corrected neural modeling"; Yang et al. 2020, "Mixed negative sampling"). Other
occurrences of the positive are masked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from eddyline.errors import BundleError
from eddyline.schema.events import Item
from embeddings.data.examples import Examples, TrainingData
from embeddings.models.bags import Bags, make_bags
from embeddings.models.base import Model, OnProgress, Recipe
from embeddings.models.optimization import minimize
from embeddings.towers import features
from embeddings.towers.base import TrainedModel
from embeddings.towers.features import FeatureSpace
from embeddings.towers.numerics import Floats, Ints
from embeddings.towers.two_tower import KIND, VERSION

HEADS = 2
# Initial deviation of embedding rows: a sum of four groups then has a norm of about 1.
ROW_STD = 0.1


class TwoTower(Model):
    """The default model: item tower and user tower, trained together."""

    kind = KIND

    @override
    def fit(
        self, data: TrainingData, recipe: Recipe, on_progress: OnProgress | None = None
    ) -> TrainedModel:
        items, examples = data.catalogue, data.examples
        item_space = features.learn_items(items, dense=_dense_length(items))
        profile_space = features.learn_profiles(data.profiles.values())
        counts = np.bincount(examples.targets, minlength=len(items))
        catalogue = CatalogueFeatures.of(items, item_space, counts)
        # An item without a click has no ID embedding: it would be trained as a negative alone.
        identity_ids = [item.item_id for item, n in zip(items, counts, strict=True) if n > 0]
        item_model = ItemModel(
            len(identity_ids),
            item_space.rows,
            item_space.dense,
            dimension=recipe.dimension,
            hidden=recipe.hidden,
            dropout=recipe.dropout,
        )
        user_model = UserModel(
            profile_space.rows,
            dimension=recipe.dimension,
            hidden=recipe.hidden,
            history_max=recipe.history_max,
        )
        profiles = make_bags(
            profile_space.of_profile(data.profiles.get(user_id, {}))
            for user_id in examples.user_ids
        )
        rng = np.random.default_rng(recipe.seed)
        loss = _Loss(item_model, user_model, catalogue, profiles, examples, recipe, rng)
        losses = minimize(
            loss,
            [*item_model.parameters(), *user_model.parameters()],
            examples=len(examples),
            recipe=recipe,
            rng=rng,
            on_progress=on_progress,
        )
        item_arrays = catalogue.unscale(item_model.eval().export())
        user_arrays = user_model.eval().export()
        return TrainedModel(
            kind=KIND,
            version=VERSION,
            dimension=recipe.dimension,
            history_max=recipe.history_max,
            item_space=item_space,
            profile_space=profile_space,
            identity_ids=identity_ids,
            arrays={
                **{f"item.{name}": array for name, array in item_arrays.items()},
                **{f"user.{name}": array for name, array in user_arrays.items()},
            },
            micro=recipe.micro,
            losses=losses,
        )


class _Loss:
    """The loss of a batch, with new negatives at every call."""

    def __init__(
        self,
        item_model: ItemModel,
        user_model: UserModel,
        catalogue: CatalogueFeatures,
        profiles: Bags,
        examples: Examples,
        recipe: Recipe,
        rng: np.random.Generator,
    ) -> None:
        self._item_model, self._user_model = item_model, user_model
        self._catalogue, self._profiles = catalogue, profiles
        self._examples, self._recipe, self._rng = examples, recipe, rng
        self._items = len(catalogue.identities)
        share = np.bincount(examples.targets, minlength=self._items) / len(examples)
        in_batch = recipe.batch / (recipe.batch + recipe.uniform)
        mixture = in_batch * share + (1 - in_batch) / self._items
        self._log_q = torch.from_numpy(np.log(mixture)).float()

    def __call__(self, batch: Ints) -> Tensor:
        """The mean loss of some examples, a scalar. batch: int64 (b,)."""
        examples, recipe = self._examples, self._recipe
        histories, counts = examples.histories(batch, recipe.history_max)
        targets = torch.from_numpy(examples.targets[batch])
        drawn = torch.from_numpy(self._rng.integers(0, self._items, recipe.uniform))
        candidates = torch.cat([targets, drawn])
        shown = torch.from_numpy(histories).clamp(min=0).flatten()
        unique, places = torch.unique(torch.cat([candidates, shown]), return_inverse=True)
        vectors = self._item_model(self._catalogue, unique)
        users = torch.from_numpy(examples.users[batch])
        forward = self._user_model(
            vectors,
            places[len(candidates) :].view(histories.shape),
            torch.from_numpy(counts),
            self._profiles.pick(users),
        )
        scores = forward @ vectors[places[: len(candidates)]].T / recipe.temperature
        scores = scores - self._log_q[candidates]
        same = candidates[None, :] == targets[:, None]
        own = torch.arange(len(targets))
        same[own, own] = False
        return F.cross_entropy(scores.masked_fill(same, -1e9), own)


class ItemModel(nn.Module):
    """The item tower: sums of embedding rows, one residual layer, unit norm."""

    def __init__(
        self, identities: int, rows: int, dense: int, *, dimension: int, hidden: int, dropout: float
    ):
        super().__init__()
        self.dropout = dropout
        self.identity = nn.Parameter(torch.randn(identities, dimension) * ROW_STD)
        self.features = nn.Parameter(torch.randn(rows, dimension) * ROW_STD)
        self.projection = nn.Parameter(
            torch.randn(dense, dimension) * ROW_STD / math.sqrt(max(dense, 1))
        )
        self.projection_bias = nn.Parameter(torch.zeros(dimension))
        self.layer_1 = nn.Linear(dimension, hidden)
        self.layer_2 = nn.Linear(hidden, dimension)

    def forward(self, catalogue: CatalogueFeatures, rows: Tensor) -> Tensor:
        """The vectors of items, float32 (n, d), unit norm. rows: int64 (n,), unique, catalogue."""
        return self.blend(self.inputs(catalogue, rows))

    def inputs(self, catalogue: CatalogueFeatures, rows: Tensor) -> Tensor:
        """The input of the residual layer. In training, p = dropout zeroes an ID embedding."""
        identity_rows = catalogue.identities[rows]
        keep = identity_rows >= 0
        if self.training and self.dropout > 0:
            keep = keep & (torch.rand(len(rows)) >= self.dropout)
        x = torch.zeros(len(rows), self.identity.shape[1])
        if len(self.identity):
            x = F.embedding(identity_rows.clamp(min=0), self.identity) * keep[:, None]
        if len(self.features):
            x = x + catalogue.bags.pick(rows).sums(self.features)
        if catalogue.dense is not None:
            has_dense = catalogue.has_dense[rows, None]
            x = x + (catalogue.dense[rows] @ self.projection + self.projection_bias) * has_dense
        return x

    def blend(self, x: Tensor) -> Tensor:
        """The residual layer and unit norm, float32 (n, d)."""
        return F.normalize(x + cast(Tensor, self.layer_2(F.relu(self.layer_1(x)))), dim=1)

    def export(self) -> dict[str, Floats]:
        """The arrays of `embeddings.towers.item_tower.ItemTower`."""
        return {
            "identity": _array(self.identity),
            "features": _array(self.features),
            "projection": _array(self.projection),
            "projection_bias": _array(self.projection_bias),
            **_residual(self.layer_1, self.layer_2),
        }


class UserModel(nn.Module):
    """The user tower: attention of the newest item to the history, profile, residual layer."""

    def __init__(self, profile_rows: int, *, dimension: int, hidden: int, history_max: int):
        super().__init__()
        self.dimension = dimension
        self.start = nn.Parameter(torch.randn(dimension) / math.sqrt(dimension))
        self.query = nn.Linear(dimension, dimension)
        self.key = nn.Linear(dimension, dimension, bias=False)
        self.value = nn.Linear(dimension, dimension, bias=False)
        self.output = nn.Linear(dimension, dimension, bias=False)
        self.bias = nn.Parameter(torch.zeros(HEADS, history_max))
        self.profile = nn.Parameter(torch.randn(profile_rows, dimension) * ROW_STD)
        self.layer_1 = nn.Linear(dimension, hidden)
        self.layer_2 = nn.Linear(hidden, dimension)

    def forward(self, vectors: Tensor, histories: Tensor, counts: Tensor, profiles: Bags) -> Tensor:
        """f, float32 (n, d), unit norm.

        vectors:   float32 (m, d): output of the item tower
        histories: int64 (n, history_max): rows of `vectors`, newest first, any row beyond counts
        counts:    int64 (n,), 0 for an empty history
        profiles:  n bags: the profile features of the users
        """
        n, length = histories.shape
        d = self.dimension
        histories = histories.clone()
        histories[:, 0] = torch.where(counts == 0, len(vectors), histories[:, 0])
        tokens = F.embedding(histories, torch.cat([vectors, self.start[None]]))
        newest = tokens[:, 0] * math.sqrt(d)
        size = d // HEADS
        q = self.query(newest).view(n, HEADS, size)
        # (x·W_k)·q = x·(W_k·q): one small product per user instead of the keys of all items.
        queries = torch.einsum("nhs,hsd->nhd", q, self.key.weight.view(HEADS, size, d))
        queries = queries * (math.sqrt(d) / math.sqrt(size))
        scores = torch.matmul(queries, tokens.transpose(1, 2)) + self.bias
        beyond = torch.arange(length) >= counts.clamp(min=1)[:, None]
        weights = scores.masked_fill(beyond[:, None], -1e9).softmax(dim=2)
        attended = torch.matmul(weights, tokens) * math.sqrt(d)
        heads = torch.einsum("nhd,hsd->nhs", attended, self.value.weight.view(HEADS, size, d))
        z = newest + cast(Tensor, self.output(heads.reshape(n, d)))
        if len(self.profile):
            z = z + profiles.sums(self.profile)
        return F.normalize(z + cast(Tensor, self.layer_2(F.relu(self.layer_1(z)))), dim=1)

    def export(self) -> dict[str, Floats]:
        """The arrays of `embeddings.towers.user_tower.UserTower`."""
        d, size = self.dimension, self.dimension // HEADS
        wide = {name: p.detach().double().numpy() for name, p in self.named_parameters()}
        key = wide["key.weight"].reshape(HEADS, size, d)
        per_score = math.sqrt(d) / math.sqrt(size)  # tokens are scaled by √d, scores by 1/√size
        query = wide["query.weight"].reshape(HEADS, size, d)
        folded_query = np.einsum("hsi,hsj->hij", query, key) * math.sqrt(d) * per_score
        folded_bias = (
            np.einsum("hs,hsj->hj", wide["query.bias"].reshape(HEADS, size), key) * per_score
        )
        value = wide["value.weight"].reshape(HEADS, size, d)
        output = wide["output.weight"].reshape(d, HEADS, size)
        folded_value = np.einsum("hsi,ohs->hio", value, output) * math.sqrt(d)
        folded = {
            "query": folded_query.transpose(1, 0, 2).reshape(d, HEADS * d),
            "query_bias": folded_bias.reshape(HEADS * d),
            "value": folded_value.reshape(HEADS * d, d),
        }
        return {
            **{name: np.ascontiguousarray(array, np.float32) for name, array in folded.items()},
            "bias": _array(self.bias),
            "start": _array(self.start),
            "profile": _array(self.profile),
            **_residual(self.layer_1, self.layer_2),
        }


class CatalogueFeatures:
    """The features of all items as tensors.

    bags:       the feature rows of n items
    identities: int64 (n,): row of the ID embedding, -1 for none
    dense:      float32 (n, dense), scaled to mean 0 and deviation 1; None if the items have none
    has_dense:  float32 (n,): 1 where an item has a dense vector, else 0
    """

    def __init__(
        self, bags: Bags, identities: Ints, dense: Floats | None, has_dense: Floats | None
    ) -> None:
        self.bags = bags
        self.identities = torch.from_numpy(identities)
        self.dense = None if dense is None else torch.from_numpy(dense)
        self.has_dense = (
            torch.zeros(len(identities)) if has_dense is None else torch.from_numpy(has_dense)
        )
        self._mean_and_deviation: tuple[Floats, Floats] | None = None

    @classmethod
    def of(cls, items: Sequence[Item], space: FeatureSpace, counts: Ints) -> CatalogueFeatures:
        """The features of items; those with counts > 0 get an ID embedding, in their order."""
        identities = np.where(counts > 0, np.cumsum(counts > 0) - 1, -1)
        bags = make_bags(space.of_item(item) for item in items)
        if not space.dense:
            return cls(bags, identities, None, None)
        has_dense = np.array([item.vector is not None for item in items], np.float32)
        raw = np.array([item.vector or [0.0] * space.dense for item in items], np.float32)
        mean = raw[has_dense > 0].mean(axis=0)
        deviation = np.maximum(raw[has_dense > 0].std(axis=0), np.float32(1e-3))
        catalogue = cls(bags, identities, (raw - mean) / deviation, has_dense)
        catalogue._mean_and_deviation = mean, deviation
        return catalogue

    def unscale(self, arrays: Mapping[str, Floats]) -> dict[str, Floats]:
        """The item tower's arrays with a projection of raw instead of scaled dense vectors."""
        if self._mean_and_deviation is None:
            return dict(arrays)
        mean, deviation = self._mean_and_deviation
        projection = arrays["projection"] / deviation[:, None]
        bias = arrays["projection_bias"] - mean @ projection
        return {**arrays, "projection": projection, "projection_bias": bias}


def _dense_length(items: Sequence[Item]) -> int:
    lengths = {len(item.vector) for item in items if item.vector is not None}
    if len(lengths) > 1:
        raise BundleError(f"items have vectors of different lengths: {sorted(lengths)}")
    return lengths.pop() if lengths else 0


def _residual(layer_1: nn.Linear, layer_2: nn.Linear) -> dict[str, Floats]:
    return {
        "w1": _array(layer_1.weight.T),
        "b1": _array(layer_1.bias),
        "w2": _array(layer_2.weight.T),
        "b2": _array(layer_2.bias),
    }


def _array(tensor: Tensor) -> Floats:
    return np.ascontiguousarray(tensor.detach().numpy(), np.float32)
