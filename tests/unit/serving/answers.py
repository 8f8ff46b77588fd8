"""What tests of answers look at."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from serving.proto import retrieval_pb2 as pb
from serving.rpc.client import CallFailed


def ids(answer: pb.RetrieveResponse) -> list[str]:
    return [item.item_id for item in answer.items]


def fails(call: Callable[[], object]) -> str:
    """`CODE: detail` of the call's error."""
    with pytest.raises(CallFailed) as failed:
        call()
    return f"{failed.value.code}: {failed.value.detail}"
