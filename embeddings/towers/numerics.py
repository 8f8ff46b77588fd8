"""Row-wise products and unit norm: the same row gives the same bits in any batch.

BLAS chooses the kernel of a matrix product, and so the order of its sums, by the shape of the
matrices and, on some processors (AMD Zen, Intel Haswell), by the row's position. Therefore every
row is a vector-matrix product of its own: its bits depend on the row and the matrix alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

# Rows are computed in blocks of this many, which bounds the memory of intermediate results.
BLOCK = 256
# float32 cannot express the direction of a shorter vector; `unit` returns the first unit vector.
NORM_MIN = 1e-8


def blocks(n: int, size: int = BLOCK) -> Iterator[tuple[int, int]]:
    """(start, stop) of each block over n rows.

    >>> list(blocks(600))
    [(0, 256), (256, 512), (512, 600)]
    """
    for start in range(0, n, size):
        yield start, min(start + size, n)


def row_products(rows: Floats, matrix: Floats) -> Floats:
    """Each row times the matrix; the bits of a row do not depend on the batch.

    rows: float32 (n, d); matrix: float32 (d, m); returns float32 (n, m)

    >>> row_products(np.eye(2, dtype=np.float32), np.ones((2, 3), np.float32)).tolist()
    [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    # numpy computes a stack of (1, d) @ (d, m) with one BLAS matrix-vector product each.
    result: Floats = np.matmul(rows[:, None, :], matrix)[:, 0]
    return result


def unit(rows: Floats) -> Floats:
    """The rows scaled to unit norm, a new float32 (n, d); finite for finite rows.

    rows: float32 (n, d)

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
