"""The gRPC health service: `Check` takes no lock that a call can hold, streams are limited.

The one of grpcio sends to its streams under the lock that `Check` takes: a caller that does not
read stops all health checks. Here each stream is served for itself, a few at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

SERVICE_NAME: str = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
# Streams at a time: a client with health checking opens one for each connection.
WATCHES_MAX = 256
# Threads that send to the streams. One that does not read holds a thread until its connection ends.
WATCH_THREADS = 4


@dataclass(slots=True, eq=False)
class _Watch:
    """One stream. sent: its last status; busy: a thread sends to it."""

    service: str
    send: Callable[[Any], None]
    sent: int | None = None
    busy: bool = False
    ended: bool = False


class HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """See grpc.health.v1. Thread rule: any thread."""

    def __init__(self, submit: Callable[..., Any]) -> None:
        """submit: runs a call on one of the threads that send to streams."""
        self._submit = submit
        self._status: dict[str, int] = {}
        self._watches: set[_Watch] = set()
        self._stopped = False
        self._lock = threading.Lock()

        def watch(request: Any, context: Any, send: Callable[[Any], None]) -> None:
            self._watch(request.service, context, send)

        # Non-blocking for gRPC: an open stream holds no thread.
        watch.experimental_non_blocking = True  # type: ignore[attr-defined]
        self.Watch = watch

    def set(self, service: str, status: int) -> None:
        """Set the status of a service and tell its streams; does nothing after `stop`."""
        with self._lock:
            if self._stopped:
                return
            self._status[service] = status
            watches = [watch for watch in self._watches if watch.service == service]
        for watch in watches:
            self._submit(self._update, watch)

    def stop(self) -> None:
        """Every service is NOT_SERVING from now on; all streams end."""
        with self._lock:
            self._status = dict.fromkeys(self._status, int(NOT_SERVING))
            self._stopped = True
            watches = list(self._watches)
        for watch in watches:
            self._submit(self._update, watch)

    def Check(self, request: Any, context: grpc.ServicerContext) -> Any:
        """See grpc.health.v1."""
        status = self._status.get(request.service)
        if status is None:
            context.set_code(grpc.StatusCode.NOT_FOUND)
            return health_pb2.HealthCheckResponse()
        return health_pb2.HealthCheckResponse(status=status)

    def _watch(self, service: str, context: Any, send: Callable[[Any], None]) -> None:
        watch = _Watch(service, send)
        with self._lock:
            full = len(self._watches) >= WATCHES_MAX
            if not full:
                self._watches.add(watch)
        if full:
            context.set_code(grpc.StatusCode.RESOURCE_EXHAUSTED)
            context.set_details(f"health: {WATCHES_MAX} calls of Watch are open already")
            send(None)
        elif context.add_callback(lambda: self._end(watch)):
            self._update(watch)
        else:  # the caller is gone already
            self._end(watch)

    def _end(self, watch: _Watch) -> None:
        with self._lock:
            watch.ended = True
            self._watches.discard(watch)

    def _update(self, watch: _Watch) -> None:
        """Send what the stream lacks, one thread at a time."""
        while True:
            with self._lock:
                status = self._status.get(watch.service, int(SERVICE_UNKNOWN))
                if watch.busy or watch.ended:
                    return
                last = self._stopped and status == watch.sent
                if status == watch.sent and not last:
                    return
                watch.busy, watch.ended = True, last
                watch.sent = status
            watch.send(None if last else health_pb2.HealthCheckResponse(status=status))
            with self._lock:
                watch.busy = False
