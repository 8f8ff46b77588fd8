"""Where Prometheus asks a process what it does: plain HTTP, of what the process keeps anyway."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.exposition import start_http_server
from prometheus_client.registry import Collector

log = logging.getLogger(__name__)

# A process that is being replaced still has the port of the one that takes its place.
AGAIN_S = 0.5
# Where it still is taken after this time, a person has to look.
TAKEN_S = 60.0
_JOIN_S = 5.0


def serve(host: str, port: int, collector: Collector) -> Callable[[], None]:
    """Answer at host:port; 0 answers nowhere. Returns what ends that.

    A port that is taken is tried again, and an error in the log after a minute: the work is worth more than
    its figures.
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
    where, begun, told = f"{host}:{port}", time.monotonic(), set[int]()
    while not stop.is_set():
        try:
            server, thread = start_http_server(port, host, registry)
        except OSError as error:
            level = logging.ERROR if time.monotonic() - begun >= TAKEN_S else logging.INFO
            if level not in told:
                said = {"address": where, "reason": str(error)}
                log.log(level, "no metrics yet: the address cannot be had", extra=said)
            told.add(level)
            stop.wait(AGAIN_S)
            continue
        log.info("metrics", extra={"address": f"http://{where}/metrics"})
        stop.wait()
        server.shutdown()
        server.server_close()
        thread.join(_JOIN_S)
