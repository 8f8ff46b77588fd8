"""The item tower's forward pass in numpy: an item becomes a unit vector.

    x = identity[item] + Σ weight · features[row] + dense · projection
    v = unit(x + relu(x · w1 + b1) · w2 + b2)

An item that was not in the training data has no identity row. It gets a tiny vector derived from a
hash of its id instead. Two new items without features must not share a vector, because a graph
index cannot reach identical points.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from typing_extensions import override

from eddyline.errors import VectorRejected
from eddyline.schema.events import Item
from embeddings.towers.base import ItemEncoder
from embeddings.towers.features import FeatureSpace
from embeddings.towers.numerics import Floats, blocks, row_products, unit

# Norm of the placeholder for an unknown identity: float32 still distinguishes two items, and a
# learned identity row has a hundred times this norm.
STAND_IN_NORM = 0.01


class ItemTower(ItemEncoder):
    """Maps items to vectors. Thread rule: any thread; immutable.

    identities: item id -> row of `identity`
    arrays:     float32 `identity` (m, d), `features` (space.rows, d),
                `projection` (space.dense, d), `projection_bias` (d,),
                `w1` (d, h), `b1` (h,), `w2` (h, d), `b2` (d,)
    """

    ARRAYS = ("identity", "features", "projection", "projection_bias", "w1", "b1", "w2", "b2")

    def __init__(
        self, space: FeatureSpace, identities: Mapping[str, int], arrays: Mapping[str, Floats]
    ):
        self.space = space
        self.identities = identities
        self.arrays = {name: arrays[name] for name in self.ARRAYS}
        self.dimension = int(arrays["w1"].shape[0])

    @override
    def encode(self, items: Sequence[Item]) -> Floats:
        return self.blend(self.inputs(items))

    def inputs(self, items: Sequence[Item]) -> Floats:
        """x of the module's formula, float32 (n, d)."""
        x = np.empty((len(items), self.dimension), np.float32)
        for i, item in enumerate(items):
            x[i] = self._input(item)
        return x

    def blend(self, x: Floats) -> Floats:
        """v of the module's formula: residual layer and unit norm, float32 (n, d)."""
        a = self.arrays
        out = np.empty_like(x)
        for start, stop in blocks(len(x)):
            rows = x[start:stop]
            hidden = np.maximum(row_products(rows, a["w1"]) + a["b1"], 0.0)
            out[start:stop] = unit(rows + row_products(hidden, a["w2"]) + a["b2"])
        return out

    def _input(self, item: Item) -> Floats:
        rows, weights = self.space.of_item(item)
        row = self.identities.get(item.item_id)
        x = stand_in(item.item_id, self.dimension) if row is None else self.arrays["identity"][row]
        if rows:
            picked = self.arrays["features"][rows]
            x = x + np.add.reduce(picked * np.asarray(weights, np.float32)[:, None], axis=0)
        if self.space.dense and item.vector is not None:
            x = x + self._project(item)
        result: Floats = x
        return result

    def _project(self, item: Item) -> Floats:
        dense = np.asarray(item.vector, np.float32)
        if dense.shape != (self.space.dense,):
            raise VectorRejected(
                f"the vector of item {item.item_id!r} has {dense.size} numbers, "
                f"this generation was trained with {self.space.dense}"
            )
        if not np.isfinite(dense).all():
            raise VectorRejected(f"the vector of item {item.item_id!r} holds NaN or infinity")
        result: Floats = dense @ self.arrays["projection"] + self.arrays["projection_bias"]
        return result


def stand_in(item_id: str, dimension: int) -> Floats:
    """The placeholder of an unknown identity, float32 (d,), norm 0.01; equal in every process."""
    seed = hashlib.shake_128(item_id.encode()).digest(2 * dimension)
    signs = np.frombuffer(seed, "<i2").astype(np.float32) + np.float32(0.5)  # never all zero
    result: Floats = unit(signs[None, :])[0] * np.float32(STAND_IN_NORM)
    return result
