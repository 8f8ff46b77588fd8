"""The index's port: vectors of items in, nearest items out.

Implemented by `index.exact` (the oracle) and `index.backends.hnswlib` (the live index); one contract suite runs over
both. Every write carries the item's source offset, its version: an older or equal one is a no-op, so that
writes are idempotent and a delete wins for ever over whatever was written before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from eddyline.errors import VectorRejected
from eddyline.schema.item_record import ItemRecord
from index.arrays import Ints, Vector
from index.filters import Filter

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


_hit: Callable[[Iterable[object]], Hit] = partial(tuple.__new__, Hit)
_shape_of = attrgetter("shape")
_stamps_of = attrgetter("partition", "at_ms", "written_us", "offset")


class SearchResult:
    """The answer of a query as columns: what most callers need of it costs no object for each item.

    ids:    best first; scores: float64 (n,), as `Hit.score`
    facts:  int64 (n, 3): at_ms, written_us and offset, as in `Hit`
    """

    __slots__ = ("facts", "ids", "scores")

    def __init__(
        self, ids: list[str], scores: npt.NDArray[np.float64], facts: npt.NDArray[np.int64]
    ) -> None:
        """Over these columns, of the same length."""
        self.ids, self.scores, self.facts = ids, scores, facts

    @classmethod
    def of(cls, hits: Sequence[Hit]) -> SearchResult:
        """The columns of some hits."""
        facts = np.array([hit[2:] for hit in hits], np.int64).reshape(len(hits), 3)
        return cls(
            [hit.item_id for hit in hits], np.array([hit.score for hit in hits], np.float64), facts
        )

    def __len__(self) -> int:
        """How many items."""
        return len(self.ids)

    def hits(self) -> list[Hit]:
        """An object for each item."""
        parts = zip(self.ids, self.scores.tolist(), *self.facts.T.tolist(), strict=True)
        # What `Hit(*part)` does, without a Python call for each of hundreds.
        return list(map(_hit, parts))


class Watermark(NamedTuple):
    """The furthest record of one `items` partition that has been applied.

    offset: its source offset; at_ms, written_us: the largest of each that were seen
    """

    offset: int
    at_ms: int
    written_us: int


# Below everything that a record can say.
NO_WATERMARK = Watermark(-(2**63), -(2**63), -(2**63))


class RecallEstimate(NamedTuple):
    """What the recall guard knows (`index.recall_guard`).

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
    count; tiers, tiered: smaller graphs beside the main one, and the items they stand for
    rows: rows of the vector table, dead ones included
    applied, ignored, rejected: records; refused: graph searches that had to be answered by an exact scan
    rebuild_error: what the last rebuild died of, "" where it went well; then the old graph is still in use
    main_name, main_bytes: which main index (`index.backends`) and its memory; breadth: candidates of a search
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
    recall: RecallEstimate | None = None
    tiers: int = 0
    tiered: int = 0


class Index(Protocol):
    """Items by vector.

    Thread rule: any thread, every method. Writers wait for each other; a query waits for nobody and sees
    whole batches only. What a write acknowledged by returning, every later query sees.
    """

    @property
    def dimension(self) -> int:
        """The length of every vector."""

    def apply(self, records: Sequence[ItemRecord], others: Sequence[ItemRecord] = ()) -> int:
        """Apply upserts and retires as one batch: queries see all of it or nothing. Returns how many counted.

        others: records of items that are held elsewhere (another shard): they move the watermarks, no more
        Order within the batch does not matter: of one item the record with the highest offset wins.
        Raises VectorRejected, naming the item, where any vector does not fit; nothing is written then.
        """

    def upsert(self, records: Sequence[ItemRecord]) -> int:
        """`apply` of records that all carry a vector; raises ValueError where one does not."""

    def retire(self, records: Sequence[ItemRecord]) -> int:
        """`apply` of records that all are deletes; raises ValueError where one is not."""

    def query(
        self, vector: Vector, k: int, exclude: Collection[str] = (), filters: Filter | None = None
    ) -> list[Hit]:
        """The live items of the highest inner product, best first, equal scores by item id.

        vector: float32 (d,), finite
        asked:  only items that pass this filter; k of them, where there are k
        k:      as many items as there are, where fewer are live and not excluded; [] for k <= 0
        Raises VectorRejected where the vector does not fit.
        """

    def find(
        self, vector: Vector, k: int, exclude: Collection[str] = (), filters: Filter | None = None
    ) -> SearchResult:
        """The same answer as `query`, as columns."""

    def vectors_of(self, item_ids: Sequence[str]) -> Vector:
        """float32 (h, d): the vectors of the live ones among the items, order and repeats kept."""

    def describe(self, item_ids: Sequence[str], filters: Filter | None = None) -> list[Hit | None]:
        """For each item its `Hit` with score 0.0, None where it is not live or does not pass the filter."""

    def newest(
        self, k: int, exclude: Collection[str] = (), filters: Filter | None = None
    ) -> list[Hit]:
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
        raise VectorRejected(
            f"query vector: shape {vector.shape}, the index has dimension {dimension}"
        )
    wide = vector.astype(np.float64)  # squares of float32 may be too large for it
    # The sum of squares is finite where every number is; one product is cheaper than asking each.
    if not math.isfinite(wide.dot(wide)):
        raise VectorRejected("query vector: holds NaN or infinity")


def stack_vectors(records: Sequence[ItemRecord], dimension: int) -> Vector:
    """float32 (n, d) of the records with vectors; raises VectorRejected, naming the first bad one."""
    vectors = [record.vector for record in records if record.vector is not None]
    if not vectors:
        return np.empty((0, dimension), np.float32)
    shapes = set(map(_shape_of, vectors))
    if shapes != {(dimension,)}:
        bad = next(r for r in records if r.vector is not None and r.vector.shape != (dimension,))
        found = getattr(bad.vector, "shape", None)
        raise VectorRejected(
            f"item {bad.item_id!r}: shape {found}, the index has dimension {dimension}"
        )
    rows = np.concatenate(vectors).astype(np.float32, copy=False).reshape(len(vectors), dimension)
    squares = np.einsum("ij,ij->i", rows, rows)
    # A comparison with NaN is false, so this catches NaN and infinity as well.
    good = np.abs(squares - 1.0) <= 2 * NORM_ERROR_MAX
    if np.count_nonzero(good) < len(good):
        at = int(np.argmin(good))
        norm = float(np.sqrt(squares[at]))
        what = f"norm {norm:.6g}, must be 1" if np.isfinite(norm) else "holds NaN or infinity"
        item_id = [record.item_id for record in records if record.vector is not None][at]
        raise VectorRejected(f"item {item_id!r}: {what}")
    return rows


def check_kinds(records: Sequence[ItemRecord], *, retired: bool) -> None:
    """Raise ValueError where a record is a delete among upserts, or the reverse."""
    for record in records:
        if record.retired != retired:
            what = "carries a vector" if retired else "is a delete"
            raise ValueError(f"item {record.item_id!r} {what}")


def stamps_of(records: Sequence[ItemRecord]) -> npt.NDArray[np.int64]:
    """int64 (n, 4): partition, at_ms, written_us and offset of each."""
    return np.array(list(map(_stamps_of, records)), np.int64).reshape(len(records), 4)


def watermarks_after(
    watermarks: Mapping[int, Watermark], stamps: npt.NDArray[np.int64]
) -> dict[int, Watermark]:
    """The watermarks once records with these stamps, see `stamps_of`, have been applied or ignored."""
    after = dict(watermarks)
    for partition in set(stamps[:, 0].tolist()):
        some = stamps[stamps[:, 0] == partition]
        old = after.get(partition, NO_WATERMARK)
        at_ms, written_us, offset = np.maximum.reduce(some, axis=0)[1:].tolist()
        after[partition] = Watermark(
            max(old.offset, offset), max(old.at_ms, at_ms), max(old.written_us, written_us)
        )
    return after


def winners(records: Sequence[ItemRecord]) -> dict[str, ItemRecord]:
    """Of each item in a batch the record with the highest offset, the first one where equal."""
    chosen: dict[str, ItemRecord] = {}
    for record in records:
        before = chosen.get(record.item_id)
        if before is None or record.offset > before.offset:
            chosen[record.item_id] = record
    return chosen


class AnnIndex(Protocol):
    """An immutable index over the vectors of a moment; built once, searched by many threads."""

    @property
    def size(self) -> int:
        """How many vectors it holds."""

    @property
    def name(self) -> str:
        """Which one of `index.backends` it is."""

    @property
    def memory_bytes(self) -> int:
        """Its memory, vectors of its own included."""

    def search(self, query: Vector, fetch: int, breadth: int = 0) -> Ints | None:
        """The labels of about the `fetch` (<= size) best vectors, None where it cannot find so many.

        breadth: the search is as wide as one for so many candidates, where that is more
        """
