"""The gRPC service: checks a request, has it answered, turns errors into codes with a sentence.

What answers is an `RetrievalBackend`: `WorkerBackend` from a worker's own index, `ShardBackend` where that holds one shard only,
`serving.coordinator.backend.CoordinatorBackend` from all shards.
"""

from __future__ import annotations

import logging
import threading
import time
from bisect import bisect_left
from typing import Any, NoReturn

import grpc

from eddyline.settings.loader import Settings
from serving.answer.deadline import Deadline, DeadlinePassed
from serving.proto import retrieval_pb2 as pb
from serving.proto import retrieval_pb2_grpc
from serving.rpc import converters
from serving.rpc.backends import HoldsOneShard, NoShardAnswers, RetrievalBackend

log = logging.getLogger(__name__)

# Queries are counted by their time, up to so many seconds.
BUCKETS_S = (
    0.0005,
    0.001,
    0.002,
    0.003,
    0.005,
    0.0075,
    0.01,
    0.015,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
)


class RetrievalService(retrieval_pb2_grpc.RetrievalServicer):
    """Answers Retrieve and Stats. Thread rule: any thread."""

    def __init__(self, settings: Settings) -> None:
        """Not ready: calls get UNAVAILABLE until `serve`."""
        self._settings = settings
        self._ready: RetrievalBackend | None = None
        self._waiting_for = "its start"
        self._started_ms = time.time_ns() // 1_000_000
        self._lock = threading.Lock()
        self._queries = self._failed = 0
        self._times, self._total_s = [0] * (len(BUCKETS_S) + 1), 0.0

    def waiting_for(self, what: str) -> None:
        """What the worker waits for, said to whoever calls too early."""
        self._waiting_for = what

    def serve(self, ready: RetrievalBackend) -> None:
        """From now on, answer from this."""
        self._ready = ready

    def Retrieve(
        self, request: pb.RetrieveRequest, context: grpc.ServicerContext
    ) -> pb.RetrieveResponse:
        """See retrieval.proto."""
        received_us, begun = time.time_ns() // 1000, time.perf_counter()
        deadline = Deadline.of_call(context.time_remaining(), self._settings.query_timeout_ms)
        try:
            response = self._answer(request, deadline, received_us)
        except converters.BadQuery as error:
            self._count(begun, failed=True)
            _abort(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except DeadlinePassed as error:
            self._count(begun, failed=True)
            _abort(context, grpc.StatusCode.DEADLINE_EXCEEDED, str(error))
        except HoldsOneShard as error:
            self._count(begun, failed=True)
            _abort(context, grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except NoShardAnswers as error:
            self._count(begun, failed=True)
            _abort(context, grpc.StatusCode.UNAVAILABLE, str(error))
        except _NotReady as error:
            _abort(context, grpc.StatusCode.UNAVAILABLE, str(error))
        except Exception as error:
            self._count(begun, failed=True)
            log.exception("a query failed")
            _abort(
                context,
                grpc.StatusCode.INTERNAL,
                f"{type(error).__name__}; the worker's log has more",
            )
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
            ready=ready is not None,
            started_ms=self._started_ms,
            queries=queries,
            queries_failed=failed,
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
        query = converters.query_of(request, self._settings)
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


def _abort(context: Any, code: grpc.StatusCode, sentence: str) -> NoReturn:
    context.abort(code, sentence)
    raise AssertionError("abort returned")
