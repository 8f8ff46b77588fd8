"""What `make bench-ingest` measures: CPU, memory, Redis' clock, fences, stamps in histories."""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import redis
from kafka import KafkaConsumer, TopicPartition

from benchmarks.ingest_load import Load
from eddyline.kafka import clients, topics
from eddyline.schema import user_history
from eddyline.schema.partitioning import partition_of
from eddyline.settings.loader import Settings
from sandbox.servers.local_servers import log_dir

POLL_S = 0.05
STALL_S = 60.0
# Processes started here end with this process.
_children: list[subprocess.Popen[Any]] = []
_TICK = os.sysconf("SC_CLK_TCK")


@atexit.register
def _end_children() -> None:
    for child in _children:
        if child.poll() is None:
            child.kill()


def cpu_s(pid: int) -> float:
    """User and system CPU seconds of a process so far, all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


def rss_mb(pid: int) -> float:
    """Resident memory."""
    return (
        int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1])
        * os.sysconf("SC_PAGESIZE")
        / 2**20
    )


def environment(settings: Settings) -> dict[str, str]:
    """This process's environment with the settings' servers, folders and namespace."""
    return {
        **os.environ,
        "EDDYLINE_KAFKA_BOOTSTRAP_SERVERS": settings.kafka_bootstrap_servers,
        "EDDYLINE_REDIS_URL": settings.redis_url,
        "EDDYLINE_NAMESPACE": settings.namespace,
        "EDDYLINE_DATA_DIR": settings.data_dir,
    }


class Running:
    """One of our modules as a process, whose last line is a JSON object."""

    def __init__(self, settings: Settings, module: str, *arguments: str) -> None:
        argv = [sys.executable, "-m", module, *arguments]
        self._process = subprocess.Popen(
            argv,
            env=environment(settings),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        _children.append(self._process)
        self.name = f"{module} {' '.join(arguments)[:80]}"

    def result(self, timeout_s: float) -> dict[str, Any]:
        """Wait for its end. Raises RuntimeError with what it said where that is no JSON."""
        try:
            out, errors = self._process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            out, errors = self._process.communicate()
            raise RuntimeError(
                f"{self.name}: no end after {timeout_s:.0f} s: {errors[-2000:]}"
            ) from None
        if self._process.returncode:
            raise RuntimeError(f"{self.name}: exit {self._process.returncode}: {errors[-2000:]}")
        found: dict[str, Any] = json.loads(out.splitlines()[-1])
        return found


class Ingest:
    """An ingest process, as a user starts it; what it says goes to `<data_dir>/logs`."""

    def __init__(self, settings: Settings) -> None:
        with (
            log_dir(settings)
            .joinpath(f"ingest-{settings.namespace}.log")
            .open("a", encoding="utf-8") as log
        ):
            argv = [sys.executable, "-m", "streams"]
            self._process = subprocess.Popen(
                argv, env=environment(settings), stdout=log, stderr=log
            )
        _children.append(self._process)
        self.pid = self._process.pid

    def stop(self) -> None:
        """End it in order."""
        self._process.terminate()
        self._process.wait(STALL_S)


def load(settings: Settings, **what: Any) -> Running:
    """Start a load generator."""
    return Running(settings, "benchmarks.ingest_load", msgspec.json.encode(Load(**what)).decode())


class Watch:
    """The clicks of a namespace: the ends of the log and the fences of its users."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.redis = redis.Redis.from_url(settings.redis_url)
        self._consumer = KafkaConsumer(**clients.client_options(settings), group_id=None)
        self._at = [
            TopicPartition(settings.prefixed(topics.CLICKS), p)
            for p in range(settings.clicks_partitions)
        ]
        self._ns = f"{settings.namespace}:"

    def close(self) -> None:
        self._consumer.close()
        self.redis.close()

    def sent(self) -> int:
        """Records in the log."""
        return sum(self._consumer.end_offsets(self._at).values())

    def applied(self) -> int:
        """Records up to the fences."""
        numbers = range(self.settings.clicks_partitions)
        found: Any = self.redis.mget([f"{self._ns}fence:{{u{p}}}:clicks:{p}" for p in numbers])
        return sum(int(fence.partition(b"|")[0]) + 1 for fence in found if fence)

    def until(self, count: int, each: Callable[[int], None] = lambda _: None) -> None:
        """Return once so many are applied. Raises RuntimeError where nothing moves for a minute."""
        last, moved = -1, time.monotonic()
        while (applied := self.applied()) < count:
            each(applied)
            if applied != last:
                last, moved = applied, time.monotonic()
            if time.monotonic() - moved > STALL_S:
                raise RuntimeError(f"ingest stands at {applied:,} of {count:,}")
            time.sleep(POLL_S)
        each(applied)

    def redis_cpu_s(self) -> float:
        """Redis' own CPU seconds."""
        said: Any = self.redis.info("cpu")
        return float(said["used_cpu_user"] + said["used_cpu_sys"])

    def reset_scripts(self) -> None:
        """Start Redis' own statistics anew."""
        self.redis.config_resetstat()

    def script_ms(self) -> dict[str, float]:
        """Percentiles of the time Redis spent in one script, by its own clock."""
        said: Any = self.redis.info("latencystats")
        found: Mapping[str, float] = said.get("latency_percentiles_usec_evalsha", {})
        return {name: float(value) / 1000 for name, value in found.items()}

    def stamps(self, users: list[int]) -> dict[str, np.ndarray]:
        """Milliseconds of each hop of the last event of these users, from their lists."""
        partitions = self.settings.clicks_partitions
        keys = [f"{self._ns}{{u{partition_of(f'u{n}', partitions)}}}:h:u{n}" for n in users]
        found = []
        for start in range(0, len(keys), 1_000):
            values: Any = self.redis.mget(keys[start : start + 1_000])
            for value in values:
                if value is not None:
                    stored = user_history.decode(value)
                    found.append(
                        (stored.history.produced_us, stored.history.read_us, stored.applied_us)
                    )
        produced, read, applied = np.array(found, dtype=np.float64).T / 1000
        return {"kafka": read - produced, "ingest": applied - read, "all": applied - produced}
