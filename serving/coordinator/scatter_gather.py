"""The items of all shards as one index: each look-up calls the shards that it needs in parallel.

A cache keeps the vectors of the user's items, which saves a look-up. The search names to each shard
the items and versions that the query vector was made of. If one of them has changed, the shard
reports the request as stale, and the query starts again without the cache.

The k best of all items are among the k best of every shard, so the merged list equals that of a
single index over all items, score for score. A shard that does not answer in time is left out for
the rest of the query; `status` names it.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import grpc
import numpy as np
from typing_extensions import override

from eddyline.schema.item_key import item_key
from eddyline.schema.partitioning import item_shard
from index.arrays import Keys, Vector
from index.filters import Filter
from index.port import Hit, IndexReader, IndexStats, Term, Watermark
from index.records import check_query
from serving.answer.deadline import Deadline, EndsQuery
from serving.coordinator.shards import Connection, ShardFailure, Shards
from serving.coordinator.vector_cache import Entry, VectorCache
from serving.proto import retrieval_pb2 as pb
from serving.proto import shard_pb2
from serving.proto.shard_pb2 import (
    CandidatesRequest,
    CandidatesResponse,
    TermsRequest,
    TermsResponse,
    VectorsRequest,
    VectorsResponse,
)
from serving.rpc import filter_messages
from serving.rpc.shard_service import CHANGING, IDS_MAX

# (item id, score, at_ms, written_us, offset): the fields of a Hit
_Row = tuple[str, float, int, int, int]


class StaleVectors(EndsQuery):
    """A cached vector that the query vector was made of has changed; retry without the cache."""


class ScatterGather(IndexReader):
    """The items of all shards, for one query. Thread rule: one thread."""

    is_local = False

    def __init__(
        self,
        shards: Shards,
        dimension: int,
        deadline: Deadline,
        cache: VectorCache,
        *,
        fresh: bool = False,
    ) -> None:
        """deadline: of the query; one look-up takes at most half of the time left.

        cache: vectors of earlier queries; fresh: do not read from it
        """
        self._shards = shards
        self._cache = cache
        self._fresh = fresh
        self._made_of: dict[str, int] = {}
        self.dimension = dimension
        self._deadline = deadline
        self._called: set[int] = set()
        self._missing: dict[int, ShardFailure] = {}
        self._watermarks: dict[int, dict[int, Watermark]] = {}
        self._behind: dict[int, str] = {}
        self._live = {shard.number: shard.last.index.live for shard in shards.all}
        # Versions of the items that shards have described to this query.
        self._offsets: dict[str, int] = {}
        # Attributes of ranges that no item has, by shard.
        self._unknown: dict[int, frozenset[str]] = {}

    @override
    def query(
        self, vector: Vector, k: int, exclude: Collection[str] = (), filters: Filter | None = None
    ) -> list[Hit]:
        """Also raises DeadlinePassed, StaleVectors, BadQuery: see `_check_ranges`."""
        check_query(vector, self.dimension)
        raw = np.ascontiguousarray(vector, "<f4").tobytes()
        requests = self._requests(exclude, filters)
        for request in requests.values():
            request.nearest.CopyFrom(shard_pb2.Nearest(vector=raw, k=max(0, k)))
        for number, ids in self._routed(self._made_of).items():
            if number not in requests:
                # No item of this shard can pass, but it has to check the versions of its items.
                nearest = shard_pb2.Nearest(vector=raw, k=0)
                requests[number] = CandidatesRequest(
                    target=self._shards.all[number].target, nearest=nearest
                )
            requests[number].nearest.made_of.extend(ids)
            requests[number].nearest.made_of_offsets.extend(
                self._made_of[item_id] for item_id in ids
            )
        found = _first(self._candidates(requests), k, lambda row: (-row[1], row[0]))
        # Checked: a later search of this query names what its own vector was made of since.
        self._made_of.clear()
        return found

    @override
    def newest(
        self, k: int, exclude: Collection[str] = (), filters: Filter | None = None
    ) -> list[Hit]:
        """Also raises DeadlinePassed, BadQuery."""
        requests = self._requests(exclude, filters)
        for request in requests.values():
            request.newest.k = max(0, k)
        return _first(self._candidates(requests), k, lambda row: (-row[2], row[0]))

    @override
    def describe(self, item_ids: Sequence[str], filters: Filter | None = None) -> list[Hit | None]:
        """Items of a shard that does not answer count as not live.

        Raises DeadlinePassed, BadQuery.
        """
        routed = self._routed(item_ids)
        requests = {n: r for n, r in self._requests((), filters).items() if n in routed}
        for number, request in requests.items():
            request.named.item_ids.extend(routed[number])
        found = {
            row[0]: Hit(*row) for answer in self._candidates(requests) for row in _rows(answer)
        }
        return [found.get(item_id) for item_id in item_ids]

    @override
    def find_keys(self, keys: Keys, filters: Filter | None = None) -> list[Hit | None]:
        """A key does not say which shard has its item, so all shards get all keys.

        Items of a shard that does not answer count as not live. Raises DeadlinePassed, BadQuery.
        """
        found: dict[int, Hit] = {}
        for start in range(0, len(keys), IDS_MAX):
            requests = self._requests((), filters)
            for request in requests.values():
                request.keyed.keys.extend(keys[start : start + IDS_MAX].tolist())
            for answer in self._candidates(requests):
                found |= {item_key(row[0]): Hit(*row) for row in _rows(answer)}
        return [found.get(key) for key in keys.tolist()]

    @override
    def terms_of(self, item_ids: Sequence[str], names: Collection[str]) -> list[frozenset[Term]]:
        """Items of a shard that does not answer have none. Raises DeadlinePassed."""
        found: dict[str, set[Term]] = {}
        attributes = sorted(names)
        for start in range(0, len(item_ids), IDS_MAX):
            routed = self._routed(item_ids[start : start + IDS_MAX])
            requests = {
                n: TermsRequest(
                    target=self._shards.all[n].target, item_ids=ids, attributes=attributes
                )
                for n, ids in routed.items()
            }
            answers: dict[int, TermsResponse] = self._scatter(requests)
            for number, answer in answers.items():
                ids = routed[number]
                for at, of, text in zip(answer.items, answer.attributes, answer.texts, strict=True):
                    found.setdefault(ids[at], set()).add((attributes[of], text))
        return [frozenset(found.get(item_id, ())) for item_id in item_ids]

    @override
    def vectors_of(self, item_ids: Sequence[str]) -> Vector:
        """Also raises DeadlinePassed."""
        known = {} if self._fresh else self._cache.look_up(item_ids)
        # An item that a shard has described has this version at least.
        known = {i: e for i, e in known.items() if self._offsets.get(i, e[0]) == e[0]}
        self._made_of |= {item_id: version for item_id, (version, _) in known.items()}
        fetched = self._fetched([item_id for item_id in item_ids if item_id not in known])
        self._cache.keep({i: entry for i, entry in fetched.items() if entry[0] != CHANGING})
        known |= fetched
        found = [known[item_id][1] for item_id in item_ids if item_id in known]
        return np.array(found, np.float32).reshape(len(found), self.dimension)

    def _fetched(self, item_ids: Sequence[str]) -> dict[str, Entry]:
        """Item -> version and vector, for live items of shards that answer."""
        if not item_ids:
            return {}
        routed = self._routed(item_ids)
        requests = {
            n: VectorsRequest(target=self._shards.all[n].target, item_ids=ids)
            for n, ids in routed.items()
        }
        answers: dict[int, VectorsResponse] = self._scatter(requests)
        entries: dict[str, Entry] = {}
        for number, answer in answers.items():
            rows = np.frombuffer(answer.vectors, "<f4").reshape(-1, self.dimension)
            for at, version, row in zip(answer.found, answer.offsets, rows, strict=True):
                entries[routed[number][at]] = (version, row)
        return entries

    @override
    def number_names(self) -> None:
        """The shards know them."""

    @override
    def watermarks(self) -> Mapping[int, Watermark]:
        """The lowest of the shards that answered, for partitions that all of them know."""
        known = [marks for number, marks in self._watermarks.items() if number not in self._missing]
        partitions = set.intersection(*(set(marks) for marks in known)) if known else set()
        return {p: _lowest([marks[p] for marks in known]) for p in partitions}

    @override
    def stats(self) -> IndexStats:
        """Only `live`; for a shard that was not called, as of its last check."""
        live = sum(count for number, count in self._live.items() if number not in self._missing)
        return IndexStats(live=live)

    def behind(self) -> str:
        """Which shards may lag behind Kafka and why; "" if none does."""
        return "; ".join(f"shard {number}: {why}" for number, why in sorted(self._behind.items()))

    def status(self) -> pb.Shards:
        """The shards that this query needed, and those of them that are missing."""
        made = pb.Shards(
            count=len(self._shards.all),
            asked=len(self._called),
            answered=len(self._called) - len(self._missing),
        )
        for number, failure in sorted(self._missing.items()):
            address = self._shards.all[number].address
            made.missing.add(
                shard=number, address=address, reason=failure.reason, detail=failure.detail
            )
        return made

    def _routed(self, item_ids: Iterable[str]) -> dict[int, list[str]]:
        """Shard -> its items among these, each once, order kept."""
        count = len(self._shards.all)
        routed: dict[int, list[str]] = {}
        for item_id in dict.fromkeys(item_ids):
            routed.setdefault(item_shard(item_id, count), []).append(item_id)
        return routed

    def _requests(
        self, exclude: Iterable[str], filters: Filter | None
    ) -> dict[int, CandidatesRequest]:
        """A request per shard that can have a passing item; it names ids of that shard only."""
        excluded = self._routed(exclude)
        allow = None if filters is None or filters.allow is None else self._routed(filters.allow)
        deny = self._routed(filters.deny) if filters is not None else {}
        requests = {}
        for shard in self._shards.all:
            number = shard.number
            if allow is not None and number not in allow:
                continue
            request = CandidatesRequest(target=shard.target, exclude=excluded.get(number, ()))
            if filters is not None:
                mine = () if allow is None else allow[number]
                request.filters.CopyFrom(
                    filter_messages.filters_of(filters, allow=mine, deny=deny.get(number, ()))
                )
            requests[number] = request
        return requests

    def _candidates(self, requests: Mapping[int, CandidatesRequest]) -> list[CandidatesResponse]:
        answers: dict[int, CandidatesResponse] = self._scatter(requests)
        if any(answer.stale for answer in answers.values()):
            raise StaleVectors
        for number, answer in answers.items():
            marks = {
                w.partition: Watermark(w.offset, w.at_ms, w.written_us) for w in answer.watermarks
            }
            # The first of several look-ups has the lowest watermarks.
            self._watermarks.setdefault(number, marks)
            if answer.behind:
                self._behind[number] = answer.behind
            if requests[number].HasField("newest"):
                self._live[number] = answer.live
            self._unknown[number] = frozenset(answer.unknown_attributes)
            self._offsets.update(zip(answer.item_ids, answer.offsets, strict=True))
        self._check_ranges()
        return list(answers.values())

    def _check_ranges(self) -> None:
        """Raise BadQuery for a range over an attribute that no item of any shard has or had.

        Only all shards together know that; no item is live: every name may be right.
        """
        if len(self._unknown) == len(self._shards.all) and any(self._live.values()):
            for name in sorted(frozenset.intersection(*self._unknown.values())):
                raise filter_messages.BadQuery(filter_messages.no_such_attribute(name))

    def _scatter(self, requests: Mapping[int, Any]) -> dict[int, Any]:
        """Shard -> answer; a shard that gives none is missing for the rest of the query."""
        self._deadline.check("the shards were called")
        timeout_s = min(self._shards.timeout_s, self._deadline.left_s() / 2)
        until = time.monotonic() + timeout_s
        calls: list[tuple[Connection, Callable[[], Any]]] = []
        answers = {}
        for number, request in requests.items():
            shard = self._shards.all[number]
            self._called.add(number)
            if number in self._missing:
                continue
            failure = shard.failure
            if failure is not None:
                self._missing[number] = failure
            else:
                calls.append((shard, partial(shard.call, request, until)))
        # The last call runs on this thread: one hand-over less.
        pooled = [(shard, self._shards.pool.submit(call).result) for shard, call in calls[:-1]]
        for shard, result in (*calls[-1:], *pooled):
            try:
                answers[shard.number] = result()
                shard.answered()
            except (grpc.RpcError, TimeoutError) as error:
                self._missing[shard.number] = shard.missed(error, timeout_s)
                self._shards.check_soon()
        return answers


def _rows(answer: CandidatesResponse) -> Iterable[_Row]:
    return zip(
        answer.item_ids, answer.scores, answer.at_ms, answer.written_us, answer.offsets, strict=True
    )


def _first(
    answers: Sequence[CandidatesResponse], k: int, order: Callable[[_Row], Any]
) -> list[Hit]:
    """The first k of several lists that are sorted by `order`."""
    merged = heapq.merge(*map(_rows, answers), key=order)
    return [Hit(*row) for row in islice(merged, max(0, k))]


def _lowest(marks: Sequence[Watermark]) -> Watermark:
    return Watermark(*(min(parts) for parts in zip(*marks, strict=True)))
