"""A small generation, with towers from a seed instead of a training, and logs to evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eddyline.schema.events import Click, Item
from embeddings.bundle import bundle
from embeddings.bundle.bundle import Bundle, NewBundle
from embeddings.towers import features, runtimes
from embeddings.towers.base import TrainedModel
from embeddings.towers.micro_step import MicroSettings
from evaluation.event_log import EventLog, LogBuilder

ITEMS, D = 30, 16
# 2020-09-13, as ingest refuses events from before 1990.
BASE_MS = 1_600_000_000_000


def make_bundle(
    folder: Path,
    items: Sequence[Item],
    generation: str = "1",
    *,
    seed: int = 7,
    dimension: int = D,
    history_max: int = 5,
) -> Bundle:
    """Towers from a seed; every item has an ID embedding. A step moves an embedding far."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(0, 0.4, shape).astype(np.float32)

    ids = [item.item_id for item in items]
    empty = features.learn_profiles([])
    model = TrainedModel(
        kind="two_tower",
        version=1,
        dimension=dimension,
        history_max=history_max,
        item_space=empty,
        profile_space=empty,
        identity_ids=ids,
        arrays={
            "item.identity": draw(len(ids), dimension),
            "item.features": draw(empty.rows, dimension),
            "item.projection": draw(0, dimension),
            "item.projection_bias": draw(dimension),
            **{f"item.{name}": draw(dimension, dimension) for name in ("w1", "w2")},
            **{f"item.{name}": draw(dimension) for name in ("b1", "b2")},
            "user.query": draw(dimension, 2 * dimension),
            "user.query_bias": draw(2 * dimension),
            "user.bias": draw(2, history_max),
            "user.value": draw(2 * dimension, dimension),
            "user.start": draw(dimension),
            "user.profile": draw(empty.rows, dimension),
            **{f"user.{name}": draw(dimension, dimension) for name in ("w1", "w2")},
            **{f"user.{name}": draw(dimension) for name in ("b1", "b2")},
        },
        micro=MicroSettings(rate=0.05, min_steps_before=1),
    )
    tower = runtimes.runtime(model.kind, model.version).item_tower(model)
    new = NewBundle(
        generation=generation,
        created_ms=1_000,
        model=model,
        item_ids=ids,
        item_vectors=tower.encode(items),
        item_partitions=np.zeros(len(ids), np.int32),
        item_offsets=np.arange(len(ids)),
        item_attributes=[{}] * len(ids),
        cut={"0": len(ids)},
        measured={},
    )
    bundle.write(folder / generation, new)
    return bundle.load(folder / generation)


def make_items(n: int = ITEMS) -> list[Item]:
    """Items; some become live in the middle of the log, some never in time."""
    times = {n - 1: 10**9, n - 2: 50_000, n - 3: 50_001, n - 4: 50_001}
    times = {number: BASE_MS + at_ms for number, at_ms in times.items()}
    return [Item(item_id=f"i{number}", at_ms=times.get(number, 0)) for number in range(n)]


def make_log(
    seed: int, *, events: int = 160, users: int = 6, items: Sequence[Item] | None = None
) -> EventLog:
    """Events with baskets, repeats, dislikes, several users at one time, items that are unknown."""
    rng = np.random.default_rng(seed)
    described = make_items() if items is None else list(items)
    builder, at_ms = LogBuilder(changes=described), BASE_MS + 1_000
    for _ in range(events):
        at_ms += int(rng.choice([0, 0, 500, 1_000]))
        builder.add(
            Click(
                user_id=f"u{rng.integers(users)}",
                item_id=f"i{int(ITEMS * rng.random() ** 2)}",
                at_ms=at_ms,
                kind="dislike" if rng.random() < 0.1 else "click",
            )
        )
    builder.add(Click(user_id="u0", item_id="nowhere", at_ms=at_ms))
    return builder.build()
