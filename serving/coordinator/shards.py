"""The connections to the shards: which answer, which are away, and when those are tried again.

Queries leave out a shard that is away, refuses, or was late several times in a row, until its
`Stats` shows that it is ready and holds the right shard and generation. One thread checks the
shards: often while they answer, with growing pauses while one is away.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import grpc

from eddyline.addresses import split
from eddyline.errors import SettingsError
from eddyline.process.retry import Backoff
from eddyline.settings.loader import Settings
from serving.proto import retrieval_pb2 as pb
from serving.proto import retrieval_pb2_grpc, shard_pb2, shard_pb2_grpc
from serving.rpc.client import open_channel
from serving.rpc.server import WorkerServer

log = logging.getLogger(__name__)

SHARDS_MAX = 256
# Interval of checks of a shard that answers: its `Stats` are at most this old.
CHECK_S = 0.5
CHECK_TIMEOUT_S = 0.5
# First pause before the next check of a shard that is away; it doubles up to `backoff_ms_max`.
PAUSE_S = 0.1
# After this many late answers in a row queries leave a shard out; a single one is chance.
LATE_MAX = 3
# Most calls at a time besides one on each query's own thread; more would wait for CPU.
CALLS_MAX = 256
DETAIL_CHARACTERS_MAX = 200
CLOSE_S = 5.0
_REASONS = {
    grpc.StatusCode.DEADLINE_EXCEEDED: "late",
    grpc.StatusCode.UNAVAILABLE: "away",
    grpc.StatusCode.FAILED_PRECONDITION: "refused",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "busy",
}


ShardRequest = shard_pb2.VectorsRequest | shard_pb2.CandidatesRequest | shard_pb2.TermsRequest


class ShardFailure(NamedTuple):
    """Why a shard gave no answer: the reason as in `MissingShard`, and one sentence."""

    reason: str
    detail: str


NO_SHARD_SERVICE = ShardFailure(
    "refused", "the worker there answers no coordinator; set EDDYLINE_SHARD_SERVICE=true for it"
)


def parse(text: str) -> list[str]:
    """The addresses of `shard_addresses`, by shard. Raises SettingsError."""
    addresses = [part.strip() for part in text.split(",")] if text.strip() else []
    if not 1 <= len(addresses) <= SHARDS_MAX:
        raise SettingsError(
            f"shard_addresses = {text!r}: {len(addresses)} addresses, allowed are "
            f"1 … {SHARDS_MAX}; set EDDYLINE_SHARD_ADDRESSES to host:port of each shard's "
            "worker, in the order of shards"
        )
    for address in addresses:
        try:
            split(address)
        except ValueError as error:
            raise SettingsError(f"shard_addresses: {error}") from None
        if addresses.count(address) > 1:
            raise SettingsError(f"shard_addresses: {address!r} is there twice")
    return addresses


class Connection:
    """One shard. Thread rule: any thread."""

    def __init__(
        self, number: int, count: int, address: str, generation: str, backoff_s_max: float
    ) -> None:
        """Connects at the first call; queries use it after its first successful check."""
        self.number, self.address = number, address
        self.target = shard_pb2.Target(generation=generation, shard=number, shards=count)
        self.last = pb.StatsResponse()
        self.misses = 0
        # Start of the process there that has no shard service; 0 for none.
        self._lacks_service = 0
        self.check_at = 0.0
        self._backoff = Backoff(PAUSE_S, backoff_s_max)
        self._late = 0
        self._failure: ShardFailure | None = ShardFailure("away", "it was not checked yet")
        self._lock = threading.Lock()
        # Reconnects within half a second.
        more = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.min_reconnect_backoff_ms", 100)]
        self._channel = open_channel(address, more)
        self._stub = shard_pb2_grpc.ShardStub(self._channel)  # type: ignore[no-untyped-call]
        self._stats = retrieval_pb2_grpc.RetrievalStub(self._channel).Stats  # type: ignore[no-untyped-call]

    @property
    def failure(self) -> ShardFailure | None:
        """Why queries leave it out; None if they call it."""
        return self._failure

    def call(self, request: ShardRequest, until: float) -> Any:
        """The answer; until: monotonic time limit. Raises grpc.RpcError, TimeoutError."""
        timeout_s = until - time.monotonic()
        if timeout_s <= 0:
            raise TimeoutError
        if isinstance(request, shard_pb2.VectorsRequest):
            return self._stub.Vectors(request, timeout=timeout_s)
        if isinstance(request, shard_pb2.TermsRequest):
            return self._stub.Terms(request, timeout=timeout_s)
        return self._stub.Candidates(request, timeout=timeout_s)

    def answered(self) -> None:
        """Note that a query's call was answered."""
        self._late = 0

    def missed(self, error: Exception, timeout_s: float) -> ShardFailure:
        """Note that a query's call failed; leave the shard out if that is more than chance."""
        failure = failure_of(error, timeout_s)
        with self._lock:
            self.misses += 1
            if _code(error) is grpc.StatusCode.UNIMPLEMENTED:
                self._lacks_service, failure = self.last.started_ms, NO_SHARD_SERVICE
            self._late += failure.reason == "late"
            if failure.reason != "busy" and (failure.reason != "late" or self._late >= LATE_MAX):
                if self._failure is None:
                    log.warning(
                        "a shard is left out",
                        extra={"shard": self.number, "reason": failure.detail},
                    )
                self._failure = failure
                self.check_at = 0.0
        return failure

    def begin_check(self) -> Any:
        """Start a `Stats` call."""
        return self._stats.future(pb.StatsRequest(), timeout=CHECK_TIMEOUT_S)

    def end_check(self, call: Any) -> None:
        """Wait for the `Stats` call and use its result."""
        try:
            stats: pb.StatsResponse = call.result(timeout=2 * CHECK_TIMEOUT_S)
            failure = self._failure_in(stats)
        except (grpc.RpcError, grpc.FutureTimeoutError) as error:
            stats, failure = self.last, failure_of(error, CHECK_TIMEOUT_S)
        with self._lock:
            if self._failure is not None and failure is None:
                log.info("a shard answers", extra={"shard": self.number, "address": self.address})
            if failure is None:
                self._late = 0
                self._backoff.reset()
            self.last, self._failure = stats, failure
            pause_s = CHECK_S if failure is None else self._backoff.next_s()
            self.check_at = time.monotonic() + pause_s

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()

    def _failure_in(self, stats: pb.StatsResponse) -> ShardFailure | None:
        target, shards = self.target, max(1, stats.shards)
        if not stats.ready:
            return ShardFailure("away", "; ".join(stats.missing) or "it is not ready")
        if (stats.shard, shards) != (target.shard, target.shards):
            have = f"it holds shard {stats.shard} of {shards}"
            return ShardFailure("refused", f"{have}, not shard {target.shard} of {target.shards}")
        if stats.generation != target.generation:
            return ShardFailure(
                "refused", f"it has generation {stats.generation!r}, not {target.generation!r}"
            )
        if self._lacks_service and stats.started_ms == self._lacks_service:
            return NO_SHARD_SERVICE
        return None


class Shards:
    """All shards of one generation, and the thread that checks them. Thread rule: any thread."""

    def __init__(
        self,
        settings: Settings,
        addresses: Sequence[str],
        generation: str,
        server: WorkerServer | None = None,
    ) -> None:
        """server: its health becomes SERVING while at least one shard answers."""
        backoff_s_max = max(PAUSE_S, settings.backoff_ms_max / 1000)
        self.all = [
            Connection(number, len(addresses), address, generation, backoff_s_max)
            for number, address in enumerate(addresses)
        ]
        self.timeout_s = settings.shard_timeout_ms / 1000
        # Threads with blocking calls: gRPC's futures took twice the CPU and 1.6 times the time.
        calls_max = max(1, min(CALLS_MAX, settings.worker_threads * (len(addresses) - 1)))
        self.pool = ThreadPoolExecutor(calls_max, thread_name_prefix="shard")
        self._server = server
        self._serving: bool | None = None
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Check every shard once, then continue in the background."""
        self.check()
        self._thread = threading.Thread(target=self._run, name="shards", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Check every shard that is due."""
        now = time.monotonic()
        due = [(shard, shard.begin_check()) for shard in self.all if shard.check_at <= now]
        for shard, call in due:
            shard.end_check(call)
        answering = any(shard.failure is None for shard in self.all)
        if self._server is not None and answering != self._serving:
            self._server.set_serving(answering)
            self._serving = answering

    def check_soon(self) -> None:
        """Check the shards that just failed now."""
        self._wake.set()

    def close(self) -> None:
        """Stop the checks; close all connections."""
        self._stop.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(CLOSE_S)
        self.pool.shutdown(wait=False, cancel_futures=True)
        for shard in self.all:
            shard.close()

    def _run(self) -> None:
        while not self._stop.is_set():
            next_s = min(shard.check_at for shard in self.all) - time.monotonic()
            self._wake.wait(max(0.01, next_s))
            self._wake.clear()
            try:
                if not self._stop.is_set():
                    self.check()
            except Exception:  # without checks a recovered shard would stay left out
                log.exception("the check of the shards failed")
                self._stop.wait(PAUSE_S)


def failure_of(error: Exception, timeout_s: float) -> ShardFailure:
    """The failure of a shard whose call raised this."""
    if isinstance(error, (grpc.FutureTimeoutError, TimeoutError)):
        return ShardFailure("late", f"no answer within {timeout_s * 1000:.0f} ms")
    code = _code(error)
    reason = _REASONS.get(code, "failed")
    if reason == "late":
        return ShardFailure(reason, f"no answer within {timeout_s * 1000:.0f} ms")
    text = (error.details() if isinstance(error, grpc.Call) else str(error)) or code.name
    detail = text if reason in ("away", "refused", "busy") else f"{code.name}: {text}"
    return ShardFailure(reason, detail[:DETAIL_CHARACTERS_MAX])


def _code(error: Exception) -> grpc.StatusCode:
    return error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN
