"""Tiles of fixed shape, and unit norm: the two things that make the same row give the same bits.

BLAS picks its kernel, and with it the order of its sums, by the shape of the matrices. A row that is computed
alone, among 7 or among 64 others would differ in its last bits. So rows go through matrix products in tiles
of exactly `TILE` rows, the last one padded.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

# 32 rows: at 64 dimensions the fastest of 8 … 256 per row, and a single row still costs well under 1 ms.
TILE = 32
# A shorter vector has no direction that float32 could tell; it becomes the first unit vector.
NORM_MIN = 1e-8


def tiles(n: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of each tile over n rows.

    >>> list(tiles(70))
    [(0, 32), (32, 64), (64, 70)]
    """
    for start in range(0, n, TILE):
        yield start, min(start + TILE, n)


def padded(rows: Floats) -> Floats:
    """The rows as a whole tile, float32 (TILE, d), zeros at its end; the array itself where they are one.

    rows: float32 (n, d), n ≤ TILE

    >>> padded(np.ones((2, 64), np.float32)).shape
    (32, 64)
    """
    if len(rows) == TILE:
        return rows
    tile = np.zeros((TILE, rows.shape[1]), np.float32)
    tile[: len(rows)] = rows
    return tile


def unit(rows: Floats) -> Floats:
    """The rows at unit norm, always finite for finite rows. rows: float32 (n, d); a new array.

    >>> unit(np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)).tolist()
    [[0.6000000238418579, 0.800000011920929], [1.0, 0.0]]
    """
    norms = np.sqrt(np.add.reduce(rows * rows, axis=1))
    if norms.size and norms.min() < NORM_MIN:
        rows = rows.copy()
        short = norms < NORM_MIN
        rows[short] = 0.0
        rows[short, 0] = 1.0
        norms[short] = 1.0
    result: Floats = rows / norms[:, None]
    return result
