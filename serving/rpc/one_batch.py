"""Ends a call with its response in one batch: message and status together.

gRPC lets a handler return before its call is answered only as a stream of responses. A stream's
message is a batch of its own, which the sending thread waits for, and the status is another: two
more hand-overs between threads than a call with one response needs. So message and status are sent
as gRPC does for such a call, by a private function. A gRPC without it sends two batches.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import grpc
from grpc import _server

_PARAMETERS = ["rpc_event", "state", "serialized_response"]


def _found() -> Callable[[Any, Any, bytes], None] | None:
    """gRPC's function, if it is the one that this file knows."""
    status = getattr(_server, "_status", None)
    if status is None or [*inspect.signature(status).parameters] != _PARAMETERS:
        return None
    return status  # type: ignore[no-any-return]


STATUS = _found()


def ending(
    context: grpc.ServicerContext, send: Callable[[Any], None]
) -> Callable[[Any | None], None]:
    """A function that ends the call: with the message that it gets, or with the context's status.

    send: of gRPC: sends a message, and ends the call when it gets None
    Thread rule: any thread, once.
    """
    event, state = getattr(context, "_rpc_event", None), getattr(context, "_state", None)

    def end(response: Any | None) -> None:
        if response is None:
            send(None)
        elif STATUS is None or event is None or state is None:
            send(response)
            send(None)
        else:
            STATUS(event, state, response.SerializeToString())

    return end
