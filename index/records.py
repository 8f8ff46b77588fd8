"""Checks and columns of item records and queries, shared by the live index and the oracle."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import attrgetter

import numpy as np

from eddyline.errors import VectorRejected
from eddyline.schema.item_record import ItemRecord
from index.arrays import Ints, Vector
from index.port import Watermark

# float32 rounding of a normalised vector of 4,096 numbers stays below 1e-5.
NORM_ERROR_MAX = 1e-3

# Below every offset and time of a record.
_NO_WATERMARK = Watermark(-(2**63), -(2**63), -(2**63))

_shape_of = attrgetter("shape")
_stamps_of = attrgetter("partition", "at_ms", "written_us", "offset")


def check_query(vector: Vector, dimension: int) -> None:
    """Raise VectorRejected unless the query vector is a finite float array (d,)."""
    if vector.shape != (dimension,):
        raise VectorRejected(
            f"query vector: shape {vector.shape}, the index has dimension {dimension}"
        )
    wide = vector.astype(np.float64)  # squares may overflow float32
    # The sum of squares is finite if every number is; one product is cheaper than isfinite.
    if not math.isfinite(wide.dot(wide)):
        raise VectorRejected("query vector: holds NaN or infinity")


def stack_vectors(records: Sequence[ItemRecord], dimension: int) -> Vector:
    """float32 (n, d): vectors of the records that carry one.

    Raises VectorRejected, naming the first item whose vector has a wrong shape or norm.
    """
    vectors = [record.vector for record in records if record.vector is not None]
    if not vectors:
        return np.empty((0, dimension), np.float32)
    shapes = set(map(_shape_of, vectors))
    if shapes != {(dimension,)}:
        bad = next(r for r in records if r.vector is not None and r.vector.shape != (dimension,))
        shape = getattr(bad.vector, "shape", None)
        raise VectorRejected(
            f"item {bad.item_id!r}: shape {shape}, the index has dimension {dimension}"
        )
    stacked = np.concatenate(vectors).astype(np.float32, copy=False)
    stacked = stacked.reshape(len(vectors), dimension)
    squares = np.einsum("ij,ij->i", stacked, stacked)
    # Comparisons with NaN are false, so this catches NaN and infinity too.
    good = np.abs(squares - 1.0) <= 2 * NORM_ERROR_MAX
    if np.count_nonzero(good) < len(good):
        at = int(np.argmin(good))
        norm = float(np.sqrt(squares[at]))
        what = f"norm {norm:.6g}, must be 1" if np.isfinite(norm) else "holds NaN or infinity"
        item_id = [record.item_id for record in records if record.vector is not None][at]
        raise VectorRejected(f"item {item_id!r}: {what}")
    return stacked


def stamps_of(records: Sequence[ItemRecord]) -> Ints:
    """int64 (n, 4): partition, at_ms, written_us and offset of each record."""
    return np.array(list(map(_stamps_of, records)), np.int64).reshape(len(records), 4)


def watermarks_after(watermarks: Mapping[int, Watermark], stamps: Ints) -> dict[int, Watermark]:
    """The watermarks after records with these stamps (see `stamps_of`), applied or ignored."""
    after = dict(watermarks)
    for partition in set(stamps[:, 0].tolist()):
        old = after.get(partition, _NO_WATERMARK)
        of_partition = stamps[stamps[:, 0] == partition]
        at_ms, written_us, offset = np.maximum.reduce(of_partition, axis=0)[1:].tolist()
        after[partition] = Watermark(
            max(old.offset, offset), max(old.at_ms, at_ms), max(old.written_us, written_us)
        )
    return after
