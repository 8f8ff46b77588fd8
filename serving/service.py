"""The gRPC service: checks a request, has it answered, turns errors into codes with a sentence.

What answers is an `Answering`: `Ready` from a worker's own index, `OfShard` where that holds one shard only,
`serving.coordinator.answers.OfAllShards` from all shards.
"""

from __future__ import annotations

import logging
import threading
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import grpc

from eddyline.errors import EddylineError
from eddyline.settings import Settings
from index.port import Index
from serving import wire
from serving.deadline import Deadline, DeadlinePassed
from serving.paths.popular import PopularPath
from serving.proto import retrieval_pb2 as pb
from serving.proto import retrieval_pb2_grpc
from serving.replica import TailState
from serving.retrieve import Query, Retriever
from serving.share import Share

log = logging.getLogger(__name__)

# Queries are counted by their time, up to so many seconds.
BUCKETS_S = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class NobodyAnswers(EddylineError):
    """No shard answered; the message says why, shard by shard."""


class NotWhole(EddylineError):
    """This worker holds one shard of the items; answers come from its coordinator."""


class Answering(Protocol):
    """What a service answers from. Thread rule: any thread."""

    def retrieve(self, query: Query, deadline: Deadline, received_us: int) -> pb.RetrieveResponse:
        """The answer. Raises DeadlinePassed, NobodyAnswers, NotWhole."""

    def tell(self, response: pb.StatsResponse) -> None:
        """Fill in what it holds and how far it has come."""


@dataclass(frozen=True, slots=True)
class Ready:
    """All that a worker answers from; handed over once it can."""

    generation: str
    retriever: Retriever
    index: Index
    popular: PopularPath
    tail: Callable[[], TailState]

    def retrieve(self, query: Query, deadline: Deadline, received_us: int) -> pb.RetrieveResponse:
        """See `Answering`."""
        answer = self.retriever.retrieve(query, deadline, received_us)
        return wire.response_of(answer, self.generation, self.index)

    def tell(self, response: pb.StatsResponse) -> None:
        """See `Answering`."""
        _tell_index(response, self.generation, self.index, self.tail())
        response.shards = 1
        response.popular.items = self.popular.size()
        response.popular.age_ms = self.popular.age_ms()
        response.missing.extend(self.retriever.missing())


@dataclass(frozen=True, slots=True)
class OfShard:
    """What a worker of one shard has; answers to users are its coordinator's business.

    behind: why the index may lag behind Kafka, "" where it does not
    """

    generation: str
    share: Share
    index: Index
    tail: Callable[[], TailState]
    behind: Callable[[], str]

    def retrieve(self, query: Query, deadline: Deadline, received_us: int) -> pb.RetrieveResponse:
        """See `Answering`; never answers."""
        raise NotWhole(f"this worker holds {self.share.name} only; ask the coordinator of the shards")

    def tell(self, response: pb.StatsResponse) -> None:
        """See `Answering`."""
        _tell_index(response, self.generation, self.index, self.tail())
        response.shard, response.shards = self.share
        response.popular.age_ms = -1
        if self.behind():
            response.missing.append(f"kafka: {self.behind()}")


class Service(retrieval_pb2_grpc.RetrievalServicer):
    """Answers Retrieve and Stats. Thread rule: any thread."""

    def __init__(self, settings: Settings) -> None:
        """Not ready: calls get UNAVAILABLE until `serve`."""
        self._settings = settings
        self._ready: Answering | None = None
        self._waiting_for = "its start"
        self._started_ms = time.time_ns() // 1_000_000
        self._lock = threading.Lock()
        self._queries = self._failed = 0
        self._times, self._total_s = [0] * (len(BUCKETS_S) + 1), 0.0

    def waiting_for(self, what: str) -> None:
        """What the worker waits for, said to whoever calls too early."""
        self._waiting_for = what

    def serve(self, ready: Answering) -> None:
        """From now on, answer from this."""
        self._ready = ready

    def Retrieve(self, request: pb.RetrieveRequest, context: grpc.ServicerContext) -> pb.RetrieveResponse:
        """See retrieval.proto."""
        received_us, begun = time.time_ns() // 1000, time.perf_counter()
        deadline = Deadline.of_call(context.time_remaining(), self._settings.query_timeout_ms)
        try:
            response = self._answer(request, deadline, received_us)
        except wire.BadQuery as error:
            self._count(begun, failed=True)
            _abort(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except DeadlinePassed as error:
            self._count(begun, failed=True)
            _abort(context, grpc.StatusCode.DEADLINE_EXCEEDED, str(error))
        except NotWhole as error:
            self._count(begun, failed=True)
            _abort(context, grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except NobodyAnswers as error:
            self._count(begun, failed=True)
            _abort(context, grpc.StatusCode.UNAVAILABLE, str(error))
        except _NotReady as error:
            _abort(context, grpc.StatusCode.UNAVAILABLE, str(error))
        except Exception as error:
            self._count(begun, failed=True)
            log.exception("a query failed")
            _abort(context, grpc.StatusCode.INTERNAL, f"{type(error).__name__}; the worker's log has more")
        self._count(begun, failed=False)
        return response

    def Stats(self, request: pb.StatsRequest, context: grpc.ServicerContext) -> pb.StatsResponse:
        """See retrieval.proto. Answers before the worker is ready, too."""
        return self.stats()

    def stats(self) -> pb.StatsResponse:
        """What `Stats` answers."""
        ready = self._ready
        with self._lock:
            queries, failed = self._queries, self._failed
        response = pb.StatsResponse(
            ready=ready is not None, started_ms=self._started_ms, queries=queries, queries_failed=failed
        )
        if ready is None:
            response.missing.append(f"worker: waits for {self._waiting_for}")
            return response
        ready.tell(response)
        return response

    def times(self) -> tuple[list[int], float]:
        """(queries by how long they took, see `BUCKETS_S`, and longer ones; seconds of all of them)."""
        with self._lock:
            return list(self._times), self._total_s

    def _answer(
        self, request: pb.RetrieveRequest, deadline: Deadline, received_us: int
    ) -> pb.RetrieveResponse:
        query = wire.query_of(request, self._settings)
        ready = self._ready
        if ready is None:
            raise _NotReady(f"the worker is not ready: it waits for {self._waiting_for}")
        return ready.retrieve(query, deadline, received_us)

    def _count(self, begun: float, *, failed: bool) -> None:
        took_s = time.perf_counter() - begun
        with self._lock:
            self._queries += 1
            self._failed += failed
            self._times[bisect_left(BUCKETS_S, took_s)] += 1
            self._total_s += took_s


class _NotReady(Exception):
    """The worker cannot answer yet."""


def _tell_index(response: pb.StatsResponse, generation: str, index: Index, tail: TailState) -> None:
    response.generation = generation
    response.index.CopyFrom(wire.sizes_of(index.stats(), index.dimension))
    response.watermarks.extend(wire.watermarks_of(index))
    response.tail.CopyFrom(wire.tail_of(tail))


def _abort(context: Any, code: grpc.StatusCode, sentence: str) -> NoReturn:
    context.abort(code, sentence)
    raise AssertionError("abort returned")
