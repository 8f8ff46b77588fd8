"""Metrics of a process for Prometheus: labelled metrics, and the endpoint in plain HTTP."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import start_http_server
from prometheus_client.registry import Collector

log = logging.getLogger(__name__)

# While a process is replaced, its predecessor still holds the port.
AGAIN_S = 0.5
# A port that is in use for longer is logged as an error.
TAKEN_S = 60.0
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
    address, begun_s, logged = f"{host}:{port}", time.monotonic(), set[int]()
    while not stop.is_set():
        try:
            server, thread = start_http_server(port, host, registry)
        except OSError as error:
            level = logging.ERROR if time.monotonic() - begun_s >= TAKEN_S else logging.INFO
            if level not in logged:
                values = {"address": address, "reason": str(error)}
                log.log(level, "no metrics yet: the address cannot be bound", extra=values)
            logged.add(level)
            stop.wait(AGAIN_S)
            continue
        log.info("metrics", extra={"address": f"http://{address}/metrics"})
        stop.wait()
        server.shutdown()
        server.server_close()
        thread.join(_JOIN_S)
