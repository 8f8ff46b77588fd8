"""A second kind of model: one file for training, one for run time, one line in each registry."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from eddyline.errors import BundleError
from eddyline.schema.events import Click, Item
from embeddings.bundle import bundle
from embeddings.data.examples import TrainingData
from embeddings.models.base import Model, OnProgress, Recipe
from embeddings.models.registry import MODELS
from embeddings.towers import runtimes
from embeddings.towers.base import ItemEncoder, ModelRuntime, TrainedModel, UserEncoder
from embeddings.towers.features import FeatureSpace
from embeddings.towers.micro_step import MicroSettings, MicroStep
from embeddings.towers.numerics import Floats, unit
from embeddings.training.trainer import train

D, INTERESTS = 8, 2


class Table(Model):
    """A vector per item; a user is the mean of the history."""

    kind = "table"

    def fit(
        self, data: TrainingData, recipe: Recipe, on_progress: OnProgress | None = None
    ) -> TrainedModel:
        ids = [item.item_id for item in data.catalogue]
        draws = np.random.default_rng(recipe.seed).normal(size=(len(ids), D))
        return TrainedModel(
            kind=self.kind,
            version=2,
            dimension=D,
            history_max=recipe.history_max,
            item_space=FeatureSpace(),
            profile_space=FeatureSpace(),
            identity_ids=ids,
            arrays={"table": unit(draws.astype(np.float32))},
            micro=MicroSettings(),
        )


class TableItems(ItemEncoder):
    def __init__(self, rows: Mapping[str, int], table: Floats) -> None:
        self._rows, self._table = rows, table

    def encode(self, items: Sequence[Item]) -> Floats:
        return self._table[[self._rows.get(item.item_id, 0) for item in items]]


class TableUsers(UserEncoder):
    """encode_one returns several interest vectors: the newest items of the history."""

    def __init__(self, history_max: int) -> None:
        self.history_max = history_max

    def encode(
        self,
        table: Floats,
        histories: Sequence[Sequence[int]],
        profiles: Sequence[Mapping[str, object]],
    ) -> Floats:
        return unit(np.stack([table[list(h[: self.history_max])].mean(axis=0) for h in histories]))

    def encode_one(self, history: Floats, profile: Mapping[str, object]) -> Floats:
        return history[:INTERESTS]

    def combine(self, forward: Floats, embedding: Floats | None) -> Floats:
        return forward if embedding is None else unit(forward + embedding)


class TableRuntime(ModelRuntime):
    kind, version, arrays = "table", 2, ("table",)

    def shapes(self, model: TrainedModel) -> Mapping[str, tuple[int, ...]]:
        return {"table": (len(model.identity_ids), model.dimension)}

    def item_tower(self, model: TrainedModel) -> TableItems:
        rows = {item_id: row for row, item_id in enumerate(model.identity_ids)}
        return TableItems(rows, model.arrays["table"])

    def user_tower(self, model: TrainedModel) -> TableUsers:
        return TableUsers(model.history_max)

    def micro_step(self, model: TrainedModel, item_vectors: Floats) -> MicroStep:
        return MicroStep(item_vectors, model.micro)


ITEMS = [Item(item_id=f"i{n}") for n in range(6)]
DATA = TrainingData(ITEMS, {}, [Click(user_id="u", item_id="i1", at_ms=1)])


def test_a_second_model_is_trained_stored_and_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(runtimes.RUNTIMES, "table", TableRuntime())
    report = train(DATA, tmp_path / "g", "1", model=Table(), recipe=Recipe(seed=5))
    assert (report.items, report.events, list(report.losses)) == (6, 1, [])
    loaded = bundle.load(tmp_path / "g")
    assert (loaded.model.kind, loaded.model.version, loaded.dimension) == ("table", 2, D)
    assert loaded.item_tower.encode(ITEMS).tobytes() == loaded.item_vectors.tobytes()
    forward = loaded.user_tower.encode(loaded.item_vectors, [[1, 2]], [{}])
    interests = loaded.user_tower.encode_one(loaded.item_vectors[[3, 2, 1]], {})
    assert (forward.shape, interests.shape) == ((1, D), (INTERESTS, D))
    embedding = loaded.micro.step(forward, np.zeros((1, D), np.float32), [1], ["event"])
    assert loaded.user_tower.combine(interests, embedding[0]).shape == (INTERESTS, D)
    (tmp_path / "g" / "table.npy").unlink()
    with pytest.raises(BundleError, match=r"table\.npy: is missing"):
        bundle.load(tmp_path / "g")


def test_a_release_without_its_runtime_refuses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setitem(runtimes.RUNTIMES, "table", TableRuntime())
        train(DATA, tmp_path / "g", "1", model=Table())
    with pytest.raises(BundleError, match="model kind 'table' is unknown, this release reads"):
        bundle.load(tmp_path / "g")


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_every_model_has_a_runtime_of_its_kind(kind: str) -> None:
    assert MODELS[kind].kind == runtimes.RUNTIMES[kind].kind == kind
