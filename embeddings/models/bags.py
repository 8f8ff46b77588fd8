"""Bags of weighted rows of an embedding table, as tensors: the features of items or users."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Bags(NamedTuple):
    """n bags; bag i holds rows and weights [offsets[i], offsets[i + 1]).

    rows: int64 (m,); offsets: int64 (n + 1,); weights: float32 (m,)
    """

    rows: Tensor
    offsets: Tensor
    weights: Tensor

    def pick(self, chosen: Tensor) -> Bags:
        """Some of the bags. chosen: int64 (k,)."""
        starts = self.offsets[chosen]
        sizes = self.offsets[chosen + 1] - starts
        offsets = torch.zeros(len(chosen) + 1, dtype=torch.int64)
        torch.cumsum(sizes, 0, out=offsets[1:])
        shift = torch.repeat_interleave(starts - offsets[:-1], sizes)
        positions = torch.arange(int(offsets[-1])) + shift
        return Bags(self.rows[positions], offsets, self.weights[positions])

    def sums(self, table: Tensor) -> Tensor:
        """The weighted sum of each bag's rows, float32 (n, d). table: float32 (rows, d)."""
        return F.embedding_bag(
            self.rows,
            table,
            self.offsets,
            mode="sum",
            per_sample_weights=self.weights,
            include_last_offset=True,
        )


def make_bags(features: Iterable[tuple[list[int], list[float]]]) -> Bags:
    """Bags from (rows, weights) pairs, as `FeatureSpace.of_item` returns them."""
    rows: list[int] = []
    weights: list[float] = []
    offsets = [0]
    for some_rows, some_weights in features:
        rows += some_rows
        weights += some_weights
        offsets.append(len(rows))
    return Bags(
        torch.tensor(rows, dtype=torch.int64),
        torch.tensor(offsets, dtype=torch.int64),
        torch.tensor(weights, dtype=torch.float32),
    )
