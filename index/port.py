"""The index's port: vectors of items in, nearest items out.

Implemented by `index.exact` (the oracle) and `index.hnsw` (the live index); one contract suite runs over
both. Every write carries the item's source offset, its version: an older or equal one is a no-op, so that
writes are idempotent and a delete wins for ever over whatever was written before it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from eddyline.errors import VectorRejected
from eddyline.records import ItemRecord
from index.filters import Filter

Vector = npt.NDArray[np.float32]

# float32 rounding of a normalised vector of 4,096 numbers stays below 1e-5; what is further off was not
# normalised.
NORM_ERROR_MAX = 1e-3


class Hit(NamedTuple):
    """One live item as a query found it.

    score:      inner product of the query and the item's current vector, in float64; 0.0 where nothing was
                asked
    at_ms:      the item's own event time, 0 is unknown
    written_us: when its vector was written, microseconds since 1970
    offset:     its version, the offset in the `items` topic; -1 where it came from a file
    """

    item_id: str
    score: float
    at_ms: int
    written_us: int
    offset: int


class Watermark(NamedTuple):
    """The furthest record of one `items` partition that has been applied.

    offset: its source offset; at_ms, written_us: the largest of each that were seen
    """

    offset: int
    at_ms: int
    written_us: int


class Recall(NamedTuple):
    """What the recall guard knows (`index.guard`).

    step:            "normal", or what is done about a recall that is too low: "wider", "rebuild", "exact"
    samples:         shadow queries that the estimate is made of; 0: the figures below mean nothing yet
    estimate:        share of the exact answer that the index found, with its 95% interval low … high
    shadowed, skipped: sampled queries that were compared, and that were left out to save CPU
    raised, lowered: steps taken towards more work for each query, and back
    """

    step: str
    samples: int
    estimate: float
    low: float
    high: float
    shadowed: int
    skipped: int
    raised: int
    lowered: int


@dataclass(frozen=True, slots=True)
class IndexStats:
    """What the index holds and does.

    live: items a query can return; tombstones: retired items whose version is kept; main: items in the graph
    (0: every query is an exact scan); fresh: rows scanned beside it; stale: graph entries that no longer
    count;
    rows: rows of the vector table, dead ones included
    applied, ignored, rejected: records; refused: graph searches that had to be answered by an exact scan
    rebuild_error: what the last rebuild died of, "" where it went well; then the old graph is still in use
    main_name, main_bytes: which main index (`index.mains`) and its memory; breadth: candidates of a search
    recall: of the recall guard, None where there is none
    """

    live: int = 0
    tombstones: int = 0
    main: int = 0
    fresh: int = 0
    stale: int = 0
    rows: int = 0
    applied: int = 0
    ignored: int = 0
    rejected: int = 0
    refused: int = 0
    rebuilding: bool = False
    rebuilds: int = 0
    rebuilds_failed: int = 0
    rebuild_s: float = 0.0
    rebuild_error: str = ""
    main_name: str = ""
    main_bytes: int = 0
    breadth: int = 0
    recall: Recall | None = None


class Index(Protocol):
    """Items by vector.

    Thread rule: any thread, every method. Writers wait for each other; a query waits for nobody and sees
    whole batches only. What a write acknowledged by returning, every later query sees.
    """

    @property
    def dimension(self) -> int:
        """The length of every vector."""

    def apply(self, records: Sequence[ItemRecord]) -> int:
        """Apply upserts and retires as one batch: queries see all of it or nothing. Returns how many counted.

        Order within the batch does not matter: of one item the record with the highest offset wins.
        Raises VectorRejected, naming the item, where any vector does not fit; nothing is written then.
        """

    def upsert(self, records: Sequence[ItemRecord]) -> int:
        """`apply` of records that all carry a vector; raises ValueError where one does not."""

    def retire(self, records: Sequence[ItemRecord]) -> int:
        """`apply` of records that all are deletes; raises ValueError where one is not."""

    def query(
        self, vector: Vector, k: int, exclude: Collection[str] = (), asked: Filter | None = None
    ) -> list[Hit]:
        """The live items of the highest inner product, best first, equal scores by item id.

        vector: float32 (d,), finite
        asked:  only items that pass this filter; k of them, where there are k
        k:      as many items as there are, where fewer are live and not excluded; [] for k <= 0
        Raises VectorRejected where the vector does not fit.
        """

    def vectors_of(self, item_ids: Sequence[str]) -> Vector:
        """float32 (h, d): the vectors of the live ones among the items, order and repeats kept."""

    def describe(self, item_ids: Sequence[str], asked: Filter | None = None) -> list[Hit | None]:
        """For each item its `Hit` with score 0.0, None where it is not live or does not pass the filter."""

    def newest(self, k: int, exclude: Collection[str] = (), asked: Filter | None = None) -> list[Hit]:
        """The live items of the largest `at_ms` that pass, newest first, equal ones by item id; score 0.0."""

    def watermarks(self) -> Mapping[int, Watermark]:
        """The watermark of each `items` partition that a record came from."""

    def stats(self) -> IndexStats:
        """Sizes and counters now."""

    def close(self) -> None:
        """Stop background work. Queries go on, on what is there."""


def check_query(vector: Vector, dimension: int) -> None:
    """Raise VectorRejected where a query vector is not a finite float array (d,)."""
    if vector.shape != (dimension,):
        raise VectorRejected(f"query vector: shape {vector.shape}, the index has dimension {dimension}")
    if not np.isfinite(vector).all():
        raise VectorRejected("query vector: holds NaN or infinity")


def stack_vectors(records: Sequence[ItemRecord], dimension: int) -> Vector:
    """float32 (n, d) of records with vectors; raises VectorRejected, naming the first that does not fit."""
    vectors = [record.vector for record in records if record.vector is not None]
    for record, vector in zip(records, vectors, strict=True):
        if vector.shape != (dimension,):
            raise VectorRejected(
                f"item {record.item_id!r}: shape {vector.shape}, the index has dimension {dimension}"
            )
    rows = np.array(vectors, np.float32).reshape(len(vectors), dimension)
    squares = np.einsum("ij,ij->i", rows, rows)
    # A comparison with NaN is false, so this catches NaN and infinity as well.
    good = np.abs(squares - 1.0) <= 2 * NORM_ERROR_MAX
    if not good.all():
        at = int(np.argmin(good))
        norm = float(np.sqrt(squares[at]))
        what = f"norm {norm:.6g}, must be 1" if np.isfinite(norm) else "holds NaN or infinity"
        raise VectorRejected(f"item {records[at].item_id!r}: {what}")
    return rows


def check_kinds(records: Sequence[ItemRecord], *, retired: bool) -> None:
    """Raise ValueError where a record is a delete among upserts, or the reverse."""
    for record in records:
        if record.retired != retired:
            what = "carries a vector" if retired else "is a delete"
            raise ValueError(f"item {record.item_id!r} {what}")


def watermarks_after(
    watermarks: Mapping[int, Watermark], records: Sequence[ItemRecord]
) -> dict[int, Watermark]:
    """The watermarks once these records have been applied or ignored."""
    after = dict(watermarks)
    for record in records:
        old = after.get(record.partition)
        if old is None:
            new = Watermark(record.offset, record.at_ms, record.written_us)
        elif record.offset > old.offset or record.at_ms > old.at_ms or record.written_us > old.written_us:
            new = Watermark(
                max(old.offset, record.offset),
                max(old.at_ms, record.at_ms),
                max(old.written_us, record.written_us),
            )
        else:
            continue
        after[record.partition] = new
    return after


def winners(records: Sequence[ItemRecord]) -> dict[str, ItemRecord]:
    """Of each item in a batch the record with the highest offset, the first one where equal."""
    chosen: dict[str, ItemRecord] = {}
    for record in records:
        before = chosen.get(record.item_id)
        if before is None or record.offset > before.offset:
            chosen[record.item_id] = record
    return chosen
