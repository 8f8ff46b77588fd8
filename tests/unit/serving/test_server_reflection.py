"""Clients without our .proto files learn the services by reflection, v1 and v1alpha."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from eddyline.settings.loader import Settings
from serving.rpc.client import open_channel
from serving.rpc.retrieval_service import RetrievalService
from serving.rpc.server import WorkerServer
from serving.rpc.shard_service import ShardService
from serving.sharding import ShardAssignment

SETTINGS = Settings(worker_port=0)
VERSIONS = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")
OURS = ("eddyline.retrieval.v1.Retrieval", "grpc.health.v1.Health")


class Database(ProtoReflectionDescriptorDatabase):
    """The client of grpcio-reflection, for either version of the service."""

    def __init__(self, channel: grpc.Channel, version: str) -> None:
        super().__init__(channel)
        call = channel.stream_stream(
            f"/{version}/ServerReflectionInfo",
            reflection_pb2.ServerReflectionRequest.SerializeToString,
            reflection_pb2.ServerReflectionResponse.FromString,
        )
        self._stub = type("Stub", (), {"ServerReflectionInfo": staticmethod(call)})


@pytest.fixture
def channel() -> Iterator[grpc.Channel]:
    assignment = ShardAssignment(1, 2)
    server = WorkerServer(SETTINGS, RetrievalService(SETTINGS), ShardService(assignment, 10))
    with open_channel(server.address) as opened:
        yield opened
    server.stop(0)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_call_is_built_from_reflection_alone(channel: grpc.Channel, version: str) -> None:
    """As grpcurl and ghz do: list, resolve the symbol, build the message, call."""
    database = Database(channel, version)
    services = set(database.get_services())
    assert {*VERSIONS, *OURS, "eddyline.shard.v1.Shard"} == services
    pool = descriptor_pool.DescriptorPool(database)
    for name in services:
        assert pool.FindServiceByName(name).methods, name
    method = pool.FindServiceByName(OURS[0]).FindMethodByName("Stats")
    request = message_factory.GetMessageClass(method.input_type)
    response = message_factory.GetMessageClass(method.output_type)
    call = channel.unary_unary(f"/{OURS[0]}/Stats", request.SerializeToString, response.FromString)
    stats: Any = call(request(), timeout=5)
    assert not stats.ready and list(stats.missing) == ["worker: waits for its start"]


@pytest.mark.parametrize("version", VERSIONS)
def test_an_unknown_symbol_is_an_answer(channel: grpc.Channel, version: str) -> None:
    call = Database(channel, version)._stub.ServerReflectionInfo
    question = reflection_pb2.ServerReflectionRequest(file_containing_symbol="eddyline.Nothing")
    [answer] = call(iter([question]), timeout=5)
    assert answer.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


def test_the_file_of_v1_has_the_names_of_v1(channel: grpc.Channel) -> None:
    pool = descriptor_pool.DescriptorPool(Database(channel, VERSIONS[0]))
    service = pool.FindServiceByName(VERSIONS[0])
    assert service.file.name == "grpc/reflection/v1/reflection.proto"
    [method] = service.methods
    assert method.input_type.full_name == "grpc.reflection.v1.ServerReflectionRequest"
    assert method.output_type.fields_by_name["error_response"].message_type.full_name == (
        "grpc.reflection.v1.ErrorResponse"
    )
