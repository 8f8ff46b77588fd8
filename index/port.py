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

from eddyline.schema.item_key import cached_keys_of
from eddyline.schema.item_record import ItemRecord
from index.arrays import Floats, Ints, Keys, Names, Vector
from index.filters import Filter
from index.ranked import RankedItems


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


# First look-up of `IndexReader.first_listed` and `first_by_key` beyond the k that are needed; each
# further one has twice as many. None of `first_listed` has more than PIECE_MAX: a look-up may be a
# call to other processes, whose size is limited.
PIECE_MIN, PIECE_MAX = 16, 1_024

# An attribute's name, see `IndexReader.terms_of`, and one of its texts.
Term = tuple[str, str]

# Builds what `Hit(*fields)` builds, without a Python call for each of hundreds of hits.
hit_of: Callable[[Iterable[object]], Hit] = partial(tuple.__new__, Hit)


class SearchResult:
    """The answer of a query as columns, which spare most callers an object per item.

    scores: float64 (n,), as `Hit.score`, best first
    facts:  int64 (n, 3): at_ms, written_us and offset, as in `Hit`
    names, labels: of a live index, see `index.hits.HitColumns`; None: of another one
    """

    __slots__ = ("_ids", "facts", "labels", "names", "scores")

    def __init__(
        self,
        ids: list[str] | None,
        scores: Floats,
        facts: Ints,
        names: Names | None = None,
        labels: Ints | None = None,
    ) -> None:
        """ids: None: those of names and labels"""
        self._ids = ids
        self.scores = scores
        self.facts = facts
        self.names = names
        self.labels = labels

    @property
    def ids(self) -> list[str]:
        """Item ids, best first."""
        if self._ids is None:
            assert self.names is not None and self.labels is not None
            self._ids = self.names[self.labels].tolist()
        return self._ids

    @classmethod
    def of(cls, hits: Sequence[Hit]) -> SearchResult:
        """The columns of these hits."""
        facts = np.array([hit[2:] for hit in hits], np.int64).reshape(len(hits), 3)
        scores = np.array([hit.score for hit in hits], np.float64)
        return cls([hit.item_id for hit in hits], scores, facts)

    def __len__(self) -> int:
        return len(self.scores)

    def hits(self) -> list[Hit]:
        """One `Hit` per item, best first."""
        columns = zip(self.ids, self.scores.tolist(), *self.facts.T.tolist(), strict=True)
        return list(map(hit_of, columns))


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
    is_local:  whether it only computes; else it waits for other processes
    """

    dimension: int
    is_local: bool = True

    def query(
        self, vector: Vector, k: int, exclude: Collection[str] = (), filters: Filter | None = None
    ) -> Sequence[Hit]:
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

    def first_listed(
        self,
        ranked: RankedItems,
        k: int,
        exclude: Collection[str] = (),
        filters: Filter | None = None,
    ) -> Sequence[Hit]:
        """The first k of these items that are live, pass and are not excluded; scores: the list's.

        Most of a list is live, so the first look-up has about k items.
        """
        hits: list[Hit] = []
        start, size = 0, min(k + PIECE_MIN, PIECE_MAX)
        while len(hits) < k and start < len(ranked):
            ids, scores = ranked.ids[start : start + size], ranked.scores[start : start + size]
            pairs = [
                pair for pair in zip(ids, scores.tolist(), strict=True) if pair[0] not in exclude
            ]
            live = self.describe([item_id for item_id, _ in pairs], filters) if pairs else []
            hits += [
                hit_of((hit[0], score, *hit[2:]))
                for hit, (_, score) in zip(live, pairs, strict=True)
                if hit is not None
            ]
            start, size = start + size, min(2 * size, PIECE_MAX)
        return hits[: max(k, 0)]

    def first_by_key(
        self, keys: Keys, scores: Floats, k: int, filters: Filter | None = None
    ) -> Sequence[Hit]:
        """The k live passing items of the highest of these scores, equal scores by item id.

        keys: uint64 (n,), as for `find_keys`, each once; scores: float64 (n,), finite
        """
        order = np.argsort(-scores, kind="stable")
        keys, falling = keys[order], -scores[order]
        hits: list[Hit] = []
        start, size = 0, k + PIECE_MIN
        while len(hits) < k and start < len(keys):
            last = min(start + size, len(keys)) - 1
            # With all of the same score: only the ids say which of them come first.
            end = int(np.searchsorted(falling, falling[last], side="right"))
            found = self.find_keys(keys[start:end], filters)
            some = zip(found, falling[start:end].tolist(), strict=True)
            more = [hit_of((hit[0], -score, *hit[2:])) for hit, score in some if hit is not None]
            hits += sorted(more, key=lambda hit: (-hit.score, hit.item_id))
            start, size = end, 2 * size
        return hits[: max(k, 0)]

    def vectors_of_hits(self, hits: Sequence[Hit]) -> Vector:
        """As `vectors_of` their ids."""
        return self.vectors_of([hit.item_id for hit in hits])

    def keys_of_hits(self, hits: Sequence[Hit]) -> Keys:
        """uint64 (n,): `eddyline.schema.item_key` of each."""
        return cached_keys_of(hit.item_id for hit in hits)

    def newest(
        self, k: int, exclude: Collection[str] = (), filters: Filter | None = None
    ) -> Sequence[Hit]:
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
