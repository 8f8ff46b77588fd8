"""The micro-step alone, against torch: `python -m benchmarks.ingest_micro FOLDER`.

A batch as in ingest: different users, each with a full history of rows, an embedding as bytes and
an event key; the results are the new bytes. Tower forward, draw of the negatives, step and packing
are in the figure on both sides. torch runs the training model's forward and autograd on the whole
batch at once, and then event by event. CPU time of one thread. The generation that was made
for it is left in FOLDER.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from eddyline.schema.user_history import Entry
from embeddings.bundle import bundle
from embeddings.bundle.bundle import Bundle
from embeddings.data.examples import TrainingData
from embeddings.models.bags import make_bags
from embeddings.models.base import Recipe
from embeddings.models.two_tower import UserModel
from embeddings.training.trainer import train
from sandbox.datasets import synthetic
from streams.clicks.micro_steps import MicroSteps, Step

SIZES = (32, 256)
SECONDS = 0.6
SEED = 7
ITEMS = 2_000


def prepare(folder: Path) -> Bundle:
    """A generation over the generated data set, trained briefly: quality does not change cost."""
    dataset = synthetic.generate(items=ITEMS, users=200, clicks=8_000, seed=SEED)
    profiles = {user: dict(profile.attributes) for user, profile in dataset.profiles.items()}
    data = TrainingData(items=dataset.items, profiles=profiles, clicks=dataset.clicks)
    train(data, folder / "1", "1", recipe=Recipe(epochs=1, seed=SEED, threads=1))
    return bundle.load(folder / "1")


def make_batch(
    towers: Bundle, size: int
) -> tuple[list[list[Entry]], list[tuple[str, int, str]], dict[str, tuple[int, bytes]]]:
    """(lists, (user, target row, key) and stored embeddings of `size` users)."""
    rng = np.random.default_rng(SEED)
    ids = towers.item_ids
    lists = [[Entry(ids[row], 1) for row in rng.integers(len(ids), size=20)] for _ in range(size)]
    events = [(f"u{n}", int(rng.integers(len(ids))), f"event-{n}") for n in range(size)]
    vectors = (rng.normal(size=(size, towers.dimension)) * 0.02).astype("<f4")
    return (
        lists,
        events,
        {user: (9, v.tobytes()) for (user, _, _), v in zip(events, vectors, strict=True)},
    )


def by_numpy(towers: Bundle, size: int) -> Callable[[], object]:
    """As ingest does it, from the lists on."""
    micro, (lists, events, stored) = MicroSteps(towers), make_batch(towers, size)
    counts = {user: 10 for user, _, _ in events}

    def step() -> object:
        steps = [
            Step(u, micro.history(seen), row, key)
            for seen, (u, row, key) in zip(lists, events, strict=True)
        ]
        return micro.run(steps, counts, stored, {})

    return step


def by_torch(towers: Bundle, size: int, batch: int) -> Callable[[], object]:
    """The same, by the training model and autograd, in batches of `batch`."""
    torch.set_num_threads(1)
    lists, events, stored = make_batch(towers, size)
    hidden, length = towers.user_tower.arrays["w1"].shape[1], towers.user_tower.history_max
    model = UserModel(
        towers.user_tower.space.rows, dimension=towers.dimension, hidden=hidden, history_max=length
    )
    vectors, s = torch.from_numpy(towers.item_vectors.copy()), towers.micro.settings
    none = make_bags(([], []) for _ in range(batch))
    micro = MicroSteps(towers)

    def one(at: int) -> dict[str, tuple[int, bytes]]:
        mine = events[at : at + batch]
        places = np.zeros((batch, length), np.int64)
        histories = [micro.history(seen) for seen in lists[at : at + batch]]
        for n, rows in enumerate(histories):
            places[n, : len(rows)] = rows
        sizes = torch.tensor([len(rows) for rows in histories])
        with torch.no_grad():
            f = model(vectors, torch.from_numpy(places), sizes, none)
        packed = b"".join(stored[user][1] for user, _, _ in mine)
        before = np.frombuffer(packed, "<f4").reshape(batch, -1).copy()
        e = torch.from_numpy(before).requires_grad_()
        drawn = torch.from_numpy(towers.micro.draw([key for _, _, key in mine]))
        targets = torch.tensor([row for _, row, _ in mine])
        u = F.normalize(f + e, dim=1)
        positive = (u * vectors[targets]).sum(1, keepdim=True)
        negative = torch.matmul(vectors[drawn], u[:, :, None])[:, :, 0]
        negative = negative.masked_fill(drawn == targets[:, None], -torch.inf)
        logits = torch.cat([positive, negative], 1) / s.temperature
        F.cross_entropy(logits, torch.zeros(batch, dtype=torch.long), reduction="sum").backward()
        with torch.no_grad():
            moved = e * (1 - s.decay) - s.rate * e.grad
            moved *= (s.norm_max / moved.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1.0)
        after = moved.numpy()
        return {user: (10, after[n].tobytes()) for n, (user, _, _) in enumerate(mine)}

    return lambda: [one(at) for at in range(0, size, batch)]


def cpu_us(work: Callable[[], object], events: int) -> float:
    """CPU microseconds an event, the best of three runs of a while."""
    best = float("inf")
    for _ in range(3):
        runs, begun, end = 0, time.process_time(), time.perf_counter() + SECONDS / 3
        while time.perf_counter() < end or not runs:
            work()
            runs += 1
        best = min(best, (time.process_time() - begun) / (runs * events) * 1e6)
    return best


def main() -> None:
    """Measure and print one JSON line."""
    towers = prepare(Path(sys.argv[1]))
    result: dict[str, float] = {}
    for size in SIZES:
        for work in (by_numpy(towers, size), by_torch(towers, size, size)):
            work()
        result[f"numpy_{size}"] = cpu_us(by_numpy(towers, size), size)
        result[f"torch_{size}"] = cpu_us(by_torch(towers, size, size), size)
    result["torch_one"] = cpu_us(by_torch(towers, 32, 1), 32)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
