"""Server reflection under both of its names: v1alpha, and v1, which clients try first.

grpcio-reflection has v1alpha alone. The messages of v1 are the same on the wire.
"""

from __future__ import annotations

from collections.abc import Iterable

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha import reflection, reflection_pb2

from serving.rpc import call_pools

_ALPHA: str = reflection.SERVICE_NAME
_ALPHA_PACKAGE, _PACKAGE = "grpc.reflection.v1alpha", "grpc.reflection.v1"
V1_NAME = _ALPHA.replace(_ALPHA_PACKAGE, _PACKAGE)
SERVICE_NAMES = (V1_NAME, _ALPHA)


def add_to_server(names: Iterable[str], server: grpc.Server) -> None:
    """Describe these services, and reflection itself, to callers of either version."""
    names = [*names, *SERVICE_NAMES]
    servicer = call_pools.BoundedReflection(names, _pool_of(names))
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        [
            grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": handler})
            for name in SERVICE_NAMES
        ]
    )


def _pool_of(names: Iterable[str]) -> DescriptorPool:
    """The files of these services, and the file of v1, which grpcio-reflection lacks."""
    pool, added = descriptor_pool.DescriptorPool(), set[str]()

    def add(file: FileDescriptor) -> None:
        if file.name not in added:
            added.add(file.name)
            for dependency in file.dependencies:
                add(dependency)
            pool.AddSerializedFile(file.serialized_pb)

    for name in names:
        if name != V1_NAME:
            add(descriptor_pool.Default().FindFileContainingSymbol(name))
    pool.AddSerializedFile(_v1_file().SerializeToString())
    return pool


def _v1_file() -> descriptor_pb2.FileDescriptorProto:
    """The file of v1alpha under the names of v1."""
    file = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(file)
    file.name, file.package = "grpc/reflection/v1/reflection.proto", _PACKAGE
    old, new = f".{_ALPHA_PACKAGE}.", f".{_PACKAGE}."
    for message in file.message_type:
        for field in message.field:
            if field.type_name:  # a message, not a number or text
                field.type_name = field.type_name.replace(old, new)
    for service in file.service:
        for method in service.method:
            method.input_type = method.input_type.replace(old, new)
            method.output_type = method.output_type.replace(old, new)
    return file
