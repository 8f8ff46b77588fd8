"""What each kind of fault does. A fault returns what it met, in words; "" where it found nothing to break."""

from __future__ import annotations

import threading
import time

import redis

from tests.chaos.load import Load
from tests.chaos.proxy import Kind, Trouble
from tests.chaos.scene import Scene
from tests.chaos.schedule import Fault

# So much later than the time-out come slow answers.
SLOW_S = 0.9
FLUSH_S = 5.0
# A process that was killed a moment ago is back within this.
BACK_S = 10.0
# A trouble waits so long for a command to meet: other faults may hold everybody just then.
MEET_S = 40.0
_TROUBLE: dict[str, Kind] = {
    "error": "error",
    "slow": "slow",
    "cut before": "cut before",
    "cut after": "cut after",
}


class Faults:
    """Makes faults fall on a scene. Thread rule: any thread; faults overlap on purpose.

    stop: ends waits early
    """

    def __init__(self, scene: Scene, load: Load, stop: threading.Event) -> None:
        self._scene = scene
        self._load = load
        self._stop = stop
        # One trouble at a time: two would hide each other.
        self._proxy_turn = threading.Lock()

    def fall(self, fault: Fault) -> str:
        """Make it fall, and wait until it is over. Returns what it met."""
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
            copy = self._scene.copy_files(str(fault.number))
            self._stop.wait(float(fault.more["older_s"]))
            self._scene.swap_files(copy)
            return "swapped"
        if kind == "emptied":
            return self._empty(str(fault.more["how"]))
        if kind in ("duplicates", "reordered", "strays"):
            self._load.burst(kind, int(fault.more["events"]))
            return f"{fault.more['events']} events"
        return self._trouble(kind, float(fault.more["seconds"]))

    def _kill(self, name: str) -> str:
        deadline = time.monotonic() + BACK_S
        while not self._scene.kill(name):  # another fault has just killed it
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
            except redis.RedisError:  # another fault holds Valkey; then the files go
                pass
            finally:
                client.close()
        self._scene.swap_files(None)
        return "files gone"

    def _trouble(self, kind: str, seconds: float) -> str:
        what, _, code = kind.partition(" ")
        trouble = _TROUBLE[what if what in _TROUBLE else kind]
        with self._proxy_turn:
            proxy = self._scene.proxy
            before = proxy.hits.total()
            # Seconds in which nothing came by would be no fault: it goes on until something did.
            deadline = time.monotonic() + MEET_S
            while True:
                until_s = time.monotonic() + seconds
                proxy.make(Trouble(trouble, until_s, code if trouble == "error" else "", SLOW_S))
                self._stop.wait(seconds)
                met = proxy.hits.total() - before
                if met or time.monotonic() > deadline or self._stop.is_set():
                    break
            proxy.calm()
        return f"{met} commands" if met else ""
