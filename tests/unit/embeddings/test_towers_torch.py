"""Torch and numpy compute the same towers: to 2e-4."""

import numpy as np
import pytest
import torch

from eddyline.schema.events import Item
from embeddings.models.bags import Bags, make_bags
from embeddings.models.two_tower import CatalogueFeatures, ItemModel, UserModel
from embeddings.towers import features
from embeddings.towers.item_tower import ItemTower
from embeddings.towers.numerics import unit
from embeddings.towers.user_tower import UserTower

D, H, LENGTH = 64, 96, 20
TOLERANCE = 2e-4
ITEMS = [
    Item(
        item_id=str(n),
        title=f"Part {n} again",
        categories=["Drama", "War"][: n % 3],
        attributes={"year": 1900 + n},
    )
    for n in range(120)
]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(5)


def shaken(model: torch.nn.Module) -> None:
    """Every parameter away from its initial value, zeros included."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)


@pytest.mark.parametrize("dense", [0, 8])
def test_item_tower(dense: int) -> None:
    rng = np.random.default_rng(1)
    dense_vectors = rng.normal(size=(len(ITEMS), dense)).astype(np.float32)
    has_dense = (np.arange(len(ITEMS)) % 3 > 0).astype(np.float32) if dense else None
    items = [
        Item(
            **{f: getattr(item, f) for f in item.__struct_fields__ if f != "vector"},
            vector=dense_vectors[n].tolist() if dense and n % 3 else None,
        )
        for n, item in enumerate(ITEMS)
    ]
    space = features.learn_items(items, dense=dense)
    bags = make_bags(space.of_item(item) for item in items)
    catalogue = CatalogueFeatures(
        bags, np.arange(len(items)), dense_vectors if dense else None, has_dense
    )
    model = ItemModel(len(items), space.rows, dense, dimension=D, hidden=H, dropout=0.5).eval()
    shaken(model)
    rows = torch.randperm(len(items))
    expected = model(catalogue, rows).detach().numpy()
    tower = ItemTower(space, {item.item_id: n for n, item in enumerate(items)}, model.export())
    found = tower.encode([items[row] for row in rows])
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    # A cold item: the layers agree on the input that numpy forms with its stand-in.
    cold = tower.inputs([Item(item_id="new", title="Part one", categories=["Drama"])])
    np.testing.assert_allclose(
        tower.blend(cold), model.blend(torch.from_numpy(cold)).detach().numpy(), atol=TOLERANCE
    )


def test_identity_dropout_is_for_training_alone() -> None:
    space = features.learn_items(ITEMS)
    catalogue = CatalogueFeatures(
        make_bags(space.of_item(i) for i in ITEMS), np.arange(len(ITEMS)), None, None
    )
    model = ItemModel(len(ITEMS), space.rows, 0, dimension=D, hidden=H, dropout=0.5)
    rows = torch.arange(len(ITEMS))
    content = model.inputs(
        CatalogueFeatures(catalogue_bags(space), np.full(len(ITEMS), -1), None, None), rows
    )
    dropped = (model.train().inputs(catalogue, rows) == content).all(dim=1).sum().item()
    assert 30 <= dropped <= 90
    assert (model.eval().inputs(catalogue, rows) == content).all(dim=1).sum().item() == 0


def catalogue_bags(space: features.FeatureSpace) -> Bags:
    return make_bags(space.of_item(item) for item in ITEMS)


def test_user_tower() -> None:
    rng = np.random.default_rng(2)
    profiles = [{"age": 15 + n, "gender": "FM"[n % 2]} if n % 3 else {} for n in range(90)]
    space = features.learn_profiles(profiles)
    model = UserModel(space.rows, dimension=D, hidden=H, history_max=LENGTH).eval()
    shaken(model)
    vectors = unit(rng.normal(size=(300, D)).astype(np.float32))
    places = rng.integers(0, 300, (90, LENGTH))
    counts = np.concatenate([[0, 0, 1, 2, 19, 20], rng.integers(0, 21, 84)])
    bags = make_bags(space.of_profile(p) for p in profiles)
    picked = bags.pick(torch.arange(90))
    expected = model(*(torch.from_numpy(part) for part in (vectors, places, counts)), picked)
    tower = UserTower(space, model.export())
    rows = [row[:n].tolist() for row, n in zip(places, counts, strict=True)]
    found = tower.encode(vectors, rows, profiles)
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=TOLERANCE)
    alone = np.array([tower.encode_one(vectors[h], p) for h, p in zip(rows, profiles, strict=True)])
    np.testing.assert_allclose(alone, expected.detach().numpy(), atol=TOLERANCE)
