"""The gRPC service for the coordinator: vectors and candidates of the items in this worker."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import grpc
import numpy as np

from eddyline.errors import VectorRejected
from eddyline.settings.answers import LIMITS_MAX
from index.filters import Filter
from index.port import PIECE_MAX, Hit, Index
from index.records import check_query
from serving.proto import retrieval_pb2 as pb
from serving.proto import shard_pb2, shard_pb2_grpc
from serving.recall.towers import OVER_FETCH
from serving.rpc import converters, filter_messages
from serving.rpc.backends import LocalIndex
from serving.rules.limits import BARRED_FACTOR
from serving.sharding import ShardAssignment

log = logging.getLogger(__name__)

# Ids of one list of a request: the longest history of a user, a piece of the popular list.
IDS_MAX = max(1_000, PIECE_MAX)
# Ids that a search leaves out, besides k that the answer has already: the user's list and session,
# what they had beyond it, what editorial rules deny, and the pages before. What its vector was made
# of has the same limit.
EXCLUDED_MAX = 16_384
ATTRIBUTES_MAX = 2 * LIMITS_MAX
# In place of a version (-1 or more): the item is not live; it changed while it was read.
NOT_LIVE, CHANGING = -2, -3


class ShardService(shard_pb2_grpc.ShardServicer):
    """Answers Vectors and Candidates; see shard.proto. Thread rule: any thread."""

    def __init__(self, assignment: ShardAssignment, k_max: int) -> None:
        """Not ready: calls get UNAVAILABLE until `serve`.

        assignment: items of the worker; k_max: of a user's query
        """
        self.assignment = assignment
        self._k_max = OVER_FETCH * k_max
        self._excluded_max = EXCLUDED_MAX + k_max
        self._held: LocalIndex | None = None
        self._lock = threading.Lock()
        self._calls = {"answered": 0, "failed": 0}

    def serve(self, held: LocalIndex) -> None:
        """From now on, answer from this index."""
        self._held = held

    def Vectors(
        self, request: shard_pb2.VectorsRequest, context: grpc.ServicerContext
    ) -> shard_pb2.VectorsResponse:
        """See shard.proto."""
        with self._counted():
            return self._vectors(request, context)

    def _vectors(
        self, request: shard_pb2.VectorsRequest, context: grpc.ServicerContext
    ) -> shard_pb2.VectorsResponse:
        held = self._checked(request.target, context)
        ids = list(request.item_ids)
        try:
            _check_count("item_ids", ids)
        except filter_messages.BadQuery as error:
            _abort(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        # Versions only grow: if it is equal before and after, it is the version of the vector.
        before = versions_of(held.index, ids)
        # One by one: `vectors_of` leaves no gap for an item that is not live.
        found = [held.index.vectors_of([item_id]) for item_id in ids]
        after = versions_of(held.index, ids)
        live = [at for at, vector in enumerate(found) if len(vector)]
        vectors = b"".join(found[at].astype("<f4", copy=False).tobytes() for at in live)
        offsets = [after[at] if before[at] == after[at] else CHANGING for at in live]
        return shard_pb2.VectorsResponse(found=live, vectors=vectors, offsets=offsets)

    def Terms(
        self, request: shard_pb2.TermsRequest, context: grpc.ServicerContext
    ) -> shard_pb2.TermsResponse:
        """See shard.proto."""
        with self._counted():
            held = self._checked(request.target, context)
            try:
                _check_count("item_ids", request.item_ids)
                _check_count("attributes", request.attributes, ATTRIBUTES_MAX)
            except filter_messages.BadQuery as error:
                _abort(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
            return _terms(request, held)

    def Candidates(
        self, request: shard_pb2.CandidatesRequest, context: grpc.ServicerContext
    ) -> shard_pb2.CandidatesResponse:
        """See shard.proto."""
        with self._counted():
            return self._candidates(request, context)

    def _candidates(
        self, request: shard_pb2.CandidatesRequest, context: grpc.ServicerContext
    ) -> shard_pb2.CandidatesResponse:
        held = self._checked(request.target, context)
        try:
            _check_limits(request, self._k_max, self._excluded_max)
            return _candidates(request, held)
        except (filter_messages.BadQuery, VectorRejected, ValueError) as error:
            _abort(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except Exception as error:
            log.exception("a coordinator's call failed")
            _abort(
                context,
                grpc.StatusCode.INTERNAL,
                f"{type(error).__name__}; the worker's log has more",
            )

    def counts(self) -> dict[str, int]:
        """Calls since the start by outcome: answered, failed."""
        with self._lock:
            return dict(self._calls)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        outcome = "failed"
        try:
            yield
            outcome = "answered"
        finally:
            with self._lock:
                self._calls[outcome] += 1

    def _checked(self, target: shard_pb2.Target, context: grpc.ServicerContext) -> LocalIndex:
        """The index, if the call is for its generation and shard; aborts the call otherwise."""
        held = self._held
        if held is None:
            _abort(context, grpc.StatusCode.UNAVAILABLE, "the worker is not ready")
        left_s = context.time_remaining()
        if left_s is not None and left_s <= 0:
            _abort(
                context,
                grpc.StatusCode.DEADLINE_EXCEEDED,
                "the deadline passed while the call waited",
            )
        requested = (target.generation, target.shard, target.shards)
        if requested != (held.generation, *self.assignment):
            what = (
                "this worker holds generation {!r}, shard {} of {}; requested {!r}, shard {} of {}"
            )
            sentence = what.format(held.generation, *self.assignment, *requested)
            _abort(context, grpc.StatusCode.FAILED_PRECONDITION, sentence)
        return held


def _check_limits(request: shard_pb2.CandidatesRequest, k_max: int, excluded_max: int) -> None:
    """Raise BadQuery if a number or a list of ids is larger than a coordinator's can be."""
    for name in ("nearest", "newest"):
        k = getattr(request, name).k
        if not 0 <= k <= k_max:
            raise filter_messages.BadQuery(f"{name}.k: {k}, allowed are 0 … {k_max}")
    _check_count("exclude", request.exclude, excluded_max)
    _check_count("named.item_ids", request.named.item_ids)
    _check_count("nearest.made_of", request.nearest.made_of, excluded_max)
    _check_count("keyed.keys", request.keyed.keys)


def _check_count(name: str, ids: Sequence[str] | Sequence[int], most: int = IDS_MAX) -> None:
    if len(ids) > most:
        raise filter_messages.BadQuery(f"{name}: {len(ids)} values, allowed are 0 … {most}")


def versions_of(index: Index, item_ids: list[str]) -> list[int]:
    """The version of each item; NOT_LIVE if it is not live."""
    return (
        [NOT_LIVE if hit is None else hit.offset for hit in index.describe(item_ids)]
        if item_ids
        else []
    )


def _candidates(
    request: shard_pb2.CandidatesRequest, held: LocalIndex
) -> shard_pb2.CandidatesResponse:
    """Raises BadQuery, VectorRejected, ValueError."""
    index = held.index
    # Read before the search: the answer includes at least these records.
    watermarks, behind = converters.watermarks_of(index), held.missing()
    filters: Filter | None = (
        filter_messages.filter_of(request.filters, "as_is", BARRED_FACTOR)
        if request.HasField("filters")
        else None
    )
    filter_messages.check_texts(filters, index.text_names())
    exclude = frozenset(request.exclude)
    wanted = request.WhichOneof("wanted")
    hits: Sequence[Hit]
    if wanted == "nearest":
        if len(request.nearest.vector) != 4 * index.dimension:
            size = len(request.nearest.vector)
            raise VectorRejected(
                f"nearest.vector: {size} bytes, the index has dimension {index.dimension}"
            )
        vector = np.frombuffer(request.nearest.vector, "<f4")
        check_query(vector, index.dimension)
        if versions_of(index, list(request.nearest.made_of)) != list(
            request.nearest.made_of_offsets
        ):
            return shard_pb2.CandidatesResponse(stale=True)
        hits = index.query(vector, request.nearest.k, exclude, filters)
    elif wanted == "named":
        hits = [
            hit for hit in index.describe(list(request.named.item_ids), filters) if hit is not None
        ]
    elif wanted == "keyed":
        keys = np.array(request.keyed.keys, np.uint64)
        hits = [hit for hit in index.find_keys(keys, filters) if hit is not None]
    elif wanted == "newest":
        hits = index.newest(request.newest.k, exclude, filters)
    else:
        raise filter_messages.BadQuery("wanted: is missing")
    response = _response(hits, watermarks, index.stats().live if wanted == "newest" else 0, behind)
    if filters is not None and filters.ranges:
        known = index.number_names() or ()
        response.unknown_attributes.extend(name for name in filters.ranges if name not in known)
    return response


def _terms(request: shard_pb2.TermsRequest, held: LocalIndex) -> shard_pb2.TermsResponse:
    attributes = list(request.attributes)
    number_of = {name: number for number, name in enumerate(attributes)}
    response = shard_pb2.TermsResponse()
    for place, found in enumerate(held.index.terms_of(list(request.item_ids), attributes)):
        for name, text in sorted(found):
            response.items.append(place)
            response.attributes.append(number_of[name])
            response.texts.append(text)
    return response


def _response(
    hits: Sequence[Hit], watermarks: list[pb.IndexWatermark], live: int, behind: str
) -> shard_pb2.CandidatesResponse:
    ids, scores, at_ms, written_us, offsets = (
        zip(*hits, strict=True) if hits else ((), (), (), (), ())
    )
    return shard_pb2.CandidatesResponse(
        item_ids=ids,
        scores=scores,
        at_ms=at_ms,
        written_us=written_us,
        offsets=offsets,
        watermarks=watermarks,
        live=live,
        behind=behind,
    )


def _abort(context: Any, code: grpc.StatusCode, sentence: str) -> NoReturn:
    context.abort(code, sentence)
    raise AssertionError("abort returned")
