"""The items of `make bench-item_visible`, and a generation over them whose answers are known
beforehand.

The item tower is that of every generation, with weights drawn by chance: what an item is about
(title, categories, year) says where it lies. The user tower is the simplest there is: a user's
vector is that of the item clicked last. So a user who clicked an anchor gets the items nearest to
it.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np

from eddyline.kafka.producers import now_ms
from eddyline.schema.events import Item
from eddyline.schema.item_record import attributes_of
from embeddings.bundle import bundle
from embeddings.bundle.bundle import NewBundle
from embeddings.towers import features
from embeddings.towers.base import TrainedModel
from embeddings.towers.features import FeatureSpace
from embeddings.towers.micro_step import MicroSettings
from embeddings.towers.numerics import Floats
from embeddings.towers.two_tower import KIND, VERSION, TwoTowerRuntime

D, HIDDEN, HISTORY = 64, 128, 20
CATEGORIES = [f"category {n}" for n in range(40)]
_SYLLABLES = "ka lo mi ru te sa no vi pe du ba ze ri fo ghi ju wa ly co ne".split()


def item(number: int, about: int = 0, price: int = 0) -> Item:
    """Item `i<number>`.

    Another `about` is another title, categories and year; the tower sees no price.
    """
    drawn = random.Random(f"{number}/{about}")
    words = ["".join(drawn.choices(_SYLLABLES, k=3)) for _ in range(3)]
    attributes: dict[str, str | float | bool] = {"year": drawn.randrange(1950, 2026)}
    if price:
        attributes["price"] = price
    return Item(
        item_id=f"i{number}",
        title=" ".join(words),
        categories=drawn.sample(CATEGORIES, 2),
        attributes=attributes,
        at_ms=now_ms() if about or price else 0,
    )


def anchor(number: int) -> Item:
    """An item that somebody clicked; nothing else is about the same."""
    like = item(-1 - number)
    return Item(
        item_id=f"anchor-{number}",
        title=like.title,
        categories=like.categories,
        attributes=like.attributes,
    )


def near(number: int, item_id: str) -> Item:
    """An item about the very same as an anchor, so it lies where the anchor lies."""
    like = anchor(number)
    return Item(
        item_id=item_id,
        title=like.title,
        categories=like.categories,
        attributes=like.attributes,
        at_ms=now_ms(),
    )


def write(folder: Path, count: int, anchors: int) -> None:
    """A generation "1" of `count` items and some anchors at `folder`."""
    rng = np.random.default_rng(7)
    known = [item(n) for n in range(count)]
    everything = [*known, *(anchor(n) for n in range(anchors))]
    space = features.learn_items(known)
    model = TrainedModel(
        kind=KIND,
        version=VERSION,
        dimension=D,
        history_max=HISTORY,
        item_space=space,
        profile_space=features.learn_profiles([{"age": 1}, {"age": 2}]),
        identity_ids=[one.item_id for one in known],
        arrays={
            **{f"item.{name}": a for name, a in _item_arrays(rng, count, space).items()},
            **{f"user.{name}": a for name, a in _user_arrays().items()},
        },
        micro=MicroSettings(),
    )
    n = len(everything)
    bundle.write(
        folder,
        NewBundle(
            generation="1",
            created_ms=now_ms(),
            model=model,
            item_ids=[one.item_id for one in everything],
            item_vectors=TwoTowerRuntime().item_tower(model).encode(everything),
            item_partitions=np.zeros(n, np.int32),
            item_offsets=np.full(n, -1),
            item_attributes=[attributes_of(one) for one in everything],
            cut={},
            measured={},
            item_at_ms=np.array([one.at_ms for one in everything], np.int64),
        ),
    )


def _item_arrays(rng: np.random.Generator, count: int, space: FeatureSpace) -> dict[str, Floats]:
    def draw(rows: int, norm: float) -> Floats:
        return rng.normal(0, norm / D**0.5, (rows, D)).astype(np.float32)

    zeros = np.zeros
    return {
        "identity": draw(count, 0.5),
        "features": draw(space.rows, 1.0),
        "projection": draw(0, 1.0),
        "projection_bias": zeros(D, np.float32),
        "w1": zeros((D, HIDDEN), np.float32),
        "b1": zeros(HIDDEN, np.float32),
        "w2": zeros((HIDDEN, D), np.float32),
        "b2": zeros(D, np.float32),
    }


def _user_arrays() -> dict[str, Floats]:
    """Nothing is added to the newest item's vector."""
    rows = features.learn_profiles([{"age": 1}, {"age": 2}]).rows
    shapes = {
        "query": (D, 2 * D),
        "query_bias": (2 * D,),
        "bias": (2, HISTORY),
        "value": (2 * D, D),
        "start": (D,),
        "profile": (rows, D),
        "w1": (D, HIDDEN),
        "b1": (HIDDEN,),
        "w2": (HIDDEN, D),
        "b2": (D,),
    }
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
