"""Metrics of a process for Prometheus: labelled metrics, and the endpoint in plain HTTP."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import make_wsgi_app
from prometheus_client.registry import Collector

from eddyline import addresses

log = logging.getLogger(__name__)

# While a process is replaced, its predecessor still holds the port.
AGAIN_S = 0.5
# A port that is in use for longer is logged as an error.
TAKEN_S = 60.0
# Connections at a time, and how long one may take: a scraper needs one, for milliseconds.
CONNECTIONS_MAX = 8
REQUEST_S = 10.0
_JOIN_S = 5.0


def labelled(
    kind: type[CounterMetricFamily] | type[GaugeMetricFamily],
    name: str,
    what: str,
    label: str,
    values: Mapping[str, float],
) -> Metric:
    """One metric with a value for each value of its label. what: its help text."""
    family = kind(name, what, labels=[label])
    for value, number in values.items():
        family.add_metric([value], number)
    return family


def serve(host: str, port: int, collector: Collector) -> Callable[[], None]:
    """Serve metrics at host:port; port 0 serves none. Returns a function that stops it.

    A port in use does not stop the process: it is tried again, and logged as an error in time.
    """
    if not port:
        return lambda: None
    registry = CollectorRegistry()
    for of_process in (ProcessCollector, PlatformCollector, GCCollector):
        of_process(registry=registry)
    registry.register(collector)
    stop = threading.Event()
    thread = threading.Thread(
        target=_serve, args=(host, port, registry, stop), name="metrics", daemon=True
    )
    thread.start()

    def end() -> None:
        stop.set()
        thread.join(_JOIN_S)

    return end


def _serve(host: str, port: int, registry: CollectorRegistry, stop: threading.Event) -> None:
    host = addresses.bare_host(host)
    address, begun_s, logged = addresses.joined(host, port), time.monotonic(), set[int]()
    while not stop.is_set():
        try:
            server = _server(host, port, registry)
        except OSError as error:
            level = logging.ERROR if time.monotonic() - begun_s >= TAKEN_S else logging.INFO
            if level not in logged:
                values = {"address": address, "reason": str(error)}
                log.log(level, "no metrics yet: the address cannot be bound", extra=values)
            logged.add(level)
            stop.wait(AGAIN_S)
            continue
        log.info("metrics", extra={"address": f"http://{address}/metrics"})
        thread = threading.Thread(target=server.serve_forever, name="metrics-http", daemon=True)
        thread.start()
        stop.wait()
        server.shutdown()
        server.server_close()
        thread.join(_JOIN_S)


class _Server(ThreadingMixIn, WSGIServer):
    """A thread for each connection, of which there are few, and none for long."""

    daemon_threads = True

    def __init__(self, *args: Any) -> None:
        self._places = threading.BoundedSemaphore(CONNECTIONS_MAX)
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection, or close it if too many are open."""
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection, for a limited time."""
        end = threading.Timer(REQUEST_S, _cut, (request,))
        end.daemon = True
        end.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            end.cancel()
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A caller that went away, or was cut off, is nothing to report."""
        log.debug("a connection for metrics failed", exc_info=True)


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Log no requests."""


def _server(host: str, port: int, registry: CollectorRegistry) -> WSGIServer:
    """Raises OSError if the address cannot be bound."""
    [(family, *_), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    server = type("_Server", (_Server,), {"address_family": family})
    return make_server(host, port, make_wsgi_app(registry), server, _Handler)


def _cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
