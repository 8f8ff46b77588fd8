"""The two-tower model at run time: array names, their shapes, and both towers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from typing_extensions import override

from embeddings.towers.base import ModelRuntime, TrainedModel
from embeddings.towers.item_tower import ItemTower
from embeddings.towers.micro_step import MicroStep
from embeddings.towers.numerics import Floats
from embeddings.towers.user_tower import UserTower

KIND, VERSION = "two_tower", 1
ARRAYS = (*(f"item.{n}" for n in ItemTower.ARRAYS), *(f"user.{n}" for n in UserTower.ARRAYS))


class TwoTowerRuntime(ModelRuntime):
    """Item tower and user tower from the arrays `item.*` and `user.*`."""

    kind, version, arrays = KIND, VERSION, ARRAYS

    @override
    def shapes(self, model: TrainedModel) -> Mapping[str, tuple[int, ...]]:
        d, items, profiles = model.dimension, model.item_space, model.profile_space
        item_hidden, user_hidden = model.arrays["item.b1"].size, model.arrays["user.b1"].size
        heads = len(np.atleast_1d(model.arrays["user.bias"]))
        return {
            "item.identity": (len(model.identity_ids), d),
            "item.features": (items.rows, d),
            "item.projection": (items.dense, d),
            "item.projection_bias": (d,),
            "item.w1": (d, item_hidden),
            "item.b1": (item_hidden,),
            "item.w2": (item_hidden, d),
            "item.b2": (d,),
            "user.query": (d, heads * d),
            "user.query_bias": (heads * d,),
            "user.bias": (heads, model.history_max),
            "user.value": (heads * d, d),
            "user.start": (d,),
            "user.profile": (profiles.rows, d),
            "user.w1": (d, user_hidden),
            "user.b1": (user_hidden,),
            "user.w2": (user_hidden, d),
            "user.b2": (d,),
        }

    @override
    def item_tower(self, model: TrainedModel) -> ItemTower:
        identities = {item_id: row for row, item_id in enumerate(model.identity_ids)}
        return ItemTower(model.item_space, identities, model.tower_arrays("item."))

    @override
    def user_tower(self, model: TrainedModel) -> UserTower:
        return UserTower(model.profile_space, model.tower_arrays("user."))

    @override
    def micro_step(self, model: TrainedModel, item_vectors: Floats) -> MicroStep:
        return MicroStep(item_vectors, model.micro)
