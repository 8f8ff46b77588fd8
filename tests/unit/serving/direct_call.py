"""A call of `Retrieve` without a connection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

from serving.proto import retrieval_pb2 as pb
from serving.rpc.retrieval_service import RetrievalService


class DirectCall:
    """What a servicer needs of gRPC's context."""

    code: grpc.StatusCode = grpc.StatusCode.OK
    details = ""

    def time_remaining(self) -> None:
        return None

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details

    def add_callback(self, callback: Callable[[], None]) -> bool:
        return True


def retrieve(service: RetrievalService, user_id: str, k: int, **more: Any) -> pb.RetrieveResponse:
    """The response. more: fields of the request. Raises RuntimeError with the status code."""
    call, sent = DirectCall(), list[Any]()
    service.answer(pb.RetrieveRequest(user_id=user_id, k=k, **more), call, sent.append)
    if call.code is not grpc.StatusCode.OK:
        raise RuntimeError(f"{call.code}: {call.details}")
    [response] = sent
    return response  # type: ignore[no-any-return]
