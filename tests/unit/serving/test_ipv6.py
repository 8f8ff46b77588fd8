"""IPv6 in every form that a host setting may have: gRPC, health, the shared port and metrics."""

from __future__ import annotations

import socket
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry

from cli.commands.query import worker_address
from eddyline import addresses
from eddyline.errors import SettingsError
from eddyline.kafka.diagnostics import BrokerProbe
from eddyline.process import metrics
from eddyline.settings import loader
from eddyline.settings.loader import Settings
from serving.coordinator.shards import parse
from serving.rpc.client import Client, open_channel
from serving.rpc.retrieval_service import RetrievalService
from serving.rpc.server import PortTaken, SharedPort, WorkerServer


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not _has_ipv6(), reason="this machine has no IPv6 on loopback")
# "%1": the scope of the loopback interface on Linux.
HOSTS = ["::1", "[::1]", "::", "[::]", "0:0:0:0:0:0:0:1"]
HOSTS += ["::1%1", "[::1%1]"] if sys.platform == "linux" else []


@needs_ipv6
@pytest.mark.parametrize("role", ["worker", "coordinator"])
@pytest.mark.parametrize("host", HOSTS)
def test_a_server_is_reached_at_the_address_that_it_prints(host: str, role: str) -> None:
    settings = Settings(**{f"{role}_host": host, f"{role}_port": 0})
    server = WorkerServer(settings, RetrievalService(settings), role=role)  # type: ignore[arg-type]
    bare = host.strip("[]")
    assert server.address.startswith(f"[{bare}]:")
    try:
        with open_channel(server.address) as channel, Client(server.address) as client:
            stub = health_pb2_grpc.HealthStub(channel)
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert client.stats().missing
        taken = Settings(
            **{f"{role}_host": host, f"{role}_port": addresses.split(server.address)[1]}
        )
        with pytest.raises(PortTaken, match=r"\[.*\]:\d+ cannot be bound"):
            WorkerServer(taken, RetrievalService(settings), role=role)  # type: ignore[arg-type]
    finally:
        server.stop(0)


@needs_ipv6
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux spreads connections")
@pytest.mark.parametrize("host", HOSTS)
def test_processes_share_a_port(host: str) -> None:
    settings = Settings(worker_host=host, worker_port=0)
    port = SharedPort(settings)
    server = WorkerServer(settings, RetrievalService(settings), port=port)
    try:
        assert server.address == port.address
        with Client(port.address) as client:
            assert client.stats().missing
    finally:
        server.stop(0)
        port.close()


@needs_ipv6
@pytest.mark.parametrize("host", HOSTS)
def test_metrics_are_served(host: str) -> None:
    with socket.socket(socket.AF_INET6) as free:
        free.bind(("::1", 0))
        port = free.getsockname()[1]
    stop = metrics.serve(host, port, CollectorRegistry())  # type: ignore[arg-type]
    try:
        for _ in range(100):
            try:
                with urllib.request.urlopen(f"http://[::1]:{port}/metrics", timeout=5) as answer:
                    assert b"python_info" in answer.read()
                    return
            except OSError:
                time.sleep(0.05)
        raise AssertionError("no metrics")
    finally:
        stop()


@pytest.mark.parametrize("name", ["worker_host", "coordinator_host", "metrics_host"])
@pytest.mark.parametrize(
    "host",
    ["[::1]:50051", "127.0.0.1:50051", "::1]", "[::1", "[worker]", "::zz", "a b", "http://a"],
)
def test_a_host_that_is_none_is_refused_by_name(name: str, host: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as refused:
        loader.load({f"EDDYLINE_{name.upper()}": host}, folder=tmp_path)
    assert str(refused.value).startswith(f"{name} = {host!r}: must be a host")


@pytest.mark.parametrize(
    "host", ["::1", "[::]", "fe80::1%eth0", "[fe80::1%eth0]", "here", "0.0.0.0"]
)
def test_every_form_of_a_host_is_a_setting(host: str, tmp_path: Path) -> None:
    settings = loader.load({"EDDYLINE_WORKER_HOST": host}, folder=tmp_path)
    bare = host.strip("[]")
    expected = f"[{bare}]:50051" if ":" in bare else f"{bare}:50051"
    found = worker_address(Settings(worker_host=settings.worker_host, data_dir=str(tmp_path)))
    assert found == expected and addresses.split(found) == (bare, 50051)


def test_addresses_of_shards_and_brokers() -> None:
    shards = ["[::1]:50051", "[fe80::1%eth0]:5", "here:1", "10.0.0.1:65535"]
    assert parse(",".join(shards)) == shards
    for bad in ("::1", "[::1]", "::1:50051", "here", "here:0", "here:65536", "[here]:5", ":5", ""):
        with pytest.raises(SettingsError, match="shard_addresses"):
            parse(f"here:1,{bad}")
    for address, expected in (
        ("[::1]:9093", ("::1", 9093)),
        ("::1", ("::1", 9092)),
        ("[::1]", ("::1", 9092)),
        ("kafka", ("kafka", 9092)),
        ("kafka:9", ("kafka", 9)),
    ):
        assert BrokerProbe(Settings(), address, 0.0)._host_port() == expected
