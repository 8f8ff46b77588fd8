"""Where Prometheus asks a process what it does: plain HTTP, of what the process keeps anyway."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.exposition import start_http_server
from prometheus_client.registry import Collector

log = logging.getLogger(__name__)

# A process that is replaced may still have the port of the one that takes its place.
AGAIN_S = 2.0
_JOIN_S = 5.0


def serve(host: str, port: int, collector: Collector) -> Callable[[], None]:
    """Answer at host:port; 0 answers nowhere. Returns what ends that.

    A port that is taken is an error in the log and tried again: the work is worth more than its figures.
    """
    if not port:
        return lambda: None
    registry = CollectorRegistry()
    for of_process in (ProcessCollector, PlatformCollector, GCCollector):
        of_process(registry=registry)
    registry.register(collector)
    stop = threading.Event()
    thread = threading.Thread(target=_serve, args=(host, port, registry, stop), name="metrics", daemon=True)
    thread.start()

    def end() -> None:
        stop.set()
        thread.join(_JOIN_S)

    return end


def _serve(host: str, port: int, registry: CollectorRegistry, stop: threading.Event) -> None:
    where, told = f"{host}:{port}", False
    while not stop.is_set():
        try:
            server, thread = start_http_server(port, host, registry)
        except OSError as error:
            if not told:
                log.error(
                    "no metrics: the address cannot be had", extra={"address": where, "reason": str(error)}
                )
            told = True
            stop.wait(AGAIN_S)
            continue
        log.info("metrics", extra={"address": f"http://{where}/metrics"})
        stop.wait()
        server.shutdown()
        server.server_close()
        thread.join(_JOIN_S)
