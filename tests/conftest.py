"""Servers for the tests: those of the environment, else containers where an engine answers, else
local ones.

One Kafka and one Redis a run; each test takes a namespace of its own on them.
"""

from __future__ import annotations

import contextlib
import gc
import os
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import msgspec
import pytest
from filelock import FileLock
from hypothesis.internal.conjecture import providers
from hypothesis.internal.constants_ast import Constants

from eddyline.settings.loader import Settings
from sandbox.servers.local_servers import local_servers, log_dir
from sandbox.servers.supervisor import Supervisor
from tests.integration.redis_servers import real_cluster

# The same examples every time, so that a failure of CI is a failure everywhere;
# HYPOTHESIS_PROFILE=explore goes on looking. Before the test modules are imported: their own
# settings are made on top of this one. No deadline: a busy machine makes any example slow.
hypothesis.settings.register_profile("ci", derandomize=True, database=None, deadline=None)
hypothesis.settings.register_profile("explore", derandomize=False, deadline=None)
# `make mutations` wants a failure, not the smallest one: shrinking takes minutes.
hypothesis.settings.register_profile(
    "mutations",
    deadline=None,
    derandomize=True,
    database=None,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "ci")
hypothesis.settings.load_profile(PROFILE)
if PROFILE != "explore":
    # Hypothesis also draws constants that it finds in the modules loaded so far. Which ones are
    # loaded depends on the tests that ran before in this process, and so would the examples.
    providers._get_local_constants = Constants

# Settings of the machine that runs the tests must not steer them; its servers may.
for _name in [n for n in os.environ if n.startswith("EDDYLINE_")]:
    del os.environ[_name]


# A slow machine's time for the longest of what the processes of a run share: a training.
ONCE_S = 100
# The longest files first, then the other files that wait for servers, so that all processes end at
# about the same time.
LONGEST = (
    "crashes refill repartition kafka_security feed_pages chaos archive_process dead_letters "
    "redis_cluster whole_records"
).split()
ORDER = (*(f"test_{name}.py" for name in LONGEST), "integration", "lint", "contract", "simulation")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The third process of pytest -n 3 --dist loadfile begins with tests without servers."""
    if config.getvalue("dist") != "loadfile":
        return None
    from tests.scheduler import ServersLastInThird

    return ServersLastInThird(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the files of tests/ for processes that share them: pytest -n 3 --dist loadfile."""

    def rank(item: pytest.Item) -> int:
        path = item.path.as_posix()
        inside = path.partition("/tests/")[2]
        return next((n for n, part in enumerate(ORDER) if part in inside), len(ORDER))

    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=rank)
    if not os.environ.get("SOAK_S"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="long: `make soak` runs it"))


def once_per_run(
    tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]
) -> Path:
    """A folder that all processes of one test run share; the first one to ask fills it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock", timeout=ONCE_S):
        if not folder.exists():
            unfinished = folder.with_suffix(".unfinished")
            make(unfinished)
            unfinished.rename(folder)
    return folder


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """Settings that name a real Kafka and a real Redis. Small partition counts: tests read them
    all.
    """
    base = Settings(
        data_dir=str(tmp_path_factory.mktemp("servers")),
        clicks_partitions=4,
        items_partitions=2,
        worker_port=0,
        kafka_bootstrap_servers=os.environ.get("KAFKA_BOOTSTRAP_SERVERS", ""),
        redis_url=os.environ.get("REDIS_URL", ""),
    )
    with contextlib.ExitStack() as stack:
        if not (base.kafka_bootstrap_servers and base.redis_url) and engine_answers():
            base = stack.enter_context(containers(base))
        supervisor = stack.enter_context(Supervisor(log_dir(base)))
        yield stack.enter_context(local_servers(base, supervisor, owner="the tests"))


def engine_answers() -> bool:
    """Whether a container engine can be asked for servers."""
    import docker

    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", ResourceWarning
        )  # docker-py leaves its socket open where it fails
        try:
            client = docker.from_env(timeout=2)
            client.ping()
            client.close()
        except Exception:
            return False
        finally:
            gc.collect()
    return True


@contextlib.contextmanager
def containers(base: Settings) -> Iterator[Settings]:
    """What the environment does not name, as containers."""
    from testcontainers.kafka import KafkaContainer
    from testcontainers.redis import RedisContainer

    with contextlib.ExitStack() as stack:
        kafka, redis = base.kafka_bootstrap_servers, base.redis_url
        if not kafka:
            kafka = stack.enter_context(KafkaContainer().with_kraft()).get_bootstrap_server()
        if not redis:
            made = stack.enter_context(RedisContainer("valkey/valkey:9"))
            redis = f"redis://{made.get_container_host_ip()}:{made.get_exposed_port(6379)}/0"
        yield msgspec.structs.replace(base, kafka_bootstrap_servers=kafka, redis_url=redis)


@pytest.fixture(scope="session")
def cluster_settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """Settings that name a real Redis Cluster of three nodes, which no test breaks."""
    with real_cluster(tmp_path_factory.mktemp("cluster"), cluster_node_timeout="15000") as cluster:
        yield Settings(redis_url=cluster.url, redis_cluster=True)


@pytest.fixture
def fresh_settings(servers: Settings, tmp_path: Path) -> Settings:
    """The servers' settings with a namespace and a data folder of this test's own."""
    return msgspec.structs.replace(
        servers, namespace=f"t-{uuid.uuid4().hex[:12]}", data_dir=str(tmp_path)
    )
