"""The gRPC service: checks a request, has a backend answer it, turns errors into status codes.

The `RetrievalBackend` is a `WorkerBackend` (all items), a `ShardBackend` (one shard) or a
`serving.coordinator.backend.CoordinatorBackend` (all shards).
"""

from __future__ import annotations

import logging
import threading
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import grpc

from eddyline.errors import EddylineError, VectorRejected
from eddyline.settings.loader import Settings
from serving.answer.click_waits import ClickPending, TooManyWait
from serving.answer.deadline import Deadline, DeadlinePassed
from serving.answer.retriever import ItemsNotLive, NearestQuery, Query
from serving.proto import retrieval_pb2 as pb
from serving.rpc import converters, one_batch
from serving.rpc.backends import HoldsOneShard, NoShardAnswers, OtherGeneration, RetrievalBackend
from serving.rpc.filter_messages import BadQuery

log = logging.getLogger(__name__)

NAME = pb.DESCRIPTOR.services_by_name["Retrieval"].full_name
# A call that waits for a click keeps this much of its deadline for the answer itself.
ANSWER_S = 0.05
# Requests of one batch: with 4 ms each it holds its thread for a quarter of a second.
BATCH_MAX = 64
# Upper bounds of the histogram of query times, seconds.
_BUCKETS_MS = (0.5, 1, 2, 3, 5, 7.5, 10, 15, 25, 50, 100, 250, 500, 1_000)
BUCKETS_S = tuple(ms / 1000 for ms in _BUCKETS_MS)
# The calls for items, with their requests and responses.
_CALLS: dict[str, tuple[Any, Any]] = {
    "Retrieve": (pb.RetrieveRequest, pb.RetrieveResponse),
    "SimilarItems": (pb.SimilarItemsRequest, pb.RetrieveResponse),
    "SearchByVector": (pb.SearchByVectorRequest, pb.RetrieveResponse),
    "Explain": (pb.ExplainRequest, pb.ExplainResponse),
    "RetrieveBatch": (pb.RetrieveBatchRequest, pb.RetrieveBatchResponse),
}
_Request = (
    pb.RetrieveRequest
    | pb.SimilarItemsRequest
    | pb.SearchByVectorRequest
    | pb.ExplainRequest
    | pb.RetrieveBatchRequest
)
_Response = pb.RetrieveResponse | pb.ExplainResponse | pb.RetrieveBatchResponse


class NoRoom(EddylineError):
    """An answer of a batch whose response is full."""


_CODES: dict[type[Exception], grpc.StatusCode] = {
    BadQuery: grpc.StatusCode.INVALID_ARGUMENT,
    VectorRejected: grpc.StatusCode.INVALID_ARGUMENT,
    ItemsNotLive: grpc.StatusCode.NOT_FOUND,
    OtherGeneration: grpc.StatusCode.FAILED_PRECONDITION,
    DeadlinePassed: grpc.StatusCode.DEADLINE_EXCEEDED,
    HoldsOneShard: grpc.StatusCode.FAILED_PRECONDITION,
    NoShardAnswers: grpc.StatusCode.UNAVAILABLE,
    TooManyWait: grpc.StatusCode.RESOURCE_EXHAUSTED,
    NoRoom: grpc.StatusCode.RESOURCE_EXHAUSTED,
}


class PathCounts(NamedTuple):
    """A recall path since the start.

    queries:  that called it; candidates: that it returned
    items:    of answers, that it returned; marginal: of those, which no other path returned
    seconds:  in the path
    """

    queries: int = 0
    items: int = 0
    candidates: int = 0
    marginal: int = 0
    seconds: float = 0.0

    def plus(self, one: pb.PathSummary) -> PathCounts:
        """With one more query."""
        return PathCounts(
            self.queries + 1,
            self.items + one.taken,
            self.candidates + one.candidates,
            self.marginal + one.marginal,
            self.seconds + one.took_us / 1e6,
        )


_NOT_CALLED = PathCounts()


class QueryCounts(NamedTuple):
    """Queries since the start.

    times: queries by how long they took, one entry for each of `BUCKETS_S` and one for longer ones
    paths: recall path -> its counts, for paths that were called
    waiting: calls that wait for a click now
    """

    queries: int
    failed: int
    times: list[int]
    total_s: float
    paths: dict[str, PathCounts]
    waiting: int = 0


class RetrievalService:
    """Answers all calls of the service. Thread rule: any thread."""

    def __init__(self, settings: Settings) -> None:
        """Not ready: calls get UNAVAILABLE until `serve`."""
        self._settings = settings
        self._backend: RetrievalBackend | None = None
        self._waiting_for = "its start"
        self._started_ms = time.time_ns() // 1_000_000
        self._lock = threading.Lock()
        self._queries = self._failed = 0
        self._times, self._total_s = [0] * (len(BUCKETS_S) + 1), 0.0
        self._paths: dict[str, PathCounts] = {}

    def waiting_for(self, what: str) -> None:
        """Name what the worker waits for; callers that are too early get it in the error."""
        self._waiting_for = what

    def serve(self, backend: RetrievalBackend) -> None:
        """From now on, answer from this backend; running calls end on the one before."""
        self._backend = backend

    def answer(
        self,
        request: _Request,
        context: grpc.ServicerContext,
        send: Callable[[_Response | None], None],
    ) -> None:
        """Answer every call but Stats; see retrieval.proto.

        send: ends the call with the response, or with None after an error; perhaps from another
        thread: a call that waits for a click holds no thread
        """
        received_us, begun = time.time_ns() // 1000, time.perf_counter()
        deadline = Deadline.of_call(context.time_remaining(), self._settings.query_timeout_ms)
        self._run(_Call(request, context, send, deadline, received_us, begun))

    def Stats(self, request: pb.StatsRequest, context: grpc.ServicerContext) -> pb.StatsResponse:
        """See retrieval.proto. Answers also before the worker is ready."""
        return self.stats()

    def stats(self) -> pb.StatsResponse:
        """What `Stats` answers."""
        backend, counts = self._backend, self.counts()
        response = pb.StatsResponse(
            ready=backend is not None,
            started_ms=self._started_ms,
            queries=counts.queries,
            queries_failed=counts.failed,
        )
        if backend is None:
            response.missing.append(f"worker: waits for {self._waiting_for}")
        else:
            backend.fill_stats(response)
        return response

    def counts(self) -> QueryCounts:
        """The counters now."""
        waits = self._backend.waits if self._backend is not None else None
        waiting = 0 if waits is None else len(waits)
        with self._lock:
            times, paths = list(self._times), dict(self._paths)
            return QueryCounts(self._queries, self._failed, times, self._total_s, paths, waiting)

    def _run(self, call: _Call, resumed: Query | None = None) -> None:
        """Answer the call, or park it. resumed: its query, once it has waited for its click."""
        try:
            response = self._answer(call, resumed)
        except _NotReady as error:
            return call.fail(grpc.StatusCode.UNAVAILABLE, str(error))
        except tuple(_CODES) as error:
            self._ended(call, None)
            return call.fail(*_status_of(error))
        except Exception as error:
            self._ended(call, None)
            return call.fail(*_status_of(error))
        if response is not None:
            self._ended(call, response)
            call.send(response)

    def _answer(self, call: _Call, resumed: Query | None) -> _Response | None:
        """The response; None if the call waits for its click."""
        settings = self._settings
        if isinstance(call.request, pb.ExplainRequest):
            explained, item_ids = converters.explained_of(call.request, settings)
            return self._ready().explain(
                explained, item_ids, call.deadline, settings.k_max, call.request.impression_id
            )
        if isinstance(call.request, pb.RetrieveBatchRequest):
            return self._batch(call.request, call)
        query = resumed or self._query(call.request)
        backend = self._ready()
        if isinstance(query, NearestQuery):
            return backend.nearest(query, call.deadline, call.received_us)
        waits, after = backend.waits, query.after
        if waits is not None and after is not None and after.wait_ms:
            waits.check(after)  # before any work: callers that are refused may be many
        try:
            return backend.retrieve(query, call.deadline, call.received_us)
        except ClickPending:
            assert waits is not None and after is not None
        wait_s = min(after.wait_ms / 1000, call.deadline.left_s() - ANSWER_S)
        parked = waits.park(
            after, wait_s, lambda waited: self._run(call, replace(query, after=waited))
        )
        if not call.context.add_callback(lambda: waits.cancel(parked)):
            waits.cancel(parked)  # the caller is gone already
        return None

    def _batch(self, batch: pb.RetrieveBatchRequest, call: _Call) -> pb.RetrieveBatchResponse:
        """The answers to all requests, each with its status. Raises BadQuery, _NotReady."""
        if not 1 <= len(batch.requests) <= BATCH_MAX:
            count = len(batch.requests)
            raise BadQuery(f"requests: {count} values, allowed are 1 … {BATCH_MAX}")
        backend = self._ready()
        queries: list[Query | Exception] = []
        for request in batch.requests:
            try:
                queries.append(converters.batched_of(request, self._settings))
            except BadQuery as error:
                queries.append(error)
        users = backend.read_users(one.user_id for one in queries if isinstance(one, Query))
        response, size = pb.RetrieveBatchResponse(), 0
        for query in queries:
            answer, begun = response.answers.add(), time.perf_counter()
            try:
                if isinstance(query, Exception):
                    raise query
                made = backend.retrieve(query, call.deadline, call.received_us, users)
                size += made.ByteSize()
                if size > converters.ANSWER_BYTES_MAX:
                    size -= made.ByteSize()
                    raise NoRoom(
                        f"the answers of the batch would exceed {converters.ANSWER_BYTES_MAX:,} "
                        "bytes: send this request again"
                    )
            except Exception as error:
                code, answer.detail = _status_of(error)
                answer.code = code.value[0]
                self._count(begun, None)
            else:
                answer.response.CopyFrom(made)
                self._count(begun, made)
        return response

    def _ready(self) -> RetrievalBackend:
        if self._backend is None:
            raise _NotReady(f"the worker is not ready: it waits for {self._waiting_for}")
        return self._backend

    def _query(
        self, request: pb.RetrieveRequest | pb.SimilarItemsRequest | pb.SearchByVectorRequest
    ) -> Query | NearestQuery:
        if isinstance(request, pb.SimilarItemsRequest):
            return converters.similar_of(request, self._settings)
        if isinstance(request, pb.SearchByVectorRequest):
            return converters.vector_of(request, self._settings)
        return converters.query_of(request, self._settings)

    def _ended(self, call: _Call, response: _Response | None) -> None:
        """Count a query. response: None: it failed.

        An explanation, which takes longer, is none; a batch counts its queries itself.
        """
        if not isinstance(call.request, pb.ExplainRequest | pb.RetrieveBatchRequest):
            assert response is None or isinstance(response, pb.RetrieveResponse)
            self._count(call.begun, response)

    def _count(self, begun: float, response: pb.RetrieveResponse | None) -> None:
        """Count one query; response: None for a failed one."""
        took_s = time.perf_counter() - begun
        paths = response.paths if response else ()
        with self._lock:
            self._queries += 1
            self._failed += response is None
            self._times[bisect_left(BUCKETS_S, took_s)] += 1
            self._total_s += took_s
            for one in paths:
                self._paths[one.path] = self._paths.get(one.path, _NOT_CALLED).plus(one)


class _Call(NamedTuple):
    """One call for items, from its arrival to its answer."""

    request: _Request
    context: grpc.ServicerContext
    send: Callable[[_Response | None], None]
    deadline: Deadline
    received_us: int
    begun: float

    def fail(self, code: grpc.StatusCode, detail: str) -> None:
        """End the call with this status. `abort` would raise, which only the handler may."""
        self.context.set_code(code)
        self.context.set_details(detail)
        self.send(None)


def _status_of(error: Exception) -> tuple[grpc.StatusCode, str]:
    """The status of a query that ended with this; logs what nobody expects."""
    for kind, code in _CODES.items():
        if isinstance(error, kind):
            return code, str(error)
    log.error("a query failed", exc_info=error)
    detail = f"{type(error).__name__}; the worker's log has more"
    return grpc.StatusCode.INTERNAL, detail


class _NotReady(Exception):
    """The worker cannot answer yet."""


def add_to_server(service: RetrievalService, server: grpc.Server) -> None:
    """As the generated function, but calls for items are answered through a callback.

    On the wire a stream of one response is a single response.
    """

    def answer(request: Any, context: Any, send: Any) -> None:
        service.answer(request, context, one_batch.ending(context, send))

    answer.experimental_non_blocking = True  # type: ignore[attr-defined]
    handlers = {
        name: grpc.unary_stream_rpc_method_handler(
            answer, request.FromString, response.SerializeToString
        )
        for name, (request, response) in _CALLS.items()
    }
    handlers["Stats"] = grpc.unary_unary_rpc_method_handler(
        service.Stats, pb.StatsRequest.FromString, pb.StatsResponse.SerializeToString
    )
    generic = grpc.method_handlers_generic_handler(NAME, handlers)
    server.add_generic_rpc_handlers((generic,))
    server.add_registered_method_handlers(NAME, handlers)
