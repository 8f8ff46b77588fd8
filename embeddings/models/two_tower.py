"""The towers in torch: the same maths as `embeddings.towers.item_tower` and `embeddings.towers.user_tower`.

Histories are rows of a table of the item tower's output vectors, so gradients flow through keys and values
into the item tower. `export` multiplies the attention's matrices out in float64 for the numpy forward.
"""

from __future__ import annotations

import math
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embeddings.towers.features import Bags

Floats = npt.NDArray[np.float32]

HEADS = 2
# Start of embedding rows: a sum of four groups then has about the norm that unit vectors need.
ROW_STD = 0.1


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
        """Unit vectors float32 (n, d) of some rows of the catalogue, int64 (n,), unique."""
        return self.blend(self.inputs(catalogue, rows))

    def inputs(self, catalogue: CatalogueFeatures, rows: Tensor) -> Tensor:
        """The sums before the residual layer. In training an identity is zero with p = dropout."""
        identity_rows = catalogue.identities[rows]
        keep = identity_rows >= 0
        if self.training and self.dropout > 0:
            keep = keep & (torch.rand(len(rows)) >= self.dropout)
        x = torch.zeros(len(rows), self.identity.shape[1])
        if len(self.identity):
            x = F.embedding(identity_rows.clamp(min=0), self.identity) * keep[:, None]
        if len(self.features):
            places, offsets, weights = catalogue.bags_of(rows)
            x = x + F.embedding_bag(
                places,
                self.features,
                offsets,
                mode="sum",
                per_sample_weights=weights,
                include_last_offset=True,
            )
        if catalogue.dense is not None:
            given = catalogue.dense_given[rows, None]
            x = x + (catalogue.dense[rows] @ self.projection + self.projection_bias) * given
        return x

    def blend(self, x: Tensor) -> Tensor:
        """The residual layer and unit norm."""
        return F.normalize(x + cast(Tensor, self.layer_2(F.relu(self.layer_1(x)))), dim=1)

    def export(self) -> dict[str, Floats]:
        """The arrays of `embeddings.towers.item_tower.ItemTower`."""
        return {
            "identity": _array(self.identity),
            "features": _array(self.features),
            "projection": _array(self.projection),
            "projection_bias": _array(self.projection_bias),
            "w1": _array(self.layer_1.weight.T),
            "b1": _array(self.layer_1.bias),
            "w2": _array(self.layer_2.weight.T),
            "b2": _array(self.layer_2.bias),
        }


class UserModel(nn.Module):
    """The user tower: the newest item attends to the history; profile, residual layer, unit norm."""

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

    def forward(
        self,
        vectors: Tensor,
        places: Tensor,
        counts: Tensor,
        profiles: tuple[Tensor, Tensor, Tensor],
    ) -> Tensor:
        """f, unit norm, float32 (n, d).

        vectors:  float32 (m, d): the item tower's output
        places:   int64 (n, history_max): rows of `vectors`, newest first, anything beyond counts
        counts:   int64 (n,), 0 for an empty history
        profiles: rows, offsets (n + 1,) and weights of the users' profile features
        """
        n, length = places.shape
        d = self.dimension
        places = places.clone()
        places[:, 0] = torch.where(counts == 0, len(vectors), places[:, 0])
        tokens = F.embedding(places, torch.cat([vectors, self.start[None]]))
        newest = tokens[:, 0] * math.sqrt(d)
        size = d // HEADS
        q = self.query(newest).view(n, HEADS, size)
        # Scores by (x·W_k)·q = x·(W_k·q): one small product a user in place of keys of all his items.
        asked = torch.einsum("nhs,hsd->nhd", q, self.key.weight.view(HEADS, size, d))
        asked = asked * (math.sqrt(d) / math.sqrt(size))
        scores = torch.matmul(asked, tokens.transpose(1, 2)) + self.bias
        beyond = torch.arange(length) >= counts.clamp(min=1)[:, None]
        weights = scores.masked_fill(beyond[:, None], -1e9).softmax(dim=2)
        seen = torch.matmul(weights, tokens) * math.sqrt(d)
        heads = torch.einsum("nhd,hsd->nhs", seen, self.value.weight.view(HEADS, size, d))
        z = newest + cast(Tensor, self.output(heads.reshape(n, d)))
        if len(self.profile):
            rows, offsets, row_weights = profiles
            z = z + F.embedding_bag(
                rows,
                self.profile,
                offsets,
                mode="sum",
                per_sample_weights=row_weights,
                include_last_offset=True,
            )
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
            "w1": _array(self.layer_1.weight.T),
            "b1": _array(self.layer_1.bias),
            "w2": _array(self.layer_2.weight.T),
            "b2": _array(self.layer_2.bias),
        }


class CatalogueFeatures:
    """The features of all items as tensors. identities: row of the ID embedding, -1 for none."""

    def __init__(
        self,
        bags: Bags,
        identities: npt.NDArray[np.int64],
        dense: Floats | None,
        given: Floats | None,
    ):
        self.identities = torch.from_numpy(identities)
        self.dense = None if dense is None else torch.from_numpy(dense)
        self.dense_given = (
            torch.zeros(len(identities)) if given is None else torch.from_numpy(given)
        )
        self._rows, self._weights = torch.from_numpy(bags.rows), torch.from_numpy(bags.weights)
        self._offsets = torch.from_numpy(bags.offsets)

    def bags_of(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(feature rows, offsets (n + 1,), weights) of some items."""
        return pick_bags(self._rows, self._offsets, self._weights, rows)


def pick_bags(
    flat: Tensor, offsets: Tensor, weights: Tensor, bags: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, offsets (n + 1,), weights) of some bags out of many."""
    starts = offsets[bags]
    sizes = offsets[bags + 1] - starts
    ends = torch.zeros(len(bags) + 1, dtype=torch.int64)
    torch.cumsum(sizes, 0, out=ends[1:])
    places = torch.arange(int(ends[-1])) + torch.repeat_interleave(starts - ends[:-1], sizes)
    return flat[places], ends, weights[places]


def _array(tensor: Tensor) -> Floats:
    return np.ascontiguousarray(tensor.detach().numpy(), np.float32)
