"""Threads and limits of each kind of call: health, reflection and Stats never use a query's thread.

gRPC runs a call in the pool that is an attribute of its handler, else in the server's own. The
interceptor sets that attribute, and refuses a call whose pool is full before it waits anywhere.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha import reflection

# A reflection stream ends after this long without a question, and after this long in any case.
REFLECTION_IDLE_S = 10.0
REFLECTION_S_MAX = 120.0
REFLECTION_STREAMS_MAX = 4


class CallPool(ThreadPoolExecutor):
    """A thread pool that counts its calls, running and waiting. Thread rule: any thread."""

    def __init__(self, name: str, threads: int, calls_max: int) -> None:
        """calls_max: with this many calls inside, `full` is true."""
        super().__init__(threads, thread_name_prefix=name)
        self.name, self.calls_max = name, calls_max
        self._calls = 0
        self._counting = threading.Lock()

    def submit(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """As ThreadPoolExecutor does; counted until it is done."""
        with self._counting:
            self._calls += 1
        try:
            future = super().submit(call, *args, **kwargs)
        except BaseException:
            self._leave()
            raise
        future.add_done_callback(self._leave)
        return future

    def full(self) -> bool:
        """Whether a further call is refused."""
        return self._calls >= self.calls_max

    def _leave(self, _: object = None) -> None:
        with self._counting:
            self._calls -= 1


class CallPools(grpc.ServerInterceptor):  # type: ignore[misc]
    """Gives each method its pool; a call to a full pool gets RESOURCE_EXHAUSTED at once."""

    def __init__(self, queries: CallPool, others: Mapping[str, CallPool]) -> None:
        """queries: of all methods that `others` (full method name -> pool) does not name."""
        self._queries, self._others = queries, others
        self._refusals = CallPool("refused", 1, 1_000)

    def intercept_service(
        self, continuation: Callable[[Any], Any], handler_call_details: Any
    ) -> Any:
        """See grpc.ServerInterceptor."""
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        pool = self._others.get(handler_call_details.method)
        if (pool or self._queries).full():
            return _answered_by(handler, _refuse(pool or self._queries), self._refusals)
        return handler if pool is None else _answered_by(handler, None, pool)

    def close(self) -> None:
        """End the threads that run nothing."""
        for pool in {self._queries, self._refusals, *self._others.values()}:
            pool.shutdown(wait=False)


class BoundedReflection(reflection.ReflectionServicer):  # type: ignore[misc]
    """Server reflection whose streams end when idle, and after a while in any case."""

    def __init__(self, names: Iterable[str], pool: DescriptorPool) -> None:
        """names: services to list; pool: their descriptors."""
        super().__init__(names, pool)
        self._idle_s, self._s_max = REFLECTION_IDLE_S, REFLECTION_S_MAX

    def ServerReflectionInfo(self, request_iterator: Iterator[Any], context: Any) -> Iterator[Any]:
        """See grpc.reflection.v1; the caller of a stream that is ended gets CANCELLED."""
        ends = [_timer(self._s_max, context.cancel), _timer(self._idle_s, context.cancel)]

        def watched() -> Iterator[Any]:
            for request in request_iterator:
                ends[1].cancel()
                yield request
                ends[1] = _timer(self._idle_s, context.cancel)

        try:
            yield from super().ServerReflectionInfo(watched(), context)
        finally:
            for end in ends:
                end.cancel()


def _timer(seconds: float, call: Callable[[], Any]) -> threading.Timer:
    timer = threading.Timer(seconds, call)
    timer.daemon = True
    timer.start()
    return timer


def _refuse(pool: CallPool) -> Callable[[Any, Any], Any]:
    def refuse(_: Any, context: Any) -> None:
        context.abort(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            f"{pool.name}: {pool.calls_max} calls run or wait already",
        )

    return refuse


def _answered_by(handler: Any, behavior: Callable[[Any, Any], Any] | None, pool: CallPool) -> Any:
    """The handler with its behavior, or another one, run in this pool."""
    kinds = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
    [kind] = [kind for kind in kinds if getattr(handler, kind) is not None]
    original = getattr(handler, kind)

    def run(*args: Any) -> Any:
        return (behavior or original)(*args)

    if behavior is None and getattr(original, "experimental_non_blocking", False):
        run.experimental_non_blocking = True  # type: ignore[attr-defined]
    run.experimental_thread_pool = pool  # type: ignore[attr-defined]
    return handler._replace(**{kind: run})
