"""What each kind of fault does. A fault returns what it met, in words; "" for nothing."""

from __future__ import annotations

import threading
import time

import redis

from tests.chaos.load import Load
from tests.chaos.proxy import Kind, ProxyFault
from tests.chaos.scene import Scene
from tests.chaos.schedule import Fault

# Slow answers come this late, after the client's time-out.
SLOW_S = 0.9
FLUSH_S = 5.0
# A killed process is back within this time.
BACK_S = 10.0
# A proxy fault waits this long for a command: other faults may hold every client.
MEET_S = 90.0
_PROXY_FAULTS: dict[str, Kind] = {
    "error": "error",
    "slow": "slow",
    "cut before": "cut before",
    "cut after": "cut after",
}


class Faults:
    """Injects faults into a scene. Thread rule: any thread; faults overlap on purpose.

    stop: ends waits early
    """

    def __init__(self, scene: Scene, load: Load, stop: threading.Event) -> None:
        self._scene = scene
        self._load = load
        self._stop = stop

    def inject(self, fault: Fault) -> str:
        """Inject the fault and wait until it is over. Returns what it met."""
        kind = fault.kind
        if kind == "kill ingest":
            return self._kill(str(fault.more["which"]))
        if kind.startswith("kill"):
            return self._kill(
                {"kill redis": "valkey", "kill broker": "kafka", "kill worker": "worker"}[kind]
            )
        if kind.startswith("freeze"):
            name = {"freeze redis": "valkey", "freeze broker": "kafka"}.get(kind) or str(
                fault.more["which"]
            )
            return self._freeze(name, float(fault.more["seconds"]))
        if kind == "older copy":
            with self._scene.copies:
                copy = self._scene.copy_files(str(fault.number))
                self._stop.wait(float(fault.more["older_s"]))
                self._scene.swap_files(copy)
            return "swapped"
        if kind == "emptied":
            with self._scene.copies:
                return self._empty(str(fault.more["how"]))
        if kind == "retention":
            deleted = self._scene.retain()
            return f"{deleted} offsets" if deleted else ""
        if kind == "settings":
            self._scene.change_ingest(**fault.more)
            return ", ".join(f"{name} {value}" for name, value in fault.more.items())
        if kind == "retraining":
            return f"generation {self._scene.retrain()}"
        if kind in ("duplicates", "reordered", "strays", "transactions"):
            self._load.burst(kind, int(fault.more["events"]))
            return f"{fault.more['events']} events"
        return self._proxy_fault(kind, float(fault.more["seconds"]))

    def _kill(self, name: str) -> str:
        deadline = time.monotonic() + BACK_S
        while not self._scene.kill(name):  # another fault just killed it
            if time.monotonic() > deadline or self._stop.wait(0.1):
                return ""
        return "killed"

    def _freeze(self, name: str, seconds: float) -> str:
        with self._scene.frozen(name) as stopped:
            self._stop.wait(seconds)
        return "frozen" if stopped else ""

    def _empty(self, how: str) -> str:
        if how == "FLUSHALL":
            client = redis.Redis.from_url(self._scene.settings.redis_url, socket_timeout=FLUSH_S)
            try:
                client.flushall()
                return "flushed"
            except redis.RedisError:  # another fault holds Valkey: remove the files
                pass
            finally:
                client.close()
        self._scene.swap_files(None)
        return "files gone"

    def _proxy_fault(self, kind: str, seconds: float) -> str:
        what, _, code = kind.partition(" ")
        proxy_fault = _PROXY_FAULTS[what if what in _PROXY_FAULTS else kind]
        with self._scene.proxy_turn:
            proxy = self._scene.proxy
            before = proxy.hits.total()
            # A fault that met no command is none: it goes on until one comes.
            deadline = time.monotonic() + MEET_S
            while True:
                until_s = time.monotonic() + seconds
                proxy.inject(
                    ProxyFault(proxy_fault, until_s, code if proxy_fault == "error" else "", SLOW_S)
                )
                self._stop.wait(seconds)
                met = proxy.hits.total() - before
                if met or time.monotonic() > deadline or self._stop.is_set():
                    break
            proxy.clear()
        return f"{met} commands" if met else ""
