"""The index port: item vectors in, nearest items out.

`index.exact` (the oracle) and `index.live` implement it; one contract suite runs over both.
Every write carries the item's source offset. A write with an older or equal offset is a no-op,
so writes are idempotent and a delete outlasts every earlier write. One exception: an item without
a time (`at_ms` 0, from an old bundle) takes the record of its own offset, if that has a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np

from eddyline.schema.item_record import ItemRecord
from index.arrays import Floats, Ints, Keys, Vector
from index.filters import Filter


class Hit(NamedTuple):
    """One live item of an answer.

    score:      inner product of query and current item vector in float64; 0.0 without a query
    at_ms:      the item's event time, milliseconds since 1970; 0 if unknown
    written_us: when its vector was written, microseconds since 1970
    offset:     the item's offset in the `items` topic; -1 if it came from a file
    """

    item_id: str
    score: float
    at_ms: int
    written_us: int
    offset: int


# An attribute's name, see `IndexReader.terms_of`, and one of its texts.
Term = tuple[str, str]

# Builds what `Hit(*fields)` builds, without a Python call for each of hundreds of hits.
_hit: Callable[[Iterable[object]], Hit] = partial(tuple.__new__, Hit)


class SearchResult:
    """The answer of a query as columns, which spare most callers an object per item.

    ids:    item ids, best first; scores: float64 (n,), as `Hit.score`
    facts:  int64 (n, 3): at_ms, written_us and offset, as in `Hit`
    """

    __slots__ = ("facts", "ids", "scores")

    def __init__(self, ids: list[str], scores: Floats, facts: Ints) -> None:
        self.ids = ids
        self.scores = scores
        self.facts = facts

    @classmethod
    def of(cls, hits: Sequence[Hit]) -> SearchResult:
        """The columns of these hits."""
        facts = np.array([hit[2:] for hit in hits], np.int64).reshape(len(hits), 3)
        scores = np.array([hit.score for hit in hits], np.float64)
        return cls([hit.item_id for hit in hits], scores, facts)

    def __len__(self) -> int:
        return len(self.ids)

    def hits(self) -> list[Hit]:
        """One `Hit` per item, best first."""
        columns = zip(self.ids, self.scores.tolist(), *self.facts.T.tolist(), strict=True)
        return list(map(_hit, columns))


class LiveItems(NamedTuple):
    """All live items of one moment as columns.

    ids: item ids; vectors: float32 (n, d), unit norm; at_ms: int64 (n,), as in `Hit`
    place_of: item id -> its place in the columns
    """

    ids: list[str]
    vectors: Vector
    at_ms: Ints
    place_of: Mapping[str, int]

    @classmethod
    def of(cls, ids: list[str], vectors: Vector, at_ms: Ints) -> LiveItems:
        """The columns of these items."""
        return cls(ids, vectors, at_ms, {item_id: n for n, item_id in enumerate(ids)})


class Watermark(NamedTuple):
    """Progress in one `items` partition: the largest offset, at_ms and written_us applied."""

    offset: int
    at_ms: int
    written_us: int


class RecallEstimate(NamedTuple):
    """State of the recall guard, see `index.recall_guard`.

    step:            "normal", or the current countermeasure: "wider", "rebuild", "exact"
    samples:         distinct queries behind the estimate; with 0 the next three mean nothing
    estimate:        share of the exact answer that the index found; low, high: its interval;
                     with a probability of 95% it holds at every look
    shadowed, skipped: sampled queries that were compared, and that were skipped: repeated ones,
                     and others to save CPU
    raised, lowered: steps towards more work per query, and steps back
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
    """Sizes and counters of an index.

    live: items a query can return; tombstones: retired items whose offset is kept
    main: entries of the main segment, 0 if every query is an exact scan; stale: its dead entries
    fresh: entries of the fresh buffer; rows: rows of the vector table, dead ones included
    applied, ignored, rejected: item records by outcome
    refused: segment searches that an exact scan had to replace
    rebuild_error: error of the last rebuild, "" on success; after an error the old segment serves
    main_name, main_bytes: ANN backend of the main segment and its memory
    breadth: fewest candidates that a search requests; recall: None without a recall guard
    small_segments, small_segment_items: segments behind the main one and their live entries
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
    small_segments: int = 0
    small_segment_items: int = 0


class IndexReader(Protocol):
    """The reading half of `Index`: what a query needs. Thread rule: as the implementation's.

    A worker reads its own index; a coordinator reads the shards through `ScatterGather`.

    dimension: length of every vector
    """

    dimension: int

    def query(
        self, vector: Vector, k: int, exclude: Collection[str] = (), filters: Filter | None = None
    ) -> list[Hit]:
        """The k live items of the highest inner product, best first, equal scores by item id.

        vector:  float32 (d,), finite
        k:       fewer hits come back if fewer items qualify; k <= 0 gives []
        exclude: item ids to leave out; filters: only items that pass
        Raises VectorRejected if the vector does not fit.
        """

    def vectors_of(self, item_ids: Sequence[str]) -> Vector:
        """float32 (n, d): vectors of those items that are live, order and repeats kept."""

    def describe(self, item_ids: Sequence[str], filters: Filter | None = None) -> list[Hit | None]:
        """For each id its `Hit` with score 0.0; None if not live or not passing the filter."""

    def find_keys(self, keys: Keys, filters: Filter | None = None) -> list[Hit | None]:
        """For each `eddyline.schema.item_key` the `Hit` of its item with score 0.0.

        keys: uint64 (n,)
        None if no item with this key is live and passes the filter.
        """

    def live_ids(self, keys: Keys) -> list[str]:
        """The items of these keys that are live, in their order.

        keys: uint64 (n,), as for `find_keys`
        """
        return [hit.item_id for hit in self.find_keys(keys) if hit is not None]

    def newest(
        self, k: int, exclude: Collection[str] = (), filters: Filter | None = None
    ) -> list[Hit]:
        """The k passing live items of the largest `at_ms`, equal ones by item id; score 0.0."""

    def terms_of(self, item_ids: Sequence[str], names: Collection[str]) -> list[frozenset[Term]]:
        """For each id what it has of these attributes; nothing if the item is not live.

        names: "categories" and "tags" are the item's lists; another one is an attribute whose text
        filters may name. One that is not known has no terms.
        """

    def number_names(self) -> Collection[str] | None:
        """Names of the numeric attributes, dates included, that items have or had.

        None if that is not known: no item is live, or the items are in other processes.
        """

    def watermarks(self) -> Mapping[int, Watermark]:
        """`items` partition -> watermark, for every partition that a record came from."""

    def stats(self) -> IndexStats:
        """Sizes and counters now."""


class Index(IndexReader, Protocol):
    """Items by vector.

    Thread rule: every method from any thread. Writers wait for each other; queries wait for
    nothing and see whole batches only. Once a write has returned, every later query sees it.
    """

    def apply(self, records: Sequence[ItemRecord], others: Sequence[ItemRecord] = ()) -> int:
        """Apply upserts and retires as one batch; returns how many records took effect.

        others: records of items that another shard holds; they only move the watermarks
        Of several records of one item the one with the highest offset counts, in any order.
        Raises VectorRejected, naming the item, if a vector does not fit; then nothing is written.
        """

    def upsert(self, records: Sequence[ItemRecord]) -> int:
        """`apply` for records with vectors; raises ValueError if one has none."""
        for record in records:
            if record.retired:
                raise ValueError(f"item {record.item_id!r} is a delete")
        return self.apply(records)

    def retire(self, records: Sequence[ItemRecord]) -> int:
        """`apply` for deletes; raises ValueError if a record is not a delete."""
        for record in records:
            if not record.retired:
                raise ValueError(f"item {record.item_id!r} carries a vector")
        return self.apply(records)

    def find(
        self, vector: Vector, k: int, exclude: Collection[str] = (), filters: Filter | None = None
    ) -> SearchResult:
        """The answer of `query` as columns."""

    def text_names(self) -> Collection[str]:
        """Names of the attributes whose texts filters may name."""

    def live_items(self) -> LiveItems:
        """A copy of what a query can return, for rankings of all items. O(n·d)."""

    def end_tombstones(self, kept_us: int, limit: int = 4_096) -> int:
        """Forget deletes that are `kept_us` older than the newest record; returns how many.

        kept_us: microseconds by the records' `written_us`; limit: about so many in one call
        The rule is in `index.storage.tombstones`. Call it only after the whole log was read.
        """

    def close(self) -> None:
        """Stop background work; queries continue."""
