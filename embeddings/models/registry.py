"""The models that can be trained, by kind.

A new model is a file and a line here (training), and a file and a line in
`embeddings.towers.runtimes` (run time).
"""

from __future__ import annotations

from collections.abc import Mapping

from embeddings.models.base import Model
from embeddings.models.two_tower import TwoTower

DEFAULT = TwoTower.kind
_ALL: tuple[Model, ...] = (TwoTower(),)
MODELS: Mapping[str, Model] = {model.kind: model for model in _ALL}
