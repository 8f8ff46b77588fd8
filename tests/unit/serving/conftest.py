"""A worker of memory stores behind a real gRPC server, for the files that need no other one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from serving.coordinator import shards
from serving.rpc.client import Client
from serving.rpc.retrieval_service import RetrievalService
from serving.rpc.server import WorkerServer
from tests.unit.serving.test_retriever import SETTINGS, World


@pytest.fixture(autouse=True)
def _patient_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine a shard may take a second to answer a check; none is away here."""
    monkeypatch.setattr(shards, "CHECK_TIMEOUT_S", 5.0)


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def service(world: World) -> RetrievalService:
    made = RetrievalService(SETTINGS)
    made.serve(world.backend)
    return made


@pytest.fixture
def client(service: RetrievalService) -> Iterator[Client]:
    server = WorkerServer(SETTINGS, service)
    with Client(server.address) as made:
        yield made
    server.stop(0.0)
