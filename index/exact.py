"""The oracle: every query looks at every item. Simple enough to be right at sight."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from typing_extensions import override

from eddyline.schema.events import LISTS
from eddyline.schema.item_key import item_key
from eddyline.schema.item_record import ItemRecord
from index.arrays import Keys, Vector
from index.filters import Filter, matches, numbers, terms, text_of
from index.port import Hit, Index, IndexStats, LiveItems, SearchResult, Term, Watermark
from index.records import check_query, stack_vectors, stamps_of, watermarks_after


class ExactIndex(Index):
    """A dict of records behind one lock; a query is O(n·d).

    Thread rule: any thread; readers take the lock too.
    """

    def __init__(self, dimension: int, text_names: Collection[str] = frozenset()) -> None:
        """dimension: length of every vector; text_names: see `Index.text_names`."""
        self.dimension = dimension
        self._text_names = text_names
        self._lock = threading.Lock()
        self._records: dict[str, ItemRecord] = {}
        self._watermarks: dict[int, Watermark] = {}
        self._floors: dict[int, int] = {}
        self._number_names: set[str] = set()
        self._applied = self._ignored = self._rejected = 0

    @override
    def apply(self, records: Sequence[ItemRecord], others: Sequence[ItemRecord] = ()) -> int:
        with self._lock:
            try:
                stack_vectors(records, self.dimension)
            except Exception:
                self._rejected += 1
                raise
            applied = 0
            known = [
                r
                for r in records
                if r.item_id in self._records or r.offset > self._floors.get(r.partition, -(2**63))
            ]
            for item_id, record in _newest_of_each(known).items():
                before = self._records.get(item_id)
                if before is None or _counts_after(record, before):
                    self._records[item_id] = record
                    self._number_names.update(numbers(record.attributes))
                    applied += 1
            self._watermarks = watermarks_after(self._watermarks, stamps_of([*records, *others]))
            self._applied += applied
            self._ignored += len(records) - applied
            return applied

    @override
    def query(
        self, vector: Vector, k: int, exclude: Collection[str] = (), filters: Filter | None = None
    ) -> list[Hit]:
        check_query(vector, self.dimension)
        query = vector.astype(np.float64)
        scored = [
            _hit(record, float((record.vector.astype(np.float64) * query).sum()))
            for record in self._live(exclude, filters)
            if record.vector is not None
        ]
        return sorted(scored, key=lambda hit: (-hit.score, hit.item_id))[: max(k, 0)]

    @override
    def find(
        self, vector: Vector, k: int, exclude: Collection[str] = (), filters: Filter | None = None
    ) -> SearchResult:
        return SearchResult.of(self.query(vector, k, exclude, filters))

    @override
    def vectors_of(self, item_ids: Sequence[str]) -> Vector:
        with self._lock:
            records = [self._records.get(item_id) for item_id in item_ids]
        vectors = [r.vector for r in records if r is not None and r.vector is not None]
        return np.array(vectors, np.float32).reshape(len(vectors), self.dimension)

    @override
    def describe(self, item_ids: Sequence[str], filters: Filter | None = None) -> list[Hit | None]:
        with self._lock:
            records = [self._records.get(item_id) for item_id in item_ids]
        return [
            None if r is None or r.retired or not _passes(r, filters) else _hit(r, 0.0)
            for r in records
        ]

    @override
    def find_keys(self, keys: Keys, filters: Filter | None = None) -> list[Hit | None]:
        found = {item_key(record.item_id): record for record in self._live((), filters)}
        records = map(found.get, keys.tolist())
        return [None if record is None else _hit(record, 0.0) for record in records]

    @override
    def newest(
        self, k: int, exclude: Collection[str] = (), filters: Filter | None = None
    ) -> list[Hit]:
        hits = [_hit(record, 0.0) for record in self._live(exclude, filters)]
        return sorted(hits, key=lambda hit: (-hit.at_ms, hit.item_id))[: max(k, 0)]

    @override
    def terms_of(self, item_ids: Sequence[str], names: Collection[str]) -> list[frozenset[Term]]:
        with self._lock:
            records = [self._records.get(item_id) for item_id in item_ids]
        texts = [name for name in names if name in self._text_names and name not in LISTS]
        return [frozenset() if r is None or r.retired else _terms(r, names, texts) for r in records]

    @override
    def text_names(self) -> Collection[str]:
        return self._text_names

    @override
    def number_names(self) -> Collection[str] | None:
        with self._lock:
            live = any(not record.retired for record in self._records.values())
            return set(self._number_names) if live else None

    @override
    def watermarks(self) -> Mapping[int, Watermark]:
        return self._watermarks

    @override
    def stats(self) -> IndexStats:
        with self._lock:
            live = sum(not record.retired for record in self._records.values())
            return IndexStats(
                live=live,
                tombstones=len(self._records) - live,
                rows=live,
                applied=self._applied,
                ignored=self._ignored,
                rejected=self._rejected,
            )

    @override
    def live_items(self) -> LiveItems:
        records = self._live((), None)
        ids = [record.item_id for record in records]
        at_ms = np.array([record.at_ms for record in records], np.int64)
        return LiveItems.of(ids, self.vectors_of(ids), at_ms)

    @override
    def end_tombstones(self, kept_us: int, limit: int = 4_096) -> int:
        with self._lock:
            now_us = max((mark.written_us for mark in self._watermarks.values()), default=0)
            ended = [
                r for r in self._records.values() if r.retired and r.written_us < now_us - kept_us
            ]
            for record in ended:
                del self._records[record.item_id]
                floor = self._floors.get(record.partition, record.offset)
                self._floors[record.partition] = max(floor, record.offset)
            return len(ended)

    @override
    def close(self) -> None:
        pass

    def _live(self, exclude: Collection[str], filters: Filter | None) -> list[ItemRecord]:
        excluded = set(exclude)
        with self._lock:
            records = list(self._records.values())
        return [
            r
            for r in records
            if not r.retired and r.item_id not in excluded and _passes(r, filters)
        ]


def _counts_after(record: ItemRecord, before: ItemRecord) -> bool:
    """Whether the record is newer, or the same one with the time that the item lacked."""
    if record.offset != before.offset or record.retired or before.retired:
        return record.offset > before.offset
    return bool(record.at_ms) and not before.at_ms


def _newest_of_each(records: Sequence[ItemRecord]) -> dict[str, ItemRecord]:
    """Item id -> its record with the highest offset, the first one of equals."""
    newest: dict[str, ItemRecord] = {}
    for record in records:
        before = newest.get(record.item_id)
        if before is None or record.offset > before.offset:
            newest[record.item_id] = record
    return newest


def _terms(record: ItemRecord, names: Collection[str], texts: Collection[str]) -> frozenset[Term]:
    """The record's terms of the lists and of the texts among these names."""
    attributes = record.attributes
    found = {(name, term) for name in LISTS if name in names for term in terms(attributes, name)}
    for name in texts:
        if (text := text_of(attributes, name)) is not None:
            found.add((name, text))
    return frozenset(found)


def _passes(record: ItemRecord, filters: Filter | None) -> bool:
    return filters is None or matches(filters, record.item_id, record.attributes)


def _hit(record: ItemRecord, score: float) -> Hit:
    return Hit(record.item_id, score, record.at_ms, record.written_us, record.offset)
