"""The training loop of torch models: epochs of shuffled batches, Adam, a cosine schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from embeddings.models.base import OnProgress, Progress, Recipe
from embeddings.towers.numerics import Ints


def minimize(
    loss: Callable[[Ints], Tensor],
    parameters: Iterable[Tensor],
    *,
    examples: int,
    recipe: Recipe,
    rng: np.random.Generator,
    on_progress: OnProgress | None,
) -> list[float]:
    """Minimize a loss over examples. Returns the mean loss of each epoch.

    loss: from the indices of a batch, int64 (b,), to a scalar with a gradient
    """
    batches = math.ceil(examples / recipe.batch)
    steps = batches * recipe.epochs
    # Fused: a step over 3 tables of 20,000 rows takes 14 ms instead of 85 ms.
    optimizer = torch.optim.Adam(parameters, lr=recipe.rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    losses = []
    for epoch in range(recipe.epochs):
        order = rng.permutation(examples)
        total = 0.0
        for batch in range(batches):
            value = loss(order[batch * recipe.batch : (batch + 1) * recipe.batch])
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            current = float(value.detach())
            total += current
            if on_progress is not None:
                step = epoch * batches + batch + 1
                on_progress(Progress(step, steps, epoch + 1, recipe.epochs, current))
        losses.append(total / batches)
    return losses
