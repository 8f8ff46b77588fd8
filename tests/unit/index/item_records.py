"""What the index tests share: vectors, records, waiting, and a check of the placement."""

import time
from collections.abc import Callable

import numpy as np

from eddyline.schema.item_record import ItemRecord
from index.storage.index_version import IndexVersion


def units(n: int, dimension: int, seed: int) -> np.ndarray:
    """float32 (n, dimension): random unit vectors."""
    vectors = np.random.default_rng(seed).normal(size=(n, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def records(vectors: np.ndarray, first: int = 0, offset: int | None = None) -> list[ItemRecord]:
    """Items i<first>, i<first + 1>, … from this offset on (default: `first`)."""
    offset = first if offset is None else offset
    return [ItemRecord(f"i{first + n}", 0, offset + n, 0, 0, v) for n, v in enumerate(vectors)]


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline, pause_s = time.monotonic() + timeout_s, 0.0002
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(pause_s)
        pause_s = min(0.005, 2 * pause_s)


def each_live_item_has_one_entry(version: IndexVersion) -> None:
    """The live entries of segments and fresh buffer name each live row once."""
    entries = [segment.rows for segment in version.segments]
    entries.append(version.fresh.rows[: version.fresh_count])
    live = [rows[version.table.died_at[rows] > version.seq] for rows in entries]
    expected = version.table.live_rows(version.used, version.seq)
    assert sorted(np.concatenate(live)) == expected.tolist()
    assert [len(rows) for rows in live[:-1]] == list(version.live_entries)
