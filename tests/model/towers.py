"""Towers for the simulations: the embedding is a checksum of what was learned, in order."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np

from eddyline.errors import VectorRejected
from tests.model import model

REFUSED_TITLE = "no vector"
# Exact in float32: the embedding counts in the integers below this prime.
PRIME = 8_191


def code(text: str) -> int:
    """A number of a text."""
    return sum(map(ord, text)) % 97


class Towers:
    """Towers whose embedding is a checksum of what was learned, in order. Thread rule: any."""

    dimension = 1

    def __init__(self, generation: str, items: Sequence[str], least: int) -> None:
        self.generation = generation
        self.rows = MappingProxyType({item: row for row, item in enumerate(items)})
        self.item_vectors = np.array([[code(item)] for item in items], np.float32)
        self.user_tower = SimpleNamespace(history_max=3, encode=self._history)
        self.item_tower = SimpleNamespace(encode=self._encode)
        self.micro = SimpleNamespace(min_steps_before=least, step=self._step)

    def _history(self, table: Any, histories: Sequence[Any], profiles: Sequence[Any]) -> Any:
        sums = [sum((n + 2) * int(table[row][0]) for n, row in enumerate(h)) for h in histories]
        return np.array(sums, np.float32).reshape(-1, 1)

    def _step(self, forward: Any, embedding: Any, targets: Any, keys: Sequence[str]) -> Any:
        new = [
            (7 * int(e) + int(f) + 3 * int(self.item_vectors[t][0]) + code(key)) % PRIME
            for e, f, t, key in zip(embedding[:, 0], forward[:, 0], targets, keys, strict=True)
        ]
        return np.array(new, np.float32).reshape(-1, 1)

    def _encode(self, items: Sequence[Any]) -> Any:
        if any(item.title == REFUSED_TITLE for item in items):
            raise VectorRejected("no unit vector")
        return np.ones((len(items), 1), np.float32)


def checksum(learned: Sequence[model.Learned]) -> int:
    """What `Towers` make of these steps."""
    found = 0
    for step in learned:
        history = sum((n + 2) * code(item) for n, item in enumerate(step.history))
        found = (7 * found + history + 3 * code(step.item_id) + code(step.key)) % PRIME
    return found
