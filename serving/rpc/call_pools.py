"""Threads and limits of each kind of call: health, reflection and Stats never use a query's thread.

gRPC runs a call in the pool that is an attribute of its handler, else in the server's own. The
interceptor sets that attribute, and refuses a call whose pool is full before it waits anywhere.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha import reflection

# A reflection stream ends after this long without a question, and after this long in any case.
REFLECTION_IDLE_S = 10.0
REFLECTION_S_MAX = 120.0
REFLECTION_STREAMS_MAX = 4
# If calls wait and no thread took one for so long, all threads wait for a server themselves, or for
# long work. A busy pool takes one every few milliseconds, however many wait.
STUCK_S = 0.02
# A thread beyond the first ones ends after this time without a call.
IDLE_S = 5.0


_Call = tuple[Future[Any], Callable[[], Any]]


class _Threads:
    """Threads of a pool; all under the pool's lock. count: of threads

    The one that has been idle for the shortest time is woken: its memory is still in the caches.
    """

    def __init__(self) -> None:
        self.count = 0
        self._idle: list[threading.Lock] = []

    def wake(self) -> bool:
        """Have an idle thread go on; False if all are busy."""
        if not self._idle:
            return False
        self._idle.pop().release()
        return True

    def wake_all(self) -> None:
        """Have all idle threads go on."""
        while self.wake():
            pass

    def wait(self, pool: threading.Lock, timeout_s: float = -1) -> bool:
        """Be idle until woken; False after the time-out. pool: its lock, let go meanwhile."""
        mine = threading.Lock()
        mine.acquire()
        self._idle.append(mine)
        pool.release()
        try:
            woken = mine.acquire(timeout=timeout_s)
        finally:
            pool.acquire()
        if not woken and mine in self._idle:
            self._idle.remove(mine)
            return False
        return True


class CallPool(ThreadPoolExecutor):
    """A thread pool that counts its calls, running and waiting. Thread rule: any thread.

    Python runs one thread at a time, so many that compute only hand the interpreter to each other.
    A few are enough, unless they wait for a server. So if calls wait and none was taken for
    `STUCK_S`, a further thread takes one. While calls wait, one of the further threads looks after
    that.
    """

    def __init__(self, name: str, threads: int, calls_max: int, *, at_first: int = 0) -> None:
        """calls_max: with this many calls inside, `full` is true.

        at_first: threads whose calls do not wait; default: all
        """
        super().__init__(threads, thread_name_prefix=name)
        self.name, self.calls_max = name, calls_max
        self._at_first = min(at_first or threads, threads)
        self._more = threads - self._at_first
        self._lock = threading.Lock()
        self._first, self._further = _Threads(), _Threads()
        # When a call was taken last.
        self._taken_s = 0.0
        # Whether one of the further threads looks after the calls that wait.
        self._watched = False
        # Calls without a thread, with the time since when.
        self._waiting: deque[tuple[float, Future[Any], Callable[[], Any]]] = deque()
        self._calls = self._made = 0
        self._closed = False

    def submit(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """As ThreadPoolExecutor does; counted until it is done."""
        future = Future[Any]()
        with self._lock:
            if self._closed:
                raise RuntimeError(f"{self.name}: the pool is closed")
            self._calls += 1
            self._waiting.append((time.monotonic(), future, partial(call, *args, **kwargs)))
            if not self._wake(self._first, self._at_first, self._next):
                self._watch()
        return future

    def full(self) -> bool:
        """Whether a further call is refused."""
        return self._calls >= self.calls_max

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """No further calls; the threads end after those that are inside."""
        with self._lock:
            self._closed = True
            for threads in (self._first, self._further):
                threads.wake_all()
        super().shutdown(wait, cancel_futures=cancel_futures)

    def _wake(self, threads: _Threads, most: int, take: Callable[[], _Call | None]) -> bool:
        """Have an idle thread go on, or start one; False if all are busy."""
        if threads.wake():
            return True
        if threads.count < most:
            threads.count += 1
            self._made += 1
            name = f"{self.name}_{self._made}"
            threading.Thread(target=self._run, args=(take,), name=name, daemon=True).start()
            return True
        return False

    def _watch(self) -> None:
        """Have one of the further threads look after the calls that wait."""
        if not self._watched:
            self._watched = self._wake(self._further, self._more, self._next_stuck)

    def _run(self, take: Callable[[], _Call | None]) -> None:
        while (taken := take()) is not None:
            future, call = taken
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
            # Not kept until the next call comes.
            del taken, future, call
            with self._lock:
                self._calls -= 1

    def _next(self) -> _Call | None:
        """The call that waits longest; None: the thread ends."""
        threads = self._first
        with self._lock:
            while not self._waiting:
                if self._closed:
                    threads.count -= 1
                    return None
                threads.wait(self._lock)
            return self._take()

    def _next_stuck(self) -> _Call | None:
        """The call that waits longest, once none was taken for so long; None: the thread ends."""
        threads = self._further
        while True:
            with self._lock:
                while not self._waiting:
                    self._watched = False
                    if self._closed or not threads.wait(self._lock, IDLE_S):
                        threads.count -= 1
                        return None
                since_s = max(self._waiting[0][0], self._taken_s)
                left_s = since_s + STUCK_S - time.monotonic()
                if left_s <= 0:
                    self._watched = False
                    taken = self._take()
                    if self._waiting:
                        self._watch()
                    return taken
            time.sleep(left_s)

    def _take(self) -> _Call:
        self._taken_s = time.monotonic()
        _, future, call = self._waiting.popleft()
        return future, call


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
