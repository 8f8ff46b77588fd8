"""The table of item keys against a dict, with keys that collide, freed labels and growth."""

from __future__ import annotations

import numpy as np
import pytest

from index.storage import key_table
from index.storage.key_table import KeyTable


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_table, "CAPACITY_MIN", 2)


def keys_that_collide(rng: np.random.Generator, n: int) -> np.ndarray:
    """Distinct ones, many with equal low bits, so that they want the same slots."""
    low = rng.integers(0, 3, 3 * n).astype(np.uint64)
    high = rng.integers(1, 2**40, 3 * n).astype(np.uint64) << np.uint64(20)
    return np.unique(high | low)[:n]


@pytest.mark.parametrize("seed", range(8))
def test_it_finds_what_a_dict_finds(seed: int) -> None:
    rng, table = np.random.default_rng(seed), KeyTable(1)
    known: dict[int, int] = {}  # label -> key
    free, labels = list[int](), 0
    pool = keys_that_collide(rng, 400)
    for _ in range(60):
        unused = np.setdiff1d(pool, np.array([*known.values()], np.uint64))
        more = rng.choice(unused, min(len(unused), int(rng.integers(0, 12))), replace=False)
        chosen = []
        for _ in more:
            chosen.append(free.pop() if free and rng.random() < 0.7 else labels)
            labels += chosen[-1] == labels
        before = table
        table = table.with_room(labels, len(more))
        assert table.find(pool).tolist() == before.find(pool).tolist()
        table.insert(np.array(chosen, np.int64), more)
        known |= dict(zip(chosen, more.tolist(), strict=True))
        if known and rng.random() < 0.5:
            ended = rng.choice([*known], int(rng.integers(1, len(known) + 1)) // 2, replace=False)
            table.remove(ended)
            for label in ended.tolist():
                del known[label]
                free.append(label)
        wanted = {key: label for label, key in known.items()}
        assert table.find(pool).tolist() == [wanted.get(key, -1) for key in pool.tolist()]
    assert labels > 50


def test_labels_that_come_and_go_take_no_more_memory() -> None:
    rng, table, sizes = np.random.default_rng(1), KeyTable(8), set()
    labels = np.arange(8)
    for _ in range(300):
        table = table.with_room(8, 8)
        table.insert(labels, rng.integers(1, 2**63, 8).astype(np.uint64))
        table.remove(labels)
        sizes.add(table.memory_bytes)
    assert max(sizes) <= 8 * 8 + 4 * 64


def test_an_item_takes_at_most_32_bytes() -> None:
    for n in (1_000, 1_024, 1_025, 100_000):
        table = KeyTable(n).with_room(n, n)
        table.insert(np.arange(n), np.arange(1, n + 1).astype(np.uint64))
        assert table.memory_bytes <= 32 * n


def test_an_answer_is_good_while_nothing_changed() -> None:
    table, keys = KeyTable(8, 8), np.arange(1, 9).astype(np.uint64)
    before = table.changes
    assert table.find(keys).tolist() == [-1] * 8 and table.changes == before
    table.insert(np.arange(3), keys[:3])
    after = table.changes
    assert after != before
    assert table.keys_at(np.arange(3)).tolist() == [1, 2, 3]
    table.remove(np.array([1]))
    assert table.changes not in (before, after)
    assert table.find(keys).tolist() == [0, -1, 2, -1, -1, -1, -1, -1]
